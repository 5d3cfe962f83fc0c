"""An ApplyRequest (see shard.proto) to and from bytes without a copy of its events: written around them, and read as
views into the received message. They are nearly all of it, and protobuf would copy them on each serialisation, each
parse and each access.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from profile_service.wire.framing import length_prefix, read_fields
from userprofile.internal.v1 import shard_pb2

_REQUEST = shard_pb2.ApplyRequest
_PART = shard_pb2.ApplyRequest.Part

REQUEST_PREFIX = "request:"
"""A producer id that starts so names a single request, which has no successor."""

_NUMBERS_BYTES = 48
"""Of a part's numbers, with tags and lengths."""

_INT32_BITS = 32
_INT64_BITS = 64


@dataclass(frozen=True, slots=True)
class ApplyPart:
    """An ApplyRequest.Part; its fields are described there."""

    producer_id: str = ""
    sequence: int = 0
    acknowledged_sequence: int = 0
    arrival_time_ns: int = 0
    events: bytes | memoryview = b""
    """May be a view into a message, and keeps that."""
    event_count: int = 0

    @property
    def size_bytes(self) -> int:
        """What it takes in memory and in a message, about; what bounds of queues count."""
        return len(self.events) + len(self.producer_id) + _NUMBERS_BYTES


def encode_part(part: ApplyPart) -> tuple[bytes | memoryview, ...]:
    """A part in pieces, the events not copied; the fields of a message may stand in any order."""
    rest = _PART(
        producer_id=part.producer_id,
        sequence=part.sequence,
        acknowledged_sequence=part.acknowledged_sequence,
        arrival_time_ns=part.arrival_time_ns,
        event_count=part.event_count,
    ).SerializeToString()
    if not part.events:
        return (rest,)
    return rest + length_prefix(_PART.EVENTS_FIELD_NUMBER, len(part.events)), part.events


def decode_part(encoded: bytes | memoryview) -> ApplyPart:
    """A part, its events as a view. Raises DecodeError."""
    producer_id, events = "", memoryview(b"")
    numbers = dict.fromkeys(_NUMBERS, 0)
    for number, value in read_fields(memoryview(encoded)):
        if isinstance(value, int):
            if number in _NUMBERS:
                numbers[number] = _signed(value, _NUMBERS[number])
        elif number == _PART.EVENTS_FIELD_NUMBER:
            events = value
        elif number == _PART.PRODUCER_ID_FIELD_NUMBER:
            try:
                producer_id = str(value, "utf-8")
            except UnicodeDecodeError as error:
                raise DecodeError(f"producer_id is not UTF-8: {error}") from None
    return ApplyPart(
        producer_id=producer_id,
        sequence=numbers[_PART.SEQUENCE_FIELD_NUMBER],
        acknowledged_sequence=numbers[_PART.ACKNOWLEDGED_SEQUENCE_FIELD_NUMBER],
        arrival_time_ns=numbers[_PART.ARRIVAL_TIME_NS_FIELD_NUMBER],
        events=events,
        event_count=numbers[_PART.EVENT_COUNT_FIELD_NUMBER],
    )


_NUMBERS = {
    _PART.SEQUENCE_FIELD_NUMBER: _INT64_BITS,
    _PART.ACKNOWLEDGED_SEQUENCE_FIELD_NUMBER: _INT64_BITS,
    _PART.ARRIVAL_TIME_NS_FIELD_NUMBER: _INT64_BITS,
    _PART.EVENT_COUNT_FIELD_NUMBER: _INT32_BITS,
}
"""A part's fields that are numbers, and how many bits of them count."""


def encode_request(request_id: int, epoch: int, parts: Sequence[ApplyPart]) -> list[bytes | memoryview]:
    """An encoded ApplyRequest in pieces, the events not copied."""
    pieces: list[bytes | memoryview] = [_REQUEST(request_id=request_id, epoch=epoch).SerializeToString()]
    for part in parts:
        encoded = encode_part(part)
        pieces.append(length_prefix(_REQUEST.PARTS_FIELD_NUMBER, sum(map(len, encoded))))
        pieces += encoded
    return pieces


def decode_request(message: bytes | memoryview) -> tuple[int, int, list[ApplyPart]]:
    """(request_id, epoch, parts) of an encoded ApplyRequest; the parts' events are views into it.

    Raises DecodeError.
    """
    request_id = epoch = 0
    parts = []
    for number, value in read_fields(memoryview(message)):
        if not isinstance(value, int):
            if number == _REQUEST.PARTS_FIELD_NUMBER:
                parts.append(decode_part(value))
        elif number == _REQUEST.REQUEST_ID_FIELD_NUMBER:
            request_id = _signed(value, _INT64_BITS)
        elif number == _REQUEST.EPOCH_FIELD_NUMBER:
            epoch = _signed(value, _INT64_BITS)
    return request_id, epoch, parts


def _signed(value: int, bits: int) -> int:
    """The lowest bits as a two's complement number."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value
