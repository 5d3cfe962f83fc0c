"""A producer's batch, looked through once: which events are valid, whose they are, where they lie. Nothing is copied,
and no Python object is made for an event, unless it is refused.

Damage inside an event refuses that event alone; damage to what holds the events together refuses the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profile_service.config import Limits
from profile_service.domain.hashing import xxh64
from profile_service.domain.kernel import kernel
from profile_service.errors import InvalidArgument
from profile_service.wire.event import VALID, explain_event, read_event
from profile_service.wire.frame import (
    ACKNOWLEDGED,
    COUNT,
    NAME_LENGTH,
    NAME_OFFSET,
    NOT_TOLD,
    SEQUENCE,
    as_buffer,
    check_frame,
    next_event,
)
from profile_service.wire.plan import WirePlan
from profile_service.wire.reasons import describe
from profile_service.wire.work import IGNORED, STACKS, USER_LENGTH, USER_OFFSET, limit_slots, make_work


@dataclass(frozen=True)
class ScannedBatch:
    """The events of one message, by index; all arrays have `count` entries."""

    buffer: NDArray[np.uint8]
    """The message."""
    count: int
    offset: NDArray[np.int64]
    """Where the event begins in `buffer`: at the tag in front of it."""
    length: NDArray[np.int32]
    """Bytes from there to the event's end: tag, length and event."""
    user_hash: NDArray[np.uint64]
    """XXH64 of the user id; 0 where the event is refused."""
    status: NDArray[np.uint8]
    """0 where the event is valid, else why not: see `wire.reasons.reason_name`."""
    name: str
    """producer_id of a StreamEventsRequest, request_id of an IngestEventsRequest."""
    sequence: int
    """sequence of a StreamEventsRequest."""
    acknowledged_sequence: int | None
    """acknowledged_sequence of a StreamEventsRequest; None where it is not set, negative where it is."""
    ignored_attributes: int
    """Attributes of valid events that the schema does not declare."""
    rejected_count: int
    plan: WirePlan
    limits: Limits
    now_ns: int

    @property
    def all_valid(self) -> bool:
        """Whether no event was refused."""
        return self.rejected_count == 0

    def rejected(self) -> list[tuple[int, str, str]]:
        """(index, field, reason) of each refused event, by index; field is a path within the event such as
        `attributes.price`.
        """
        if self.all_valid:
            return []
        index = np.flatnonzero(self.status)
        explained = np.empty((index.size, STACKS), np.int64)
        plan = self.plan
        _explain(
            self.buffer,
            plan.types_table,
            plan.attributes_table,
            plan.names,
            plan.text_count,
            plan.number_count,
            limit_slots(self.limits, self.now_ns),
            self.offset[index],
            explained,
        )
        return [
            (int(i), *describe(self.buffer, slots, plan, self.now_ns))
            for i, slots in zip(index, explained, strict=True)
        ]


def scan_batch(message: bytes | bytearray | memoryview, plan: WirePlan, limits: Limits, now_ns: int) -> ScannedBatch:
    """Looks through a StreamEventsRequest or IngestEventsRequest; `now_ns` is what event times may not be far ahead of.

    Raises InvalidArgument where the message is too large, holds too many events, or is damaged outside of its events.
    The message's memory is referred to, not copied: it must not change while the result is in use.
    """
    buffer = as_buffer(message)
    if buffer.size > limits.message_bytes:
        raise InvalidArgument("", f"a message must be at most {limits.message_bytes} bytes, is {buffer.size}")
    frame = check_frame(buffer, limits.events_per_batch, events_only=False)
    count = int(frame[COUNT])
    if count > limits.events_per_batch:
        raise InvalidArgument("events", f"must be at most {limits.events_per_batch} events, are more")
    offset = np.empty(count, np.int64)
    length = np.empty(count, np.int32)
    user_hash = np.empty(count, np.uint64)
    status = np.empty(count, np.uint8)
    ignored, rejected = _scan(
        buffer,
        plan.types_table,
        plan.attributes_table,
        plan.names,
        plan.text_count,
        plan.number_count,
        limit_slots(limits, now_ns),
        offset,
        length,
        user_hash,
        status,
    )
    name = bytes(buffer[frame[NAME_OFFSET] : frame[NAME_OFFSET] + frame[NAME_LENGTH]]).decode()
    return ScannedBatch(
        buffer=buffer,
        count=count,
        offset=offset,
        length=length,
        user_hash=user_hash,
        status=status,
        name=name,
        sequence=int(frame[SEQUENCE]),
        acknowledged_sequence=None if frame[ACKNOWLEDGED] == NOT_TOLD else int(frame[ACKNOWLEDGED]),
        ignored_attributes=ignored,
        rejected_count=rejected,
        plan=plan,
        limits=limits,
        now_ns=now_ns,
    )


@kernel
def _scan(
    buffer: NDArray[np.uint8],
    types: NDArray[np.uint64],
    attributes: NDArray[np.uint64],
    names: NDArray[np.uint8],
    text_count: int,
    number_count: int,
    limits: NDArray[np.int64],
    offset: NDArray[np.int64],
    length: NDArray[np.int32],
    user_hash: NDArray[np.uint64],
    status: NDArray[np.uint8],
) -> tuple[int, int]:
    """Fills the arrays of a batch whose framing is whole; (ignored attributes of valid events, refused events)."""
    work = make_work(limits, text_count + number_count)
    # One column, written over by each event.
    text_offset = np.empty((text_count, 1), np.int64)
    text_length = np.empty((text_count, 1), np.int32)
    number = np.empty((number_count, 1), np.float64)
    ignored = 0
    rejected = 0
    pos = 0
    for i in range(offset.size):
        start, begin, end = next_event(buffer, pos, work)
        verdict = read_event(buffer, begin, end, types, attributes, names, work, text_offset, text_length, number, 0)
        offset[i] = start
        length[i] = end - start
        status[i] = verdict
        if verdict == VALID:
            user_hash[i] = xxh64(buffer, work[USER_OFFSET], work[USER_LENGTH], 0)
            ignored += work[IGNORED]
        else:
            user_hash[i] = 0
            rejected += 1
        pos = end
    return ignored, rejected


@kernel
def _explain(
    buffer: NDArray[np.uint8],
    types: NDArray[np.uint64],
    attributes: NDArray[np.uint64],
    names: NDArray[np.uint8],
    text_count: int,
    number_count: int,
    limits: NDArray[np.int64],
    offset: NDArray[np.int64],
    explained: NDArray[np.int64],
) -> None:
    """What the reasons of the events at `offset` are made of, a row an event."""
    work = make_work(limits, text_count + number_count)
    # One column, written over by each event.
    text_offset = np.empty((text_count, 1), np.int64)
    text_length = np.empty((text_count, 1), np.int32)
    number = np.empty((number_count, 1), np.float64)
    for i in range(offset.size):
        _, begin, end = next_event(buffer, offset[i], work)
        explain_event(buffer, begin, end, types, attributes, names, work, text_offset, text_length, number)
        explained[i] = work[:STACKS]
