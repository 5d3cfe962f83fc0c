"""One Event, as kernels: `read_event` reads and judges its bytes. Scanner and decoder share it, so that they never
disagree about an event. Nearly all events are plain and end in `wire.plain`; the others, and those that are refused,
are read by `parse_event` and judged by `check_event`.

What an event says goes to `work` (see `wire.work`) and, for declared attributes, to one column of three arrays:
`text_offset` and `text_length` (text attributes, columns), `number` (number attributes, columns).

As in protobuf, the last of a scalar wins, Timestamps and Structs sent in pieces are merged, and the last of the
attributes of one name wins. Limits are on what was sent: an attribute sent twice counts twice, and each time has to
obey them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.kernel import inlined_kernel, leaf_kernel, load_f64, to_i64
from profile_service.wire.plain import parse_plain
from profile_service.wire.plan import find_name
from profile_service.wire.protobuf import is_utf8, read_length, read_tag, read_varint, skip_unknown, utf8_fault
from profile_service.wire.value import KIND_NULL, KIND_NUMBER, KIND_TEXT, read_value
from profile_service.wire.work import (
    ATTRIBUTES,
    BEGIN,
    FIELD,
    HAS_TIME,
    ID_LENGTH,
    ID_OFFSET,
    IGNORED,
    LARGE_LENGTH,
    LARGE_OFFSET,
    LARGE_SIZE,
    LARGE_STATUS,
    LAST,
    LIMIT_ATTRIBUTE,
    LIMIT_ATTRIBUTES,
    LIMIT_EVENT_ID,
    LIMIT_TIME,
    LIMIT_USER_ID,
    NANOS,
    PARSED_SLOTS,
    POSITION,
    SECONDS,
    SERIAL,
    STATUS,
    TYPE_INDEX,
    TYPE_LENGTH,
    TYPE_OFFSET,
    USER_LENGTH,
    USER_OFFSET,
    VALUE_KIND,
    VALUE_LENGTH,
    VALUE_OFFSET,
    WRONG,
    WRONG_ATTRIBUTE,
    WRONG_KIND,
)

VALID = 0
MALFORMED = 1
BAD_USER_ID = 2
BAD_TYPE = 3
BAD_TIME = 4
FAR_TIME = 5
FUTURE_TIME = 6
BAD_EVENT_ID = 7
TOO_MANY_ATTRIBUTES = 8
LARGE_NAME = 9
LARGE_VALUE = 10
WRONG_TYPE = 11
"""An event's status: valid, or the first of these that applies to it."""

MIN_SECONDS = -62_135_596_800
MAX_SECONDS = 253_402_300_799
"""0001-01-01T00:00:00Z and 9999-12-31T23:59:59Z, what a Timestamp may hold."""
MIN_NS_SECONDS = -9_223_372_036
MAX_NS_SECONDS = 9_223_372_035
"""Whole seconds that nanoseconds since 1970 can hold: 1677-09-21T00:12:44Z and 2262-04-11T23:47:15Z."""

EVENT_DEPTH = 1
"""An event is judged as part of its request: it is one level below the outermost message."""


@inlined_kernel
def read_event(
    buffer: NDArray[np.uint8],
    pos: int,
    end: int,
    types: NDArray[np.uint64],
    attributes: NDArray[np.uint64],
    names: NDArray[np.uint8],
    work: NDArray[np.int64],
    text_offset: NDArray[np.int64],
    text_length: NDArray[np.int32],
    number: NDArray[np.float64],
    column: int,
) -> int:
    """Reads the Event message in [pos, end) into `work` and the `column`, whatever that held; returns its status.

    An absent text is of length -1, an absent number NaN.
    """
    if parse_plain(buffer, pos, end, types, attributes, names, work, text_offset, text_length, number, column):
        return VALID
    return read_any_event(buffer, pos, end, types, attributes, names, work, text_offset, text_length, number, column)


@leaf_kernel
def read_any_event(
    buffer: NDArray[np.uint8],
    pos: int,
    end: int,
    types: NDArray[np.uint64],
    attributes: NDArray[np.uint64],
    names: NDArray[np.uint8],
    work: NDArray[np.int64],
    text_offset: NDArray[np.int64],
    text_length: NDArray[np.int32],
    number: NDArray[np.float64],
    column: int,
) -> int:
    """What `read_event` does, of an event of any shape."""
    for attribute in range(text_length.shape[0]):
        text_length[attribute, column] = -1
    for attribute in range(number.shape[0]):
        number[attribute, column] = np.nan
    after = parse_event(buffer, pos, end, types, attributes, names, work, text_offset, text_length, number, column)
    return to_i64(MALFORMED) if after < 0 else check_event(work)


