"""Answers as protobuf bytes, written by kernels from their end to their start.

The length of a nested message stands before it, and is known only when it is written. So the last field comes first:
whoever has written a message knows where it ends and where it begins, and puts length and tag before it.

    out   | free ................ | tag | length | field | field | field |
                                  at                                     end

Every `put_…` takes where the bytes so far begin and returns where they begin then. As protobuf does, it leaves out a
field that holds its default. There is room: the caller has made sure of it (`Feature.answer_bytes`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.kernel import copy_bytes, inlined_kernel, leaf_kernel, store_u64, to_i64

HEAD_BYTES = 6
"""At most of a tag and a length."""
NUMBER_BYTES = 9
"""Of a tag and a double."""
TIME_BYTES = HEAD_BYTES + 11 + 6
"""At most of a Timestamp and what stands before it."""

NO_ROOM = -1
"""Where an answer begins that did not fit."""

_VARINT, _FIXED_64, _LENGTH = 0, 1, 2
_NS = 1_000_000_000


class Reading(NamedTuple):
    """What rows are read against, and space to work in."""

    read_ns: int
    """The moment to which weights are decayed."""
    reals: NDArray[np.float64]
    codes: NDArray[np.int64]
    labels: NDArray[np.uint8]
    """With `reals` and `codes` the constants that operations refer to."""
    text_entries: NDArray[np.uint64]
    text_arena: NDArray[np.uint8]
    """The interned texts, as an index holds them."""
    prior_weights: NDArray[np.float64]
    """The population's stored weights of every categorical's values, one feature behind the other; empty before they
    are known."""
    prior_landmarks: NDArray[np.int64]
    """By categorical."""
    keys: NDArray[np.float64]
    order: NDArray[np.int64]
    beside: NDArray[np.int64]
    reserve: int
    """The most that an answer takes beside its interned texts."""


@inlined_kernel
def put_varint(out: NDArray[np.uint8], at: int, value: int) -> int:
    """Writes an int64."""
    rest = np.uint64(value)
    size = 1
    while size < 10 and rest >> np.uint64(7 * size) != np.uint64(0):
        size += 1
    at -= size
    for k in range(size - 1):
        out[at + k] = np.uint8(rest & np.uint64(0x7F)) | np.uint8(0x80)
        rest >>= np.uint64(7)
    out[at + size - 1] = np.uint8(rest)
    return at


@inlined_kernel
def put_head(out: NDArray[np.uint8], at: int, field: int, end: int) -> int:
    """Puts length and tag before the message, or the bytes, from `at` to `end`."""
    at = put_varint(out, at, end - at)
    out[at - 1] = np.uint8(field << 3 | _LENGTH)
    return at - 1


@inlined_kernel
def put_int(out: NDArray[np.uint8], at: int, field: int, value: int) -> int:
    """Writes an int64 field."""
    if value == 0:
        return at
    at = put_varint(out, at, value)
    out[at - 1] = np.uint8(field << 3 | _VARINT)
    return at - 1


@inlined_kernel
def put_double(out: NDArray[np.uint8], at: int, field: int, value: float) -> int:
    """Writes a double field."""
    bits = np.float64(value).view(np.uint64)
    if bits == np.uint64(0):
        return at
    store_u64(out, at - 8, bits)
    out[at - 9] = np.uint8(field << 3 | _FIXED_64)
    return at - 9


@inlined_kernel
def put_bytes(out: NDArray[np.uint8], at: int, field: int, source: NDArray[np.uint8], place: int, size: int) -> int:
    """Writes a string or bytes field."""
    if size == 0:
        return at
    copy_bytes(out, at - size, source, place, size)
    return put_head(out, at - size, field, at)


@inlined_kernel
def put_text(out: NDArray[np.uint8], at: int, field: int, reading: Reading, held: int) -> int:
    """Writes an interned text; `NO_ROOM` where that would leave less than the reserve."""
    extent = to_i64(reading.text_entries[held - 1])
    size = extent & 0xFFFF
    if at - size < reading.reserve:
        return NO_ROOM
    return put_bytes(out, at, field, reading.text_arena, extent >> 16, size)


@inlined_kernel
def put_time(out: NDArray[np.uint8], at: int, field: int, time_ns: int) -> int:
    """Writes a Timestamp field, even where it is 1970."""
    seconds = time_ns // _NS
    start = put_int(out, at, 2, time_ns - seconds * _NS)
    start = put_int(out, start, 1, seconds)
    return put_head(out, start, field, at)


@leaf_kernel
def sort_descending(keys: NDArray[np.float64], count: int, order: NDArray[np.int64], beside: NDArray[np.int64]) -> None:
    """Fills `order` with the places of the first `count` keys, the largest key first, equal ones as they stood."""
    for i in range(count):
        order[i] = i
    width = 1
    while width < count:
        for first in range(0, count, 2 * width):
            middle, last = min(first + width, count), min(first + 2 * width, count)
            left, right = first, middle
            for k in range(first, last):
                if right >= last or (left < middle and keys[order[left]] >= keys[order[right]]):
                    beside[k] = order[left]
                    left += 1
                else:
                    beside[k] = order[right]
                    right += 1
        for k in range(count):
            order[k] = beside[k]
        width *= 2
