"""Encoded messages as JSON, without a message in between: proto3's JSON mapping with lowerCamelCase names and default
values written out, in one pass over the bytes.

    descriptor ─▶ JsonPlan.compile ─▶ tables        message types ─▶ | first field | last |
                                                    fields        ─▶ | number | kind | name | default | … |, by number
    bytes, tables ─▶ write ─▶ | { | "userId": | "u1" | , | "eventCount": | "5" | … |

The fields of a message come in the order of their numbers, the elements of one field together, as protobuf and our own
encoders write them. So what is passed over has its default, and is written before what comes. Bytes in another order,
and kinds of fields that no answer of the API has, are none of the kernel's: see `JsonPlan.write`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from numpy.typing import NDArray

from profile_service.domain.kernel import copy_bytes, inlined_kernel, leaf_kernel, load_u8, load_u64, to_i64
from profile_service.wire.decimal_text import put_digits, put_double_text
from profile_service.wire.protobuf import (
    WIRE_FIXED64,
    WIRE_LENGTH,
    WIRE_VARINT,
    fault,
    read_length,
    read_tag,
    read_varint,
    skip_plain,
)

# Columns of the table of fields.
_NUMBER, _KIND, _SHAPE, _BELOW, _NAME, _NAME_BYTES, _DEFAULT, _DEFAULT_BYTES = range(8)
"""`_BELOW` is the message type of a message, the map's entry of a map, and the first line of an enum's names."""
_COLUMNS = 8

# Kinds.
_STRING, _BOOL, _INT, _INT_TEXT, _UINT_TEXT, _DOUBLE, _ENUM, _MESSAGE, _TIME = range(9)
"""Integers of 64 bits are text in JSON."""

# Shapes.
_PLAIN, _PRESENT, _LIST, _MAP = range(4)
"""One value, written always; one that is written where it is set; many; many by their keys."""

_KINDS = {
    FieldDescriptor.TYPE_STRING: _STRING,
    FieldDescriptor.TYPE_BOOL: _BOOL,
    FieldDescriptor.TYPE_INT32: _INT,
    FieldDescriptor.TYPE_UINT32: _INT,
    FieldDescriptor.TYPE_INT64: _INT_TEXT,
    FieldDescriptor.TYPE_UINT64: _UINT_TEXT,
    FieldDescriptor.TYPE_DOUBLE: _DOUBLE,
    FieldDescriptor.TYPE_ENUM: _ENUM,
    FieldDescriptor.TYPE_MESSAGE: _MESSAGE,
}
_DEFAULTS = {
    _STRING: b'""',
    _BOOL: b"false",
    _INT: b"0",
    _INT_TEXT: b'"0"',
    _UINT_TEXT: b'"0"',
    _DOUBLE: b"0.0",
}

_NO_ROOM = -1
_NOT_READ = -2

_MOST_LEVELS = 32
"""Messages nested deeper are not read."""
_FRAME = 4
_SCALAR_BYTES = 40
"""At most of what is written for a number, a time, or between two values."""
_ESCAPED_BYTES = 6
"""At most of one character's, where it is written as an escape."""

_DAY_S = 86_400
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799
"""Years 1 to 9999."""


@dataclass(frozen=True)
class JsonPlan:
    """How the messages of one type are written."""

    messages: NDArray[np.int64]
    """(message types, 2) first and last line of their fields; the type itself is the first."""
    fields: NDArray[np.int64]
    """(fields, 8), those of a message together and by their numbers."""
    names: NDArray[np.int64]
    """(enum values, 3) number, and extent in `texts`; a line of extent 0 ends an enum."""
    texts: NDArray[np.uint8]

    @classmethod
    def compile(cls, descriptor: Descriptor) -> JsonPlan | None:
        """The plan for a message type; None where one of its fields is of a kind that no answer of the API has."""
        compiler = _Compiler()
        try:
            compiler.message(descriptor)
        except NotImplementedError:
            return None
        texts = np.frombuffer(bytes(compiler.texts) or b"\0", np.uint8)
        fields = np.array(compiler.fields, np.int64).reshape(-1, _COLUMNS)
        names = np.array(compiler.names, np.int64).reshape(-1, 3)
        return cls(np.array(compiler.extents, np.int64), fields, names, texts)

    def write(self, encoded: bytes) -> bytes | None:
        """An encoded message as JSON; None where its fields are in another order, or where it is no message."""
        size = 4 * len(encoded) + 1024
        buffer = np.frombuffer(encoded, np.uint8) if encoded else _EMPTY
        frames = np.empty(_MOST_LEVELS * _FRAME, np.int64)
        while True:
            out = np.empty(size, np.uint8)
            end = _write(buffer, len(encoded), self.messages, self.fields, self.names, self.texts, frames, out)
            if end >= 0:
                return out[:end].tobytes()
            if end == _NOT_READ:
                return None
            size *= 2


