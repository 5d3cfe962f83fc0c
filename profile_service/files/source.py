"""Opens a file of events by what it holds, and says which file it is, so that an interrupted run can go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import xxhash

from profile_service.files.chunk import Chunk
from profile_service.files.errors import FileError
from profile_service.files.mapping import Attributes, Mapping, Wanted
from profile_service.files.ndjson import NdjsonFile
from profile_service.files.tables import CsvFile, ParquetFile

FORMATS = ("parquet", "csv", "ndjson")

_FORMAT_BY_SUFFIX = {
    ".parquet": "parquet", ".pq": "parquet",
    ".csv": "csv", ".tsv": "csv",
    ".ndjson": "ndjson", ".jsonl": "ndjson", ".json": "ndjson",
}  # fmt: skip
_COMPRESSED = (".gz", ".zst", ".bz2")
_READ_BYTES = 1 << 20


class EventFile(Protocol):
    """A file of events."""

    path: Path
    row_word: str
    """What a row is called in this kind of file."""

    def mapping(self, wanted: Wanted, attributes: Attributes) -> Mapping:
        """Which column is what; raises `FileError` that names what is missing."""

    def chunks(self, mapping: Mapping) -> Iterator[Chunk]:
        """The file from its beginning, the same chunks each time; raises `FileError` where it cannot be read on."""


def open_events(path: Path, format_name: str | None = None, delimiter: str | None = None) -> EventFile:
    """Opens `path`, in the format of its suffix unless another is named."""
    if not path.exists():
        raise FileError(f"{path}: no such file")
    if path.is_dir():
        raise FileError(f"{path}: is a directory; name the files in it")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    plain = [suffix for suffix in suffixes if suffix not in _COMPRESSED]
    suffix = plain[-1] if plain else ""
    found = format_name or _FORMAT_BY_SUFFIX.get(suffix)
    try:
        match found:
            case "parquet":
                return ParquetFile(path)
            case "csv":
                return CsvFile(path, delimiter or ("\t" if suffix == ".tsv" else ","))
            case "ndjson":
                return NdjsonFile(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    known = ", ".join(_FORMAT_BY_SUFFIX)
    raise FileError(f"{path}: the suffix says no known format ({known}); name one with --format {'|'.join(FORMATS)}")


def identity(path: Path, *circumstances: object) -> str:
    """A name that is equal for equal contents and circumstances. All of the file is read for it: a file that differs in
    one byte would else be taken for another one, which the service holds already."""
    digest = xxhash.xxh3_128(repr(circumstances).encode())
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def version_of(path: Path) -> tuple[int, int]:
    """Size, and time of the last change: other ones show that a file was changed."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
