"""What a producer is promised of its stream, and a caller of a single batch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from profile_service.clock import system_clock
from profile_service.cluster import router as router_module
from profile_service.cluster.partitioning import partition_of, user_hash
from profile_service.config import Capacity, Limits
from profile_service.errors import InvalidArgument, NotFound, ResourceExhausted, Superseded, Unavailable
from profile_service.frontends.api import Api
from profile_service.rpc import acknowledgements, producer_streams
from profile_service.wire.apply_request import ApplyPart
from tests.cluster.local_cluster import FakeShard, encode, until
from tests.frontends.api_harness import GRPC, Producer, another_api, api_over_shards
from userprofile.v1 import event_service_pb2, profile_pb2, profile_service_pb2

INGEST = "userprofile.v1.EventService/IngestEvents"


async def views(api: Api, user_id: str) -> int:
    request = profile_service_pb2.GetProfileRequest(user_id=user_id).SerializeToString()
    profile = profile_pb2.Profile.FromString(await api.call("userprofile.v1.ProfileService/GetProfile", request, GRPC))
    return profile.event_count


async def ingest(api: Api, message: bytes) -> event_service_pb2.IngestEventsResponse:
    return event_service_pb2.IngestEventsResponse.FromString(await api.call(INGEST, message, GRPC))


class Slow(FakeShard):
    """Answers when it is released."""

    def __init__(self, shard_id: int, epoch: int, owned: list[int]) -> None:
        super().__init__(shard_id, epoch, owned)
        self.release = asyncio.Event()

    async def submit(self, parts: Sequence[ApplyPart], size_bytes: int, epoch: int, *rest: object) -> None:
        await super().submit(parts, size_bytes, epoch)
        await self.release.wait()


async def test_a_stream_says_hello_then_acknowledges_in_order_what_is_readable() -> None:
    async with api_over_shards() as (api, _, metrics):
        producer = Producer(api)
        producer.send(producer_id="p")
        assert (await producer.told()).sequence == 0
        for sequence in range(1, 31):
            producer.send("u1", f"v{sequence}", sequence=sequence)
        responses = await producer.told_up_to(30)
        assert [r.sequence for r in responses] == sorted({r.sequence for r in responses})
        assert await views(api, "u1") == 30
        producer.end()
        assert await producer.rest() == []
        assert b"profile_service_events_accepted_total 60.0" in metrics.render()


async def test_the_first_message_may_carry_a_batch() -> None:
    async with api_over_shards() as (api, _, _):
        producer = Producer(api)
        producer.send("u1", producer_id="p", sequence=1)
        producer.end()
        assert [response.sequence for response in await producer.rest()] == [0, 1]
        assert await views(api, "u1") == 1


async def test_a_batch_sent_again_counts_once_and_a_returning_producer_hears_where_to_go_on() -> None:
    async with api_over_shards() as (api, _, _):
        first = Producer(api)
        first.send(producer_id="p")
        for sequence in (1, 2, 3):
            first.send("u1", sequence=sequence)
            await first.told_up_to(sequence)
        first.end()
        await first.rest()
        second = Producer(api)
        second.send(producer_id="p")
        known = (await second.told()).sequence
        assert 1 <= known <= 3
        for sequence in (1, 2, 3, 4):
            second.send("u1", sequence=sequence)
        second.end()
        assert (await second.rest())[-1].sequence == 4
        assert await views(api, "u1") == 4


@pytest.mark.parametrize("how", ["ends", "leaves"])
async def test_a_producer_that_comes_back_after_its_stream_has_ended_hears_exactly_where_it_was(how: str) -> None:
    async with api_over_shards(3) as (api, cluster, _):
        first = Producer(api)
        first.send(producer_id="p")
        for sequence in range(1, 6):
            first.send("u1", sequence=sequence)
        await first.told_up_to(5)
        if how == "ends":
            first.end()
            await first.rest()
        else:
            await first.leave()
        await until(lambda: max(shard.acknowledged("p") for shard in cluster.shards.values()) == 5)
        second = Producer(api)
        second.send(producer_id="p")
        assert (await second.told()).sequence == 5
        second.end()
        await second.rest()


async def test_telling_where_a_producer_is_outlasts_the_shard_that_is_told_and_ends_no_stream() -> None:
    async with api_over_shards(1) as (api, cluster, _):
        first = Producer(api)
        first.send(producer_id="p")
        first.send("u1", sequence=1)
        await first.told_up_to(1)
        await cluster.kill(0)
        first.end()
        await asyncio.wait_for(first.rest(), 1)
        await cluster.restart(0)
        await until(lambda: cluster.shards[0].acknowledged("p") == 1)
        # And it is durable there.
        await cluster.kill(0)
        await cluster.restart(0)
        assert cluster.shards[0].acknowledged("p") == 1
        assert await views(api, "u1") == 1


async def test_what_is_told_of_a_producer_never_runs_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "PATIENCE_S", 0.1)
    async with api_over_shards(2, make_shard=Slow) as (api, cluster, _):
        producer = Producer(api)
        producer.send(producer_id="p")
        for sequence in (1, 2):
            producer.send(*(f"u{number}" for number in range(10)), sequence=sequence)
        told = asyncio.create_task(producer.told_up_to(2))
        await until(lambda: all(shard.requests for shard in cluster.shards.values()))
        # One owner has applied the first batch, the other nothing.
        cluster.shards[0].release.set()
        await asyncio.sleep(0.05)
        told.cancel()
        await asyncio.wait([told])
        await producer.leave()
        cluster.shards[1].release.set()
        await asyncio.sleep(0.2)
        parts = [part for shard in cluster.shards.values() for request in shard.requests for part in request]
        assert {part.acknowledged_sequence for part in parts} == {0}
        assert all(part.sequence for part in parts)


async def test_batches_that_are_held_are_told_one_by_one_with_what_was_refused() -> None:
    async with api_over_shards() as (api, _, _):
        for _ in range(2):
            producer = Producer(api)
            producer.send(producer_id="p")
            for sequence in (1, 2, 3):
                producer.send("u1", "", sequence=sequence)
            producer.end()
            responses = await producer.rest()
            for response in responses[1:]:
                assert all(r.sequence <= response.sequence for r in response.rejected)
            told = [(r.sequence, r.index) for response in responses for r in response.rejected]
            assert told == [(1, 1), (2, 1), (3, 1)]
            assert [response.sequence for response in responses[1:]] == sorted(r.sequence for r in responses[1:])
        assert await views(api, "u1") == 3


async def test_a_producer_that_does_not_listen_to_what_is_refused_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer_streams, "MOST_UNTOLD", 50)
    monkeypatch.setattr(acknowledgements, "REJECTED_PER_RESPONSE", 10)
    async with api_over_shards() as (api, _, _):
        producer = Producer(api)
        producer.send(producer_id="p")
        await producer.told()
        for sequence in range(1, 201):
            producer.send(*[""] * 5, sequence=sequence)
        producer.end()
        # Nobody asks for more than one answer.
        await producer.told()
        for _ in range(50):
            await asyncio.sleep(0)
        assert producer._requests.qsize() > 180
        responses = await producer.rest()
        assert responses[-1].sequence == 200


async def test_an_anonymous_stream_is_acknowledged_and_counts_each_time() -> None:
    async with api_over_shards() as (api, _, _):
        for _ in range(2):
            producer = Producer(api)
            producer.send("u1", sequence=1)
            producer.end()
            assert (await producer.rest())[-1].sequence == 1
        assert await views(api, "u1") == 2


async def test_one_bad_event_spoils_nothing_and_is_named_with_its_batch() -> None:
    async with api_over_shards() as (api, _, metrics):
        producer = Producer(api)
        producer.send(producer_id="p")
        producer.send("u1", sequence=1)
        producer.send("u1", "", sequence=2)
        producer.send("u1", event_type="nonsense", sequence=3)
        producer.end()
        responses = await producer.rest()
        rejected = [(r.sequence, r.index, r.field) for response in responses for r in response.rejected]
        assert rejected == [(2, 1, "user_id"), (3, 0, "type")]
        assert responses[-1].sequence == 3
        assert await views(api, "u1") == 2
        assert b'events_rejected_total{field="user_id"} 1.0' in metrics.render()


@pytest.mark.parametrize(
    ("batches", "field", "answered"),
    [
        ([{"sequence": 1}, {"sequence": 3}], "sequence", 1),
        ([{"sequence": 2}, {"sequence": 2}], "sequence", 2),
        ([{"sequence": 5}, {"sequence": 4}], "sequence", 5),
        ([{"sequence": 0}], "sequence", 0),
        ([{"sequence": -1}], "sequence", 0),
        ([{"sequence": 1}, {"sequence": 2, "producer_id": "other"}], "producer_id", 1),
    ],
)
async def test_a_wrong_message_ends_the_stream_after_what_came_before_is_answered(
    batches: list[dict[str, Any]], field: str, answered: int
) -> None:
    async with api_over_shards() as (api, _, _):
        producer = Producer(api)
        producer.send(producer_id="p")
        for fields in batches:
            producer.send("u1", **fields)
        with pytest.raises(InvalidArgument) as raised:
            await producer.rest()
        assert raised.value.violations[0].field == field
        assert producer.last_told == answered


@pytest.mark.parametrize("producer_id", ["x" * 257, "request:1"])
async def test_a_producer_id_has_its_limits(producer_id: str) -> None:
    async with api_over_shards() as (api, _, _):
        producer = Producer(api)
        producer.send(producer_id=producer_id)
        with pytest.raises(InvalidArgument, match="producer_id"):
            await producer.told()


async def test_damage_ends_the_stream_and_says_where() -> None:
    async with api_over_shards() as (api, _, _):
        producer = Producer(api)
        producer.send(producer_id="p")
        producer.send("u1", sequence=1)
        producer.send_bytes(b"\x0a\xff")
        with pytest.raises(InvalidArgument, match=r"byte|offset"):
            await producer.rest()
        assert await views(api, "u1") == 1


async def test_the_newer_of_two_streams_of_a_producer_stays() -> None:
    async with api_over_shards() as (api, _, _):
        older, newer = Producer(api), Producer(api)
        older.send(producer_id="p")
        older.send("u1", sequence=1)
        await older.told_up_to(1)
        newer.send(producer_id="p")
        await newer.told()
        with pytest.raises(Superseded, match="'p'"):
            await older.rest()
        newer.send("u1", sequence=1)
        newer.send("u1", sequence=2)
        await newer.told_up_to(2)
        assert await views(api, "u1") == 2
        newer.end()
        await newer.rest()


async def test_an_older_stream_that_is_superseded_leaves_nothing_that_gets_ahead_of_the_newer_one() -> None:
    async with api_over_shards(1, make_shard=Slow) as (api, cluster, _):
        older, newer = Producer(api), Producer(api)
        older.send(producer_id="p")
        await older.told()
        for sequence in (1, 2):
            older.send("u1", sequence=sequence)
        telling = asyncio.create_task(older.told())
        await until(lambda: bool(cluster.shards[0].requests))
        newer.send(producer_id="p")
        await newer.told()
        with pytest.raises(Superseded):
            await telling
        for sequence in (1, 2, 3):
            newer.send("u1", sequence=sequence)
        told = asyncio.create_task(newer.told_up_to(3))
        cluster.shards[0].release.set()
        await told
        sequences = [part.sequence for request in cluster.shards[0].requests for part in request if part.sequence]
        assert sequences[-3:] == [1, 2, 3]
        newer.end()
        await newer.rest()


async def test_the_newer_stream_is_the_one_that_came_later_however_long_the_older_waits() -> None:
    async with api_over_shards(1) as (api, _, _):
        ask, slow = api.ingest._router.acknowledged, asyncio.Event()
        asked: list[str] = []

        async def acknowledged(producer_id: str) -> int:
            asked.append(producer_id)
            if len(asked) == 1:
                await slow.wait()
            return await ask(producer_id)

        api.ingest._router.acknowledged = acknowledged  # type: ignore[method-assign]
        older, newer = Producer(api), Producer(api)
        older.send(producer_id="p")
        telling = asyncio.create_task(older.told())
        await until(lambda: bool(asked))
        newer.send(producer_id="p")
        await newer.told()
        slow.set()
        with pytest.raises(Superseded):
            await telling
        newer.send("u1", sequence=1)
        await newer.told_up_to(1)
        newer.end()
        await newer.rest()


async def test_a_producer_id_used_for_other_events_counts_none_of_those_under_a_number_that_was_used() -> None:
    """A mistake of the producer's: whoever sends other batches needs another name."""
    async with api_over_shards() as (api, cluster, _):
        for user in ("u1", "v1"):
            producer = Producer(api)
            producer.send(producer_id="p")
            for sequence in (1, 2):
                producer.send(user, sequence=sequence)
            producer.end()
            assert (await producer.rest())[-1].sequence == 2
            # A shard hears with what comes next to it how far the producer is.
            await until(lambda: max(shard.acknowledged("p") for shard in cluster.shards.values()) == 2)
        assert await views(api, "u1") == 2
        with pytest.raises(NotFound):
            await views(api, "v1")


