"""Encoded requests as messages."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from profile_service.errors import InvalidArgument

Request = TypeVar("Request", bound=Message)


def parse(kind: type[Request], encoded: bytes) -> Request:
    """The message that the bytes encode. Raises InvalidArgument where they do not."""
    try:
        return kind.FromString(encoded)
    except DecodeError:
        raise InvalidArgument("", f"the bytes are not a {kind.DESCRIPTOR.full_name}") from None
