"""Events as a program writes them, and as they travel."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from userprofile.v1 import event_pb2

_NS = 1_000_000_000
_EVENTS_TAG = b"\x0a"


@dataclass(frozen=True)
class Event:
    """Something that a user did.

    >>> Event("u1", "view", attributes={"color": "red", "price": 12900}).user_id
    'u1'
    """

    user_id: str
    type: str
    time: dt.datetime | float | None = None
    """With a time zone, or seconds since 1970; None is the time of arrival."""
    event_id: str = ""
    """Where set, the event counts once within the service's dedupe window."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Text, numbers, booleans, None, lists and mappings of them."""

    def to_message(self) -> event_pb2.Event:
        """The event as userprofile.v1.Event.

        Raises:
            TypeError: an attribute is of a type that JSON does not know.
            ValueError: the time has no zone.
        """
        message = event_pb2.Event(user_id=self.user_id, type=self.type, event_id=self.event_id)
        if isinstance(self.time, dt.datetime):
            if self.time.tzinfo is None:
                raise ValueError(f"time {self.time} has no time zone: add tzinfo, such as datetime.UTC")
            message.time.FromDatetime(self.time.astimezone(dt.UTC))
        elif self.time is not None:
            message.time.FromNanoseconds(round(self.time * _NS))
        fields = message.attributes.fields
        for name, value in self.attributes.items():
            # The common types go in directly; `Struct.update` takes several times as long.
            if isinstance(value, str):
                fields[name].string_value = value
            elif isinstance(value, bool):
                fields[name].bool_value = value
            elif isinstance(value, int | float):
                fields[name].number_value = value
            elif value is None:
                fields[name].null_value = 0  # type: ignore[assignment]
            elif isinstance(value, Mapping):
                fields[name].struct_value.update(dict(value))
            elif isinstance(value, list | tuple):
                fields[name].list_value.extend(value)
            else:
                raise TypeError(f"attribute {name!r} of user {self.user_id!r} is a {type(value).__name__}: not JSON")
        return message


def frame(serialized: bytes) -> bytes:
    """A serialized Event as one element of a batch's `events`."""
    size = len(serialized)
    prefix = bytearray(_EVENTS_TAG)
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    prefix.append(size)
    return bytes(prefix) + serialized


def frame_all(events: Iterable[Event]) -> list[bytes]:
    """Each event as one element of a batch's `events`."""
    return [frame(event.to_message().SerializeToString()) for event in events]