@inlined_kernel
def parse_event(
    buffer: NDArray[np.uint8],
    pos: int,
    end: int,
    types: NDArray[np.uint64],
    attributes: NDArray[np.uint64],
    names: NDArray[np.uint8],
    work: NDArray[np.int64],
    text_offset: NDArray[np.int64],
    text_length: NDArray[np.int32],
    number: NDArray[np.float64],
    column: int,
) -> int:
    """Reads the Event message in [pos, end) into `work` and the `column`, where absent attributes stay as they are;
    returns `end` or a fault."""
    for slot in range(PARSED_SLOTS):
        work[slot] = 0
    work[TYPE_INDEX] = -1
    work[SERIAL] += 1
    while pos < end:
        work[FIELD] = 0
        tag, pos = read_tag(buffer, pos, end)
        if pos < 0:
            return pos
        if tag != 0x2A and tag != 0x0A and tag != 0x12 and tag != 0x1A and tag != 0x22:
            pos = skip_unknown(buffer, pos, end, tag, EVENT_DEPTH, work)
            if pos < 0:
                return pos
            continue
        work[FIELD] = tag >> 3
        length, pos = read_length(buffer, pos, end)
        if pos < 0:
            return pos
        if tag == 0x2A:
            pos = _parse_attributes(
                buffer, pos, pos + length, attributes, names, work, text_offset, text_length, number, column
            )
        elif tag == 0x1A:
            pos = _parse_time(buffer, pos, pos + length, work)
        elif tag == 0x12:
            work[TYPE_OFFSET] = pos
            work[TYPE_LENGTH] = length
            work[TYPE_INDEX] = find_name(types, names, buffer, pos, length)
            # A declared name is UTF-8.
            pos = pos + length if work[TYPE_INDEX] >= 0 or is_utf8(buffer, pos, length) else utf8_fault(pos)
        else:
            slot = USER_OFFSET if tag == 0x0A else ID_OFFSET
            work[slot] = pos
            work[slot + 1] = length
            pos = pos + length if is_utf8(buffer, pos, length) else utf8_fault(pos)
        if pos < 0:
            return pos
    return pos


@leaf_kernel
def check_event(work: NDArray[np.int64]) -> int:
    """Status of an event that parsed: the first thing that is wrong with it, in the order of its fields."""
    if work[USER_LENGTH] == 0 or work[USER_LENGTH] > work[LIMIT_USER_ID]:
        return BAD_USER_ID
    if work[TYPE_INDEX] < 0:
        return BAD_TYPE
    if work[HAS_TIME]:
        seconds = work[SECONDS]
        nanos = work[NANOS]
        if seconds < MIN_SECONDS or seconds > MAX_SECONDS or nanos < 0 or nanos > 999_999_999:
            return BAD_TIME
        if seconds < MIN_NS_SECONDS or seconds > MAX_NS_SECONDS:
            return FAR_TIME
        if event_time_ns(work) > work[LIMIT_TIME]:
            return FUTURE_TIME
    if work[ID_LENGTH] > work[LIMIT_EVENT_ID]:
        return BAD_EVENT_ID
    if work[ATTRIBUTES] > work[LIMIT_ATTRIBUTES]:
        return TOO_MANY_ATTRIBUTES
    if work[LARGE_STATUS] != 0:
        return to_i64(work[LARGE_STATUS])
    if work[WRONG] > 0:
        return WRONG_TYPE
    return VALID


@leaf_kernel
def event_time_ns(work: NDArray[np.int64]) -> int:
    """Event time in nanoseconds since 1970, of an event whose time is neither bad nor far."""
    return to_i64(work[SECONDS] * 1_000_000_000 + work[NANOS])


@leaf_kernel
def explain_event(
    buffer: NDArray[np.uint8],
    pos: int,
    end: int,
    types: NDArray[np.uint64],
    attributes: NDArray[np.uint64],
    names: NDArray[np.uint8],
    work: NDArray[np.int64],
    text_offset: NDArray[np.int64],
    text_length: NDArray[np.int32],
    number: NDArray[np.float64],
) -> None:
    """Parses and judges the event once more, into column 0, and leaves in `work` all that its reason is made of."""
    after = parse_event(buffer, pos, end, types, attributes, names, work, text_offset, text_length, number, 0)
    work[BEGIN] = pos
    work[POSITION] = after
    work[STATUS] = MALFORMED if after < 0 else check_event(work)
    work[WRONG_ATTRIBUTE] = -1
    for attribute in range(work.size - LAST):
        last = work[LAST + attribute]
        wanted = KIND_TEXT if attribute < text_length.shape[0] else KIND_NUMBER
        if last >> 3 == work[SERIAL] and _is_wrong(last & 7, wanted):
            work[WRONG_ATTRIBUTE] = attribute
            work[WRONG_KIND] = last & 7
            break


