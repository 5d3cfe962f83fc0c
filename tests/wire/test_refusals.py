"""Each way to refuse an event names the field, what is wrong and what would be right, and spoils no other event."""

from __future__ import annotations

import pytest

from profile_service.config import Limits
from profile_service.errors import InvalidArgument
from profile_service.wire.decode import decode_events
from profile_service.wire.plan import WirePlan
from profile_service.wire.reasons import reason_name
from profile_service.wire.scan import scan_batch
from tests.wire import encoding as enc
from tests.wire.oracle import frame
from userprofile.v1 import event_pb2, event_service_pb2

NOW_S = 1_790_000_000
NOW_NS = NOW_S * 10**9
PLAN = WirePlan.compile(["view", "contact"], ["color", "make"], ["price"])
GOOD = enc.delimited(1, b"u1") + enc.delimited(2, b"view")


def refusal(
    event: bytes | event_pb2.Event, plan: WirePlan = PLAN, limits: Limits | None = None
) -> tuple[str, str, str]:
    """(short name, field, reason), having seen that the events around it are taken."""
    encoded = event if isinstance(event, bytes) else event.SerializeToString()
    good = enc.delimited(1, b"u1") + enc.delimited(2, plan.event_types[0].encode())
    scanned = scan_batch(frame([good, encoded, good]), plan, Limits(), NOW_NS)
    assert list(scanned.status > 0) == [False, True, False]
    [(index, field, reason)] = scanned.rejected()
    assert index == 1
    assert scanned.user_hash[1] == 0
    return reason_name(scanned.status[1]), field, reason


def event(**fields: object) -> event_pb2.Event:
    return event_pb2.Event(**{"user_id": "u1", "type": "view", **fields})  # type: ignore[arg-type]


def timed(seconds: int, nanos: int = 0) -> bytes:
    return GOOD + enc.delimited(3, enc.integer(1, seconds) + enc.integer(2, nanos))


def attributed(name: str, value: bytes) -> bytes:
    return GOOD + enc.delimited(5, enc.entry(name.encode(), value))


def test_a_user_id_is_1_to_256_bytes() -> None:
    assert refusal(event(user_id="")) == ("user_id", "user_id", "must be 1 to 256 bytes, is 0")
    assert refusal(event(user_id="ü" * 129)) == ("user_id", "user_id", "must be 1 to 256 bytes, is 258")
    assert scan_batch(frame([event(user_id="ü" * 128).SerializeToString()]), PLAN, Limits(), NOW_NS).all_valid


def test_an_undeclared_type_is_named() -> None:
    assert refusal(event(type="buy")) == (
        "type",
        "type",
        'must be an event type that the schema declares (view, contact), is "buy"',
    )
    assert refusal(event(type="")) == (
        "type",
        "type",
        "must be an event type that the schema declares (view, contact), is empty",
    )


def test_a_long_undeclared_type_is_shortened_at_a_character() -> None:
    name, field, reason = refusal(event(type="aé✓😀" * 100))
    assert (name, field) == ("type", "type")
    assert reason.endswith('is "' + "aé✓😀" * 16 + '…"')


def test_of_many_declared_types_the_first_are_shown() -> None:
    plan = WirePlan.compile([f"type_{i}" for i in range(12)], [], [])
    assert (
        "(type_0, type_1, type_2, type_3, type_4, type_5, type_6, type_7, type_8, type_9, …)" in refusal(GOOD, plan)[2]
    )


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (timed(253_402_300_800), "must be from year 1 to year 9999, is 253402300800 s from 1970"),
        (timed(-62_135_596_801), "must be from year 1 to year 9999, is -62135596801 s from 1970"),
        (timed(0, 1_000_000_000), "nanos must be 0 to 999999999, is 1000000000"),
        (timed(0, -1), "nanos must be 0 to 999999999, is -1"),
        (timed(-62_135_596_800), "must be between the years 1678 and 2261, is 0001-01-01T00:00:00Z"),
        (timed(9_223_372_036), "must be between the years 1678 and 2261, is 2262-04-11T23:47:16Z"),
        (timed(NOW_S + 300, 1), "must be at most 300 s in the future, is 300 s ahead (2026-09-21T14:18:20Z)"),
        (timed(NOW_S + 3600), "must be at most 300 s in the future, is 3600 s ahead (2026-09-21T15:13:20Z)"),
    ],
)
def test_a_time_that_cannot_be_is_refused(encoded: bytes, reason: str) -> None:
    assert refusal(encoded) == ("time", "time", reason)


