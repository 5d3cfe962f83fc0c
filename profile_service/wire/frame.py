"""Framing of a batch, as kernels: where its events are. Events themselves are not looked into.

    request = (0x0A length Event | 2 name | 3 sequence | 4 acknowledged | unknown field)*

StreamEventsRequest (name: producer_id, sequence, acknowledged_sequence) and IngestEventsRequest (name: request_id)
share this shape.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.kernel import inlined_kernel, kernel, leaf_kernel, load_u8, to_i64
from profile_service.errors import InvalidArgument
from profile_service.wire.protobuf import (
    fault,
    fault_offset,
    is_utf8,
    read_length,
    read_tag,
    read_varint,
    skip_unknown,
    utf8_fault,
)
from profile_service.wire.work import LAST

EVENT_TAG = 0x0A
_NAME_TAG = 0x12
_SEQUENCE_TAG = 0x18
_ACKNOWLEDGED_TAG = 0x20

COUNT = 0
NAME_OFFSET = 1
NAME_LENGTH = 2
SEQUENCE = 3
ACKNOWLEDGED = 4
FRAME_SLOTS = 5
"""Slots of the `frame` array below."""

NOT_TOLD = -1
"""In the slot ACKNOWLEDGED of a message without the field."""


def as_buffer(message: bytes | bytearray | memoryview) -> NDArray[np.uint8]:
    """The message's bytes as a read-only array, without a copy; kernels are compiled for read-only arrays alone."""
    buffer: NDArray[np.uint8] = np.frombuffer(message, np.uint8)
    buffer.flags.writeable = False
    return buffer


def check_frame(buffer: NDArray[np.uint8], most: int, events_only: bool) -> NDArray[np.int64]:
    """Checks the framing of the whole message; returns the `frame` slots. Stops counting when it has seen `most` + 1
    events.

    With `events_only` anything but events is damage. Raises InvalidArgument naming the byte offset of the damage.
    """
    frame = np.zeros(FRAME_SLOTS, np.int64)
    frame[ACKNOWLEDGED] = NOT_TOLD
    position = _check_frame(buffer, most, events_only, frame)
    if position < 0:
        offset, is_text = fault_offset(position)
        wrong = "text that is not UTF-8" if is_text else "bytes that are not the protobuf message expected"
        raise InvalidArgument("", f"the request must be well-formed, has {wrong} at byte {offset} of {buffer.size}")
    return frame


@inlined_kernel
def next_event(buffer: NDArray[np.uint8], pos: int, work: NDArray[np.int64]) -> tuple[int, int, int]:
    """(begin of the tag, begin of the event, end) of the first event from `pos` on, in a message of whole framing.

    Where there is none, which only a message changed meanwhile can show, an empty event at the buffer's end.
    """
    begin, end = _plain_extent(buffer, pos)
    return (pos, begin, end) if begin >= 0 else _next_event(buffer, pos, work)


@inlined_kernel
def _plain_extent(buffer: NDArray[np.uint8], pos: int) -> tuple[int, int]:
    """(begin, end) of the event whose tag is at `pos` and whose length takes one or two bytes; -1 for begin where there
    is none, or it would not lie in the buffer.
    """
    size = buffer.size
    if pos + 3 > size or load_u8(buffer, pos) != EVENT_TAG:
        return to_i64(-1), to_i64(-1)
    length = load_u8(buffer, pos + 1)
    begin = pos + 2
    if length >= 0x80:
        high = load_u8(buffer, pos + 2)
        if high >= 0x80:
            return to_i64(-1), to_i64(-1)
        length += (high - 1) << 7
        begin += 1
    if begin + length > size:
        return to_i64(-1), to_i64(-1)
    return to_i64(begin), to_i64(begin + length)


@leaf_kernel
def _next_event(buffer: NDArray[np.uint8], pos: int, work: NDArray[np.int64]) -> tuple[int, int, int]:
    """What `next_event` does, wherever the event is."""
    size = buffer.size
    while pos >= 0:
        start = pos
        tag, pos = read_tag(buffer, pos, size)
        if pos < 0:
            break
        if tag == EVENT_TAG:
            length, pos = read_length(buffer, pos, size)
            if pos < 0:
                break
            return start, pos, pos + length
        pos = skip_unknown(buffer, pos, size, tag, 0, work)
    return size, size, size


@kernel
def _check_frame(buffer: NDArray[np.uint8], most: int, events_only: bool, frame: NDArray[np.int64]) -> int:
    work = np.zeros(LAST, np.int64)
    pos = 0
    end = buffer.size
    while pos < end:
        start = pos
        begin, after = _plain_extent(buffer, pos)
        if begin >= 0:
            pos = after
            frame[COUNT] += 1
            if frame[COUNT] > most:
                return pos
            continue
        tag, pos = read_tag(buffer, pos, end)
        if pos < 0:
            return pos
        if tag == EVENT_TAG:
            length, pos = read_length(buffer, pos, end)
            if pos < 0:
                return pos
            pos += length
            frame[COUNT] += 1
            if frame[COUNT] > most:
                return pos
        elif events_only:
            return fault(start)
        elif tag == _NAME_TAG:
            length, pos = read_length(buffer, pos, end)
            if pos < 0:
                return pos
            if not is_utf8(buffer, pos, length):
                return utf8_fault(pos)
            frame[NAME_OFFSET] = pos
            frame[NAME_LENGTH] = length
            pos += length
        elif tag == _SEQUENCE_TAG:
            value, pos = read_varint(buffer, pos, end)
            if pos < 0:
                return pos
            frame[SEQUENCE] = to_i64(value)
        elif tag == _ACKNOWLEDGED_TAG:
            value, pos = read_varint(buffer, pos, end)
            if pos < 0:
                return pos
            # Less than nothing, which the field's type allows, must not look like its absence.
            frame[ACKNOWLEDGED] = to_i64(value) if to_i64(value) >= 0 else NOT_TOLD - 1
        else:
            pos = skip_unknown(buffer, pos, end, tag, 0, work)
            if pos < 0:
                return pos
    return pos
