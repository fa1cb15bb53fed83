"""Files that appear whole or not at all, on a local disk or any file system that pyarrow knows by URI.

On a local disk a file is written under a temporary name ending in `.tmp`, flushed, and renamed. An object
store shows an object only once it is complete, so there it is written under its own name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from gradscale.errors import GradscaleError


@dataclass(frozen=True)
class Files:
    """The files below `root`, named by relative paths with forward slashes."""

    root: str

    def __post_init__(self) -> None:
        if "://" not in self.root:
            object.__setattr__(self, "root", os.path.abspath(os.path.expanduser(self.root)))

    @cached_property
    def _located(self) -> tuple[pafs.FileSystem, str]:
        try:
            system, path = pafs.FileSystem.from_uri(self.root)
        except (pa.ArrowInvalid, OSError) as error:
            raise GradscaleError(
                f"run directory must be a path or a URI that pyarrow can open, got {self.root}: {error}"
            ) from error
        return system, path

    @property
    def system(self) -> pafs.FileSystem:
        return self._located[0]

    def path(self, name: str) -> str:
        """The path of `name` within `system`."""
        return f"{self._located[1].rstrip('/')}/{name}".rstrip("/")

    def write(self, name: str, content: bytes | pa.Buffer) -> int:
        """Write the whole file; returns its size in bytes."""
        path = self.path(name)
        self.system.create_dir(path.rpartition("/")[0], recursive=True)
        if isinstance(self.system, pafs.LocalFileSystem):
            _write_local(path, content)
        else:
            with self.system.open_output_stream(path) as stream:
                stream.write(content)
        return len(content)

    def read(self, name: str) -> pa.Buffer:
        with self.system.open_input_file(self.path(name)) as file:
            return file.read_buffer()

    def exists(self, name: str = "") -> bool:
        return bool(self.system.get_file_info(self.path(name)).type != pafs.FileType.NotFound)

    def size(self, name: str) -> int:
        """In bytes, or -1 if there is no such file."""
        info = self.system.get_file_info(self.path(name))
        return int(info.size) if info.type == pafs.FileType.File else -1

    def list(self, folder: str = "") -> list[str]:
        """The names of all files below `folder`, sorted; empty if there is no such folder."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=True)
        prefix = len(self.path("")) + 1
        found = self.system.get_file_info(selector)
        return sorted(info.path[prefix:] for info in found if info.type == pafs.FileType.File)

    def delete(self, name: str) -> None:
        if self.exists(name):
            self.system.delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        """Delete the folder and all in it, if it is there."""
        if self.exists(name):
            self.system.delete_dir(self.path(name))

    def delete_leftovers(self) -> Iterator[str]:
        """Delete the temporary files that an interrupted run left behind, and name them."""
        for name in self.list():
            if name.endswith(".tmp"):
                self.delete(name)
                yield name


def _write_local(path: str, content: bytes | pa.Buffer) -> None:
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
