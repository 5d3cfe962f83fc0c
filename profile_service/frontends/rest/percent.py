"""Percent-encoding as RFC 3986 has it, read strictly: what is no escape, or no UTF-8, is refused and not guessed at."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from profile_service.errors import InvalidArgument

_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


def decode(raw: bytes, field: str) -> str:
    """Text of a part of a URL; raises InvalidArgument naming `field`."""
    if b"%" in raw:
        if _BROKEN_ESCAPE.search(raw):
            raise InvalidArgument(field, "must be percent-encoded: % needs two hexadecimal digits, itself is %25")
        raw = unquote_to_bytes(raw)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(field, f"must be UTF-8 when percent-decoded, byte {error.start} is not") from None


def decode_query(raw: bytes, field: str) -> str:
    """The same for a query, where a plus sign stands for a space."""
    return decode(raw.replace(b"+", b" "), field)