async def test_a_stream_is_not_read_beyond_its_window() -> None:
    capacity = Capacity(stream_window_bytes=2_000)
    async with api_over_shards(1, capacity=capacity, make_shard=Slow) as (api, cluster, _):
        producer = Producer(api)
        producer.send(producer_id="p")
        await producer.told()
        for sequence in range(1, 101):
            producer.send(*(f"u{number}" for number in range(10)), sequence=sequence)
        telling = asyncio.create_task(producer.told_up_to(100))
        await until(lambda: producer._requests.qsize() < 99 and bool(cluster.shards[0].requests))
        for _ in range(20):
            await asyncio.sleep(0)
        assert producer._requests.qsize() > 50
        cluster.shards[0].release.set()
        assert (await telling)[-1].sequence == 100
        await producer.leave()


async def test_a_producer_that_goes_away_leaves_nothing_behind() -> None:
    async with api_over_shards(1, make_shard=Slow) as (api, cluster, _):
        producer = Producer(api)
        producer.send(producer_id="p")
        await producer.told()
        producer.send("u1", sequence=1)
        waiting = asyncio.create_task(producer.told())
        await until(lambda: bool(cluster.shards[0].requests))
        waiting.cancel()
        await asyncio.wait([waiting])
        await producer.leave()
        assert api.ingest._streams._streams == {}
        await asyncio.wait_for(api.idle(), 5)


