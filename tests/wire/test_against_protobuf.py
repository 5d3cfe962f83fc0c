"""Scanner and decoder against protobuf itself: the same bytes are taken, and mean the same, whatever they are."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from profile_service.config import Limits
from profile_service.domain.columns import EventColumns
from profile_service.errors import InvalidArgument
from profile_service.wire.decode import decode_events
from profile_service.wire.gather import gather
from profile_service.wire.plan import WirePlan
from profile_service.wire.reasons import reason_name
from profile_service.wire.scan import ScannedBatch, scan_batch
from tests.wire import encoding as enc
from tests.wire import oracle
from userprofile.v1 import event_pb2, event_service_pb2

NOW_S = 1_790_000_000
NOW_NS = NOW_S * 10**9
PLAN = WirePlan.compile(
    ["view", "contact", "Anfrage über Händler"],
    ["color", "make", "größe", "a_name_of_many_more_than_sixteen_bytes", "a_name_of_many_more_than_sixteen_bytez"],
    ["price", "mileage"],
)
TYPES = [name.encode() for name in PLAN.event_types]
NAMES = [name.encode() for name in (*PLAN.text_attributes, *PLAN.number_attributes)] + [
    b"undeclared",
    b"colo",
    b"colour",
]
TIGHT = Limits(user_id_bytes=16, event_id_bytes=10, attributes_per_event=3, attribute_bytes=40)

SETTINGS = settings(
    max_examples=2 * settings().max_examples,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
MUTATIONS = 120 * settings().max_examples

EVENTS = enc.events(TYPES, NAMES, NOW_S)

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def library_events(draw: st.DrawFn) -> bytes:
    """Events as a producer's library writes them; most declared attributes are of their type."""
    event = event_pb2.Event(
        user_id=draw(st.text(min_size=1, max_size=12)), type=draw(st.sampled_from(PLAN.event_types))
    )
    if draw(st.booleans()):
        event.time.FromNanoseconds(draw(st.integers(-(2**62), NOW_NS + 300 * 10**9)))
    if draw(st.booleans()):
        event.event_id = draw(st.text(max_size=12))
    for name in draw(st.sets(st.sampled_from(PLAN.text_attributes))):
        event.attributes[name] = draw(enc.mostly(st.text(max_size=30), JSON, 15))
    finite = st.floats(allow_nan=False, allow_infinity=False)
    for name in draw(st.sets(st.sampled_from(PLAN.number_attributes))):
        event.attributes[name] = draw(enc.mostly(finite, JSON, 15))
    event.attributes.update(draw(st.dictionaries(st.text(max_size=20), JSON, max_size=3)))
    return event.SerializeToString()


@SETTINGS
@given(batch=st.lists(library_events(), max_size=6), limits=st.sampled_from([Limits(), TIGHT]))
def test_what_a_library_writes_is_taken_iff_the_rules_take_it(batch: list[bytes], limits: Limits) -> None:
    assert all(oracle.parse(event) for event in batch)
    check_batch(batch, limits)


@SETTINGS
@given(batch=st.lists(EVENTS, max_size=6), limits=st.sampled_from([Limits(), TIGHT]))
def test_an_event_is_taken_iff_protobuf_and_the_rules_take_it(batch: list[bytes], limits: Limits) -> None:
    check_batch(batch, limits)


@SETTINGS
@given(batch=st.lists(st.tuples(EVENTS, enc.randoms), max_size=6))
def test_a_damaged_event_is_taken_iff_protobuf_and_the_rules_take_it(batch: list[tuple[bytes, Random]]) -> None:
    check_batch([enc.mutate(event, random) for event, random in batch], Limits())


@SETTINGS
@given(batch=st.lists(st.binary(max_size=40), max_size=6))
def test_garbage_is_taken_iff_protobuf_and_the_rules_take_it(batch: list[bytes]) -> None:
    check_batch(batch, Limits())


