"""The messages of a producer's stream."""

from __future__ import annotations

from profile_client.errors import Rejected
from profile_client.ways import Part
from userprofile.v1 import event_service_pb2

METHOD = "/userprofile.v1.EventService/StreamEvents"


def encode_hello(producer_id: str, acknowledged_sequence: int | None) -> bytes:
    """The first message; with `acknowledged_sequence` the stream is one of several among which batches are split."""
    return event_service_pb2.StreamEventsRequest(
        producer_id=producer_id, acknowledged_sequence=acknowledged_sequence
    ).SerializeToString()


def encode_part(part: Part, acknowledged_sequence: int | None) -> bytes:
    """A message with a batch, or its part: the events are serialized already, and the fields of a message may stand in
    any order."""
    return (
        part.body
        + event_service_pb2.StreamEventsRequest(
            sequence=part.batch.sequence, acknowledged_sequence=acknowledged_sequence
        ).SerializeToString()
    )


def encode_acknowledged(acknowledged_sequence: int) -> bytes:
    """A message that only says up to where all parts of all batches are acknowledged."""
    return event_service_pb2.StreamEventsRequest(acknowledged_sequence=acknowledged_sequence).SerializeToString()


def parse_response(message: bytes) -> tuple[int, tuple[Rejected, ...]]:
    """Up to which sequence everything is durable, and what was refused."""
    response = event_service_pb2.StreamEventsResponse.FromString(message)
    return response.sequence, tuple(Rejected(r.sequence, r.index, r.field, r.reason) for r in response.rejected)