async def test_draining_answers_what_was_read_and_asks_to_come_back() -> None:
    async with api_over_shards(1, make_shard=Slow) as (api, cluster, _):
        producer = Producer(api)
        producer.send(producer_id="p")
        await producer.told()
        producer.send("u1", sequence=1)
        told = asyncio.create_task(producer.told())
        await until(lambda: bool(cluster.shards[0].requests))
        api.drain()
        cluster.shards[0].release.set()
        assert (await told).sequence == 1
        with pytest.raises(Unavailable, match="connect again"):
            await producer.rest()
        await asyncio.wait_for(api.idle(), 5)


async def test_a_single_batch_counts_what_is_valid() -> None:
    async with api_over_shards() as (api, _, _):
        answer = await ingest(api, encode(["u1", "", "u2", "x" * 257]))
        assert answer.accepted_count == 2
        assert [(r.index, r.field) for r in answer.rejected] == [(1, "user_id"), (3, "user_id")]
        assert await views(api, "u1") == 1
        answer = await ingest(api, encode([""]))
        assert (answer.accepted_count, len(answer.rejected)) == (0, 1)


async def test_a_request_id_makes_a_batch_count_once() -> None:
    async with api_over_shards() as (api, _, _):
        for _ in range(3):
            answer = await ingest(api, encode(["u1", "u2", "u1"], request_id="r1"))
            assert answer.accepted_count == 3
        await ingest(api, encode(["u1"], request_id="r2"))
        assert await views(api, "u1") == 3