_EMPTY = np.frombuffer(b"\0", np.uint8)


class _Compiler:
    def __init__(self) -> None:
        self.extents: list[tuple[int, int]] = []
        self.fields: list[tuple[int, ...]] = []
        self.names: list[tuple[int, int, int]] = []
        self.texts = bytearray()
        self._numbers: dict[str, int] = {}

    def message(self, descriptor: Descriptor) -> int:
        """The number of a message type."""
        known = self._numbers.get(descriptor.full_name)
        if known is not None:
            return known
        number = self._numbers[descriptor.full_name] = len(self.extents)
        self.extents.append((0, 0))
        lines = [self._field(field) for field in sorted(descriptor.fields, key=lambda field: field.number)]
        self.extents[number] = (len(self.fields), len(self.fields) + len(lines))
        self.fields += lines
        return number

    def _field(self, field: FieldDescriptor) -> tuple[int, ...]:
        kind, below = self._kind(field)
        default = _DEFAULTS.get(kind, b"")
        if kind == _ENUM:
            assert field.enum_type is not None
            default = b'"' + field.enum_type.values_by_number[0].name.encode() + b'"'
        shape = _PRESENT if field.has_presence else _PLAIN
        if field.is_repeated:
            is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
            shape, default = (_MAP, b"{}") if is_map else (_LIST, b"[]")
        name = self._text(f'"{field.json_name}":'.encode())
        return field.number, kind, shape, below, *name, *self._text(default)

    def _kind(self, field: FieldDescriptor) -> tuple[int, int]:
        kind = _KINDS.get(field.type)
        if kind is None:
            raise NotImplementedError(field.full_name)
        if kind == _ENUM:
            assert field.enum_type is not None
            first = len(self.names)
            self.names += [(value.number, *self._text(f'"{value.name}"'.encode())) for value in field.enum_type.values]
            self.names.append((0, 0, 0))
            return kind, first
        if kind != _MESSAGE:
            return kind, 0
        assert field.message_type is not None
        if field.message_type.full_name == "google.protobuf.Timestamp":
            return _TIME, 0
        if field.message_type.full_name.startswith("google.protobuf."):
            raise NotImplementedError(field.message_type.full_name)
        return kind, self.message(field.message_type)

    def _text(self, text: bytes) -> tuple[int, int]:
        start = len(self.texts)
        self.texts += text
        return start, len(text)


