"""Puts encoded protobuf messages into one another without decoding them, and takes them apart: a repeated field is its
elements one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import DecodeError

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_MOST_VARINT_BYTES = 10
_TAG_BITS = 32
_MOST_TAG_BYTES = 5


def varint(value: int) -> bytes:
    """A non-negative number in protobuf's base-128 encoding.

    >>> varint(300).hex()
    'ac02'
    """
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def message_field(number: int, encoded: bytes) -> bytes:
    """Tag and length that go before an encoded message (or string) to make it one element of field `number`.

    >>> (message_field(1, b"ab") + b"ab").hex()
    '0a026162'
    """
    return length_prefix(number, len(encoded))


def length_prefix(number: int, length: int) -> bytes:
    """The same for an element of `length` bytes.

    >>> length_prefix(1, 2).hex()
    '0a02'
    """
    return varint(number << 3 | _LENGTH) + varint(length)


def read_fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of the fields of a message, in their order: an int of 64 bits of a varint, a view of what has a
    length. What has four or eight bytes is passed over.

    Raises DecodeError where the bytes are no message, or hold a group.

    >>> [(number, value if isinstance(value, int) else bytes(value)) for number, value in read_fields(
    ...     memoryview(bytes.fromhex("0a026162" "10ac02")))]
    [(1, b'ab'), (2, 300)]
    """
    pos, end = 0, len(message)
    while pos < end:
        start = pos
        tag, pos = _read_varint(message, pos)
        number, wire_type = tag >> 3, tag & 7
        if not number or tag >> _TAG_BITS or pos - start > _MOST_TAG_BYTES:
            raise DecodeError(f"no field begins at byte {start}")
        if wire_type == _VARINT:
            value, pos = _read_varint(message, pos)
            yield number, value
        elif wire_type == _LENGTH:
            length, pos = _read_varint(message, pos)
            if length > end - pos:
                raise DecodeError(f"the field at byte {start} is cut off")
            yield number, message[pos : pos + length]
            pos += length
        elif wire_type in _FIXED_BYTES:
            pos += _FIXED_BYTES[wire_type]
            if pos > end:
                raise DecodeError(f"the field at byte {start} is cut off")
        else:
            raise DecodeError(f"the field at byte {start} is of wire type {wire_type}")


def _read_varint(message: memoryview, pos: int) -> tuple[int, int]:
    """Value modulo 2**64, position after it."""
    value = 0
    for count, byte in enumerate(message[pos : pos + _MOST_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, pos + count + 1
    raise DecodeError(f"the number at byte {pos} has no end")
