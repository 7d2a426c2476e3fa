"""What an engine has finished, kept while its stage goes on, so that no kill makes it generate the same text twice.

A folder of small Parquet files. A replica adds one every few seconds, with what it finished since the last, by key: a hash of
the chat and the seed. Model and sampling are those of the stage, whose folder this is. A replica reads what is there when it
starts: after the driver was killed, and after it was killed itself and Ray started it again.

Beside them lies what each replica has in flight. What lies there when it starts may have killed it: those rows go apart from
the others, in ever smaller groups, until one that kills its engine is alone with it, and is given up. A node that went killed
it then, and no row.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from undo_ray.place import Place, plain_rows
from undo_ray.types import GENERATION, Message, Row, UserError

T = TypeVar("T")

READERS = 32
"""Files read at a time."""

FLUSH = 2.0
"""Seconds that a finished generation waits at most for the next file, while others still finish."""

SPLIT = 8
"""Into how many groups rows go that were in flight when their engine died."""

DEATHS = 24
"""Of a replica's engine in one stage, after which the stage ends: then it is not a row that kills it."""

STARTS = 2
"""Times in a row that a replica tries to start its engine."""

SHARED = 5_000
"""Generations in a file of the cache. Arrow cannot read 2 GiB of text at once out of such a column."""

LINES = pa.schema([("key", pa.binary(16)), ("generation", GENERATION), ("reused", pa.bool_())])
"""`reused`: found in the cache, not made by this stage."""


def key(chat: Sequence[Message], seed: int) -> bytes:
    """16 bytes that stand for a chat and a seed."""
    return hashlib.blake2b(json.dumps([seed, list(chat)], sort_keys=True).encode(), digest_size=16).digest()


def finished(place: Place, damaged: Callable[[Place], None] | None = None) -> int:
    """Generations in a journal. `damaged` is called with each file that is no whole Parquet file; without it that raises."""
    count, files = 0, _files(place / "done", ".parquet")
    for file, rows in zip(files, _read(_rows, files), strict=True):
        if isinstance(rows, pa.ArrowInvalid):
            if damaged is None:
                raise rows
            damaged(file)
        else:
            count += rows
    return count


def _rows(file: Place) -> int | pa.ArrowInvalid:
    """How many rows a file has, or why that cannot be told."""
    try:
        return int(pq.read_metadata(file.path, filesystem=file.fs).num_rows)
    except pa.ArrowInvalid as error:
        return error


def interrupted(place: Place) -> int:
    """Generations that were in flight when a replica or its driver was killed, and are not finished since."""
    folders = sorted((place / "flight").names())
    files = [file for replica in folders for file in _files(place / f"flight/{replica}", ".json")]
    begun = {key for file in files for key in json.loads(file.read_bytes())["keys"]}
    return len(begun - {line["key"].hex() for line in lines(place)}) if begun else 0


def lines(place: Place) -> Iterator[Row]:
    """{key, generation, reused} of each of them."""
    return shared(place / "done")


def shared(cache: Place) -> Iterator[Row]:
    """The same of a cache."""

    def rows(file: Place) -> list[Row]:
        return plain_rows(pq.read_table(file.path, filesystem=file.fs, use_threads=False), file.uri)

    for found in _read(rows, _files(cache, ".parquet")):
        yield from found


def share(place: Place, cache: Place) -> list[Row]:
    """Put what a stage made into a cache, a folder of Parquet files; returns what it had from there."""
    known = list(lines(place))
    made = [line for line in known if not line["reused"]]
    for start in range(0, len(made), SHARED):
        _write(cache / f"{uuid.uuid4().hex}.parquet", made[start : start + SHARED])
    return [line["generation"] for line in known if line["reused"]]


def starts(place: Place) -> list[Row]:
    """{pool, replica, seconds, ready, interrupted} of each start of a replica: how long it took, when it was done (Unix time),
    and how many generations were in flight when it died before."""
    return [json.loads(file.read_bytes()) for file in _files(place / "starts", ".json")]


