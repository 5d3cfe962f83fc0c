"""The rules of an event in plain Python over what protobuf itself parsed: what the kernels are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from profile_service.config import Limits
from profile_service.wire.plan import WirePlan
from tests.wire.encoding import FIXED64, LENGTH, VARINT, delimited, fields
from userprofile.v1 import event_pb2, event_service_pb2

UNLIMITED = Limits(
    user_id_bytes=1 << 40,
    event_id_bytes=1 << 40,
    attributes_per_event=1 << 40,
    attribute_bytes=1 << 40,
    future_s=9e9,
)

_MEMBER = {(1, VARINT): "null", (2, FIXED64): "number", (3, LENGTH): "text", (4, VARINT): "bool"} | {
    (5, LENGTH): "struct",
    (6, LENGTH): "list",
}


def frame(events: list[bytes]) -> bytes:
    """An IngestEventsRequest of these encoded events."""
    return b"".join(delimited(1, event) for event in events)


def parse(event: bytes) -> event_pb2.Event | None:
    """What protobuf reads, inside a request; None where it refuses."""
    try:
        return event_service_pb2.IngestEventsRequest.FromString(frame([event])).events[0]
    except DecodeError:
        return None


def verdict(encoded: bytes, plan: WirePlan, limits: Limits, now_ns: int) -> str:
    """Short name of the first thing that is wrong with an event, or "valid"."""
    event = parse(encoded)
    if event is None:
        return "malformed"
    if not 1 <= len(event.user_id.encode()) <= limits.user_id_bytes:
        return "user_id"
    if event.type not in plan.event_types:
        return "type"
    if event.HasField("time"):
        time_ns = event.time.seconds * 10**9 + event.time.nanos
        years = -62_135_596_800 <= event.time.seconds <= 253_402_300_799
        if not years or not 0 <= event.time.nanos < 10**9:
            return "time"
        if not -9_223_372_036 <= event.time.seconds <= 9_223_372_035 or time_ns > now_ns + limits.future_s * 1e9:
            return "time"
    if len(event.event_id.encode()) > limits.event_id_bytes:
        return "event_id"
    sizes = [size for number, wire, sent in fields(encoded) if (number, wire) == (5, LENGTH) for size in _sizes(sent)]
    if len(sizes) > limits.attributes_per_event:
        return "attribute_count"
    if any(size > limits.attribute_bytes for size in sizes):
        return "attribute_size"
    for name, value in event.attributes.fields.items():
        kind = value.WhichOneof("kind")
        if kind in (None, "null_value"):
            continue
        if name in plan.text_attributes and kind != "string_value":
            return "attribute_type"
        if name in plan.number_attributes and (kind != "number_value" or not abs(value.number_value) <= 1e100):
            return "attribute_type"
    return "valid"


def ignored_attributes(encoded: bytes, plan: WirePlan) -> int:
    """How many attributes were sent that are undeclared, or left out by protobuf for an unknown field in them."""
    declared = {name.encode() for name in (*plan.text_attributes, *plan.number_attributes)}
    sent = [part for number, wire, part in fields(encoded) if (number, wire) == (5, LENGTH)]
    return sum(_name(part) not in declared or _has_unknown(part) for struct in sent for part in _entries(struct))


def value_of(event: event_pb2.Event, name: str) -> str | float | None:
    """Text or number of an attribute as the columns should have it; None where absent."""
    if name not in event.attributes.fields:
        return None
    value = event.attributes.fields[name]
    kind = value.WhichOneof("kind")
    return None if kind in (None, "null_value") else getattr(value, kind)


@dataclass(frozen=True)
class Framing:
    """A batch as protobuf reads one whose events are mere bytes."""

    events: list[bytes]
    name: str
    sequence: int


def framing(message: bytes) -> Framing | None:
    """None where protobuf refuses what holds the events together."""
    try:
        parsed = _BATCH.FromString(message)
    except DecodeError:
        return None
    return Framing(list(parsed.events), parsed.name, parsed.sequence)  # type: ignore[attr-defined]


def _sizes(struct: bytes) -> list[int]:
    """Of each attribute as sent: its name's or its value's size, whichever is larger."""
    return [max(len(_name(part)), _value_size(part)) for part in _entries(struct)]


def _entries(struct: bytes) -> list[bytes]:
    return [part for number, wire, part in fields(struct) if (number, wire) == (1, LENGTH)]


def _has_unknown(part: bytes) -> bool:
    return any((number, wire) not in ((1, LENGTH), (2, LENGTH)) for number, wire, _ in fields(part))


def _name(part: bytes) -> bytes:
    return next((key for number, wire, key in reversed(fields(part)) if (number, wire) == (1, LENGTH)), b"")


def _value_size(part: bytes) -> int:
    """Messages sent in pieces are merged, which is what parsing the pieces joined does."""
    value = b"".join(piece for number, wire, piece in fields(part) if (number, wire) == (2, LENGTH))
    kind, size = "null", 0
    for number, wire, payload in fields(value):
        member = _MEMBER.get((number, wire))
        if member in ("struct", "list"):
            size = len(payload) + (size if kind == member else 0)
        elif member:
            size = {"null": 1, "bool": 1, "number": 8}.get(member, len(payload))
        kind = member or kind
    return size


def _batch_class() -> type[Message]:
    file = descriptor_pb2.FileDescriptorProto(name="wire_oracle.proto", package="wire_oracle", syntax="proto3")
    batch = file.message_type.add(name="Batch")
    field = descriptor_pb2.FieldDescriptorProto
    batch.field.add(name="events", number=1, type=field.TYPE_BYTES, label=field.LABEL_REPEATED)
    batch.field.add(name="name", number=2, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    batch.field.add(name="sequence", number=3, type=field.TYPE_INT64, label=field.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("wire_oracle.Batch"))


_BATCH = _batch_class()
