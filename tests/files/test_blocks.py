"""A block of a file is the same block however the file is read, and whatever is refused or taken of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profile_service.files import ndjson, tables
from profile_service.files.blocks import cut_blocks
from profile_service.files.chunk import Chunk
from profile_service.files.encode import EncodedEvents
from profile_service.files.errors import FileError
from profile_service.files.mapping import Attributes, Wanted
from profile_service.files.source import open_events

ATTRIBUTES = Attributes(("color",), ("price",))


def event(row: int) -> bytes:
    return b"<%d>" % row


def chunk(rows: Sequence[int], done: float = 0.5) -> Chunk:
    encoded = [event(row) for row in rows]
    offsets = np.concatenate(([0], np.cumsum([len(each) for each in encoded], dtype=np.int64))).astype(np.int64)
    return Chunk(EncodedEvents(memoryview(b"".join(encoded)), offsets), np.array(rows, dtype=np.int64), len(rows), done)


@given(
    st.lists(st.integers(1, 200), unique=True, max_size=60).map(sorted),
    st.lists(st.integers(0, 60)),
    st.integers(1, 30),
)
def test_blocks_go_by_the_numbers_of_the_rows_alone(rows: list[int], cuts: list[int], size: int) -> None:
    places = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    blocks = list(cut_blocks((chunk(rows[a:b]) for a, b in itertools.pairwise(places)), size))
    assert [block.number for block in blocks] == list(range(1, len(blocks) + 1))
    assert len(blocks) == ((rows[-1] - 1) // size + 1 if rows else 0)
    for block in blocks:
        mine = [row for row in rows if (row - 1) // size + 1 == block.number]
        assert block.rows.tolist() == mine
        assert block.body() == b"".join(map(event, mine))
        assert block.size_bytes == len(block.body())
        parts = list(block.parts(7))
        assert b"".join(body for body, _ in parts) == block.body()
        assert [row for _, rows in parts for row in rows.tolist()] == mine
        assert all(len(body) <= 7 for body, _ in parts)


def test_a_block_is_given_as_soon_as_its_last_row_has_come() -> None:
    given_out: list[int] = []

    def chunks() -> Iterator[Chunk]:
        yield chunk([1, 2, 3, 4])
        assert given_out == [1, 2]
        yield chunk([5])
        raise FileError("damaged")

    def read() -> None:
        for block in cut_blocks(chunks(), 2):
            given_out.append(block.number)  # noqa: PERF401  as they come

    with pytest.raises(FileError):
        read()
    # Row 5 would be in another block once the file can be read: it is not given.
    assert given_out == [1, 2]


@pytest.mark.parametrize("kind", ["parquet", "csv", "ndjson"])
def test_blocks_do_not_depend_on_the_reader_or_on_the_columns_taken(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 5_000
    rows = [
        {
            "user_id": f"u{n}", "type": "view", "time": 1_780_000_000 + n, "color": "red" * (n % 5),
            "price": "much" if n % 7 == 0 else str(n),
        }
        for n in range(count)
    ]  # fmt: skip
    path = tmp_path / f"events.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=777)
    elif kind == "csv":
        lines = [",".join(str(value) for value in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]))
    else:
        path.write_text("".join(json.dumps(row) + ("\n\n" if n % 100 == 0 else "\n") for n, row in enumerate(rows)))

    def blocks(attributes: Attributes) -> list[set[int]]:
        file = open_events(path)
        return [set(block.rows.tolist()) for block in cut_blocks(file.chunks(file.mapping(Wanted(), attributes)), 300)]

    everything, some = blocks(Attributes((), ())), blocks(ATTRIBUTES)
    assert sum(map(len, everything)) == count
    assert sum(map(len, some)) == count - len(range(0, count, 7))
    for whole, part in zip(everything, some, strict=True):
        assert part <= whole
    monkeypatch.setattr(tables, "_ROWS_AT_ONCE", 100)
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 4_000)
    monkeypatch.setattr(ndjson, "_LINES_AT_ONCE", 77)
    assert blocks(Attributes((), ())) == everything
    assert blocks(ATTRIBUTES) == some
