"""One Event, as kernels: `parse_event` reads its bytes, `check_event` judges what was read. Scanner and decoder share both, so
that they never disagree about an event.

What an event says goes to a row of numbers (the slots below) and, for declared attributes, to one column of three arrays:
`text_offset` and `text_length` (text attributes, columns), `number` (number attributes, columns). The caller has set
`text_length` to -1 and `number` to NaN, or does not look at them.

As in protobuf, the last of a scalar wins, Timestamps and Structs sent in pieces are merged, and the last of the attributes
of one name wins. Limits are on what was sent: an attribute sent twice counts twice, and each time has to obey them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from profile_service.config import Limits
from profile_service.wire.plan import find_name
from profile_service.wire.protobuf import (
    STACK_SIZE,
    is_utf8,
    read_length,
    read_tag,
    read_varint,
    skip_unknown,
    utf8_fault,
)
from profile_service.wire.value import (
    KIND_NULL,
    KIND_NUMBER,
    KIND_TEXT,
    VALUE_FIELDS,
    VALUE_KIND,
    VALUE_LENGTH,
    VALUE_OFFSET,
    read_value,
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

USER_OFFSET = 0
USER_LENGTH = 1
TYPE_OFFSET = 2
TYPE_LENGTH = 3
TYPE_INDEX = 4
HAS_TIME = 5
SECONDS = 6
NANOS = 7
ID_OFFSET = 8
ID_LENGTH = 9
ATTRIBUTES = 10
"""Attributes as sent."""
IGNORED = 11
"""Attributes as sent that the schema does not declare."""
WRONG = 12
"""Declared attributes whose last value is of the wrong type."""
LARGE_STATUS = 13
LARGE_SIZE = 14
LARGE_OFFSET = 15
LARGE_LENGTH = 16
"""The first attribute beyond a limit: LARGE_NAME or LARGE_VALUE, the size in bytes, the extent of its name."""
FIELD = 17
"""Number of the field being read: where a fault is."""
STATUS = 18
POSITION = 19
"""What `explain` adds: the status, and where a malformed event stopped to parse (see `protobuf.fault_offset`)."""
WRONG_ATTRIBUTE = 20
WRONG_KIND = 21
"""What `explain` adds: the first declared attribute of the wrong type, and the kind of value it has."""
BEGIN = 22
"""What `explain` adds: where the event begins, after its tag and length."""
EVENT_SLOTS = 23

LIMIT_USER_ID = 0
LIMIT_EVENT_ID = 1
LIMIT_ATTRIBUTES = 2
LIMIT_ATTRIBUTE = 3
LIMIT_TIME = 4
LIMIT_SLOTS = 5

MIN_SECONDS = -62_135_596_800
MAX_SECONDS = 253_402_300_799
"""0001-01-01T00:00:00Z and 9999-12-31T23:59:59Z, what a Timestamp may hold."""
MIN_NS_SECONDS = -9_223_372_036
MAX_NS_SECONDS = 9_223_372_035
"""Whole seconds that nanoseconds since 1970 can hold: from 1677-09-21T00:12:44Z to 2262-04-11T23:47:15Z."""

EVENT_DEPTH = 1
"""An event is judged as part of its request: it is one level below the outermost message."""

_NO_LIMIT = np.iinfo(np.int64).max


def limit_slots(limits: Limits | None, now_ns: int) -> NDArray[np.int64]:
    """Limits as the kernels take them; without limits any size and any time goes."""
    slots = np.full(LIMIT_SLOTS, _NO_LIMIT, np.int64)
    if limits is not None:
        slots[LIMIT_USER_ID] = limits.user_id_bytes
        slots[LIMIT_EVENT_ID] = limits.event_id_bytes
        slots[LIMIT_ATTRIBUTES] = limits.attributes_per_event
        slots[LIMIT_ATTRIBUTE] = limits.attribute_bytes
        slots[LIMIT_TIME] = min(now_ns + round(limits.future_s * 1e9), _NO_LIMIT)
    return slots


class Plan(NamedTuple):
    """The tables of a WirePlan, inside a kernel."""

    types: NDArray[np.uint64]
    attributes: NDArray[np.uint64]
    names: NDArray[np.uint8]
    text_count: int


class Scratch(NamedTuple):
    """What parsing needs to work with, inside a kernel; one serves any number of events."""

    event: NDArray[np.int64]
    """The slots of the event parsed last."""
    value: NDArray[np.int64]
    float_value: NDArray[np.float64]
    kind: NDArray[np.uint8]
    """(declared attributes) kind of the attribute's last value; means something where `seen` is the event's."""
    seen: NDArray[np.int64]
    """(declared attributes) serial of the last event that had the attribute."""
    serial: NDArray[np.int64]
    """[0]: the current event's serial."""
    stack: NDArray[np.int64]


