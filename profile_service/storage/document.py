"""A small document that is replaced whole or not at all, with a checksum over it: what the coordinator must not forget.

{"…": …, "checksum": "…"}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from profile_service.errors import DataLoss
from profile_service.storage.data_directory import checksum, read_file, write_atomically
from profile_service.storage.fs import FileSystem


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

    def write(self, fields: dict[str, Any]) -> None:
        """Returns when it is durable. Raises OSError, DiskFull among them; the one before is then kept."""
        content = json.dumps({**fields, "checksum": checksum(fields)}, indent=1)
        write_atomically(self._fs, self._path, content.encode() + b"\n")
