"""Parquet and CSV files, read a stretch at a time: memory does not grow with the file.

CSV has a header line and texts only; an empty field is null. A row with too few or too many fields is refused, and
nothing else of its file is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from profile_service.files.chunk import Chunk, RefusedRow, chunk_of_table
from profile_service.files.encode import EncodedEvents
from profile_service.files.errors import FileError
from profile_service.files.mapping import Attributes, Mapping, Wanted, resolve

_ROWS_AT_ONCE = 32_768
_BLOCK_BYTES = 4 << 20
_READ_AHEAD_BYTES = 1 << 20


class ParquetFile:
    """Rows of a Parquet file; `row` counts from 1."""

    row_word = "row"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path, buffer_size=_READ_AHEAD_BYTES, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise FileError(f"{path}: is not a whole Parquet file: {_first_line(error)}") from error
        self._columns = list(self._file.schema_arrow.names)

    def mapping(self, wanted: Wanted, attributes: Attributes) -> Mapping:
        """Which column is what."""
        return resolve(str(self.path), self._columns, wanted, attributes)

    def chunks(self, mapping: Mapping) -> Iterator[Chunk]:
        """The rows in order; raises `FileError` where the file is damaged."""
        total, read = self._file.metadata.num_rows, 0
        try:
            for batch in self._file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=mapping.columns):
                rows = np.arange(read + 1, read + 1 + batch.num_rows, dtype=np.int64)
                read += batch.num_rows
                yield chunk_of_table(batch, mapping, rows, read / total)
        except (pa.ArrowException, OSError) as error:
            raise FileError(f"{self.path}: is damaged after row {read}: {_first_line(error)}") from error


class CsvFile:
    """Rows of a CSV file; `row` counts from 1, the header not counted."""

    row_word = "row"

    def __init__(self, path: Path, delimiter: str) -> None:
        self.path = path
        self._delimiter = delimiter
        self._size = max(path.stat().st_size, 1)
        self._bad_rows: list[tuple[int, int, int]] = []  # row, fields, fields wanted; of those not yet told
        with open_stream(path) as (stream, _):
            columns = list(self._open(stream, None).schema.names)
        twice = sorted({column for column in columns if columns.count(column) > 1})
        if twice:
            raise FileError(f"{path}: the header names {', '.join(twice)} more than once")
        self._columns = columns

    def mapping(self, wanted: Wanted, attributes: Attributes) -> Mapping:
        """Which column is what."""
        return resolve(str(self.path), self._columns, wanted, attributes)

    def chunks(self, mapping: Mapping) -> Iterator[Chunk]:
        """The rows in order; raises `FileError` where the file cannot be read on."""
        good = passed = 0
        self._bad_rows.clear()
        with open_stream(self.path) as (stream, raw):
            reader = self._open(stream, mapping.columns)
            while True:
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    break
                except (pa.ArrowException, OSError) as error:
                    row = passed + good
                    raise FileError(f"{self.path}: cannot be read after row {row}: {_first_line(error)}") from error
                whole = np.arange(good + 1, good + 1 + batch.num_rows, dtype=np.int64)
                good += batch.num_rows
                before = [number - 1 - passed - place for place, (number, _, _) in enumerate(self._bad_rows)]
                rows = whole + passed + np.searchsorted(before, whole)
                chunk = chunk_of_table(batch, mapping, rows, min(raw.tell() / self._size, 1.0))
                behind = int(np.searchsorted(before, good, side="right"))
                chunk.refused.extend(self._wrong_width(behind))
                passed += behind
                yield replace(chunk, read=chunk.read + behind)
        rest = self._wrong_width(len(self._bad_rows))
        if rest:
            nothing = EncodedEvents(memoryview(b""), np.zeros(1, dtype=np.int64))
            yield Chunk(nothing, np.zeros(0, dtype=np.int64), len(rest), 1.0, rest)

    def _open(self, stream: Any, columns: list[str] | None) -> Any:
        """A reader; with `columns`, one that gives these alone, as bytes."""
        texts = dict.fromkeys(columns or (), pa.binary())
        try:
            return pa.csv.open_csv(
                stream,
                read_options=pa.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
                parse_options=pa.csv.ParseOptions(
                    delimiter=self._delimiter, newlines_in_values=True, invalid_row_handler=self._note_bad_row
                ),
                convert_options=pa.csv.ConvertOptions(
                    column_types=texts,
                    include_columns=columns or [],
                    strings_can_be_null=True,
                    null_values=[""],
                    check_utf8=False,
                ),
            )
        except (pa.ArrowException, OSError) as error:
            raise FileError(f"{self.path}: cannot be read as CSV: {_first_line(error)}") from error

    def _note_bad_row(self, row: Any) -> str:
        number = row.number if row.number is not None else 0
        self._bad_rows.append((number - 1, row.actual_columns, row.expected_columns))
        return "skip"

    def _wrong_width(self, count: int) -> list[RefusedRow]:
        """Forgets the first `count` rows of a wrong width, and tells of them."""
        rows, self._bad_rows[:count] = self._bad_rows[:count], []
        return [RefusedRow(row, "", f"must have {expected} fields, has {actual}") for row, actual, expected in rows]


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[Any, Any]]:
    """Opens a file, decompressed by its suffix: its bytes, and the file itself, whose position shows progress."""
    try:
        raw = pa.OSFile(str(path), "rb")
        codec = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}.get(path.suffix.lower())
        stream = raw if codec is None else pa.CompressedInputStream(raw, codec)
    except (pa.ArrowException, OSError) as error:
        raise FileError(f"{path}: cannot be opened: {_first_line(error)}") from error
    try:
        yield stream, raw
    finally:
        stream.close()
        raw.close()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