class Columns(NamedTuple):
    """Where declared attributes go, inside a kernel."""

    text_offset: NDArray[np.int64]
    text_length: NDArray[np.int32]
    number: NDArray[np.float64]


@njit(cache=True, nogil=True)
def make_scratch(declared: int) -> Scratch:
    """Scratch for a plan of `declared` attributes."""
    return Scratch(
        np.zeros(EVENT_SLOTS, np.int64),
        np.zeros(VALUE_FIELDS, np.int64),
        np.zeros(1, np.float64),
        np.zeros(declared, np.uint8),
        np.zeros(declared, np.int64),
        np.zeros(1, np.int64),
        np.zeros((3, STACK_SIZE), np.int64),
    )


@njit(cache=True, nogil=True)
def parse_event(
    buffer: NDArray[np.uint8],
    pos: int,
    end: int,
    plan: Plan,
    limits: NDArray[np.int64],
    scratch: Scratch,
    columns: Columns,
    column: int,
) -> int:
    """Reads the Event message in [pos, end) into `scratch.event` and into `columns` at `column`; returns `end` or a fault."""
    event = scratch.event
    for slot in range(FIELD):
        event[slot] = 0
    event[TYPE_INDEX] = -1
    scratch.serial[0] += 1
    while pos < end:
        event[FIELD] = 0
        tag, pos = read_tag(buffer, pos, end)
        if pos < 0:
            return pos
        event[FIELD] = tag >> 3
        if tag == 0x0A or tag == 0x12 or tag == 0x22 or tag == 0x2A or tag == 0x1A:
            length, pos = read_length(buffer, pos, end)
            if pos < 0:
                return pos
            if tag == 0x2A:
                pos = _parse_attributes(buffer, pos, pos + length, plan, limits, scratch, columns, column)
                if pos < 0:
                    return pos
                continue
            if tag == 0x1A:
                pos = _parse_time(buffer, pos, pos + length, event, scratch.stack)
                if pos < 0:
                    return pos
                continue
            if tag == 0x12:
                event[TYPE_OFFSET] = pos
                event[TYPE_LENGTH] = length
                event[TYPE_INDEX] = find_name(plan.types, plan.names, buffer, pos, length)
                # A declared name is UTF-8.
                if event[TYPE_INDEX] < 0 and not is_utf8(buffer, pos, length):
                    return utf8_fault(pos)
            else:
                if not is_utf8(buffer, pos, length):
                    return utf8_fault(pos)
                if tag == 0x0A:
                    event[USER_OFFSET] = pos
                    event[USER_LENGTH] = length
                else:
                    event[ID_OFFSET] = pos
                    event[ID_LENGTH] = length
            pos += length
        else:
            pos = skip_unknown(buffer, pos, end, tag, EVENT_DEPTH, scratch.stack[2])
            if pos < 0:
                return pos
    return pos


