"""Bad input on StreamEvents: events refused by (sequence, index), sequences checked, nothing counted twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.calls import GrpcCaller, HttpCaller, delimited, new_user
from tests.e2e.serving import ServeProcess
from tests.e2e.stores import IN_BOTH_STORES
from userprofile.v1 import event_pb2
from userprofile.v1.event_service_pb2 import StreamEventsRequest

pytestmark = IN_BOTH_STORES


@pytest.fixture
def rpc(service: ServeProcess) -> Iterator[GrpcCaller]:
    with GrpcCaller(service.grpc_address) as caller:
        yield caller
    assert HttpCaller(service.http_address).get("/readyz").code == 200


def view(user_id: str) -> event_pb2.Event:
    return event_pb2.Event(user_id=user_id, type="view")


def priced(user_id: str, price: float | str) -> event_pb2.Event:
    event = view(user_id)
    event.attributes.update({"price": price})
    return event


def batch(sequence: int, *events: event_pb2.Event) -> StreamEventsRequest:
    return StreamEventsRequest(sequence=sequence, events=events)


def test_refused_events_are_named_by_sequence_index_field_and_reason(rpc: GrpcCaller) -> None:
    user, stream = new_user(), rpc.stream()
    assert stream.begin(new_user("producer")) == 0
    stream.send(batch(1, view(user), priced(user, "much"), view(user)))
    stream.send(batch(2, event_pb2.Event(user_id=user, type="sold"), view("")))
    stream.send(batch(3, view(user)))
    stream.send(batch(4))
    responses = stream.receive_until(4)
    assert stream.end() == []
    refused = [r for response in responses for r in response.rejected]
    assert [(r.sequence, r.index, r.field) for r in refused] == [
        (1, 1, "attributes.price"),
        (2, 0, "type"),
        (2, 1, "user_id"),
    ]
    assert "number" in refused[0].reason
    assert "sold" in refused[1].reason
    assert "1 to 256" in refused[2].reason
    for response in responses:
        assert all(r.sequence <= response.sequence for r in response.rejected)
    assert rpc.profile(user).event_count == 3


def test_damage_inside_an_event_refuses_that_event_alone(rpc: GrpcCaller) -> None:
    user, stream = new_user(), rpc.stream()
    stream.begin(new_user("producer"))
    damaged = delimited(1, delimited(1, user.encode()) + delimited(2, b"view") + b"\x2a\x7f")
    stream.send(batch(1, view(user)).SerializeToString() + damaged)
    (refused,) = [r for response in stream.receive_until(1) for r in response.rejected]
    assert (refused.sequence, refused.index) == (1, 1)
    assert "protobuf" in refused.reason
    stream.send(batch(2, view(user)))
    stream.receive_until(2)
    stream.end()
    assert rpc.profile(user).event_count == 2


@pytest.mark.parametrize(
    ("sequences", "field"),
    [([0], "sequence"), ([-1], "sequence"), ([1, 3], "sequence"), ([1, 1], "sequence"), ([1, 2, 1], "sequence")],
)
def test_a_sequence_that_is_not_the_next_one_ends_the_stream(rpc: GrpcCaller, sequences: list[int], field: str) -> None:
    user, stream = new_user(), rpc.stream()
    stream.begin(new_user("producer"))
    for sequence in sequences:
        stream.send(batch(sequence, view(user)))
    failure = stream.failure()
    assert failure.code == "INVALID_ARGUMENT"
    assert field in failure.violations, failure
    assert str(sequences[-1]) in failure.message


@pytest.mark.parametrize(
    ("message", "field", "word"),
    [
        (batch(1).SerializeToString() + b"\x0a\x05ab", "", ""),
        (StreamEventsRequest(sequence=1, producer_id="somebody else").SerializeToString(), "producer_id", "somebody"),
        (delimited(1, b"") * 10_001 + b"\x18\x01", "events", "10000"),
        (delimited(15, bytes(16 * 1024 * 1024)), "", "16777216"),
    ],
    ids=["damaged", "another producer", "10,001 events", "over 16 MiB"],
)
def test_a_batch_that_is_refused_whole_ends_the_stream_and_names_the_field(
    rpc: GrpcCaller, message: bytes, field: str, word: str
) -> None:
    stream = rpc.stream()
    stream.begin(new_user("producer"))
    stream.send(message)
    failure = stream.failure()
    assert failure.code == "INVALID_ARGUMENT"
    assert field in failure.violations, failure
    assert word in failure.message


def test_a_producer_id_over_256_bytes_is_refused(rpc: GrpcCaller) -> None:
    stream = rpc.stream()
    stream.send(StreamEventsRequest(producer_id="p" * 257))
    failure = stream.failure()
    assert failure.code == "INVALID_ARGUMENT"
    assert list(failure.violations) == ["producer_id"]


def test_what_came_before_a_bad_batch_is_counted(rpc: GrpcCaller) -> None:
    user, stream = new_user(), rpc.stream()
    stream.begin(new_user("producer"))
    stream.send(batch(1, view(user)))
    stream.receive_until(1)
    stream.send(batch(7, view(user)))
    assert stream.failure().code == "INVALID_ARGUMENT"
    assert rpc.profile(user).event_count == 1


def test_an_anonymous_stream_counts_as_often_as_is_sent(rpc: GrpcCaller) -> None:
    user = new_user()
    for _ in range(2):
        stream = rpc.stream()
        assert stream.begin("") == 0
        stream.send(batch(1, view(user)))
        stream.receive_until(1)
        stream.end()
    assert rpc.profile(user).event_count == 2


def test_a_batch_sent_again_through_another_stream_is_counted_once(rpc: GrpcCaller) -> None:
    user, producer = new_user(), new_user("producer")
    first = rpc.stream()
    first.begin(producer)
    for sequence in (1, 2):
        first.send(batch(sequence, view(user), view(user)))
    first.receive_until(2)
    first.cancel()  # a broken connection: the producer cannot know what arrived
    second = rpc.stream()
    assert 0 <= second.begin(producer) <= 2
    for sequence in (1, 2, 3):
        second.send(batch(sequence, view(user), view(user)))
    second.receive_until(3)
    second.end()
    assert rpc.profile(user).event_count == 6


def test_a_batch_sent_again_names_its_refused_events_again(rpc: GrpcCaller) -> None:
    user, producer = new_user(), new_user("producer")
    for _ in range(2):
        stream = rpc.stream()
        stream.begin(producer)
        stream.send(batch(1, view(user), priced(user, "much")))
        refused = [r for response in stream.receive_until(1) for r in response.rejected]
        assert [(r.sequence, r.index) for r in refused] == [(1, 1)]
        stream.end()
    assert rpc.profile(user).event_count == 1


def test_of_two_streams_of_one_producer_the_newer_goes_on(rpc: GrpcCaller) -> None:
    user, producer = new_user(), new_user("producer")
    older = rpc.stream()
    older.begin(producer)
    older.send(batch(1, view(user)))
    older.receive_until(1)
    newer = rpc.stream()
    newer.begin(producer)
    assert older.failure().code == "ABORTED"
    newer.send(batch(1, view(user)))
    newer.send(batch(2, view(user)))
    newer.receive_until(2)
    newer.end()
    assert rpc.profile(user).event_count == 2


def test_an_event_id_counts_once_whichever_way_it_comes(rpc: GrpcCaller) -> None:
    user = new_user()
    event = view(user)
    event.event_id = new_user("event")
    stream = rpc.stream()
    stream.begin("")
    stream.send(batch(1, event, event))
    stream.receive_until(1)
    stream.end()
    rpc.ingest(delimited(1, event.SerializeToString()))
    assert rpc.profile(user).event_count == 1


def test_a_request_id_counts_once(rpc: GrpcCaller) -> None:
    user = new_user()
    request = delimited(1, view(user).SerializeToString()) + delimited(2, new_user("request").encode())
    for _ in range(3):
        rpc.ingest(request)
    assert rpc.profile(user).event_count == 1


def test_a_stream_without_any_message_ends_well(rpc: GrpcCaller) -> None:
    assert rpc.stream().end() == []