REQUEST = encode(["u1", "u2", "u3", "u4", "u1", ""], request_id="r1")


async def check_request(api: Api, answers: Sequence[event_service_pb2.IngestEventsResponse]) -> None:
    """Every answer is the same, and REQUEST was counted once."""
    assert {answer.accepted_count for answer in answers} == {5}
    assert all([(r.index, r.field) for r in answer.rejected] == [(5, "user_id")] for answer in answers)
    assert [await views(api, user) for user in ("u1", "u2", "u3", "u4")] == [2, 1, 1, 1]


async def test_a_request_sent_again_while_the_first_is_on_its_way_counts_once() -> None:
    async with api_over_shards() as (api, _, _):
        await check_request(api, await asyncio.gather(*(ingest(api, REQUEST) for _ in range(10))))


async def test_a_request_sent_again_through_another_frontend_counts_once() -> None:
    async with api_over_shards() as (api, cluster, _), another_api(cluster) as other:
        await check_request(api, await asyncio.gather(ingest(api, REQUEST), ingest(other, REQUEST)))
        await check_request(other, [await ingest(other, REQUEST)])


async def test_a_request_sent_again_after_every_shard_was_killed_counts_once() -> None:
    async with api_over_shards() as (api, cluster, _):
        answers = [await ingest(api, REQUEST)]
        for shard_id in (0, 1):
            await cluster.kill(shard_id)
            await cluster.restart(shard_id)
        await check_request(api, [*answers, await ingest(api, REQUEST)])


