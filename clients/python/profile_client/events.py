"""Events as a program writes them, and as they travel.

A batch's `events` are field 1 of its message, so an event travels as   0A | length (varint) | serialized Event   and
a batch's events are these elements one after the other.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import struct_pb2

from userprofile.v1 import event_pb2

EVENT_BYTES = 15 << 20
"""Most bytes of one event: with room to spare in a message of 16 MiB. The service's own limits are far lower."""

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
    """Text, numbers, booleans, None, lists and mappings of them. A number stays a number: an id that the schema takes
    as text is to be given as text."""

    def to_message(self) -> event_pb2.Event:
        """The event as userprofile.v1.Event.

        Raises:
            TypeError: a field or an attribute is of a type that an event cannot hold.
            ValueError: the time has no zone or is no time, a number cannot be held exactly, or text is not Unicode.
        """
        try:
            message = event_pb2.Event(user_id=self.user_id, type=self.type, event_id=self.event_id)
        except TypeError:
            self._check_text()
            raise
        if isinstance(self.time, dt.datetime):
            if self.time.tzinfo is None:
                raise ValueError(f"time {self.time} has no time zone: add tzinfo, such as datetime.UTC")
            message.time.FromDatetime(self.time.astimezone(dt.UTC))
        elif self.time is not None:
            seconds: Any = self.time
            if not isinstance(seconds, int | float) or not math.isfinite(seconds):
                raise ValueError(f"time {seconds!r} is neither a datetime nor seconds since 1970")
            message.time.FromNanoseconds(round(seconds * _NS))
        if self.attributes:
            set_attributes(message.attributes, self.attributes)
        return message

    def _check_text(self) -> None:
        for name in ("user_id", "type", "event_id"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be text, is {value!r} ({type(value).__name__})")


def set_attributes(message: struct_pb2.Struct, attributes: Mapping[str, Any]) -> None:
    """Puts attributes into a message.

    Raises:
        TypeError: one is of a type that JSON does not know.
        ValueError: a number has no exact double.
    """
    fields = message.fields
    for name, value in attributes.items():
        # The two common types go in directly: every call counts here.
        kind = value.__class__
        if kind is str:
            fields[_text(name)].string_value = value
        elif kind is float:
            fields[_text(name)].number_value = value
        else:
            _set(fields[_text(name)], value, name)


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"the name of an attribute must be text, is {name!r} ({type(name).__name__})")
    return name


def _set(message: struct_pb2.Value, value: Any, path: str) -> None:
    """Puts a value where attribute `path` belongs."""
    if value is None:
        message.null_value = struct_pb2.NULL_VALUE
    elif isinstance(value, str):
        message.string_value = value
    elif isinstance(value, bool):
        message.bool_value = value
    elif isinstance(value, float):
        message.number_value = value
    elif isinstance(value, int):
        # JSON's numbers are doubles; a long id would silently become another one.
        if abs(value) > 1 << 53 and (value.bit_length() > 1023 or int(float(value)) != value):
            raise ValueError(f"attribute {path!r}: {value} has no exact double; if it is an id, give it as text")
        message.number_value = value
    elif isinstance(value, Mapping):
        message.struct_value.SetInParent()
        for name, held in value.items():
            _set(message.struct_value.fields[_text(name)], held, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        message.list_value.SetInParent()
        for index, held in enumerate(value):
            _set(message.list_value.values.add(), held, f"{path}[{index}]")
    else:
        raise TypeError(
            f"attribute {path!r} is a {type(value).__name__}; "
            "what it can be is text, a number, a boolean, None, a list or a mapping"
        )


def frame(serialized: bytes) -> bytes:
    """A serialized Event as one element of a batch's `events`.

    Raises:
        ValueError: it is too large for any message.
    """
    size = len(serialized)
    if size < 0x80:
        return b"\x0a%c" % size + serialized
    if size < 0x4000:
        return b"\x0a%c%c" % (size & 0x7F | 0x80, size >> 7) + serialized
    if size > EVENT_BYTES:
        raise ValueError(f"an event must be at most {EVENT_BYTES} bytes, is {size}")
    prefix = bytearray(_EVENTS_TAG)
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    prefix.append(size)
    return bytes(prefix) + serialized


def frame_all(events: Iterable[Event]) -> Iterator[bytes]:
    """Each event as one element of a batch's `events`."""
    return (frame(event.to_message().SerializeToString()) for event in events)


def unframe(body: bytes) -> Iterator[bytes]:
    """The serialized events of a batch's body, in order.

    >>> list(unframe(frame(b"one") + frame(b"two")))
    [b'one', b'two']
    """
    at = 0
    while at < len(body):
        size, shift, at = 0, 0, at + 1
        while True:
            byte = body[at]
            at += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        yield body[at : at + size]
        at += size
