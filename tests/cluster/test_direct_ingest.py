"""What a producer is promised that splits its batches and goes straight to the owners, in every mix with frontends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import grpc
import pytest
from grpc import aio

from profile_client.errors import InvalidArgumentError, ServiceError, UnavailableError, from_rpc_error
from profile_service.cluster.partitioning import partition_of, user_hash
from profile_service.cluster.router import Router
from profile_service.errors import InvalidArgument, Unavailable
from tests.cluster.local_cluster import LocalCluster, encode, running, until
from tests.frontends.api_harness import Producer, api_over_shards
from userprofile.v1 import event_service_pb2, profile_pb2

METHOD = "/userprofile.v1.EventService/StreamEvents"
USERS = [f"u{number}" for number in range(40)]


class OwnerStream:
    """A producer's stream straight to a shard; errors are the client's."""

    def __init__(self, channel: aio.Channel, producer_id: str = "p") -> None:
        self._requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        stream: Any = channel.stream_stream(METHOD)
        self._call = stream(self._sent())
        self._responses = aiter(self._call)
        self.send_message(event_service_pb2.StreamEventsRequest(producer_id=producer_id).SerializeToString())

    def send_message(self, message: bytes) -> None:
        self._requests.put_nowait(message)

    def send(self, user_ids: Sequence[str], sequence: int, acknowledged: int | None = None, **fields: Any) -> None:
        if acknowledged is not None:
            fields["acknowledged_sequence"] = acknowledged
        self.send_message(encode(user_ids, sequence=sequence, **fields))

    async def told(self) -> event_service_pb2.StreamEventsResponse:
        try:
            return event_service_pb2.StreamEventsResponse.FromString(await anext(self._responses))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def told_up_to(self, sequence: int) -> list[event_service_pb2.StreamEventsResponse]:
        responses = [await self.told()]
        while responses[-1].sequence < sequence:
            responses.append(await self.told())
        return responses

    async def end(self) -> list[event_service_pb2.StreamEventsResponse]:
        """Sends nothing more; the rest of the answers."""
        self._requests.put_nowait(None)
        responses = []
        while True:
            try:
                responses.append(await self.told())
            except StopAsyncIteration:
                return responses

    async def failure(self) -> ServiceError:
        """What the stream ends with."""
        while True:
            try:
                await self.told()
            except ServiceError as error:
                return error

    def cancel(self) -> None:
        self._call.cancel()

    async def _sent(self) -> AsyncIterator[bytes]:
        while (message := await self._requests.get()) is not None:
            yield message


@asynccontextmanager
async def straight_to(cluster: LocalCluster, shard_id: int) -> AsyncIterator[aio.Channel]:
    (address,) = (shard.address for shard in cluster.topology.shards if shard.shard_id == shard_id)
    async with aio.insecure_channel(address) as channel:
        yield channel


def users_of(cluster: LocalCluster, shard_id: int) -> list[str]:
    bits = cluster.topology.partition_bits
    return [user for user in USERS if cluster.topology.owner_of(partition_of(user_hash(user), bits)) == shard_id]


async def counts(router: Router, user_ids: Sequence[str]) -> list[int]:
    profiles = await router.read(user_ids, [])
    return [profile_pb2.Profile.FromString(profile).event_count for profile in profiles]


async def test_what_an_owner_acknowledges_is_readable_and_counts_once_however_often_it_is_sent() -> None:
    async with running() as (cluster, router), straight_to(cluster, 0) as channel:
        users = users_of(cluster, 0)
        for _ in range(2):
            stream = OwnerStream(channel)
            assert (await stream.told()).sequence == 0
            # Numbers of batches that have no event for this owner are left out.
            for sequence in (2, 3, 7):
                stream.send(users, sequence, acknowledged=0)
            responses = await stream.told_up_to(7)
            assert [r.sequence for r in responses] == sorted({r.sequence for r in responses} & {2, 3, 7})
            assert await counts(router, users) == [3] * len(users)
            assert await stream.end() == []


async def test_what_is_refused_of_a_batch_is_told_by_its_place_and_the_rest_counts() -> None:
    async with running() as (cluster, router), straight_to(cluster, 1) as channel:
        users = users_of(cluster, 1)
        stream = OwnerStream(channel)
        stream.send([users[0], "", users[1], "x" * 257, users[0]], 4)
        stream.send(["", ""], 6)
        await stream.told()
        told = [(r.sequence, r.index, r.field) for response in await stream.told_up_to(6) for r in response.rejected]
        assert told == [(4, 1, "user_id"), (4, 3, "user_id"), (6, 0, "user_id"), (6, 1, "user_id")]
        assert await counts(router, users[:2]) == [2, 1]
        assert await stream.end() == []


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (encode(["u"], sequence=3), "sequence"),
        (encode(["u"], sequence=-1), "sequence"),
        (encode(["u"], sequence=9, acknowledged_sequence=-1), "acknowledged_sequence"),
        (encode(["u"], sequence=9, producer_id="another"), "producer_id"),
        (b"\x0a\xff", ""),
    ],
)
async def test_a_wrong_message_ends_an_owner_s_stream_and_names_the_fault(message: bytes, field: str) -> None:
    async with running(1) as (cluster, _), straight_to(cluster, 0) as channel:
        stream = OwnerStream(channel)
        stream.send(["u"], 3)
        stream.send_message(message)
        error = await stream.failure()
        assert isinstance(error, InvalidArgumentError)
        assert [at for at, _ in error.violations] == [field]


async def test_an_owner_takes_no_acknowledgement_of_its_own_for_the_producer_s() -> None:
    async with running() as (cluster, router), straight_to(cluster, 0) as first, straight_to(cluster, 1) as second:
        streams = [OwnerStream(first), OwnerStream(second)]
        for stream in streams:
            await stream.told()
        # Batch 1 and 3 have events for the first owner alone, 2 for both; the second has not had its part.
        for sequence in (1, 2, 3):
            streams[0].send(users_of(cluster, 0), sequence, acknowledged=0)
        await streams[0].told_up_to(3)
        await streams[0].end()
        assert await router.acknowledged("p") == 0
        streams[1].send(users_of(cluster, 1), 2, acknowledged=1)
        await streams[1].told_up_to(2)
        assert await router.acknowledged("p") == 1
        # A message without events tells it, too, in the log when the stream ends.
        streams[1].send([], 0, acknowledged=3)
        await streams[1].end()
        await until(lambda: cluster.shards[1].acknowledged("p") == 3)
        await cluster.kill(1)
        await cluster.restart(1)
        assert cluster.shards[1].acknowledged("p") == 3


async def test_a_batch_with_another_s_user_ends_the_stream_and_nothing_of_it_or_after_it_is_kept() -> None:
    async with running() as (cluster, router), straight_to(cluster, 0) as channel:
        mine, others = users_of(cluster, 0), users_of(cluster, 1)
        stream = OwnerStream(channel)
        stream.send(mine, 1)
        stream.send([*mine, others[0]], 2)
        for sequence in range(3, 10):
            stream.send(mine, sequence)
        error = await stream.failure()
        assert isinstance(error, UnavailableError)
        assert error.reason == "NOT_MINE"
        assert await counts(router, mine) == [1] * len(mine)
        # Split anew and sent again, from the lowest on that is not acknowledged.
        again = OwnerStream(channel)
        for sequence in range(1, 10):
            again.send(mine, sequence)
        await again.told_up_to(9)
        assert await counts(router, mine) == [9] * len(mine)
        await again.end()


async def test_a_shard_that_recovers_says_so() -> None:
    async with running() as (cluster, _), straight_to(cluster, 0) as channel:

        def refuse(_: str) -> int:
            raise Unavailable("shard 0 recovers", 0.5)

        cluster.shards[0].acknowledged = refuse
        error = await OwnerStream(channel).failure()
        assert (error.reason, error.retry_after_s) == ("UNAVAILABLE", 0.5)


async def test_the_newer_of_two_streams_of_a_producer_stays_at_an_owner_too() -> None:
    async with running(1) as (cluster, router), straight_to(cluster, 0) as channel:
        older = OwnerStream(channel)
        older.send(USERS, 1)
        await older.told_up_to(1)
        newer = OwnerStream(channel)
        await newer.told()
        assert (await older.failure()).reason == "SUPERSEDED"
        newer.send(USERS, 1)
        newer.send(USERS, 2)
        await newer.told_up_to(2)
        assert await counts(router, USERS) == [2] * len(USERS)
        await newer.end()


async def test_a_sparse_stream_through_a_frontend_tells_what_its_producer_says() -> None:
    async with api_over_shards() as (api, cluster, _):
        producer = Producer(api)
        producer.send(producer_id="p", acknowledged_sequence=0)
        for sequence in (3, 8):
            producer.send("u1", sequence=sequence, acknowledged_sequence=2)
        assert [response.sequence for response in await producer.told_up_to(8)][-1] == 8
        assert max(shard.acknowledged("p") for shard in cluster.shards.values()) == 2
        producer.send(acknowledged_sequence=9)
        producer.end()
        assert await producer.rest() == []
        await until(lambda: max(shard.acknowledged("p") for shard in cluster.shards.values()) == 9)


async def test_a_stream_does_not_become_sparse_on_its_way() -> None:
    async with api_over_shards() as (api, _, _):
        producer = Producer(api)
        producer.send(producer_id="p")
        producer.send("u1", sequence=1, acknowledged_sequence=0)
        with pytest.raises(InvalidArgument, match="acknowledged_sequence"):
            await producer.rest()


async def test_batches_count_once_through_deaths_moves_and_every_mix_of_ways(seed: int) -> None:
    """A producer that never hears more than a stream's end: it splits what is not acknowledged anew, by a topology that
    may be stale, and sends some owners' parts straight, the others' through a frontend."""
    random = Random(seed)
    batches = 30
    async with api_over_shards() as (api, cluster, _):
        router = api.ingest._router
        bits = cluster.topology.partition_bits
        acknowledged = 0
        rounds = 0
        while acknowledged < batches:
            rounds += 1
            assert rounds < 300
            topology = cluster.topology
            direct = random.choice([{0}, {1}, {0, 1}, set()])
            last = min(batches, acknowledged + random.randrange(1, 8))
            told = await _one_round(api, cluster, direct, acknowledged, last, topology, bits, random)
            assert (await router.acknowledged("p")) <= told
            acknowledged = told
        assert await counts(router, USERS) == [batches] * len(USERS)


async def _one_round(
    api: Any,
    cluster: LocalCluster,
    direct: set[int],
    acknowledged: int,
    last: int,
    topology: Any,
    bits: int,
    random: Random,
) -> int:
    """Sends the batches after `acknowledged` up to `last`, while something dies; returns what is acknowledged then."""
    owned = {
        shard: [user for user in USERS if topology.owner_of(partition_of(user_hash(user), bits)) == shard]
        for shard in (0, 1)
    }
    sequences = range(acknowledged + 1, last + 1)
    told: dict[str, int] = {}

    async def straight(shard_id: int) -> None:
        async with straight_to(cluster, shard_id) as channel:
            stream = OwnerStream(channel)
            told[f"owner {shard_id}"] = acknowledged
            try:
                await stream.told()
                for sequence in sequences:
                    stream.send(owned[shard_id], sequence, acknowledged)
                while told[f"owner {shard_id}"] < last:
                    told[f"owner {shard_id}"] = max(acknowledged, (await stream.told()).sequence)
            except ServiceError:
                pass
            finally:
                stream.cancel()

    async def through() -> None:
        rest = [user for shard_id in (0, 1) if shard_id not in direct for user in owned[shard_id]]
        producer = Producer(api)
        told["frontend"] = acknowledged
        producer.send(producer_id="p", acknowledged_sequence=acknowledged)
        for sequence in sequences:
            producer.send(*rest, sequence=sequence, acknowledged_sequence=acknowledged)
        await producer.told()
        try:
            async with asyncio.timeout(5):
                while told["frontend"] < last:
                    told["frontend"] = max(acknowledged, (await producer.told()).sequence)
        finally:
            await producer.leave()

    async def disturb() -> None:
        await asyncio.sleep(random.random() * 0.02)
        match random.randrange(3):
            case 0:
                shard_id = random.randrange(2)
                await cluster.kill(shard_id)
                await cluster.restart(shard_id)
            case 1:
                # Another shard's news: the epoch rises, and whoever waits in a shard's queue is sent back.
                cluster.give(cluster.topology.starts)

    ways = [straight(shard_id) for shard_id in direct]
    if len(direct) < 2:
        ways.append(through())
    await asyncio.gather(disturb(), *ways)
    return min(told.values())
