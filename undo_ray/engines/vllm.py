"""vLLM as an engine: the synchronous `vllm.LLM` inside the replica's own process. The CPU build runs the same code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from undo_ray.config import Engine, Sampling
from undo_ray.engines import Completion

# The engine lives in the actor's own process: when Ray ends the actor, nothing is left holding its memory.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


class VLLM:
    """See `engines.Backend`. Draws are seeded per sample, whatever the batch."""

    def __init__(self, directory: str, engine: Engine, sampling: Sampling):
        from vllm import LLM, SamplingParams

        options: dict[str, Any] = {
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "max_model_len": engine.context,
            **({} if engine.resources.gpus else _cpu_options(engine.context)),
            **engine.kwargs,
        }
        self.llm = LLM(directory, dtype=engine.dtype, tensor_parallel_size=engine.tensor_parallel, **options)
        self.tokenizer = self.llm.get_tokenizer()
        self.context = self.llm.llm_engine.model_config.max_model_len
        self.params = partial(SamplingParams, temperature=sampling.temperature, top_p=sampling.top_p, detokenize=False)
        self.max_tokens, self.warm = sampling.max_tokens, False

    def complete(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion | str]:
        from vllm import TokensPrompt

        asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        if not self.warm and len(prompts) > 1:
            # Rows that start together on a cold cache all miss it: compute the shared prefix once, then let them flow.
            self.llm.generate(asked[:1], self.params(max_tokens=1), use_tqdm=False)
            self.warm = True
        params = [self.params(max_tokens=self.max_tokens, seed=seed) for seed in seeds]
        done = [(out.outputs[0], out.num_cached_tokens) for out in self.llm.generate(asked, params, use_tqdm=False)]
        return [Completion(list(best.token_ids), str(best.finish_reason), cached or 0) for best, cached in done]


def _cpu_options(context: int | None) -> dict[str, Any]:
    """What vLLM's CPU build needs inside an actor."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    # Engines that each bind their threads to the first cores would share them and leave the others idle.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return {
        "enforce_eager": True,  # compiling takes minutes, for a small model longer than the work
        "distributed_executor_backend": "uni",
        # A prompt prefilled in parts rewinds its seeded generator, which CPU generators cannot (vLLM 0.32, gpu_model_runner).
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(context or 0, 8192),
    }