def replicas(begun: Sequence[Row]) -> int:
    """How many replicas one pool had at most, by what `starts` gave: a stage may have had several pools, one after another."""
    pools = Counter(pool for pool, _ in {(start["pool"], start["replica"]) for start in begun})
    return max(pools.values(), default=0)


def busy(place: Place) -> float:
    """Seconds in which the engines had rows to work on, of all replicas together."""
    return sum(json.loads(file.read_bytes())["seconds"] for file in _files(place / "busy", ".json"))


def _read(read: Callable[[Place], T], files: Sequence[Place]) -> Iterator[T]:
    """What `read` gives of each file, in order. A long stage leaves tens of thousands, each a request or two of a store."""
    with ThreadPoolExecutor(READERS) as threads:
        yield from threads.map(read, files)


def _files(folder: Place, ending: str) -> list[Place]:
    """The whole files of a folder, in the order of their names; what a kill cut off has another ending."""
    return [folder / name for name in sorted(folder.names()) if name.endswith(ending)]


class Journal:
    """One replica's view of a stage's journal; safe to use from several threads.

    `replica`: a name that stays the same when Ray starts the replica again. `cache`: what other stages shared, all of it read
    into this process. `node`: where the replica is, `alive`: the nodes there are; None where no node goes. Raises UserError
    when its engine died too often.
    """

    def __init__(
        self, place: Place, replica: str, cache: Place | None = None, node: str = "", alive: Collection[str] | None = None
    ):
        self._place, self._done, self._flight = place, (place / "done").made(), (place / "flight" / replica).made()
        self._lock, self._new, self._flushed = threading.Lock(), list[Row](), time.monotonic()
        self._known = {line["key"]: line["generation"] for line in lines(place)}
        self._cached = {line["key"]: line["generation"] for line in (shared(cache) if cache else ())}
        deaths = [json.loads(file.read_bytes()) for file in _files(place / f"flight/{replica}", ".json")]
        newest = [death["keys"] for death in deaths if death["life"] == deaths[-1]["life"]]
        self._interrupted = len({bytes.fromhex(key) for keys in newest for key in keys} - self._known.keys())
        deaths = [death for death in deaths if alive is None or set(death["nodes"]) <= set(alive)]
        self._deaths = Counter(bytes.fromhex(key) for death in deaths for key in death["keys"])
        self._suspects = {bytes.fromhex(key): len(death["keys"]) for death in deaths for key in death["keys"]}  # newest last
        self._replica, self._node, self._nodes = replica, node, [node]
        self._starting, self._tried = place / "starting" / f"{replica}.json", place / "failed" / f"{replica}.json"
        self._begun: list[str] = json.loads(self._tried.read_bytes())["errors"] if self._tried.exists() else []
        self._busy_file, self._at_work, self._busy, self._since = place / "busy" / f"{uuid.uuid4().hex}.json", 0, 0.0, 0.0
        # Each life left as many files as it had batches in flight. It counts where one of its rows was not answered since, nor
        # found to be what killed it.
        self._open, self._alone = self._suspects.keys() - self._known.keys(), threading.Lock()
        open_keys = {one for one in self._open if not self._guilty(one)}
        lives = len({death["life"] for death in deaths if any(bytes.fromhex(key) in open_keys for key in death["keys"])})
        self._life = uuid.uuid4().hex[:8]
        if lives > DEATHS:
            reason = deaths[-1].get("error", "a kill")
            raise UserError(
                f"the engine died {lives} times, whatever it was given, the last time of {reason}; "
                "lower engine.batch_size or the memory knobs in engine.kwargs (placement keys: the same run goes on)",
                exit_code=5,
            )

    def starting(self, name: str) -> None:
        """Note that the engine is being started. Its process may have been killed at that before, on a node that is still
        there: that is a try that failed, see `failed`."""
        if self._starting.exists() and json.loads(self._starting.read_bytes())["node"] == self._node:
            self.failed(RuntimeError("its process was killed while it started, as systems do where memory is short"), name)
        self._starting.write_json({"node": self._node})

    def failed(self, error: Exception, name: str) -> None:
        """Note that the engine did not start. Raises UserError when that was its last try in a row."""
        named = str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"
        self._begun.append(" ".join(named.split())[:500])
        self._tried.write_json({"errors": self._begun})
        self._starting.remove()
        if len(self._begun) >= STARTS:
            raise UserError(
                f"the {name}'s engine did not start, {STARTS} times: {self._begun[-1]}; where memory is short, lower "
                "engine.context, or engine.kwargs.gpu_memory_utilization, max_num_seqs and max_num_batched_tokens, or raise "
                "engine.tensor_parallel and resources; where time is, raise engine.start_seconds",
                exit_code=5,
            ) from error

    def started(self, seconds: float, pool: str, elsewhere: Collection[str] = ()) -> None:
        """Note that the replica is up. `pool`: a name that no other pool has, `elsewhere`: nodes of its engine that are not
        its own."""
        self._tried.remove()
        self._starting.remove()
        self._nodes = [self._node, *elsewhere]
        who = {"pool": pool, "replica": self._replica}
        known = {**who, "seconds": seconds, "ready": time.time(), "interrupted": self._interrupted}
        (self._place / "starts" / f"{uuid.uuid4().hex}.json").write_json(known)

    @property
    def turn(self) -> AbstractContextManager[Any]:
        """To be held while the engine works: while rows are suspected it goes to one caller at a time, so that the engine's
        next death tells which of them it was."""
        return self._alone if self._open else nullcontext()

    def take(self, key: bytes) -> Row | None:
        """The generation of this key if an earlier life finished it, or another stage."""
        with self._lock:
            found = self._known.pop(key, None)
            if found is None and (found := self._cached.get(key)) is not None:
                self._new.append({"key": key, "generation": found, "reused": True})
            if found is not None:
                self._open.discard(key)
            return found

    def killed(self, key: bytes) -> bool:
        """Whether its engine died twice of this row, the last time with nothing else in it."""
        if guilty := self._guilty(key):
            self._open.discard(key)
        return guilty

    def _guilty(self, key: bytes) -> bool:
        return self._suspects.get(key) == 1 and self._deaths[key] > 1

    def groups(self, keys: Sequence[bytes]) -> list[list[int]]:
        """Indices of the keys that may be in the engine together: one group, and smaller ones of what was there at a death."""
        groups: dict[int, list[int]] = {}
        for index, one in enumerate(keys):
            groups.setdefault(self._suspects.get(one, 0), []).append(index)
        found = [groups.pop(0)] if 0 in groups else []
        for size, indices in sorted(groups.items()):
            step = max(1, size // SPLIT)
            found += [indices[start : start + step] for start in range(0, len(indices), step)]
        return found

    @contextmanager
    def flight(self, keys: Sequence[bytes]) -> Iterator[None]:
        """While the block runs, these rows are what the engine works on. An error in it is a death, and is noted as one."""
        file = self._flight / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.json"
        known = {"keys": [key.hex() for key in keys], "life": self._life, "nodes": self._nodes}
        file.write_json(known)
        with self._lock:
            self._since = self._since if self._at_work else time.monotonic()
            self._at_work += 1
        try:
            yield
        except Exception as error:
            file.write_json({**known, "error": f"{type(error).__name__}: {error}"[:1000]})
            raise
        finally:
            with self._lock:
                self._at_work -= 1
                if not self._at_work:
                    self._busy += time.monotonic() - self._since
                    self._busy_file.write_json({"seconds": self._busy})
        file.remove()

    def add(self, key: bytes, generation: Row) -> None:
        """Keep a finished generation; it is on disk when another comes `FLUSH` seconds later, or at `flush`. One that failed
        is not kept: the next start asks for it again."""
        with self._lock:
            self._open.discard(key)
            if generation["engine_error"] is not None:
                return
            self._new.append({"key": key, "generation": generation, "reused": False})
            if time.monotonic() - self._flushed < FLUSH:
                return
        self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet."""
        with self._lock:
            new, self._new, self._flushed = self._new, [], time.monotonic()
        if new:
            _write(self._done / f"{uuid.uuid4().hex}.parquet", new)


def _write(file: Place, lines: list[Row]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(lines, schema=LINES), sink)
    file.write_bytes(sink.getvalue().to_pybytes())
