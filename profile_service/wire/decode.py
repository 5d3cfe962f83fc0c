"""Logged or received events into the columns that `domain` applies, straight from their bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from profile_service.config import Limits
from profile_service.domain.columns import EventColumns
from profile_service.domain.hashing import xxh64
from profile_service.domain.kernel import kernel, leaf_kernel, to_i64
from profile_service.errors import InvalidArgument
from profile_service.wire.event import VALID, event_time_ns, explain_event, read_event
from profile_service.wire.frame import COUNT, as_buffer, check_frame, next_event
from profile_service.wire.plan import WirePlan
from profile_service.wire.reasons import describe
from profile_service.wire.work import (
    HAS_TIME,
    ID_LENGTH,
    ID_OFFSET,
    STACKS,
    TYPE_INDEX,
    USER_LENGTH,
    USER_OFFSET,
    limit_slots,
    make_work,
)

_SMALLEST_CAPACITY = 64
_BLOCK_EVENTS = 64
"""Events whose bytes stay in a processor's nearest cache until their texts are hashed."""


def decode_events(
    events: bytes | bytearray | memoryview,
    plan: WirePlan,
    arrival_time_ns: int,
    columns: EventColumns | None = None,
    *,
    limits: Limits | None = None,
    count: int | None = None,
) -> EventColumns:
    """Decodes an IngestEventsRequest that holds only events. An event without a time gets `arrival_time_ns`. Whoever
    knows their `count` spares a look through the whole message for it.

    `columns` of a call before are filled again, and returned, where they are large enough. With `limits` an event must
    obey them, and may not be further ahead of its arrival than they allow; without, any size and any time goes, as in
    a replay.

    Raises InvalidArgument where the bytes are not events alone, or not `count` of them, or an event is not valid;
    `columns` are then worth nothing.
    """
    buffer = as_buffer(events)
    if count is None:
        count = _count_events(buffer)
    columns = _fitting(columns, plan, buffer, count)
    return _fill(
        buffer, plan, np.array([arrival_time_ns]), np.array([count]), limit_slots(limits, arrival_time_ns), columns
    )


def decode_batches(
    batches: Sequence[bytes | memoryview], counts: Sequence[int], plan: WirePlan, arrival_times_ns: Sequence[int]
) -> EventColumns:
    """Decodes batches as `decode_events` does, each with its number of events and its time of arrival, into one set of
    columns: what many small ones cost beside their events is paid once.

    Raises InvalidArgument as `decode_events` does, or where the numbers of events do not add up.
    """
    buffer = as_buffer(b"".join(batches))
    columns = _fitting(None, plan, buffer, sum(counts))
    ends = np.cumsum(np.array(counts, np.int64))
    return _fill(buffer, plan, np.array(arrival_times_ns, np.int64), ends, limit_slots(None, 0), columns)


def _fill(
    buffer: NDArray[np.uint8],
    plan: WirePlan,
    arrival_times_ns: NDArray[np.int64],
    ends: NDArray[np.int64],
    limits: NDArray[np.int64],
    columns: EventColumns,
) -> EventColumns:
    explained = np.empty(STACKS, np.int64)
    count = columns.count
    if count == 0 and buffer.size:
        raise _miscounted(buffer, count)
    decoded = _decode(
        buffer,
        plan.types_table,
        plan.attributes_table,
        plan.names,
        limits,
        arrival_times_ns,
        ends,
        count,
        columns.user_offset,
        columns.user_length,
        columns.user_hash,
        columns.type_index,
        columns.time_ns,
        columns.event_id_hash,
        columns.text_offset,
        columns.text_length,
        columns.text_hash,
        columns.number,
        explained,
    )
    if decoded < 0:
        raise _miscounted(buffer, count)
    if decoded < count:
        field, reason = describe(buffer, explained, plan, int(arrival_times_ns[0]))
        raise InvalidArgument(f"events[{decoded}].{field}" if field else f"events[{decoded}]", reason)
    return columns


def _count_events(buffer: NDArray[np.uint8]) -> int:
    return int(check_frame(buffer, np.iinfo(np.int64).max, events_only=True)[COUNT])


def _miscounted(buffer: NDArray[np.uint8], count: int) -> InvalidArgument:
    """What is wrong with a message that is not `count` events and nothing else: where it is damaged, or their number.

    Raises InvalidArgument in the first case.
    """
    return InvalidArgument("events", f"says {count}, the bytes hold {_count_events(buffer)}")


