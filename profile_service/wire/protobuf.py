"""The protobuf encoding, as kernels: tags, varints, lengths, UTF-8, unknown fields. What parses here is what upb
(protobuf's own parser) takes, no more and no less.

    message  = field*
    field    = tag payload            tag = field number << 3 | wire type, at most 5 bytes and 32 bits, number 0 is
    invalid wire type 0  varint               at most 10 bytes; bits beyond 64 are dropped
              1  8 bytes
              2  length, bytes        length is a varint of at most 10 bytes, below 2**31
              3  group                fields up to a tag of wire type 4 with the same number
              5  4 bytes

Every kernel takes the position to read at and the end that it must not pass, and returns the position after what it
read. A negative position is a fault and tells where: see `fault`, `utf8_fault` and `fault_offset`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.kernel import leaf_kernel, load_u8, load_u64, to_i64
from profile_service.wire.work import GROUPS_STACK

MAX_DEPTH = 100
"""Messages and groups may be nested this deep below the outermost, which is at depth 0."""

WIRE_VARINT = 0
WIRE_FIXED64 = 1
WIRE_LENGTH = 2
WIRE_GROUP_START = 3
WIRE_GROUP_END = 4
WIRE_FIXED32 = 5

_HIGH_BITS = np.uint64(0x8080808080808080)


def fault_offset(position: int) -> tuple[int, bool]:
    """Of a negative position: the byte offset of the damage, and whether it is text that is not UTF-8."""
    code = -1 - position
    return code >> 1, bool(code & 1)


@leaf_kernel
def fault(pos: int) -> int:
    """The bytes at `pos` are not protobuf."""
    return -1 - 2 * pos


@leaf_kernel
def utf8_fault(pos: int) -> int:
    """The text that starts at `pos` is not UTF-8."""
    return -2 - 2 * pos


@leaf_kernel
def read_varint(buffer: NDArray[np.uint8], pos: int, end: int) -> tuple[np.uint64, int]:
    """Value modulo 2**64, position after it."""
    start = pos
    value = np.uint64(0)
    shift = np.uint64(0)
    while pos < end and pos - start < 10:
        byte = np.uint64(load_u8(buffer, pos))
        pos += 1
        value |= (byte & np.uint64(0x7F)) << shift
        if byte < np.uint64(0x80):
            return value, pos
        shift += np.uint64(7)
    return np.uint64(0), fault(start)


@leaf_kernel
def read_tag(buffer: NDArray[np.uint8], pos: int, end: int) -> tuple[int, int]:
    """Tag (field number << 3 | wire type), position after it."""
    start = pos
    if pos < end:
        first = load_u8(buffer, pos)
        if 8 <= first < 0x80:
            return first, pos + 1
    tag = to_i64(0)
    shift = to_i64(0)
    while pos < end and pos - start < 5:
        byte = load_u8(buffer, pos)
        pos += 1
        tag |= (byte & 0x7F) << shift
        if byte < 0x80:
            if tag < 8 or tag > 0xFFFFFFFF:
                break
            return tag, pos
        shift += 7
    return to_i64(0), fault(start)


@leaf_kernel
def read_length(buffer: NDArray[np.uint8], pos: int, end: int) -> tuple[int, int]:
    """Length of a payload that lies wholly before `end`, position of its first byte."""
    if pos < end:
        first = load_u8(buffer, pos)
        if first < 0x80:
            if first <= end - pos - 1:
                return first, pos + 1
            return to_i64(0), fault(pos)
    value, after = read_varint(buffer, pos, end)
    if after < 0:
        return to_i64(0), after
    if value > np.uint64(end - after):
        return to_i64(0), fault(pos)
    return to_i64(value), after


@leaf_kernel
def skip_unknown(buffer: NDArray[np.uint8], pos: int, end: int, tag: int, depth: int, work: NDArray[np.int64]) -> int:
    """Position after the payload of a field that the message, at `depth`, does not know; `work` lends a stack."""
    if tag & 7 == WIRE_GROUP_START:
        return _skip_group(buffer, pos, end, tag >> 3, depth + 1, work)
    return skip_plain(buffer, pos, end, tag & 7)


@leaf_kernel
def is_utf8(buffer: NDArray[np.uint8], pos: int, length: int) -> bool:
    """Whether the slice is UTF-8 as proto3 has it: shortest forms, no surrogates, nothing above U+10FFFF."""
    end = pos + length
    while pos < end:
        left = end - pos
        if left >= 8:
            if load_u64(buffer, pos) & _HIGH_BITS == np.uint64(0):
                pos += 8
                continue
        elif pos + 8 <= buffer.size and load_u64(buffer, pos) & (_HIGH_BITS >> np.uint64(64 - 8 * left)) == np.uint64(
            0
        ):
            return True
        lead = load_u8(buffer, pos)
        if lead < 0x80:
            pos += 1
            continue
        # The second byte's range is where overlong forms, surrogates and too large numbers show.
        low, high = 0x80, 0xBF
        if lead < 0xC2:
            return False
        if lead < 0xE0:
            size = 2
        elif lead < 0xF0:
            size = 3
            if lead == 0xE0:
                low = 0xA0
            elif lead == 0xED:
                high = 0x9F
        elif lead < 0xF5:
            size = 4
            if lead == 0xF0:
                low = 0x90
            elif lead == 0xF4:
                high = 0x8F
        else:
            return False
        if left < size:
            return False
        second = load_u8(buffer, pos + 1)
        if second < low or second > high:
            return False
        for i in range(2, size):
            if load_u8(buffer, pos + i) & 0xC0 != 0x80:
                return False
        pos += size
    return True


@leaf_kernel
def skip_plain(buffer: NDArray[np.uint8], pos: int, end: int, wire: int) -> int:
    """Position after the payload of anything but a group; the end of a group that was never begun is a fault."""
    if wire == WIRE_VARINT:
        _, after = read_varint(buffer, pos, end)
        return after
    if wire == WIRE_LENGTH:
        length, after = read_length(buffer, pos, end)
        return after if after < 0 else after + length
    if wire == WIRE_FIXED64:
        return pos + 8 if end - pos >= 8 else fault(pos)
    if wire == WIRE_FIXED32:
        return pos + 4 if end - pos >= 4 else fault(pos)
    return fault(pos)


@leaf_kernel
def _skip_group(buffer: NDArray[np.uint8], pos: int, end: int, number: int, depth: int, work: NDArray[np.int64]) -> int:
    """Position after the end tag of group `number`, which is at `depth` and whose start tag ends at `pos`."""
    if depth > MAX_DEPTH:
        return fault(pos)
    level = 0
    work[GROUPS_STACK] = number
    while True:
        tag, after = read_tag(buffer, pos, end)
        if after < 0:
            return after
        wire = tag & 7
        if wire == WIRE_GROUP_START:
            level += 1
            if depth + level > MAX_DEPTH:
                return fault(pos)
            work[GROUPS_STACK + level] = tag >> 3
            pos = after
        elif wire == WIRE_GROUP_END:
            if work[GROUPS_STACK + level] != tag >> 3:
                return fault(pos)
            if level == 0:
                return after
            level -= 1
            pos = after
        else:
            pos = skip_plain(buffer, after, end, wire)
            if pos < 0:
                return pos
