"""Events as they travel, held against protobuf's own encoding and JSON mapping."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import example, given
from hypothesis import strategies as st

from profile_client import Event
from profile_client.events import EVENT_BYTES, frame, frame_all, unframe
from userprofile.v1 import event_pb2, event_service_pb2

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(attributes=st.dictionaries(TEXT, VALUES, max_size=5))
def test_attributes_are_what_json_makes_of_them(attributes: dict[str, Any]) -> None:
    expected = json_format.ParseDict({"userId": "u", "type": "view", "attributes": attributes}, event_pb2.Event())
    message = Event("u", "view", attributes=attributes).to_message()
    if not attributes:
        expected.ClearField("attributes")
    assert message == expected


@given(sizes=st.lists(st.integers(0, 300) | st.sampled_from([127, 128, 16_383, 16_384, 70_000]), max_size=5))
@example(sizes=[2_097_151, 2_097_152])
def test_a_framed_batch_is_what_protobuf_makes_of_it(sizes: list[int]) -> None:
    events = [event_pb2.Event(user_id="x" * size) for size in sizes]
    body = b"".join(frame(event.SerializeToString()) for event in events)
    assert body == event_service_pb2.StreamEventsRequest(events=events).SerializeToString()
    assert list(unframe(body)) == [event.SerializeToString() for event in events]


def test_events_are_framed_one_by_one() -> None:
    events = [Event("u1", "view"), Event("u2", "view", 1.0)]
    request = event_service_pb2.IngestEventsRequest.FromString(b"".join(frame_all(events)))
    assert [event.user_id for event in request.events] == ["u1", "u2"]


@pytest.mark.parametrize(
    ("event", "error", "match"),
    [
        (Event("u", "view", attributes={"x": object()}), TypeError, "attribute 'x' is a object"),
        (Event("u", "view", attributes={"x": [1, b"y"]}), TypeError, r"attribute 'x\[1\]' is a bytes"),
        (Event("u", "view", attributes={"x": {"y": {1}}}), TypeError, "attribute 'x.y' is a set"),
        (Event("u", "view", attributes={1: "x"}), TypeError, "name of an attribute must be text, is 1"),  # type: ignore[dict-item]
        (Event(7, "view"), TypeError, "user_id must be text, is 7"),  # type: ignore[arg-type]
        (Event("u", "view", event_id=7), TypeError, "event_id must be text, is 7"),  # type: ignore[arg-type]
        (Event("u", "view", attributes={"id": 2**53 + 1}), ValueError, "'id': 9007199254740993 has no exact double"),
        (Event("u", "view", attributes={"id": -(10**400)}), ValueError, "has no exact double"),
        (Event("u", "view", time=dt.datetime(2026, 1, 1)), ValueError, "no time zone"),  # noqa: DTZ001
        (Event("u", "view", time=float("nan")), ValueError, "nan is neither"),
        (Event("u", "view", time="yesterday"), ValueError, "'yesterday' is neither"),  # type: ignore[arg-type]
        (Event("u\ud800", "view"), ValueError, "surrogates"),
    ],
)
def test_what_an_event_cannot_hold_is_said_at_once(event: Event, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        event.to_message()


def test_an_event_too_large_for_any_message_is_refused_here() -> None:
    with pytest.raises(ValueError, match=f"at most {EVENT_BYTES} bytes"):
        frame(bytes(EVENT_BYTES + 1))


def test_times_and_attributes_go_out_as_they_are() -> None:
    zone = dt.timezone(dt.timedelta(hours=2))
    attributes = {"a": "x", "b": 1, "c": True, "d": None, "e": [1, "y"], "f": {"g": 2.5}, "h": 2**60, "i": []}
    message = Event("u", "view", dt.datetime(2026, 1, 1, 2, tzinfo=zone), "id", attributes).to_message()
    assert message.time.ToJsonString() == "2026-01-01T00:00:00Z"
    assert json_format.MessageToDict(message.attributes) == attributes
    assert Event("u", "view", 1.5).to_message().time.ToNanoseconds() == 1_500_000_000
    assert not Event("u", "view").to_message().HasField("time")
