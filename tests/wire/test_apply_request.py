"""An ApplyRequest is written and read as protobuf does it."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from profile_service.wire.apply_request import ApplyPart, decode_part, decode_request, encode_part, encode_request
from userprofile.internal.v1 import shard_pb2

INT64 = st.integers(-(2**63), 2**63 - 1)
PARTS = st.builds(
    ApplyPart,
    producer_id=st.text(max_size=20),
    sequence=INT64,
    acknowledged_sequence=INT64,
    arrival_time_ns=INT64,
    events=st.binary(max_size=300),
    event_count=st.integers(-(2**31), 2**31 - 1),
)


def as_message(part: ApplyPart) -> shard_pb2.ApplyRequest.Part:
    return shard_pb2.ApplyRequest.Part(
        producer_id=part.producer_id,
        sequence=part.sequence,
        acknowledged_sequence=part.acknowledged_sequence,
        arrival_time_ns=part.arrival_time_ns,
        events=bytes(part.events),
        event_count=part.event_count,
    )


@given(INT64, INT64, st.lists(PARTS, max_size=4))
def test_protobuf_reads_what_is_written_and_the_other_way_round(
    request_id: int, epoch: int, parts: list[ApplyPart]
) -> None:
    expected = shard_pb2.ApplyRequest(request_id=request_id, epoch=epoch, parts=map(as_message, parts))
    encoded = b"".join(encode_request(request_id, epoch, parts))
    assert shard_pb2.ApplyRequest.FromString(encoded) == expected
    assert decode_request(encoded) == (request_id, epoch, parts)
    assert decode_request(expected.SerializeToString()) == (request_id, epoch, parts)
    for part in parts:
        assert decode_part(b"".join(encode_part(part))) == part


def test_events_are_not_copied() -> None:
    pieces = encode_request(1, 2, [ApplyPart(events=(events := b"events"), event_count=1)])
    assert any(piece is events for piece in pieces)
    encoded = b"".join(pieces)
    (part,) = decode_request(encoded)[2]
    assert isinstance(part.events, memoryview)
    assert part.events.obj is encoded
    assert any(piece is part.events for piece in encode_part(part))


@given(st.lists(PARTS, max_size=2), st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=3))
def test_of_damaged_bytes_whatever_is_read_is_what_protobuf_reads(
    parts: list[ApplyPart], damage: list[tuple[int, int]]
) -> None:
    encoded = bytearray(b"".join(encode_request(7, 8, parts)))
    for place, byte in damage:
        encoded[place % len(encoded)] = byte
    try:
        request_id, epoch, found = decode_request(bytes(encoded))
    except DecodeError:
        return
    expected = shard_pb2.ApplyRequest.FromString(bytes(encoded))
    assert (expected.request_id, expected.epoch) == (request_id, epoch)
    assert [as_message(part).SerializeToString(deterministic=True) for part in found] == [
        _known(part).SerializeToString(deterministic=True) for part in expected.parts
    ]


def _known(part: shard_pb2.ApplyRequest.Part) -> shard_pb2.ApplyRequest.Part:
    part.DiscardUnknownFields()
    return part


@pytest.mark.parametrize(
    "damaged",
    [b"\x1a\x05ab", b"\x08", b"\x08" + b"\xff" * 10, b"\x00\x01", b"\x09abc", b"\x0b\x0c", b"\x1a\x03\x0a\x01\xff"],
    ids=["cut off", "no number", "endless number", "field 0", "cut-off fixed field", "group", "no UTF-8"],
)
def test_damage_is_refused(damaged: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_request(damaged)
