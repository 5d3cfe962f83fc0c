"""What a shard writes into its log: payloads of records, to and from bytes. Every change of its state is one of them.

RECORD_EVENTS   an encoded ApplyRequest.Part (`wire.apply_request`) with only the events that are counted; one without
                events tells up to where its producer is acknowledged
RECORD_FORGET   user ids whose profiles are removed, each behind its length in two bytes (little-endian)
RECORD_SCHEMA   an encoded SchemaRecord: rows are of this schema from here on; the first record of every log
RECORD_TRANSFER an encoded Transfer: what another shard held of partitions that move here
RECORD_ADOPTION an encoded Adoption: the sums of a shard that is no more
RECORD_BEGINNING an encoded Beginning: what stands before it counts for nothing; a standby's log has one
"""

from __future__ import annotations

from collections.abc import Sequence

from userprofile.internal.v1 import shard_log_pb2

RECORD_EVENTS = 1
RECORD_FORGET = 2
RECORD_SCHEMA = 3
RECORD_TRANSFER = 4
RECORD_ADOPTION = 5
RECORD_BEGINNING = 6

RECORD_OVERHEAD_BYTES = 1024
"""More than a record of events has beside the events: the producer's id is bounded, the rest are numbers."""

_ID_LENGTH_BYTES = 2


def encode_forget(user_ids: Sequence[bytes]) -> list[bytes]:
    """The users that are forgotten."""
    return [len(user_id).to_bytes(_ID_LENGTH_BYTES, "little") + user_id for user_id in user_ids]


def decode_forget(payload: memoryview) -> list[bytes]:
    """The users that are forgotten. Raises ValueError where the payload does not end with an id."""
    user_ids = []
    at = 0
    while at < len(payload):
        start = at + _ID_LENGTH_BYTES
        at = start + int.from_bytes(payload[at:start], "little")
        user_ids.append(bytes(payload[start:at]))
    if at != len(payload):
        raise ValueError("the last user id is cut off")
    return user_ids


def encode_schema(yaml: str, reset_features: Sequence[str]) -> tuple[bytes, ...]:
    """The schema from here on, and the features that start anew."""
    return (shard_log_pb2.SchemaRecord(yaml=yaml, reset_features=reset_features).SerializeToString(),)


def decode_schema(payload: memoryview) -> shard_log_pb2.SchemaRecord:
    """The schema from here on. Raises google.protobuf.message.DecodeError."""
    return shard_log_pb2.SchemaRecord.FromString(bytes(payload))
