"""vLLM as an engine inside the replica's own process, stepped by a thread. The CPU build runs the same code."""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from undo_ray import models
from undo_ray.config import Engine, Sampling
from undo_ray.engines import Completion

# The engine lives in the actor's own process: when Ray ends the actor, nothing is left holding its memory.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


Sink = queue.SimpleQueue[Any]
"""Where a caller waits for (index, completion)."""


class VLLM:
    """See `engines.Backend`. Draws are seeded per sample, whatever the batch.

    One thread owns the engine and steps it while there is anything to do, for all callers: rows of the next batch fill the
    places that finished rows leave.
    """

    def __init__(self, directory: str, engine: Engine, sampling: Sampling, trust: bool = False):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.spec, self.trust, self.directory, self.shape = engine, trust, directory, _shape(directory, trust)
        final = RequestOutputKind.FINAL_ONLY
        draw: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "stop": list(sampling.stop)}
        self.max_tokens, self.warming = sampling.max_tokens, threading.Lock()
        self.waiting: queue.SimpleQueue[tuple[list[int], Any, Sink, int]] = queue.SimpleQueue()
        self.broken: BaseException | None = None
        self.llm = self._open()
        self.engine, self.tokenizer = self.llm.llm_engine, self.llm.get_tokenizer()
        self.context = self.engine.model_config.max_model_len
        end = models.turn_end(self.tokenizer)  # beside the ends that vLLM reads itself
        draw["stop_token_ids"] = None if end is None else [end]
        self.params = partial(SamplingParams, **draw, detokenize=bool(sampling.stop), output_kind=final)
        self.warm = False
        self.stepped = time.monotonic()
        threading.Thread(target=self._steps, daemon=True).start()

    def load(self, directory: str) -> bool:
        """See `engines.Backend`. Weights are exchanged in the running engine where vLLM does it rightly: its CPU build leaves
        the packed head of a model with tied embeddings as it was (vLLM 0.32), and quantised weights are packed as well."""
        shape = _shape(directory, self.trust)
        packed = "quantization_config" in shape or bool(self.spec.kwargs.get("quantization"))
        packed |= not self.spec.resources.gpus and bool(shape.get("tie_word_embeddings"))
        self.warm = False  # another stage: another prefix
        if directory != self.directory:
            if packed or shape != self.shape:
                return False
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})
            self.llm.reset_prefix_cache()
            self.directory = directory
        return True

    def _open(self) -> Any:
        from vllm import LLM

        options = {"enable_prefix_caching": True, **arguments(self.directory, self.spec), "trust_remote_code": self.trust}
        return LLM(**options)

    def complete(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[tuple[int, Completion | str]]:
        """See `engines.Backend`. Long prompts go first: they hold up the end of a batch least when they begin early."""
        with self.warming:
            if not self.warm and len(prompts) > 1:
                # Rows that start together on a cold cache all miss it: compute the shared prefix once, then let them flow.
                list(self._run([(0, prompts[0], self.params(max_tokens=1))]))
                self.warm = True
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        yield from self._run([(i, prompts[i], self.params(max_tokens=self.max_tokens, seed=seeds[i])) for i in order])

    def _run(self, jobs: Sequence[tuple[int, list[int], Any]]) -> Iterator[tuple[int, Completion | str]]:
        """Hand (index, prompt, params) to the engine's thread; (index, what came of it) as they finish."""
        sink: Sink = queue.SimpleQueue()
        self.stepped = time.monotonic()
        for index, prompt, params in jobs:
            self.waiting.put((prompt, params, sink, index))
        for _ in jobs:
            while True:
                try:
                    found = sink.get(timeout=min(1.0, self.spec.stall_seconds))
                    break
                except queue.Empty:
                    if self.broken is not None:
                        raise self.broken from None
                    if (still := time.monotonic() - self.stepped) > self.spec.stall_seconds:
                        raise RuntimeError(f"the engine made no step in {still:.0f} s (engine.stall_seconds)") from None
            yield found

    def _steps(self) -> None:
        """The thread that owns the engine: take what waits, step, hand out what finished. An error ends it; callers
        find it in `broken`, whether their rows were in the engine or waited for it."""
        running: dict[str, tuple[Sink, int]] = {}
        count = itertools.count()
        try:
            while True:
                while not running or not self.waiting.empty():  # with nothing to do it waits here
                    prompt, params, sink, index = self.waiting.get()
                    name = str(next(count))
                    try:
                        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
                    except ValueError as error:  # this prompt, not the engine
                        sink.put((index, f"{type(error).__name__}: {error}"[:1000]))
                    else:
                        running[name] = (sink, index)
                for output in self.engine.step():
                    sink, index = running.pop(output.request_id)
                    best = output.outputs[0]
                    done = Completion(list(best.token_ids), str(best.finish_reason), output.num_cached_tokens or 0)
                    sink.put((index, done))
                self.stepped = time.monotonic()
        except BaseException as error:
            self.broken = error
            raise


def _shape(directory: str, trust: bool) -> dict[str, Any]:
    """What of a model's configuration an engine is built for."""
    known: dict[str, Any] = models.config(directory, trust).to_dict()
    return {key: value for key, value in known.items() if key not in ("_name_or_path", "transformers_version")}


def arguments(directory: str, engine: Engine) -> dict[str, Any]:
    """What vLLM is told of an engine, by the names of its arguments; `engine.kwargs` last."""
    return {
        "model": directory,
        "dtype": engine.dtype,
        "max_model_len": engine.context,
        "tensor_parallel_size": engine.tensor_parallel,
        "pipeline_parallel_size": engine.pipeline_parallel,
        "max_num_seqs": engine.sequences,
        **({"distributed_executor_backend": "ray"} if engine.nodes > 1 else {}),  # its workers go where `kept` placed them
        "load_format": "safetensors",
        "disable_log_stats": True,
        **({} if engine.resources.gpus else _cpu_options(engine.context)),
        **engine.kwargs,
    }


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