@leaf_kernel
def _write(
    buffer: NDArray[np.uint8],
    size: int,
    messages: NDArray[np.int64],
    fields: NDArray[np.int64],
    names: NDArray[np.int64],
    texts: NDArray[np.uint8],
    frames: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> int:
    """Writes the first `size` bytes of `buffer` as JSON; returns its size, `_NO_ROOM`, or `_NOT_READ`."""
    room = len(out)
    pos, end = to_i64(0), to_i64(size)
    message = to_i64(0)
    cursor = messages[0, 0]
    opened = to_i64(-1)
    """The field whose list is open."""
    level = 0
    out[0] = 123
    at = 1
    while True:
        if room - at < 2 * _SCALAR_BYTES:
            return _NO_ROOM
        if pos >= end:
            if opened >= 0:
                at = _close(out, at, fields, opened)
            at = _put_defaults(out, at, room, fields, texts, cursor, messages[message, 1], to_i64(1 << 32))
            if at < 0 or pos > end:
                return _NO_ROOM if at < 0 else _NOT_READ
            out[at] = 125
            at += 1
            if level == 0:
                return at
            level -= 1
            frame = level * _FRAME
            message, cursor, end, opened = frames[frame], frames[frame + 1], frames[frame + 2], frames[frame + 3]
            continue
        tag, pos = read_tag(buffer, pos, end)
        if pos < 0:
            return _NOT_READ
        number, wire = tag >> 3, tag & 7
        if opened >= 0 and fields[opened, _NUMBER] == number:
            f = opened
            out[at] = 44
            at += 1
        else:
            if opened >= 0:
                at = _close(out, at, fields, opened)
                opened = to_i64(-1)
            last = messages[message, 1]
            at = _put_defaults(out, at, room, fields, texts, cursor, last, number)
            if at < 0:
                return _NO_ROOM
            while cursor < last and fields[cursor, _NUMBER] < number:
                cursor += 1
            if cursor == last or fields[cursor, _NUMBER] != number:
                if cursor > messages[message, 0] and fields[cursor - 1, _NUMBER] >= number:
                    return _NOT_READ
                pos = skip_plain(buffer, pos, end, wire)
                if pos < 0:
                    return _NOT_READ
                continue
            f = cursor
            cursor += 1
            if room - at < fields[f, _NAME_BYTES] + 2 * _SCALAR_BYTES:
                return _NO_ROOM
            at = _put_name(out, at, fields, texts, f)
            if fields[f, _SHAPE] >= _LIST:
                opened = f
                out[at] = 91 if fields[f, _SHAPE] == _LIST else 123
                at += 1
        kind, shape = fields[f, _KIND], fields[f, _SHAPE]
        value_end = end
        if shape == _MAP:
            # An entry is a message of two fields, of which each may be left out.
            if wire != WIRE_LENGTH:
                return _NOT_READ
            length, pos = read_length(buffer, pos, end)
            if pos < 0:
                return _NOT_READ
            value_end = pos + length
            entry = messages[fields[f, _BELOW], 0]
            pos, at = _put_key(buffer, pos, value_end, fields, texts, entry, out, at)
            if pos < 0 or at < 0:
                return _NOT_READ if pos < 0 else _NO_ROOM
            f = entry + 1
            kind = fields[f, _KIND]
            wire = WIRE_LENGTH
            if pos < value_end:
                tag, pos = read_tag(buffer, pos, value_end)
                if pos < 0 or tag >> 3 != 2:
                    return _NOT_READ
                wire = tag & 7
            elif kind != _MESSAGE:
                if room - at < fields[f, _DEFAULT_BYTES] + 2 * _SCALAR_BYTES:
                    return _NO_ROOM
                at = _put_text(out, at, texts, fields[f, _DEFAULT], fields[f, _DEFAULT_BYTES])
                continue
            else:
                value_end = to_i64(-1)
        if kind == _MESSAGE:
            if wire != WIRE_LENGTH or level == _MOST_LEVELS:
                return _NOT_READ
            length = to_i64(0)
            if value_end >= 0:
                length, pos = read_length(buffer, pos, value_end)
                if pos < 0:
                    return _NOT_READ
            if shape == _MAP and value_end >= 0 and pos + length != value_end:
                return _NOT_READ
            frame = level * _FRAME
            frames[frame], frames[frame + 1], frames[frame + 2], frames[frame + 3] = message, cursor, end, opened
            level += 1
            message = fields[f, _BELOW]
            cursor, end, opened = messages[message, 0], pos + length, to_i64(-1)
            out[at] = 123
            at += 1
            continue
        if shape == _LIST and wire == WIRE_LENGTH and kind != _STRING and kind != _TIME:
            length, pos = read_length(buffer, pos, end)
            if pos < 0:
                return _NOT_READ
            packed_end = pos + length
            wire = WIRE_FIXED64 if kind == _DOUBLE else WIRE_VARINT
            first = True
            if length == 0:
                return _NOT_READ
            while pos < packed_end:
                if room - at < 2 * _SCALAR_BYTES:
                    return _NO_ROOM
                if not first:
                    out[at] = 44
                    at += 1
                first = False
                pos, at = _put_value(buffer, pos, packed_end, wire, kind, fields[f, _BELOW], names, texts, out, at)
                if pos < 0 or at < 0:
                    return _NOT_READ if pos < 0 else _NO_ROOM
            continue
        pos, at = _put_value(buffer, pos, value_end, wire, kind, fields[f, _BELOW], names, texts, out, at)
        if pos < 0 or at < 0:
            return _NOT_READ if pos < 0 else _NO_ROOM
        if shape == _MAP and pos != value_end:
            return _NOT_READ


@inlined_kernel
def _put_text(out: NDArray[np.uint8], at: int, texts: NDArray[np.uint8], place: int, size: int) -> int:
    copy_bytes(out, to_i64(at), texts, to_i64(place), to_i64(size))
    return at + size


@inlined_kernel
def _put_name(out: NDArray[np.uint8], at: int, fields: NDArray[np.int64], texts: NDArray[np.uint8], f: int) -> int:
    """A comma where something stands before, and the name."""
    if out[at - 1] != 123:
        out[at] = 44
        at += 1
    return _put_text(out, at, texts, fields[f, _NAME], fields[f, _NAME_BYTES])


@inlined_kernel
def _close(out: NDArray[np.uint8], at: int, fields: NDArray[np.int64], opened: int) -> int:
    out[at] = 93 if fields[opened, _SHAPE] == _LIST else 125
    return at + 1


@leaf_kernel
def _put_defaults(
    out: NDArray[np.uint8],
    at: int,
    room: int,
    fields: NDArray[np.int64],
    texts: NDArray[np.uint8],
    cursor: int,
    last: int,
    number: int,
) -> int:
    """The defaults of the fields from `cursor` on whose numbers are below `number`."""
    while cursor < last and fields[cursor, _NUMBER] < number:
        if fields[cursor, _SHAPE] != _PRESENT:
            if room - at < fields[cursor, _NAME_BYTES] + fields[cursor, _DEFAULT_BYTES] + 2 * _SCALAR_BYTES:
                return _NO_ROOM
            at = _put_name(out, at, fields, texts, cursor)
            at = _put_text(out, at, texts, fields[cursor, _DEFAULT], fields[cursor, _DEFAULT_BYTES])
        cursor += 1
    return at


@leaf_kernel
def _put_key(
    buffer: NDArray[np.uint8],
    pos: int,
    end: int,
    fields: NDArray[np.int64],
    texts: NDArray[np.uint8],
    f: int,
    out: NDArray[np.uint8],
    at: int,
) -> tuple[int, int]:
    """The key of a map's entry, always text, and a colon: where its value begins, and where the text ends."""
    kind = fields[f, _KIND]
    quoted = kind in (_INT, _BOOL)
    if quoted:
        out[at] = 34
        at += 1
    given = False
    if pos < end:
        tag, after = read_tag(buffer, pos, end)
        if after < 0:
            return after, at
        if tag >> 3 == 1:
            given = True
            # No key is an enum.
            pos, at = _put_value(buffer, after, end, tag & 7, kind, 0, fields, texts, out, at)
            if pos < 0 or at < 0:
                return pos, at
    if not given:
        at = _put_text(out, at, texts, fields[f, _DEFAULT], fields[f, _DEFAULT_BYTES])
    if quoted:
        out[at] = 34
        at += 1
    out[at] = 58
    return pos, at + 1


@leaf_kernel
def _put_value(
    buffer: NDArray[np.uint8],
    pos: int,
    end: int,
    wire: int,
    kind: int,
    below: int,
    names: NDArray[np.int64],
    texts: NDArray[np.uint8],
    out: NDArray[np.uint8],
    at: int,
) -> tuple[int, int]:
    """One value that is no message: where it ends in `buffer`, a fault where it is none, and where its text ends,
    `_NO_ROOM` where there is not enough."""
    if kind == _DOUBLE:
        if wire != WIRE_FIXED64 or end - pos < 8:
            return fault(pos), at
        return pos + 8, put_double_text(out, at, load_u64(buffer, pos))
    if kind in (_STRING, _TIME):
        if wire != WIRE_LENGTH:
            return fault(pos), at
        length, pos = read_length(buffer, pos, end)
        if pos < 0:
            return pos, at
        if kind == _TIME:
            return _put_time(buffer, pos, pos + length, out, at)
        if len(out) - at < _ESCAPED_BYTES * length + 2 * _SCALAR_BYTES:
            return pos, to_i64(_NO_ROOM)
        return pos + length, _put_string(buffer, pos, length, out, at)
    if wire != WIRE_VARINT:
        return fault(pos), at
    value, pos = read_varint(buffer, pos, end)
    if pos < 0:
        return pos, at
    if kind == _BOOL:
        if value != np.uint64(0):
            return pos, _put_text(out, at, _TRUE, 0, 4)
        return pos, _put_text(out, at, _FALSE, 0, 5)
    if kind == _ENUM:
        line = below
        while names[line, 2] > 0:
            if names[line, 0] == to_i64(value):
                if len(out) - at < names[line, 2] + 2 * _SCALAR_BYTES:
                    return pos, to_i64(_NO_ROOM)
                return pos, _put_text(out, at, texts, names[line, 1], names[line, 2])
            line += 1
    if kind in (_INT_TEXT, _UINT_TEXT):
        out[at] = 34
        at += 1
    if kind != _UINT_TEXT and to_i64(value) < 0:
        out[at] = 45
        at += 1
        value = np.uint64(0) - value
    at = put_digits(out, at, value)
    if kind in (_INT_TEXT, _UINT_TEXT):
        out[at] = 34
        at += 1
    return pos, at


_TRUE = np.frombuffer(b"true", np.uint8)
_FALSE = np.frombuffer(b"false", np.uint8)
_HEXADECIMAL = np.frombuffer(b"0123456789abcdef", np.uint8)
_SHORT_ESCAPES = np.zeros(32, np.uint8)
for _letter, _code in zip(b"btnfr", (8, 9, 10, 12, 13), strict=True):
    _SHORT_ESCAPES[_code] = _letter


@leaf_kernel
def _put_string(buffer: NDArray[np.uint8], pos: int, length: int, out: NDArray[np.uint8], at: int) -> int:
    """Text between quotes; control characters, quotes and backslashes are escaped."""
    out[at] = 34
    at += 1
    for k in range(pos, pos + length):
        character = load_u8(buffer, k)
        if character == 34 or character == 92:
            out[at] = 92
            at += 1
        elif character < 32:
            out[at] = 92
            if _SHORT_ESCAPES[character] != 0:
                out[at + 1] = _SHORT_ESCAPES[character]
                at += 2
            else:
                out[at + 1] = 117
                out[at + 2] = out[at + 3] = 48
                out[at + 4] = _HEXADECIMAL[character >> 4]
                out[at + 5] = _HEXADECIMAL[character & 15]
                at += 6
            continue
        out[at] = character
        at += 1
    out[at] = 34
    return at + 1


@leaf_kernel
def _put_time(buffer: NDArray[np.uint8], pos: int, end: int, out: NDArray[np.uint8], at: int) -> tuple[int, int]:
    """A Timestamp as RFC 3339 has it, with three, six or nine digits of a second where it has a fraction."""
    seconds, nanos = to_i64(0), to_i64(0)
    while pos < end:
        tag, pos = read_tag(buffer, pos, end)
        if pos < 0 or (tag != 1 << 3 and tag != 2 << 3):
            return fault(max(pos, 0)), at
        value, pos = read_varint(buffer, pos, end)
        if pos < 0:
            return pos, at
        if tag == 1 << 3:
            seconds = to_i64(value)
        else:
            nanos = to_i64(value)
    if seconds < _FIRST_SECOND or seconds > _LAST_SECOND or nanos < 0 or nanos > 999_999_999:
        return fault(pos), at
    days = seconds // _DAY_S
    rest = seconds - days * _DAY_S
    # Years begin in March here, so that a leap day is a year's last; an era is 400 years.
    shifted = days + 719_468
    era = shifted // 146_097
    day = shifted - era * 146_097
    year = (day - day // 1_460 + day // 36_524 - day // 146_096) // 365
    day -= 365 * year + year // 4 - year // 100
    march = (5 * day + 2) // 153
    month = march + 3 if march < 10 else march - 9
    year += era * 400 + (1 if month <= 2 else 0)
    out[at] = 34
    at = _put_fixed(out, at + 1, year, 4, 45)
    at = _put_fixed(out, at, month, 2, 45)
    at = _put_fixed(out, at, day - (153 * march + 2) // 5 + 1, 2, 84)
    at = _put_fixed(out, at, rest // 3_600, 2, 58)
    at = _put_fixed(out, at, rest // 60 % 60, 2, 58)
    at = _put_fixed(out, at, rest % 60, 2, 90 if nanos == 0 else 46)
    if nanos != 0:
        if nanos % 1_000_000 == 0:
            at = _put_fixed(out, at, nanos // 1_000_000, 3, 90)
        elif nanos % 1_000 == 0:
            at = _put_fixed(out, at, nanos // 1_000, 6, 90)
        else:
            at = _put_fixed(out, at, nanos, 9, 90)
    out[at] = 34
    return pos, at + 1


@inlined_kernel
def _put_fixed(out: NDArray[np.uint8], at: int, number: int, size: int, following: int) -> int:
    """A number of a fixed count of digits, and the character that follows it."""
    for k in range(at + size - 1, at - 1, -1):
        out[k] = np.uint8(48 + number % 10)
        number //= 10
    out[at + size] = following
    return at + size + 1
