"""google.protobuf.Value inside an attribute, as kernels: what it holds, and whether everything nested in it is
well-formed.

    Struct      1 fields: map<string, Value> = repeated entry        ListValue   1 values: repeated Value
    entry       1 key, 2 value
    Value       oneof: 1 null_value, 2 number_value, 3 string_value, 4 bool_value, 5 struct_value, 6 list_value

A structure inside an attribute is checked and never read: no feature uses one. The check walks it with an explicit
stack.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.kernel import leaf_kernel, load_f64
from profile_service.wire.protobuf import (
    MAX_DEPTH,
    fault,
    is_utf8,
    read_length,
    read_tag,
    read_varint,
    skip_unknown,
    utf8_fault,
)
from profile_service.wire.work import ENDS_STACK, KINDS_STACK, VALUE_KIND, VALUE_LENGTH, VALUE_OFFSET

KIND_NULL = 0
"""null_value, or a Value with nothing set: the attribute counts as absent."""
KIND_NUMBER = 1
KIND_TEXT = 2
KIND_BOOL = 3
KIND_STRUCT = 4
KIND_LIST = 5
KIND_NOT_FINITE = 6
"""A number that is NaN or infinite."""
KIND_HUGE = 7
"""A number beyond `MOST_NUMBER`."""

MOST_NUMBER = 1e100
"""The largest number taken, either way: squares of larger ones would overflow, and spoil the population's sums."""

KIND_NAMES = ("null", "a number", "text", "a bool", "a struct", "a list", "NaN or infinite", "beyond 1e100")

# Kinds of the messages on the stack.
_STRUCT = 0
_ENTRY = 1
_VALUE = 2
_LIST = 3


@leaf_kernel
def read_value(
    buffer: NDArray[np.uint8],
    pos: int,
    end: int,
    depth: int,
    work: NDArray[np.int64],
) -> int:
    """Merges the Value message in [pos, end), at `depth`, into the VALUE slots of `work`; returns `end` or a fault.

    The member sent last wins. A struct or list sent again is merged into the one before, so their sizes add up.
    """
    while pos < end:
        start = pos
        tag, pos = read_tag(buffer, pos, end)
        if pos < 0:
            return pos
        if tag == 0x1A:
            length, pos = read_length(buffer, pos, end)
            if pos < 0:
                return pos
            if not is_utf8(buffer, pos, length):
                return utf8_fault(pos)
            work[VALUE_KIND] = KIND_TEXT
            work[VALUE_OFFSET] = pos
            work[VALUE_LENGTH] = length
            pos += length
        elif tag == 0x11:
            if end - pos < 8:
                return fault(start)
            number = load_f64(buffer, pos)
            work[VALUE_KIND] = KIND_NUMBER if np.isfinite(number) else KIND_NOT_FINITE
            if np.isfinite(number) and abs(number) > MOST_NUMBER:
                work[VALUE_KIND] = KIND_HUGE
            work[VALUE_OFFSET] = pos
            work[VALUE_LENGTH] = 8
            pos += 8
        elif tag == 0x08 or tag == 0x20:
            _, pos = read_varint(buffer, pos, end)
            if pos < 0:
                return pos
            work[VALUE_KIND] = KIND_NULL if tag == 0x08 else KIND_BOOL
            work[VALUE_LENGTH] = 1
        elif tag == 0x2A or tag == 0x32:
            kind = KIND_STRUCT if tag == 0x2A else KIND_LIST
            length, pos = read_length(buffer, pos, end)
            if pos < 0:
                return pos
            pos = _check_nested(buffer, pos, pos + length, _STRUCT if tag == 0x2A else _LIST, depth + 1, work)
            if pos < 0:
                return pos
            work[VALUE_LENGTH] = length + (work[VALUE_LENGTH] if work[VALUE_KIND] == kind else 0)
            work[VALUE_KIND] = kind
        else:
            pos = skip_unknown(buffer, pos, end, tag, depth, work)
            if pos < 0:
                return pos
    return pos


@leaf_kernel
def _check_nested(buffer: NDArray[np.uint8], pos: int, end: int, kind: int, depth: int, work: NDArray[np.int64]) -> int:
    """Whether the message of `kind` in [pos, end), at `depth`, is well-formed all the way down: `end` or a fault."""
    if depth > MAX_DEPTH:
        return fault(pos)
    level = 0
    work[KINDS_STACK] = kind
    work[ENDS_STACK] = end
    while True:
        if pos == work[ENDS_STACK + level]:
            if level == 0:
                return pos
            level -= 1
            continue
        kind = work[KINDS_STACK + level]
        limit = work[ENDS_STACK + level]
        start = pos
        tag, pos = read_tag(buffer, pos, limit)
        if pos < 0:
            return pos
        child = -1
        if tag == 0x0A:
            if kind == _STRUCT:
                child = _ENTRY
            elif kind == _LIST:
                child = _VALUE
        elif kind == _ENTRY:
            if tag == 0x12:
                child = _VALUE
        elif kind == _VALUE:
            if tag == 0x2A:
                child = _STRUCT
            elif tag == 0x32:
                child = _LIST
        if child >= 0:
            length, pos = read_length(buffer, pos, limit)
            if pos < 0:
                return pos
            level += 1
            if depth + level > MAX_DEPTH:
                return fault(start)
            work[KINDS_STACK + level] = child
            work[ENDS_STACK + level] = pos + length
        elif (kind == _ENTRY and tag == 0x0A) or (kind == _VALUE and tag == 0x1A):
            length, pos = read_length(buffer, pos, limit)
            if pos < 0:
                return pos
            if not is_utf8(buffer, pos, length):
                return utf8_fault(pos)
            pos += length
        else:
            # Numbers, bools and nulls need no more than to be well-formed: as unknown fields.
            pos = skip_unknown(buffer, pos, limit, tag, depth + level, work)
            if pos < 0:
                return pos
