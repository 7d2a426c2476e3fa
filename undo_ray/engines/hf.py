"""The embedded engine: batched `transformers` generation with the keys and values of a shared prompt prefix computed once.

Where all layers attend to all tokens. A sliding window counts padding as tokens, and a linear layer's state is no keys and
values: with one of these every prompt is computed whole.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from undo_ray import models
from undo_ray.config import Engine, Sampling
from undo_ray.engines import Completion

MIN_SHARED = 32
"""Prompt tokens from which a shared prefix is worth a forward pass of its own."""


class Transformers:
    """See `engines.Backend`. Sampling draws are seeded per batch: the same for the same batch."""

    def __init__(self, directory: str, engine: Engine, sampling: Sampling, trust: bool = False):
        torch.set_num_threads(max(1, int(engine.resources.cpus)))
        self.device = "cuda" if engine.resources.gpus else "cpu"
        self.engine, self.sampling, self.trust = engine, sampling, trust
        self.model: Any = None
        self.prefix_cache: DynamicCache | None = None
        self.directory = ""
        self.load(directory)

    def load(self, directory: str) -> bool:
        """See `engines.Backend`."""
        if directory == self.directory:
            return True
        self.model = self.prefix_cache = None  # before there is a second one
        self.prefix: list[int] = []
        self.tokenizer = models.tokenizer(directory, self.trust)
        model = models.weights(directory, self.trust, dtype=getattr(torch, self.engine.dtype))
        self.model = model.to(self.device).eval()
        self.context = self.engine.context or models.context(self.model.config) or sys.maxsize
        sampling = self.sampling
        self.ends = set(models.ends(self.tokenizer, self.model.generation_config))
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.ends)
        sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
        self.config = GenerationConfig(
            do_sample=bool(sampled),
            **sampled,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=sorted(self.ends),
            pad_token_id=self.pad,
        )
        self.model.generation_config = self.config  # else what its directory says fills in what is not set here
        self.shares, self.directory = True, directory
        return True

    def complete(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[tuple[int, Completion | str]]:
        """See `engines.Backend`. A batch that fails is halved until what breaks it (a row too long for the memory) is alone."""
        yield from enumerate(self._whole_or_halved(prompts, seeds))

    def _whole_or_halved(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion | str]:
        try:
            return self._complete(prompts, seeds)
        except (RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if self.device == "cuda":
                torch.cuda.synchronize()  # raises where the device is lost: it would fail on every row, and the process must go
            if len(prompts) == 1:
                return [f"{type(error).__name__}: {error}"[:1000]]
        half = len(prompts) // 2
        return self._whole_or_halved(prompts[:half], seeds[:half]) + self._whole_or_halved(prompts[half:], seeds[half:])

    @torch.inference_mode()
    def _complete(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion | str]:
        torch.manual_seed(hash(tuple(seeds)))
        shared = self._shared(prompts)
        # Layout: shared prefix, then padding, then each prompt's rest. Positions come from the attention mask, so the padding
        # in the middle changes nothing (where nothing is shared, it stands in front).
        width = max(len(prompt) for prompt in prompts)
        padding = [width - len(prompt) for prompt in prompts]
        ids = [p[:shared] + [self.pad] * gap + p[shared:] for p, gap in zip(prompts, padding, strict=True)]
        mask = [[1] * shared + [0] * gap + [1] * (width - shared - gap) for gap in padding]
        cache = None
        if shared:
            cache = copy.deepcopy(self.prefix_cache)
            assert cache is not None
            cache.batch_repeat_interleave(len(prompts))
        output = self.model.generate(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            past_key_values=cache,
            generation_config=self.config,
            stopping_criteria=[partial(self._stopped, width)] if self.sampling.stop else None,
        )
        return [self._completion(row, shared) for row in output[:, width:].tolist()]

    def _stopped(self, width: int, ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """Which rows have a stop string at the end of what follows their prompts. Those of `generate` itself fail on tokenizers
        of whole words (transformers 5.19)."""
        tail = ids[:, max(width, ids.shape[1] - max(map(len, self.sampling.stop)) - 4) :]  # a token is a character or more
        texts = self.tokenizer.batch_decode(tail, skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.sampling.stop) for text in texts], device=ids.device)

    def _completion(self, tokens: list[int], cached: int) -> Completion:
        end = next((index for index, token in enumerate(tokens) if token in self.ends), None)
        if self.sampling.stop:  # a row that one of them ended goes on with padding, which may be an end itself
            while tokens and tokens[-1] == self.pad:
                tokens = tokens[:-1]
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if any(stop in text for stop in self.sampling.stop):
                return Completion(tokens, "stop", cached)
        return Completion(tokens, "length", cached) if end is None else Completion(tokens[: end + 1], "stop", cached)

    def _shared(self, prompts: Sequence[list[int]]) -> int:
        """Length of the prefix all prompts share (0 when too short to pay), its keys and values ready in `prefix_cache`."""
        if not self.shares or len(prompts) == 1:
            return 0
        first, last = min(prompts), max(prompts)  # in sorted order: what these two share, all share
        length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        # The last token of each prompt must go through the model for its logits.
        length = min(length, min(map(len, prompts)) - 1)
        if length < MIN_SHARED:
            return 0
        if prompts[0][:length] == self.prefix:  # exactly: what is counted as cached must not depend on earlier batches
            return length
        # Before there is a second one, and lest a pass that fails leave the wrong one.
        self.prefix, self.prefix_cache = [], None
        ids = torch.tensor([prompts[0][:length]], device=self.device)
        # A model of states alone gives none.
        cache = getattr(self.model(input_ids=ids, use_cache=True, logits_to_keep=1), "past_key_values", None)
        self.shares = all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", (None,)))
        if not self.shares:
            return 0
        self.prefix_cache = cache
        self.prefix = prompts[0][:length]
        return length
