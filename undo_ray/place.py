"""A file or folder on a local path or URI: the only module that opens file systems. Knows nothing of runs."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from undo_ray.types import UserError


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

    def names(self) -> list[str]:
        """Names of the files and folders right below."""
        fs, path = filesystem(self.uri)
        return [info.base_name for info in fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))]

    def leaf(self, info: pafs.FileInfo) -> str:
        """Path of a file below this folder, relative to it."""
        return os.path.relpath(info.path, self.path)

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