@leaf_kernel
def _parse_time(buffer: NDArray[np.uint8], pos: int, end: int, work: NDArray[np.int64]) -> int:
    """Merges the Timestamp message in [pos, end) into the event's time."""
    work[HAS_TIME] = 1
    while pos < end:
        tag, pos = read_tag(buffer, pos, end)
        if pos < 0:
            return pos
        if tag == 0x08 or tag == 0x10:
            value, pos = read_varint(buffer, pos, end)
            if tag == 0x08:
                work[SECONDS] = to_i64(value)
            else:
                # An int32 is the low half of what was sent.
                work[NANOS] = to_i64(np.int32(value & np.uint64(0xFFFFFFFF)))
        else:
            pos = skip_unknown(buffer, pos, end, tag, EVENT_DEPTH + 1, work)
        if pos < 0:
            return pos
    return pos


@inlined_kernel
def _parse_attributes(
    buffer: NDArray[np.uint8],
    pos: int,
    end: int,
    attributes: NDArray[np.uint64],
    names: NDArray[np.uint8],
    work: NDArray[np.int64],
    text_offset: NDArray[np.int64],
    text_length: NDArray[np.int32],
    number: NDArray[np.float64],
    column: int,
) -> int:
    """Merges the Struct message in [pos, end) into the event's attributes."""
    while pos < end:
        tag, pos = read_tag(buffer, pos, end)
        if pos < 0:
            return pos
        if tag != 0x0A:
            pos = skip_unknown(buffer, pos, end, tag, EVENT_DEPTH + 1, work)
            if pos < 0:
                return pos
            continue
        length, pos = read_length(buffer, pos, end)
        if pos < 0:
            return pos
        pos, attribute = _parse_attribute(buffer, pos, pos + length, attributes, names, work)
        if pos < 0:
            return pos
        if attribute < 0:
            work[IGNORED] += 1
            continue
        kind = work[VALUE_KIND]
        if attribute < text_length.shape[0]:
            _count_wrong(attribute, kind, KIND_TEXT, work)
            text_offset[attribute, column] = work[VALUE_OFFSET]
            text_length[attribute, column] = work[VALUE_LENGTH] if kind == KIND_TEXT else -1
        else:
            _count_wrong(attribute, kind, KIND_NUMBER, work)
            value = load_f64(buffer, work[VALUE_OFFSET]) if kind == KIND_NUMBER else np.nan
            number[attribute - text_length.shape[0], column] = value
    return pos


@inlined_kernel
def _parse_attribute(
    buffer: NDArray[np.uint8],
    pos: int,
    end: int,
    attributes: NDArray[np.uint64],
    names: NDArray[np.uint8],
    work: NDArray[np.int64],
) -> tuple[int, int]:
    """Reads one entry of the attributes' map, in [pos, end): name and value in any order, either possibly absent.

    Returns `end` or a fault, and the declared attribute that it is, or -1 where it is none.
    """
    work[VALUE_KIND] = KIND_NULL
    work[VALUE_LENGTH] = 0
    attribute = -1
    has_unknown = False
    name_offset = pos
    name_length = 0
    while pos < end:
        tag, pos = read_tag(buffer, pos, end)
        if pos < 0:
            return pos, attribute
        if tag != 0x0A and tag != 0x12:
            pos = skip_unknown(buffer, pos, end, tag, EVENT_DEPTH + 2, work)
            if pos < 0:
                return pos, attribute
            has_unknown = True
            continue
        length, pos = read_length(buffer, pos, end)
        if pos < 0:
            return pos, attribute
        if tag == 0x12:
            pos = read_value(buffer, pos, pos + length, EVENT_DEPTH + 3, work)
        else:
            name_offset = pos
            name_length = length
            attribute = find_name(attributes, names, buffer, pos, length)
            # A declared name is UTF-8.
            pos = pos + length if attribute >= 0 or is_utf8(buffer, pos, length) else utf8_fault(pos)
        if pos < 0:
            return pos, attribute
    work[ATTRIBUTES] += 1
    limit = work[LIMIT_ATTRIBUTE]
    if (name_length > limit or work[VALUE_LENGTH] > limit) and work[LARGE_STATUS] == 0:
        work[LARGE_STATUS] = LARGE_NAME if name_length > limit else LARGE_VALUE
        work[LARGE_SIZE] = name_length if name_length > limit else work[VALUE_LENGTH]
        work[LARGE_OFFSET] = name_offset
        work[LARGE_LENGTH] = name_length
    # protobuf keeps an entry that has more than a name and a value as an unknown field: the map does not get it.
    return pos, -1 if has_unknown else attribute


@leaf_kernel
def _count_wrong(attribute: int, kind: int, wanted: int, work: NDArray[np.int64]) -> None:
    """Keeps count of declared attributes whose last value is of the wrong type."""
    last = work[LAST + attribute]
    if last >> 3 == work[SERIAL] and _is_wrong(last & 7, wanted):
        work[WRONG] -= 1
    if _is_wrong(kind, wanted):
        work[WRONG] += 1
    work[LAST + attribute] = work[SERIAL] << 3 | kind


@leaf_kernel
def _is_wrong(kind: int, wanted: int) -> bool:
    return kind != wanted and kind != KIND_NULL