def _fitting(columns: EventColumns | None, plan: WirePlan, buffer: NDArray[np.uint8], count: int) -> EventColumns:
    """The given columns where they have room for `count` events of this plan, else new ones with room to spare."""
    # An event takes two bytes at least: a number that somebody says asks for no more memory than the message could.
    if not 0 <= 2 * count <= buffer.size:
        raise _miscounted(buffer, count)
    texts, numbers = plan.text_count, plan.number_count
    if (
        columns is not None
        and columns.user_offset.shape[0] >= count
        and columns.text_offset.shape[0] == texts
        and columns.number.shape[0] == numbers
    ):
        columns.count = count
        columns.buffer = buffer
        return columns
    capacity = max(_SMALLEST_CAPACITY, 1 << max(0, count - 1).bit_length())
    return EventColumns(
        count=count,
        buffer=buffer,
        user_offset=np.empty(capacity, np.int64),
        user_length=np.empty(capacity, np.int32),
        user_hash=np.empty(capacity, np.uint64),
        type_index=np.empty(capacity, np.int16),
        time_ns=np.empty(capacity, np.int64),
        event_id_hash=np.empty(capacity, np.uint64),
        text_offset=np.empty((texts, capacity), np.int64),
        text_length=np.empty((texts, capacity), np.int32),
        text_hash=np.empty((texts, capacity), np.uint64),
        number=np.empty((numbers, capacity), np.float64),
    )


@kernel
def _decode(
    buffer: NDArray[np.uint8],
    types: NDArray[np.uint64],
    attributes: NDArray[np.uint64],
    names: NDArray[np.uint8],
    limits: NDArray[np.int64],
    arrival_times_ns: NDArray[np.int64],
    ends: NDArray[np.int64],
    count: int,
    user_offset: NDArray[np.int64],
    user_length: NDArray[np.int32],
    user_hash: NDArray[np.uint64],
    type_index: NDArray[np.int16],
    time_ns: NDArray[np.int64],
    event_id_hash: NDArray[np.uint64],
    text_offset: NDArray[np.int64],
    text_length: NDArray[np.int32],
    text_hash: NDArray[np.uint64],
    number: NDArray[np.float64],
    explained: NDArray[np.int64],
) -> int:
    """Fills the columns from a message; `count`, or the index of the first event that is not valid, which is then
    explained, or -1 where the message is not `count` events and nothing else. The events before `ends[b]` that no
    earlier batch has are batch b's.
    """
    work = make_work(limits, text_length.shape[0] + number.shape[0])
    id_offset = np.empty(_BLOCK_EVENTS, np.int64)
    id_length = np.empty(_BLOCK_EVENTS, np.int64)
    pos = 0
    batch = 0
    for first in range(0, count, _BLOCK_EVENTS):
        last = min(first + _BLOCK_EVENTS, count)
        for i in range(first, last):
            while i >= ends[batch]:
                batch += 1
            tag_at, begin, end = next_event(buffer, pos, work)
            if tag_at != pos or pos == buffer.size:
                return to_i64(-1)
            verdict = read_event(
                buffer, begin, end, types, attributes, names, work, text_offset, text_length, number, i
            )
            if verdict != VALID:
                explain_event(buffer, begin, end, types, attributes, names, work, text_offset, text_length, number)
                explained[:] = work[:STACKS]
                return to_i64(i)
            user_offset[i] = work[USER_OFFSET]
            user_length[i] = work[USER_LENGTH]
            type_index[i] = work[TYPE_INDEX]
            time_ns[i] = event_time_ns(work) if work[HAS_TIME] else arrival_times_ns[batch]
            id_offset[i - first] = work[ID_OFFSET]
            id_length[i - first] = work[ID_LENGTH]
            pos = end
        # A hash is a chain of multiplications: those of one event after the other overlap, as nothing else is between.
        _hash_texts(buffer, user_offset[first:last], user_length[first:last], user_hash[first:last])
        _hash_ids(buffer, id_offset, id_length, user_hash[first:last], event_id_hash[first:last])
        for text in range(text_length.shape[0]):
            _hash_texts(
                buffer, text_offset[text, first:last], text_length[text, first:last], text_hash[text, first:last]
            )
    return to_i64(count) if pos == buffer.size else to_i64(-1)


@leaf_kernel
def _hash_texts(
    buffer: NDArray[np.uint8], offset: NDArray[np.int64], length: NDArray[np.int32], key: NDArray[np.uint64]
) -> None:
    """XXH64 of each text. Of an absent one, whose length is negative, hash and offset become 0."""
    for i in range(len(key)):
        if length[i] >= 0:
            key[i] = xxh64(buffer, offset[i], to_i64(length[i]), 0)
        else:
            offset[i] = 0
            key[i] = 0


@leaf_kernel
def _hash_ids(
    buffer: NDArray[np.uint8],
    offset: NDArray[np.int64],
    length: NDArray[np.int64],
    user_hash: NDArray[np.uint64],
    key: NDArray[np.uint64],
) -> None:
    """XXH64 of each event id seeded with the user's hash; 0 means no event id, so a hash of 0 becomes 1."""
    for i in range(len(key)):
        if length[i] == 0:
            key[i] = 0
        else:
            value = xxh64(buffer, offset[i], length[i], user_hash[i])
            key[i] = value if value != np.uint64(0) else np.uint64(1)
