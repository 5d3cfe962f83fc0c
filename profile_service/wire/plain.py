"""The Event as protobuf libraries write it, read in one pass: fields in the order of their numbers, each at most once,
tags and most lengths of one byte.

    user_id type [time: seconds [nanos]] [event_id] [attributes: entry*]        entry = key value
    value   string_value | number_value

`parse_plain` takes such an event where nothing is wrong with it, and leaves all others to `wire.event`, which knows
every shape and says what is wrong. What it takes means there what it means here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.kernel import inlined_kernel, load_f64, load_u8, load_u32, load_u64, to_i64
from profile_service.wire.plan import find_row, is_short_name, name_index
from profile_service.wire.protobuf import is_utf8
from profile_service.wire.value import MOST_NUMBER
from profile_service.wire.work import (
    ATTRIBUTE_ROWS,
    HAS_TIME,
    ID_LENGTH,
    ID_OFFSET,
    IGNORED,
    LIMIT_ATTRIBUTE,
    LIMIT_ATTRIBUTES,
    LIMIT_EVENT_ID,
    LIMIT_TIME,
    LIMIT_USER_ID,
    MOST_ATTRIBUTE_ROWS,
    NANOS,
    SECONDS,
    TYPE_INDEX,
    TYPE_ROW,
    USER_LENGTH,
    USER_OFFSET,
)

MOST_DECLARED = 64
"""Declared attributes that a mask of those already read has bits for."""
MOST_PLAIN_SECONDS = 9_223_372_035
"""Whole seconds since 1970 that nanoseconds can hold."""

_HIGH_BITS = np.uint64(0x8080808080808080)
_BYTE_NUMBERS = np.uint64(0x0001020304050607)


@inlined_kernel
def parse_plain(
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
) -> bool:
    """Whether the Event in [pos, end) is plain and valid; if so `work` and the `column` have it: absent texts are of
    length -1, absent numbers NaN. If not, the column and the event's slots of `work` hold anything.
    """
    texts = text_length.shape[0]
    declared = texts + number.shape[0]
    # Tag and length of the first two fields, at least.
    if declared > MOST_DECLARED or end - pos < 4:
        return False
    user_length = load_u8(buffer, pos + 1)
    user_offset = pos + 2
    pos = user_offset + user_length
    # With room for the next tag and length.
    if load_u8(buffer, user_offset - 2) != 0x0A or user_length >= 0x80 or end - pos < 2:
        return False
    if user_length == 0 or user_length > work[LIMIT_USER_ID] or not _is_text(buffer, user_offset, user_length):
        return False
    type_length = load_u8(buffer, pos + 1)
    if load_u8(buffer, pos) != 0x12 or type_length >= 0x80 or type_length > end - pos - 2:
        return False
    row = work[TYPE_ROW]
    if not is_short_name(types, row, buffer, pos + 2, type_length):
        row = find_row(types, names, buffer, pos + 2, type_length)
        if row < 0:
            return False
        work[TYPE_ROW] = row
    # Noted at once: what waits for the end stands in the way of everything before.
    work[USER_OFFSET] = user_offset
    work[USER_LENGTH] = user_length
    work[TYPE_INDEX] = name_index(types, row)
    pos += 2 + type_length

    has_time = 0
    seconds = to_i64(0)
    nanos = to_i64(0)
    if end - pos >= 2 and load_u8(buffer, pos) == 0x1A:
        length = load_u8(buffer, pos + 1)
        pos += 2
        stop = pos + length
        if length < 2 or length >= 0x80 or stop > end or load_u8(buffer, pos) != 0x08:
            return False
        seconds, pos = _short_varint(buffer, pos + 1)
        if pos < 0 or pos > stop or seconds > MOST_PLAIN_SECONDS:
            return False
        if pos < stop:
            if load_u8(buffer, pos) != 0x10:
                return False
            nanos, pos = _short_varint(buffer, pos + 1)
            if pos != stop or nanos > 999_999_999:
                return False
        if seconds * 1_000_000_000 + nanos > work[LIMIT_TIME]:
            return False
        has_time = 1
    work[HAS_TIME] = has_time
    work[SECONDS] = seconds
    work[NANOS] = nanos

    id_offset = pos
    id_length = to_i64(0)
    if end - pos >= 2 and load_u8(buffer, pos) == 0x22:
        id_length = load_u8(buffer, pos + 1)
        id_offset = pos + 2
        pos = id_offset + id_length
        if id_length >= 0x80 or pos > end or id_length > work[LIMIT_EVENT_ID]:
            return False
        if not _is_text(buffer, id_offset, id_length):
            return False
    work[ID_OFFSET] = id_offset
    work[ID_LENGTH] = id_length

    ignored = 0
    sent = to_i64(0)
    seen = np.uint64(0)
    seen_count = 0
    if pos < end:
        if end - pos < 3 or load_u8(buffer, pos) != 0x2A:
            return False
        length = load_u8(buffer, pos + 1)
        pos += 2
        if length >= 0x80:
            high = load_u8(buffer, pos)
            if high >= 0x80:
                return False
            length += (high - 1) << 7
            pos += 1
        if pos + length != end:
            return False
        limit = work[LIMIT_ATTRIBUTE]
        room = work[LIMIT_ATTRIBUTES]
        while pos < end:
            # Entry and its length, name and its length; then value and its length, its member and the next byte.
            if end - pos < 4 or sent == room:
                return False
            head = to_i64(load_u32(buffer, pos))
            entry_length = head >> 8 & 0xFF
            name_length = head >> 24
            name_offset = pos + 4
            pos += 2 + entry_length
            value = name_offset + name_length
            if head & 0xFF00FF != 0x0A000A or entry_length >= 0x80 or pos > end or value + 4 > pos:
                return False
            head = to_i64(load_u32(buffer, value))
            if head & 0xFF != 0x12 or value + 2 + (head >> 8 & 0xFF) != pos:
                return False
            is_text = head >> 16 & 0xFF == 0x1A
            size = head >> 24 if is_text else to_i64(8)
            first = value + 4 if is_text else value + 3
            if (not is_text and head >> 16 & 0xFF != 0x11) or first + size != pos:
                return False
            if name_length > limit or size > limit or (is_text and not _is_text(buffer, first, size)):
                return False
            # Mostly where the attribute in this place of the event before was. To look is not to wait for a hash.
            place = ATTRIBUTE_ROWS + min(sent, MOST_ATTRIBUTE_ROWS - 1)
            sent += 1
            row = work[place]
            if not is_short_name(attributes, row, buffer, name_offset, name_length):
                row = find_row(attributes, names, buffer, name_offset, name_length)
                if row < 0:
                    # A declared name is UTF-8.
                    if not _is_text(buffer, name_offset, name_length):
                        return False
                    ignored += 1
                    continue
                work[place] = row
            attribute = name_index(attributes, row)
            bit = np.uint64(1) << np.uint64(attribute)
            if seen & bit != np.uint64(0) or is_text != (attribute < texts):
                return False
            seen |= bit
            seen_count += 1
            if is_text:
                text_offset[attribute, column] = first
                text_length[attribute, column] = size
            else:
                given = load_f64(buffer, first)
                # Not so for NaN, either.
                if not abs(given) <= MOST_NUMBER:
                    return False
                number[attribute - texts, column] = given
    if seen_count < declared:
        for attribute in range(declared):
            if seen >> np.uint64(attribute) & np.uint64(1) == np.uint64(0):
                if attribute < texts:
                    text_length[attribute, column] = -1
                else:
                    number[attribute - texts, column] = np.nan
    work[IGNORED] = ignored
    return True


@inlined_kernel
def _is_text(buffer: NDArray[np.uint8], pos: int, length: int) -> bool:
    """Whether the slice is UTF-8; at once where it is ASCII."""
    if length <= 16 and pos + 16 <= buffer.size:
        # No branch depends on the length. Two shifts, as one of 64 bits is undefined.
        head = min(length, 8)
        shift, rest_shift = np.uint64(32 - 4 * head), np.uint64(32 - 4 * (length - head))
        bits = load_u64(buffer, pos) << shift << shift | load_u64(buffer, pos + 8) << rest_shift << rest_shift
        return bits & _HIGH_BITS == np.uint64(0) or is_utf8(buffer, pos, length)
    if length >= 8:
        bits = load_u64(buffer, pos + length - 8)
        for at in range(pos, pos + length - 8, 8):
            bits |= load_u64(buffer, at)
        return bits & _HIGH_BITS == np.uint64(0) or is_utf8(buffer, pos, length)
    return length == 0 or is_utf8(buffer, pos, length)


@inlined_kernel
def _short_varint(buffer: NDArray[np.uint8], pos: int) -> tuple[int, int]:
    """Value and position after a varint of at most 8 bytes; a position of -1 where it is longer, or where the buffer
    ends so soon that 8 bytes cannot be read at once. The caller sees whether it passed its end.
    """
    if pos + 8 > buffer.size:
        return to_i64(0), to_i64(-1)
    word = load_u64(buffer, pos)
    stops = ~word & _HIGH_BITS
    if stops == np.uint64(0):
        return to_i64(0), to_i64(-1)
    lowest = stops & (~stops + np.uint64(1))
    last = to_i64((lowest >> np.uint64(7)) * _BYTE_NUMBERS >> np.uint64(56))
    # Seven bits of each byte up to the last: pairs of bytes together, then pairs of pairs, then both halves.
    word &= (lowest - np.uint64(1)) & ~_HIGH_BITS
    word = word & np.uint64(0x007F007F007F007F) | (word & np.uint64(0x7F007F007F007F00)) >> np.uint64(1)
    word = word & np.uint64(0x00003FFF00003FFF) | (word & np.uint64(0x3FFF00003FFF0000)) >> np.uint64(2)
    word = word & np.uint64(0x000000000FFFFFFF) | (word & np.uint64(0x0FFFFFFF00000000)) >> np.uint64(4)
    return to_i64(word), pos + last + 1