@njit(cache=True, nogil=True)
def check_event(event: NDArray[np.int64], limits: NDArray[np.int64]) -> int:
    """Status of an event that parsed: the first thing that is wrong with it, in the order of its fields."""
    if event[USER_LENGTH] == 0 or event[USER_LENGTH] > limits[LIMIT_USER_ID]:
        return BAD_USER_ID
    if event[TYPE_INDEX] < 0:
        return BAD_TYPE
    if event[HAS_TIME]:
        seconds = event[SECONDS]
        nanos = event[NANOS]
        if seconds < MIN_SECONDS or seconds > MAX_SECONDS or nanos < 0 or nanos > 999_999_999:
            return BAD_TIME
        if seconds < MIN_NS_SECONDS or seconds > MAX_NS_SECONDS:
            return FAR_TIME
        if event_time_ns(event) > limits[LIMIT_TIME]:
            return FUTURE_TIME
    if event[ID_LENGTH] > limits[LIMIT_EVENT_ID]:
        return BAD_EVENT_ID
    if event[ATTRIBUTES] > limits[LIMIT_ATTRIBUTES]:
        return TOO_MANY_ATTRIBUTES
    if event[LARGE_STATUS] != 0:
        return event[LARGE_STATUS]
    if event[WRONG] > 0:
        return WRONG_TYPE
    return VALID


@njit(cache=True, nogil=True)
def event_time_ns(event: NDArray[np.int64]) -> int:
    """Event time in nanoseconds since 1970, of an event whose time is neither bad nor far."""
    return event[SECONDS] * 1_000_000_000 + event[NANOS]


@njit(cache=True, nogil=True)
def explain_event(
    buffer: NDArray[np.uint8],
    pos: int,
    end: int,
    plan: Plan,
    limits: NDArray[np.int64],
    scratch: Scratch,
    columns: Columns,
) -> None:
    """Parses and judges the event once more and leaves in `scratch.event` all that its reason is made of."""
    event = scratch.event
    event[BEGIN] = pos
    event[WRONG_ATTRIBUTE] = -1
    after = parse_event(buffer, pos, end, plan, limits, scratch, columns, 0)
    event[POSITION] = after
    event[STATUS] = MALFORMED if after < 0 else check_event(event, limits)
    for attribute in range(scratch.kind.size):
        if scratch.seen[attribute] == scratch.serial[0]:
            wanted = KIND_TEXT if attribute < plan.text_count else KIND_NUMBER
            if _is_wrong(scratch.kind[attribute], wanted):
                event[WRONG_ATTRIBUTE] = attribute
                event[WRONG_KIND] = scratch.kind[attribute]
                break


@njit(cache=True, nogil=True)
def _parse_time(
    buffer: NDArray[np.uint8], pos: int, end: int, event: NDArray[np.int64], stack: NDArray[np.int64]
) -> int:
    """Merges the Timestamp message in [pos, end) into the event's time."""
    event[HAS_TIME] = 1
    while pos < end:
        tag, pos = read_tag(buffer, pos, end)
        if pos < 0:
            return pos
        if tag == 0x08 or tag == 0x10:
            value, pos = read_varint(buffer, pos, end)
            if pos < 0:
                return pos
            if tag == 0x08:
                event[SECONDS] = np.int64(value)
            else:
                # An int32 is the low half of what was sent.
                event[NANOS] = np.int64(np.int32(value & np.uint64(0xFFFFFFFF)))
        else:
            pos = skip_unknown(buffer, pos, end, tag, EVENT_DEPTH + 1, stack[2])
            if pos < 0:
                return pos
    return pos


