"""The kernel that writes JSON from bytes: it leaves to others what it cannot write, and never reads or writes beyond.

That what it writes is protobuf's own mapping is tested where it is used (tests/frontends/test_rest_json.py).
"""

from __future__ import annotations

import orjson
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from profile_service.wire.framing import message_field
from profile_service.wire.json_text import JsonPlan
from userprofile.v1.admin_service_pb2 import GetStatusResponse
from userprofile.v1.event_pb2 import Event
from userprofile.v1.profile_pb2 import Profile
from userprofile.v1.profile_service_pb2 import BatchGetProfilesResponse


def plan_of(kind: type) -> JsonPlan:
    plan = JsonPlan.compile(kind.DESCRIPTOR)  # type: ignore[attr-defined]
    assert plan is not None
    return plan


def sample() -> Profile:
    profile = Profile(user_id='a"\\\n\x01é', event_count=-5)
    profile.read_time.FromNanoseconds(1_795_338_000_123_456_789)
    profile.features["colour"].categorical.values.add(value="red", weight=0.25)
    profile.features["price"].distribution.histogram.edges.extend([1.0, 2.5, 1e300])
    profile.features["views"].window_count.value = 2**62
    profile.features["nothing"].SetInParent()
    return profile


def test_every_kind_of_value_is_written() -> None:
    profile = sample()
    text = plan_of(Profile).write(profile.SerializeToString())
    assert text is not None
    assert orjson.loads(text) == json_format.MessageToDict(profile, always_print_fields_with_no_presence=True)
    assert text.startswith(
        b'{"userId":"a\\"\\\\\\n\\u0001\xc3\xa9","eventCount":"-5","readTime":"2026-11-22T09:00:00.123456789Z"'
    )


def test_an_answer_that_is_much_longer_than_its_bytes_finds_room() -> None:
    empty = BatchGetProfilesResponse(profiles=[Profile()] * 1_000, missing_user_ids=["\x01" * 10_000])
    text = plan_of(BatchGetProfilesResponse).write(empty.SerializeToString())
    assert text is not None
    assert orjson.loads(text) == json_format.MessageToDict(empty, always_print_fields_with_no_presence=True)


def test_bytes_in_another_order_are_left() -> None:
    one, other = Profile(user_id="u").SerializeToString(), Profile(event_count=1).SerializeToString()
    assert plan_of(Profile).write(one + other) is not None
    assert plan_of(Profile).write(other + one) is None
    assert plan_of(Profile).write(one + one) is None


def test_fields_that_nobody_knows_are_passed_over() -> None:
    known = Profile(user_id="u").SerializeToString()
    unknown = message_field(1_000, b"abc") + b"abc"
    assert plan_of(Profile).write(known + unknown) == plan_of(Profile).write(known)


def test_a_type_with_a_kind_of_field_that_it_does_not_know_has_no_plan() -> None:
    assert JsonPlan.compile(Event.DESCRIPTOR) is None


@given(st.data())
def test_damaged_bytes_are_left_or_written_and_nothing_else_is_read(data: st.DataObject) -> None:
    encoded = bytearray(sample().SerializeToString())
    for _ in range(data.draw(st.integers(0, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(encoded[: data.draw(st.integers(0, len(encoded)))])
    kind = data.draw(st.sampled_from([Profile, GetStatusResponse, BatchGetProfilesResponse]))
    text = plan_of(kind).write(cut)
    assert text is None or text.startswith(b"{")