@pytest.mark.parametrize("seconds", [NOW_S + 300, 0, -1, -9_223_372_036])
def test_any_age_and_five_minutes_ahead_are_taken(seconds: int) -> None:
    assert scan_batch(frame([timed(seconds)]), PLAN, Limits(), NOW_NS).all_valid
    assert decode_events(frame([timed(seconds)]), PLAN, NOW_NS).time_ns[0] == seconds * 10**9


def test_an_event_id_is_at_most_256_bytes() -> None:
    assert refusal(event(event_id="é" * 129)) == ("event_id", "event_id", "must be at most 256 bytes, is 258")


def test_attributes_are_at_most_64_as_sent() -> None:
    entries = [enc.entry(b"color", enc.text_value(b"red"))] * 65
    assert refusal(GOOD + enc.delimited(5, b"".join(entries))) == (
        "attribute_count",
        "attributes",
        "must be at most 64, are 65",
    )
    assert scan_batch(frame([GOOD + enc.delimited(5, b"".join(entries[1:]))]), PLAN, Limits(), NOW_NS).all_valid


@pytest.mark.parametrize("name", ["color", "undeclared"])
def test_an_attribute_is_at_most_1_kib(name: str) -> None:
    field = f"attributes.{name}"
    text = enc.text_value(b"x" * 1025)
    assert refusal(attributed(name, text)) == (
        "attribute_size",
        field,
        "value must be at most 1024 bytes, is 1025",
    )
    listed = enc.list_value([enc.text_value(b"x" * 500)] * 2)
    merged = refusal(attributed(name, listed + listed))
    assert merged[:2] == ("attribute_size", field)
    assert merged[2] == f"value must be at most 1024 bytes, is {2 * (len(listed) - 3)}"
    twice = enc.delimited(5, enc.entry(name.encode(), text) + enc.entry(name.encode(), enc.text_value(b"x")))
    assert refusal(GOOD + twice)[0] == "attribute_size"


def test_an_attributes_name_is_at_most_1_kib() -> None:
    assert refusal(attributed("n" * 1025, enc.text_value(b"x"))) == (
        "attribute_size",
        "attributes." + "n" * 64 + "…",
        "name must be at most 1024 bytes, is 1025",
    )


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("color", enc.double(2, 1.5), "must be text, is a number"),
        ("color", enc.integer(4, 1), "must be text, is a bool"),
        ("color", enc.struct_value([]), "must be text, is a struct"),
        ("color", enc.list_value([]), "must be text, is a list"),
        ("price", enc.text_value(b"12900"), "must be a finite number, is text"),
        ("price", enc.integer(4, 0), "must be a finite number, is a bool"),
        ("price", enc.struct_value([]), "must be a finite number, is a struct"),
        ("price", enc.list_value([]), "must be a finite number, is a list"),
        ("price", enc.double(2, float("nan")), "must be a finite number, is NaN or infinite"),
        ("price", enc.double(2, float("-inf")), "must be a finite number, is NaN or infinite"),
        ("price", enc.double(2, -1.1e100), "must be a finite number, is beyond 1e100"),
        ("color", enc.double(2, float("nan")), "must be text, is NaN or infinite"),
    ],
)
def test_a_declared_attribute_of_another_type_is_refused(name: str, value: bytes, reason: str) -> None:
    assert refusal(attributed(name, value)) == ("attribute_type", f"attributes.{name}", reason)
    with pytest.raises(InvalidArgument) as caught:
        decode_events(frame([GOOD, attributed(name, value)]), PLAN, NOW_NS)
    [violation] = caught.value.violations
    assert (violation.field, violation.description) == (f"events[1].attributes.{name}", reason)