def test_thousands_of_mutations_of_rich_events_are_taken_iff_protobuf_takes_them(seed: int) -> None:
    random = Random(seed)
    for _ in range(MUTATIONS // 100):
        check_batch([enc.mutate(random.choice(RICH), random) for _ in range(100)], Limits(), whole_request=False)


@SETTINGS
@given(
    pieces=st.lists(
        st.one_of(
            st.builds(enc.delimited, st.just(1), st.one_of(EVENTS, st.binary(max_size=5)), enc.paddings),
            st.builds(enc.delimited, st.just(2), enc.raw_texts),
            st.builds(enc.integer, st.just(3), st.integers(-3, 2**63 - 1), enc.paddings),
            enc.unknown_fields,
        ),
        max_size=6,
    ),
    random=st.one_of(st.none(), enc.randoms),
)
@example(pieces=[b"\x0a\x80"], random=None)
@example(pieces=[b"\x0c"], random=None)
def test_a_batch_is_refused_iff_what_holds_its_events_together_is_damaged(
    pieces: list[bytes], random: Random | None
) -> None:
    message = b"".join(pieces)
    if random is not None:
        message = enc.mutate(message, random)
    framing = oracle.framing(message)
    if framing is None:
        with pytest.raises(InvalidArgument, match="at byte"):
            scan_batch(message, PLAN, Limits(), NOW_NS)
        with pytest.raises(InvalidArgument):
            decode_events(message, PLAN, NOW_NS)
        return
    scanned = scan_batch(message, PLAN, Limits(), NOW_NS)
    assert (scanned.name, scanned.sequence) == (framing.name, framing.sequence)
    check_scan(scanned, framing.events, Limits())


@SETTINGS
@given(message=st.binary(max_size=64))
def test_any_bytes_are_scanned_as_protobuf_frames_them(message: bytes) -> None:
    framing = oracle.framing(message)
    if framing is None:
        with pytest.raises(InvalidArgument):
            scan_batch(message, PLAN, Limits(), NOW_NS)
    else:
        check_scan(scan_batch(message, PLAN, Limits(), NOW_NS), framing.events, Limits())


@pytest.mark.parametrize(
    "kind", ["lists", "structs", "groups", "groups in a value", "groups in a time", "groups in an entry"]
)
def test_nesting_is_followed_exactly_as_deep_as_protobuf_does(kind: str) -> None:
    def nested(depth: int) -> bytes:
        value = enc.text_value(b"x")
        for _ in range(depth):
            value = enc.list_value([value]) if kind == "lists" else enc.struct_value([(b"k", value)])
        groups = enc.tag(9, enc.START) * depth + enc.tag(9, enc.END) * depth
        odd = {
            "groups": groups,
            "groups in a value": enc.delimited(5, enc.entry(b"k", groups)),
            "groups in a time": enc.delimited(3, groups),
            "groups in an entry": enc.delimited(5, enc.delimited(1, groups)),
        }
        return USER + odd.get(kind, enc.delimited(5, enc.entry(b"k", value)))

    batch = [nested(depth) for depth in range(120)]
    taken = check_batch(batch, oracle.UNLIMITED, whole_request=False)
    assert taken.status[0] == 0
    assert taken.status[-1] != 0


def test_every_truncation_of_a_rich_event_agrees_with_protobuf() -> None:
    for event in RICH:
        check_batch([event[:end] for end in range(len(event) + 1)], Limits(), whole_request=False)


def check_batch(batch: list[bytes], limits: Limits, *, whole_request: bool = True) -> ScannedBatch:
    """Scans and decodes the batch and compares all that comes out with what protobuf and plain Python make of it."""
    message = oracle.frame(batch)
    scanned = scan_batch(message, PLAN, limits, NOW_NS)
    check_scan(scanned, batch, limits)
    valid = np.flatnonzero(scanned.status == 0)
    gathered = gather(scanned.buffer, scanned.offset, scanned.length, valid)
    if whole_request:
        parsed = event_service_pb2.IngestEventsRequest.FromString(bytes(gathered))
        assert [repr(event) for event in parsed.events] == [repr(oracle.parse(batch[i])) for i in valid]
    check_columns(decode_events(gathered, PLAN, NOW_NS + 7, limits=limits), [batch[i] for i in valid])
    for event in batch if whole_request else []:
        check_decode_alone(event)
    return scanned


def check_scan(scanned: ScannedBatch, batch: list[bytes], limits: Limits) -> None:
    verdicts = [oracle.verdict(event, PLAN, limits, NOW_NS) for event in batch]
    assert scanned.count == len(batch)
    assert [reason_name(status) for status in scanned.status] == verdicts, [event.hex() for event in batch]
    for i, event in enumerate(batch):
        extent = bytes(scanned.buffer[scanned.offset[i] : scanned.offset[i] + scanned.length[i]])
        assert [part for _, _, part in enc.fields(extent)] == [event]
        if verdicts[i] == "valid":
            parsed = oracle.parse(event)
            assert parsed is not None
            assert int(scanned.user_hash[i]) == xxhash.xxh64_intdigest(parsed.user_id.encode())
    refused = [i for i, name in enumerate(verdicts) if name != "valid"]
    rejected = scanned.rejected()
    assert [index for index, _, _ in rejected] == refused
    assert all(reason and (field or verdicts[i] == "malformed") for i, field, reason in rejected)
    assert scanned.all_valid == (not refused)
    taken = [event for event, name in zip(batch, verdicts, strict=True) if name == "valid"]
    assert scanned.ignored_attributes == sum(oracle.ignored_attributes(event, PLAN) for event in taken)


def check_columns(columns: EventColumns, batch: list[bytes]) -> None:
    assert columns.count == len(batch)

    def text(offset: int, length: int) -> str:
        return bytes(columns.buffer[offset : offset + length]).decode()

    for i, encoded in enumerate(batch):
        event = oracle.parse(encoded)
        assert event is not None
        user = xxhash.xxh64_intdigest(event.user_id.encode())
        assert text(columns.user_offset[i], columns.user_length[i]) == event.user_id
        assert int(columns.user_hash[i]) == user
        assert PLAN.event_types[columns.type_index[i]] == event.type
        time_ns = event.time.seconds * 10**9 + event.time.nanos if event.HasField("time") else NOW_NS + 7
        assert columns.time_ns[i] == time_ns
        event_id = event.event_id.encode()
        assert int(columns.event_id_hash[i]) == (xxhash.xxh64_intdigest(event_id, seed=user) or 1 if event_id else 0)
        for row, name in enumerate(PLAN.text_attributes):
            value = oracle.value_of(event, name)
            if value is None:
                assert columns.text_length[row, i] == -1
            else:
                assert text(columns.text_offset[row, i], columns.text_length[row, i]) == value
                assert int(columns.text_hash[row, i]) == xxhash.xxh64_intdigest(str(value).encode())
        for row, name in enumerate(PLAN.number_attributes):
            value = oracle.value_of(event, name)
            got = columns.number[row, i]
            assert math.isnan(got) if value is None else got == value


def check_decode_alone(event: bytes) -> None:
    """The decoder refuses what the scanner would refuse for anything but limits."""
    if oracle.verdict(event, PLAN, oracle.UNLIMITED, NOW_NS) == "valid":
        check_columns(decode_events(oracle.frame([event]), PLAN, NOW_NS + 7), [event])
    else:
        with pytest.raises(InvalidArgument, match=r"^events\[0\]"):
            decode_events(oracle.frame([event]), PLAN, NOW_NS)


USER = enc.delimited(1, b"u1") + enc.delimited(2, b"view")

RICH = [
    USER
    + enc.delimited(3, enc.integer(1, NOW_S) + enc.integer(2, 5))
    + enc.delimited(4, b"id-1")
    + enc.delimited(
        5,
        enc.entry(b"color", enc.text_value("größer als 8 Bytes ✓".encode()))
        + enc.entry(b"price", enc.double(2, 12900.5))
        + enc.entry(b"a_name_of_many_more_than_sixteen_bytez", enc.text_value(b"z"))
        + enc.entry(b"make", b"")
        + enc.entry(b"undeclared", enc.integer(4, 1)),
    ),
    USER
    + enc.group(9, enc.integer(1, 300) + enc.group(2, enc.delimited(3, b"\xff")))
    + enc.delimited(
        5, enc.entry(b"tags", enc.list_value([enc.text_value(b"a"), enc.double(2, 1), enc.list_value([b""])]))
    )
    + enc.delimited(3, enc.integer(1, -5))
    + enc.delimited(5, enc.entry(b"nested", enc.struct_value([("ключ".encode(), enc.struct_value([(b"", b"")]))])))
    + enc.delimited(5, enc.delimited(1, enc.delimited(2, enc.double(2, 1)) + enc.delimited(1, b"price"), 1))
    + enc.delimited(3, enc.integer(2, 2**32 + 7))
    + enc.delimited(1, b"u2"),
]
