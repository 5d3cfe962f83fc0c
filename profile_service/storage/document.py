"""A small document that is replaced whole or not at all, with a checksum over it: what the coordinator must not forget.

{"…": …, "checksum": "…"}
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from profile_service.errors import DataLoss
from profile_service.storage.fs import FileSystem

NEW_SUFFIX = ".new"
"""Of a file that is written and not yet in place."""


class Document:
    """One document of a directory.

    Args:
        advice: what to do where it is damaged.
    """

    def __init__(self, fs: FileSystem, path: Path, advice: str) -> None:
        self._fs = fs
        self._path = path
        self._advice = advice

    def read(self) -> dict[str, Any] | None:
        """What was written last; None before the first time. Raises DataLoss where it is damaged."""
        if self._path.name not in self._fs.names(self._path.parent):
            return None
        try:
            fields: dict[str, Any] = json.loads(read_file(self._fs, self._path))
            found = fields.pop("checksum")
        except (ValueError, AttributeError, KeyError, TypeError):
            found = None
        if found is None or found != checksum(fields):
            raise DataLoss(f"{self._path} is damaged: {self._advice}")
        return fields

    def make_durable(self) -> None:
        """Returns when what there is cannot be lost any more, whatever became of the last write; takes no room."""
        if self._path.name in self._fs.names(self._path.parent):
            file = self._fs.open(self._path, writable=True)
            try:
                file.sync()
            finally:
                file.close()
            self._fs.sync_directory(self._path.parent)

    def write(self, fields: dict[str, Any]) -> None:
        """Returns when it is durable. Raises OSError, DiskFull among them; the one before is then kept."""
        content = json.dumps({**fields, "checksum": checksum(fields)}, indent=1)
        write_atomically(self._fs, self._path, content.encode() + b"\n")


def read_file(fs: FileSystem, path: Path) -> bytes:
    """A whole file."""
    file = fs.open(path)
    try:
        return file.read(0, file.size)
    finally:
        file.close()


def checksum(fields: dict[str, Any]) -> str:
    """Of a document's fields."""
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=8).hexdigest()


def write_atomically(fs: FileSystem, path: Path, content: bytes) -> None:
    """Puts a file in place, or in place of another, so that a crash leaves one of the two whole."""
    new = path.with_name(path.name + NEW_SUFFIX)
    if new.name in fs.names(path.parent):
        fs.remove(new)
    file = fs.create(new)
    try:
        file.write(0, [content])
        file.sync()
    finally:
        file.close()
    fs.rename(new, path)
    fs.sync_directory(path.parent)
