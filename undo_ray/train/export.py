"""The trained student as a Hugging Face directory, and the proof that the directory is the model that was trained."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from undo_ray import models
from undo_ray.config import Engine

EXACT, ROUNDED = 1e-3, 0.05
"""Largest difference of log-probabilities on the probe in fp32 (identical weights give 0–1e-5); largest mean difference where
training or the export round to bfloat16, each token counting as much as it is likely: unlikely ones differ by more in a model
that is the same."""


def write(state: dict[str, Tensor], start: str, directory: str, trust: bool = False) -> None:
    """Save as `start` was saved: same architecture, type of weights, tokenizer, chat template and generation config, to which
    the end of a turn is added, with which every lesson ended.

    `state`: every parameter of the plain model, on the CPU. Shards of 4 GB, safetensors.
    """
    config = models.config(start, trust)
    dtype = config.dtype or torch.float32
    model = models.weights(start, trust, dtype=dtype)
    if config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name not in (model._tied_weights_keys or ())}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if name not in (model._tied_weights_keys or ())]
    if missing or unexpected:
        raise RuntimeError(
            f"the trained student lacks {missing[:3]} or has more than the model it started from: {unexpected[:3]}"
        )
    tokenizer = models.tokenizer(start, trust)
    if len(ends := models.ends(tokenizer, model.generation_config)) > 1:
        model.generation_config.eos_token_id = ends
    model.generation_config = _savable(model.generation_config)
    model.save_pretrained(directory, max_shard_size="4GB")  # S3 copies no object of more than 5
    tokenizer.save_pretrained(directory)


def _savable(config: Any) -> Any:
    """A generation config that transformers 5 saves. It loads some that it refuses there: sampling values without `do_sample`,
    which is then set, since they mean it; of others the tokens alone are kept."""
    from transformers import GenerationConfig

    sampling = copy.deepcopy(config)
    sampling.do_sample = True
    for found in (config, sampling):
        try:
            found.validate(strict=True)
            return found
        except ValueError:
            pass
    return GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)


def differs(directory: str, ids: list[int], trained: Tensor, exact: bool, trust: bool = False) -> str | None:
    """Load the directory as the next stage will and compare log-probabilities on `ids`; None when they agree.

    `trained`: (tokens, vocabulary), fp32, from the sharded model. `exact`: nothing rounded to half precision on the way.
    """
    model = models.weights(directory, trust, dtype=torch.float32).eval()
    with torch.inference_mode():
        loaded = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    apart = (trained.cpu() - loaded).abs()
    found, limit = (apart.max(), EXACT) if exact else ((loaded.exp() * apart).sum(-1).mean(), ROUNDED)
    if found <= limit:  # also false for NaN
        return None
    return f"transformers loads another model: log-probabilities on a lesson differ by {found:.2g} (limit {limit:g})"


def vllm_differs(model: Callable[[], str], engine: Engine, ids: list[int], trained: list[float], trust: bool) -> str | None:
    """The same through vLLM, run as a task where the student's engine runs: log-probability of each token of `ids[1:]`.

    `model()` gives the directory, on the task's node.
    """
    # Before vLLM is imported. In this process, and on CPUs with 1 GiB of cache and unbound threads, as undo_ray.engines has it.
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    variables["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # of tensor parallel: a Ray worker has threads, and must not be forked
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    import vllm

    room = max(len(ids) + 1, engine.context or 0)
    options: dict[str, Any] = {"enforce_eager": True, "max_model_len": room, "disable_log_stats": True}
    if not engine.resources.gpus:
        options |= {"distributed_executor_backend": "uni", "enable_chunked_prefill": False}
        options["max_num_batched_tokens"] = max(room, 8192)
    options |= {"load_format": "safetensors", **engine.kwargs, "trust_remote_code": trust}
    llm = vllm.LLM(model=model(), dtype=engine.dtype, tensor_parallel_size=engine.tensor_parallel, **options)
    [output] = llm.generate([{"prompt_token_ids": ids}], vllm.SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    loaded = [found[token].logprob for token, found in zip(ids[1:], (output.prompt_logprobs or [])[1:], strict=True)]
    apart = sum(abs(a - b) for a, b in zip(trained, loaded, strict=True)) / len(loaded)
    if apart <= ROUNDED:
        return None
    return (
        f"vLLM loads another model: log-probabilities of a lesson's tokens differ by {apart:.2g} on average (limit {ROUNDED})"
    )


def keeps_fp32(start: str, trust: bool = False) -> bool:
    """Whether the export holds its weights in fp32."""
    return models.config(start, trust).dtype in (None, torch.float32)