@njit(cache=True, nogil=True)
def _parse_attributes(
    buffer: NDArray[np.uint8],
    pos: int,
    end: int,
    plan: Plan,
    limits: NDArray[np.int64],
    scratch: Scratch,
    columns: Columns,
    column: int,
) -> int:
    """Merges the Struct message in [pos, end) into the event's attributes."""
    while pos < end:
        tag, pos = read_tag(buffer, pos, end)
        if pos < 0:
            return pos
        if tag == 0x0A:
            length, pos = read_length(buffer, pos, end)
            if pos < 0:
                return pos
            pos = _parse_attribute(buffer, pos, pos + length, plan, limits, scratch, columns, column)
        else:
            pos = skip_unknown(buffer, pos, end, tag, EVENT_DEPTH + 1, scratch.stack[2])
        if pos < 0:
            return pos
    return pos


@njit(cache=True, nogil=True)
def _parse_attribute(
    buffer: NDArray[np.uint8],
    pos: int,
    end: int,
    plan: Plan,
    limits: NDArray[np.int64],
    scratch: Scratch,
    columns: Columns,
    column: int,
) -> int:
    """Reads one entry of the attributes' map, in [pos, end): name and value in any order, either possibly absent."""
    value = scratch.value
    value[VALUE_KIND] = KIND_NULL
    value[VALUE_LENGTH] = 0
    attribute = -1
    name_offset = pos
    name_length = 0
    while pos < end:
        tag, pos = read_tag(buffer, pos, end)
        if pos < 0:
            return pos
        if tag == 0x0A:
            name_length, pos = read_length(buffer, pos, end)
            if pos < 0:
                return pos
            name_offset = pos
            attribute = find_name(plan.attributes, plan.names, buffer, pos, name_length)
            # A declared name is UTF-8.
            if attribute < 0 and not is_utf8(buffer, pos, name_length):
                return utf8_fault(pos)
            pos += name_length
        elif tag == 0x12:
            length, pos = read_length(buffer, pos, end)
            if pos < 0:
                return pos
            pos = read_value(buffer, pos, pos + length, EVENT_DEPTH + 3, value, scratch.float_value, scratch.stack)
            if pos < 0:
                return pos
        else:
            pos = skip_unknown(buffer, pos, end, tag, EVENT_DEPTH + 2, scratch.stack[2])
            if pos < 0:
                return pos
    event = scratch.event
    event[ATTRIBUTES] += 1
    limit = limits[LIMIT_ATTRIBUTE]
    if (name_length > limit or value[VALUE_LENGTH] > limit) and event[LARGE_STATUS] == 0:
        event[LARGE_STATUS] = LARGE_NAME if name_length > limit else LARGE_VALUE
        event[LARGE_SIZE] = name_length if name_length > limit else value[VALUE_LENGTH]
        event[LARGE_OFFSET] = name_offset
        event[LARGE_LENGTH] = name_length
    if attribute < 0:
        event[IGNORED] += 1
    else:
        _keep_attribute(attribute, plan, scratch, columns, column)
    return pos


@njit(cache=True, nogil=True)
def _keep_attribute(attribute: int, plan: Plan, scratch: Scratch, columns: Columns, column: int) -> None:
    """Puts the value just read into the declared attribute's column, and counts whether it is of the wrong type."""
    value = scratch.value
    kind = value[VALUE_KIND]
    is_text = attribute < plan.text_count
    wanted = KIND_TEXT if is_text else KIND_NUMBER
    if scratch.seen[attribute] == scratch.serial[0] and _is_wrong(scratch.kind[attribute], wanted):
        scratch.event[WRONG] -= 1
    if _is_wrong(kind, wanted):
        scratch.event[WRONG] += 1
    scratch.seen[attribute] = scratch.serial[0]
    scratch.kind[attribute] = kind
    if is_text:
        columns.text_offset[attribute, column] = value[VALUE_OFFSET]
        columns.text_length[attribute, column] = value[VALUE_LENGTH] if kind == KIND_TEXT else -1
    else:
        columns.number[attribute - plan.text_count, column] = scratch.float_value[0] if kind == KIND_NUMBER else np.nan


@njit(cache=True, nogil=True)
def _is_wrong(kind: int, wanted: int) -> bool:
    return kind != wanted and kind != KIND_NULL
