"""The messages of a producer's stream."""

from __future__ import annotations

from profile_client.errors import Rejected
from profile_client.window import Batch
from userprofile.v1 import event_service_pb2

METHOD = "/userprofile.v1.EventService/StreamEvents"


def encode_hello(producer_id: str) -> bytes:
    """The first message."""
    return event_service_pb2.StreamEventsRequest(producer_id=producer_id).SerializeToString()


def encode_batch(batch: Batch) -> bytes:
    """A batch's message: its events are serialized already, and the fields of a message may stand in any order."""
    return batch.body + event_service_pb2.StreamEventsRequest(sequence=batch.sequence).SerializeToString()


def parse_response(message: bytes) -> tuple[int, tuple[Rejected, ...]]:
    """Up to which sequence everything is durable, and what was refused."""
    response = event_service_pb2.StreamEventsResponse.FromString(message)
    return response.sequence, tuple(Rejected(r.sequence, r.index, r.field, r.reason) for r in response.rejected)
