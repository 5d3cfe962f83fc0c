"""A stretch of a file as events ready to be sent, with what was refused of it; and rows by column made into one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from profile_service.files.columns import Refused, to_number, to_text, to_time
from profile_service.files.encode import Columns, EncodedEvents, Times, encode_events
from profile_service.files.mapping import Mapping

MOST_EVENT_BYTES = 1 << 20
"""A larger event would not fit into a message beside others; its row is refused here."""

NO_TIME = "must not be null (an event without a time can only count as of its arrival: --untimed)"


@dataclass(frozen=True)
class RefusedRow:
    """A row that was not sent."""

    row: int
    field: str
    reason: str


@dataclass(frozen=True)
class Chunk:
    """A stretch of a file."""

    events: EncodedEvents
    rows: NDArray[np.int64]
    """Row of the file, from 1, of each event."""
    read: int
    """Rows of the file that the chunk was made of."""
    done: float
    """How much of the file has been read after it, 0 to 1."""
    refused: list[RefusedRow] = field(default_factory=list)


def chunk_of_table(batch: pa.RecordBatch, mapping: Mapping, rows: NDArray[np.int64], done: float) -> Chunk:
    """The rows of `batch`, whose row numbers in the file are `rows`, as a chunk."""
    count = batch.num_rows
    refused = Refused(count)
    texts = {name: to_text(batch[column], column) for name, column in mapping.texts.items()}
    numbers = {
        name: to_number(batch[column], column, f"attributes.{name}", refused)
        for name, column in mapping.numbers.items()
    }
    columns = Columns(
        user_id=to_text(batch[mapping.user], mapping.user),
        type=_types(batch, mapping),
        time=_times(batch, mapping, refused),
        event_id=None if mapping.event_id is None else to_text(batch[mapping.event_id], mapping.event_id),
        texts=texts,
        numbers=numbers,
    )
    _refuse_large(columns, refused)
    if refused.reasons:
        columns = columns.take(refused.keep)
    gone = [RefusedRow(int(rows[row]), *why) for row, why in sorted(refused.reasons.items())]
    return Chunk(encode_events(columns), rows[refused.keep], count, done, gone)


def _types(batch: pa.RecordBatch, mapping: Mapping) -> pa.Array:
    if mapping.type is not None:
        return to_text(batch[mapping.type], mapping.type)
    return pa.repeat(pa.scalar((mapping.type_value or "").encode(), pa.large_binary()), batch.num_rows)


def _times(batch: pa.RecordBatch, mapping: Mapping, refused: Refused) -> Times:
    if mapping.time is None:
        nothing = np.zeros(batch.num_rows, dtype=np.int64)
        return Times(nothing, nothing, np.zeros(batch.num_rows, dtype=np.bool_))
    times = to_time(batch[mapping.time], mapping.time, refused)
    if not mapping.untimed:
        refused.add_where(~times.present, "time", NO_TIME)
    return times


def _refuse_large(columns: Columns, refused: Refused) -> None:
    texts = [columns.user_id, columns.type, *columns.texts.values()]
    if columns.event_id is not None:
        texts.append(columns.event_id)
    sizes = sum(pc.binary_length(text).fill_null(0).to_numpy(zero_copy_only=False) for text in texts)
    refused.add_where(np.asarray(sizes > MOST_EVENT_BYTES), "", f"must be at most {MOST_EVENT_BYTES} bytes in all")