@pytest.mark.parametrize("through_another", [False, True])
async def test_a_request_that_reached_one_owner_only_is_completed_when_it_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, through_another: bool
) -> None:
    monkeypatch.setattr(router_module, "PATIENCE_S", 0.3)
    async with api_over_shards() as (api, cluster, _), another_api(cluster) as other:
        await cluster.kill(0)
        with pytest.raises(Unavailable, match="may have been counted in part"):
            await ingest(api, REQUEST)
        await until(lambda: cluster.shards[1].status().event_count > 0)
        await cluster.restart(0)
        monkeypatch.undo()
        await check_request(api, [await ingest(other if through_another else api, REQUEST)])


async def test_a_request_id_used_for_other_events_adds_only_what_its_first_use_did_not_touch() -> None:
    """A mistake of the caller's, which is answered as if all were well: a request id names one batch. What is counted
    of the second batch are the events of users in partitions that the first had no event for."""
    async with api_over_shards() as (api, cluster, _):
        bits = cluster.topology.partition_bits
        first = "u1"
        same = next(f"v{n}" for n in range(1000) if _partition(f"v{n}", bits) == _partition(first, bits))
        other = next(f"v{n}" for n in range(1000) if _partition(f"v{n}", bits) != _partition(first, bits))
        await ingest(api, encode([first], request_id="r1"))
        answer = await ingest(api, encode([first, same, other], request_id="r1"))
        assert answer.accepted_count == 3
        assert await views(api, first) == 1
        assert await views(api, other) == 1
        with pytest.raises(NotFound):
            await views(api, same)


def _partition(user_id: str, bits: int) -> int:
    return partition_of(user_hash(user_id), bits)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (b"", "events"),
        (encode([], request_id="r"), "events"),
        (encode(["u"], request_id="r" * 257), "request_id"),
        (encode(["u"] * 4), "events"),
        (b"\xff", ""),
    ],
)
async def test_a_wrong_batch_names_its_fault(message: bytes, field: str) -> None:
    async with api_over_shards(limits=Limits(events_per_batch=3)) as (api, _, _):
        with pytest.raises(InvalidArgument) as raised:
            await ingest(api, message)
        assert raised.value.violations[0].field == field


async def test_a_full_owner_refuses_a_single_batch_and_says_when_to_come_back() -> None:
    capacity = Capacity(owner_window_bytes=1_000)
    async with api_over_shards(1, capacity=capacity, make_shard=Slow) as (api, cluster, _):
        batch = encode([f"u{number}" for number in range(100)])
        first = asyncio.create_task(ingest(api, batch))
        await until(lambda: bool(cluster.shards[0].requests))
        with pytest.raises(ResourceExhausted) as raised:
            await ingest(api, batch)
        assert raised.value.retry_after_s > 0
        cluster.shards[0].release.set()
        assert (await first).accepted_count == 100


async def test_events_without_a_time_get_the_time_of_their_arrival() -> None:
    async with api_over_shards() as (api, _, _):
        before = system_clock()
        await ingest(api, encode(["u1"]))
        request = profile_service_pb2.GetProfileRequest(user_id="u1").SerializeToString()
        encoded = await api.call("userprofile.v1.ProfileService/GetProfile", request, GRPC)
        assert before <= profile_pb2.Profile.FromString(encoded).last_seen_time.ToNanoseconds() <= system_clock()