def test_an_entry_with_an_unknown_field_is_no_attribute_as_protobuf_has_it() -> None:
    strange = enc.delimited(1, enc.delimited(1, b"price") + enc.delimited(2, enc.text_value(b"x")) + enc.integer(3, 1))
    right = enc.entry(b"price", enc.double(2, 5))
    message = frame([GOOD + enc.delimited(5, right + strange)])
    assert event_service_pb2.IngestEventsRequest.FromString(message).events[0].attributes["price"] == 5
    assert decode_events(message, PLAN, NOW_NS).number[0, 0] == 5
    assert scan_batch(message, PLAN, Limits(), NOW_NS).ignored_attributes == 1


def test_only_the_last_value_of_a_declared_attribute_has_to_be_of_its_type() -> None:
    wrong, right = enc.entry(b"price", enc.text_value(b"x")), enc.entry(b"price", enc.double(2, 1))
    assert scan_batch(frame([GOOD + enc.delimited(5, wrong + wrong + right)]), PLAN, Limits(), NOW_NS).all_valid
    assert refusal(GOOD + enc.delimited(5, wrong + right + wrong))[0] == "attribute_type"


@pytest.mark.parametrize(
    ("damage", "field", "reason"),
    [
        (enc.delimited(1, b"u\xff"), "user_id", "text that is not UTF-8 at byte 12"),
        (enc.delimited(5, enc.entry(b"\xc0\x80", b"")), "attributes", "text that is not UTF-8 at byte 16"),
        (enc.delimited(3, b"\x08"), "time", "bytes that are not protobuf at byte 13"),
        (b"\x0a\x05u", "user_id", "bytes that are not protobuf at byte 11"),
        (b"\x0c", "", "bytes that are not protobuf at byte 11"),
        (b"\x00", "", "bytes that are not protobuf at byte 10"),
    ],
)
def test_damage_is_told_with_its_field_and_byte(damage: bytes, field: str, reason: str) -> None:
    expected = f"must be a well-formed userprofile.v1.Event, has {reason}"
    assert refusal(GOOD + damage) == ("malformed", field, expected)


def test_of_several_faults_the_first_in_the_order_of_the_fields_is_told() -> None:
    everything = event(user_id="", type="buy", event_id="x" * 300)
    assert refusal(everything)[0] == "user_id"
    everything.user_id = "u1"
    assert refusal(everything)[0] == "type"
    everything.type = "view"
    assert refusal(everything)[0] == "event_id"
    assert refusal(everything.SerializeToString() + b"\x0a")[0] == "malformed"


def test_refusals_come_in_the_order_of_the_events() -> None:
    batch = [GOOD, b"", GOOD, enc.delimited(1, b"u1"), b"\xff", GOOD]
    scanned = scan_batch(frame(batch), PLAN, Limits(), NOW_NS)
    assert [(index, field) for index, field, _ in scanned.rejected()] == [(1, "user_id"), (3, "type"), (4, "")]
    assert (scanned.rejected_count, scanned.all_valid) == (3, False)


def test_a_replay_obeys_no_limits_and_a_shard_may_ask_for_them() -> None:
    large = event(user_id="u" * 300, event_id="e" * 300)
    large.time.FromSeconds(NOW_S + 86_400)
    large.attributes["color"] = "x" * 5000
    for i in range(100):
        large.attributes[f"a{i}"] = i
    encoded = frame([large.SerializeToString()])
    assert decode_events(encoded, PLAN, NOW_NS).text_length[0, 0] == 5000
    with pytest.raises(InvalidArgument, match=r"events\[0\].user_id: must be 1 to 256 bytes, is 300"):
        decode_events(encoded, PLAN, NOW_NS, limits=Limits())
    with pytest.raises(InvalidArgument, match=r"events\[0\].user_id: must not be empty"):
        decode_events(frame([b""]), PLAN, NOW_NS)
