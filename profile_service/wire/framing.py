"""Puts encoded protobuf messages into one another without decoding them: a repeated field is its elements one after the
other."""

from __future__ import annotations


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
    return varint(number << 3 | 2) + varint(len(encoded))
