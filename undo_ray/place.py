"""A file or folder on a local path or URI: the only module that opens file systems. Knows nothing of runs."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from undo_ray.types import Row, UserError, unusable
from undo_ray.written import secret_in

Json = dict[str, Any]

CHUNK = 16 << 20
"""Bytes of one request when a file is copied."""

LARGEST_COPY = 5 << 30
"""Bytes of the largest object that S3 copies by itself."""


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """(pyarrow file system, path on it) of a local path or URI. Raises UserError for a scheme nothing can open, and for a URI
    that holds a secret, without repeating it: addresses are written to the run directory, to logs and reports."""
    if reason := secret_in(uri):
        raise UserError(f"an address of a file or folder {reason}")
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


def plain_rows(table: pa.Table | pa.RecordBatch, where: str) -> list[Row]:
    """The rows of a file, as `to_pylist` has them. Raises UserError where a column holds pickled objects.

    Ray Data registers such a column type with Arrow, which then unpickles the values of whatever file declares one.
    """
    if found := next((field.name for field in table.schema if _pickled(field.type)), None):
        raise UserError(f"{where}: column {found} holds pickled objects, which could run code; write plain values")
    rows: list[Row] = table.to_pylist()
    return rows


def _pickled(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return kind.extension_name == "ray.data.arrow_pickled_object" or _pickled(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _pickled(kind.value_type)
    return any(_pickled(kind.field(index).type) for index in range(kind.num_fields))


def cache() -> Path:
    """Where this machine keeps what it fetched or made: $UNDO_RAY_CACHE, else `~/.cache/undo_ray`."""
    return Path(os.environ.get("UNDO_RAY_CACHE") or Path.home() / ".cache" / "undo_ray")


def absolute(uri: str) -> Place:
    """The place of a URI or of a path as people give it, good in any process: workers have working directories of their own."""
    return Place(uri if "://" in uri else os.path.abspath(uri))


@dataclass(frozen=True)
class Place:
    """A file or folder on some file system; picklable, so that workers can write to it.

    Opened at first use, once for all places below: on an object store that is one client, not one a call.
    """

    uri: str
    _above: tuple[Place, str] | None = field(default=None, compare=False, repr=False)

    def __truediv__(self, name: str) -> Place:
        base, options = self._parted
        return Place(f"{base.rstrip('/')}/{name}{options}", (self, name))

    def beside(self, name: str) -> Place:
        """A file or folder in the folder this one is in."""
        base, options = self._parted
        return Place(f"{base.rstrip('/').rpartition('/')[0]}/{name}{options}")

    @property
    def _parted(self) -> tuple[str, str]:
        """The URI without its options, and these with their `?`; a local path may have one in a name."""
        base, query, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return base, query + options

    def __reduce__(self) -> tuple[type[Place], tuple[str]]:
        return Place, (self.uri,)

    @cached_property
    def _opened(self) -> tuple[pafs.FileSystem, str]:
        if self._above:
            folder, name = self._above
            return folder.fs, f"{folder.path.rstrip('/')}/{name}"
        return filesystem(self.uri)

    fs = property(lambda self: self._opened[0])
    path = property(lambda self: self._opened[1], doc="As `fs` takes it.")

    def exists(self) -> bool:
        return self.fs.get_file_info(self.path).type != pafs.FileType.NotFound

    def read_bytes(self) -> bytes:
        with self.fs.open_input_stream(self.path) as stream:
            return stream.read()

    def write_bytes(self, data: bytes) -> None:
        """Write whole or not at all as far as the store allows: objects appear when closed, local files by rename."""
        self.fs.create_dir(os.path.dirname(self.path), recursive=True)
        if isinstance(self.fs, pafs.LocalFileSystem):
            part = f"{self.path}.{uuid.uuid4().hex[:8]}.part"
            try:
                with open(part, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, self.path)
            except BaseException:  # on a full disk what is left of every try would be there for ever
                with suppress(OSError):
                    os.unlink(part)
                raise
        else:
            with self.fs.open_output_stream(self.path) as stream:
                stream.write(data)

    def write_json(self, value: Any) -> None:
        self.write_bytes(json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")

    def read_json(self, remedy: str, what: str = "a JSON object", valid: Callable[[Json], bool] = bool) -> Json:
        """A JSON object for which `valid` holds. Raises UserError (exit code 4) naming the file when it is not one."""
        try:
            found = json.loads(self.read_bytes())
        except ValueError:
            raise unusable(f"{self.uri}: not valid JSON; {remedy}") from None
        if not isinstance(found, dict) or not valid(found):
            raise unusable(f"{self.uri}: not {what}; {remedy}")
        return found

    def files(self) -> dict[str, pafs.FileInfo]:
        """Every file below by its path relative to this folder, in the order of these paths."""
        found = self.fs.get_file_info(pafs.FileSelector(self.path, recursive=True, allow_not_found=True))
        return dict(sorted((os.path.relpath(info.path, self.path), info) for info in found if info.is_file))

    def names(self) -> list[str]:
        """Names of the files and folders right below."""
        return [info.base_name for info in self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))]

    def made(self) -> Place:
        """This folder, made where there is none."""
        self.fs.create_dir(self.path, recursive=True)
        return self

    def remove(self) -> None:
        """Remove the file or folder; nothing happens where there is none."""
        kind = self.fs.get_file_info(self.path).type
        if kind == pafs.FileType.Directory:
            self.fs.delete_dir(self.path)
        elif kind == pafs.FileType.File:
            self.fs.delete_file(self.path)

    def move(self, to: Place) -> None:
        """Move the file or folder to another place on its file system, which must be free.

        File by file, the last name first: `manifest.json` is gone only when the tries below `try-…` are.
        """
        info = self.fs.get_file_info(self.path)
        files = self.files() if info.type == pafs.FileType.Directory else {"": info}
        for name, info in reversed(files.items()):
            there = f"{to.path}/{name}".rstrip("/")
            self.fs.create_dir(os.path.dirname(there), recursive=True)
            if not isinstance(self.fs, pafs.LocalFileSystem) and info.size > LARGEST_COPY:
                pafs.copy_files(info.path, there, source_filesystem=self.fs, destination_filesystem=self.fs, chunk_size=CHUNK)
            else:
                self.fs.move(info.path, there)
        self.remove()

    def upload(self, directory: str) -> None:
        """Copy a local directory here."""
        pafs.copy_files(directory, self.made().path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=self.fs)

    def download(self, directory: str, patterns: Sequence[str]) -> None:
        """Copy the files below whose names match one of the patterns, as a hub matches them, to a local directory.

        Raises UserError when a name leads out of this folder, as an object's may.
        """
        names = [name for name in self.files() if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if found := next((name for name in names if name.startswith("..")), None):
            raise UserError(f"{self.uri}: holds {found}, which would be written outside of the copy; take it away")

        def copy(name: str) -> None:
            here, there = pafs.LocalFileSystem(), os.path.join(directory, name)
            os.makedirs(os.path.dirname(there), exist_ok=True)
            pafs.copy_files((self / name).path, there, source_filesystem=self.fs, destination_filesystem=here, chunk_size=CHUNK)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(copy, names))
