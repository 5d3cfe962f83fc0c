"""A batch as a whole: its bounds, its name and sequence, what is counted, and columns used again."""

from __future__ import annotations

import numpy as np
import pytest

from profile_service.config import Limits
from profile_service.errors import InvalidArgument
from profile_service.wire.decode import decode_events
from profile_service.wire.plan import WirePlan
from profile_service.wire.scan import scan_batch
from tests.wire import encoding as enc
from tests.wire.oracle import frame
from userprofile.v1 import event_pb2, event_service_pb2

NOW_NS = 1_790_000_000 * 10**9
PLAN = WirePlan.compile(["view", "contact"], ["color", "make"], ["price"])
GOOD = enc.delimited(1, b"u1") + enc.delimited(2, b"view")


def test_an_empty_message_has_no_events() -> None:
    scanned = scan_batch(b"", PLAN, Limits(), NOW_NS)
    assert (scanned.count, scanned.name, scanned.sequence, scanned.all_valid, scanned.rejected()) == (
        0,
        "",
        0,
        True,
        [],
    )
    assert decode_events(b"", PLAN, NOW_NS).count == 0


def test_a_stream_request_gives_its_producer_and_sequence() -> None:
    request = event_service_pb2.StreamEventsRequest(producer_id="prodüzent", sequence=-(2**63))
    request.events.add(user_id="u")
    scanned = scan_batch(request.SerializeToString(), PLAN, Limits(), NOW_NS)
    assert (scanned.name, scanned.sequence, scanned.count) == ("prodüzent", -(2**63), 1)


def test_an_ingest_request_gives_its_request_id() -> None:
    request = event_service_pb2.IngestEventsRequest(
        request_id="r-1", events=[event_pb2.Event(user_id="u", type="view")]
    )
    scanned = scan_batch(memoryview(request.SerializeToString()), PLAN, Limits(), NOW_NS)
    assert (scanned.name, scanned.sequence, scanned.all_valid) == ("r-1", 0, True)


def test_too_many_events_are_refused_together() -> None:
    limits = Limits(events_per_batch=3)
    assert scan_batch(frame([GOOD] * 3), PLAN, limits, NOW_NS).count == 3
    with pytest.raises(InvalidArgument, match="events: must be at most 3 events"):
        scan_batch(frame([GOOD] * 4), PLAN, limits, NOW_NS)


def test_a_message_too_large_is_refused() -> None:
    message = frame([GOOD])
    with pytest.raises(InvalidArgument, match=f"must be at most {len(message) - 1} bytes, is {len(message)}"):
        scan_batch(message, PLAN, Limits(message_bytes=len(message) - 1), NOW_NS)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (frame([GOOD]) + b"\x0a\x09abc", "bytes that are not the protobuf message expected at byte 13 of 17"),
        (frame([GOOD]) + b"\x00", "bytes that are not the protobuf message expected at byte 12 of 13"),
        (enc.delimited(2, b"\xff"), "text that is not UTF-8 at byte 2 of 3"),
        (enc.group(7, b"", 8), "bytes that are not the protobuf message expected at byte 1 of 2"),
    ],
)
def test_damage_around_the_events_is_told_with_its_byte(message: bytes, complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        scan_batch(message, PLAN, Limits(), NOW_NS)


@pytest.mark.parametrize("extra", [enc.delimited(2, b"name"), enc.integer(3, 1), enc.integer(9, 1)])
def test_the_decoder_takes_events_and_nothing_else(extra: bytes) -> None:
    with pytest.raises(InvalidArgument, match="at byte 12 of"):
        decode_events(frame([GOOD]) + extra + frame([GOOD]), PLAN, NOW_NS)


def test_ignored_attributes_are_counted_in_valid_events_alone() -> None:
    event = event_pb2.Event(user_id="u", type="view")
    event.attributes.update({"color": "red", "colour": "red", "x": None})
    refused = event_pb2.Event(attributes=event.attributes)
    scanned = scan_batch(frame([event.SerializeToString(), refused.SerializeToString()] * 2), PLAN, Limits(), NOW_NS)
    assert scanned.ignored_attributes == 4


def test_the_message_is_referred_to_and_not_copied() -> None:
    message = frame([GOOD])
    scanned = scan_batch(message, PLAN, Limits(), NOW_NS)
    assert np.shares_memory(scanned.buffer, np.frombuffer(message, np.uint8))
    assert not scanned.buffer.flags.writeable


def test_columns_are_filled_again_where_they_have_room() -> None:
    def event(color: str | None, price: float | None) -> bytes:
        made = event_pb2.Event(user_id="u1", type="contact")
        if color is not None:
            made.attributes["color"] = color
        if price is not None:
            made.attributes["price"] = price
        return made.SerializeToString()

    columns = decode_events(frame([event("red", 1.0)] * 70), PLAN, NOW_NS)
    arrays = [id(array) for array in (columns.text_length, columns.number, columns.user_hash)]
    assert columns.user_hash.size >= 70
    again = decode_events(frame([event(None, None), event("blue", None), event(None, 2.0)]), PLAN, NOW_NS, columns)
    assert again is columns
    assert again.count == 3
    assert arrays == [id(array) for array in (again.text_length, again.number, again.user_hash)]
    assert list(again.text_length[0, :3]) == [-1, 4, -1]
    assert list(again.text_hash[0, [0, 2]]) == [0, 0]
    np.testing.assert_equal(again.number[0, :3], [np.nan, np.nan, 2.0])
    larger = decode_events(frame([event("red", 1.0)] * 1000), PLAN, NOW_NS, columns)
    assert larger.count == 1000
    assert larger.user_hash.size >= 1000


def test_columns_of_another_plan_are_not_filled_again() -> None:
    columns = decode_events(frame([GOOD]), WirePlan.compile(["view"], [], ["a", "b"]), NOW_NS)
    assert decode_events(frame([GOOD]), PLAN, NOW_NS, columns).number.shape[0] == 1


@pytest.mark.parametrize("said", [0, 1, 3, 1 << 40, -1])
def test_another_number_of_events_than_was_said_is_refused(said: int) -> None:
    assert decode_events(frame([GOOD, GOOD]), PLAN, NOW_NS, count=2).count == 2
    with pytest.raises(InvalidArgument, match=f"says {said}, the bytes hold 2"):
        decode_events(frame([GOOD, GOOD]), PLAN, NOW_NS, count=said)


@pytest.mark.parametrize("cut", [1, 5])
def test_damage_is_named_where_the_number_of_events_is_said_too(cut: int) -> None:
    for message in (frame([GOOD, GOOD])[:-cut], frame([GOOD]) + b"\x12\x01a" + frame([GOOD])):
        with pytest.raises(InvalidArgument, match="must be well-formed"):
            decode_events(message, PLAN, NOW_NS, count=2)


def test_no_events_are_no_bytes() -> None:
    assert decode_events(b"", PLAN, NOW_NS, count=0).count == 0
