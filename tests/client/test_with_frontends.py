"""Both clients against real frontends over real shards, all of which come and go: what is sent counts once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Any

import httpx
import pytest

from profile_client import (
    AbortedError,
    AsyncProfileClient,
    Event,
    ProducerOptions,
    ProfileClient,
    Rejected,
    RejectedEventsError,
    ResourceExhaustedError,
)
from profile_service.clock import system_clock
from profile_service.config import Settings
from profile_service.frontends.server import Frontend
from tests.client.both import awaitable
from tests.cluster.local_cluster import SCHEMA, LocalCluster, running, until

WAIT_S = 60.0
USERS = [f"u{number}" for number in range(10)]
SMALL = ProducerOptions(batch_events=5, in_flight_batches=4, reconnect_s=(0.01, 0.1))


class Place:
    """An address with a frontend, or just now without one."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._settings = Settings(grpc_port=0, http_port=0, drain_timeout_s=10.0, capacity=cluster.capacity)
        self.frontend: Frontend
        self.http_address = ""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._settings.grpc_port}"

    async def start(self) -> None:
        self.frontend = Frontend(SCHEMA, self._settings, self._cluster.source, system_clock, self._cluster)
        await self.frontend.start()
        self.http_address = self.frontend.http_address
        self._settings = replace(self._settings, grpc_port=int(self.frontend.grpc_address.rpartition(":")[2]))

    async def drain(self) -> None:
        """It ends as on SIGTERM."""
        await self.frontend.drain()

    async def kill(self) -> None:
        """It ends at once: connections break, and nothing is said."""
        await self.frontend._grpc.stop(0)
        await self.frontend._router.close()
        await self.frontend.drain()


@asynccontextmanager
async def service(shards: int = 2) -> AsyncIterator[tuple[LocalCluster, Place]]:
    async with running(shards) as (cluster, _):
        place = Place(cluster)
        await place.start()
        try:
            yield cluster, place
        finally:
            await place.drain()


@asynccontextmanager
async def connected(kind: str, place: Place) -> AsyncIterator[Any]:
    """A client of the kind; calls of the synchronous one run in threads."""
    if kind == "asyncio":
        async with AsyncProfileClient(place.address, timeout_s=WAIT_S) as client:
            yield client
    else:
        synchronous = ProfileClient(place.address, timeout_s=WAIT_S)
        try:
            yield awaitable(synchronous)
        finally:
            await asyncio.to_thread(synchronous.close)


async def counts(client: Any) -> list[int]:
    batch = await client.batch_get_profiles(USERS)
    return [profile.event_count for profile in batch.profiles]


async def send_for_ever(producer: Any) -> None:
    while True:
        await producer.send(Event("u0", "view"))
        await producer.flush()


both = pytest.mark.parametrize("kind", ["sync", "asyncio"])


@both
async def test_a_producer_goes_on_through_frontends_and_shards_that_end_in_every_way(kind: str, seed: int) -> None:
    random = Random(seed)
    rounds = 60
    heard: list[tuple[int, int]] = []

    def hear(_: int, rejected: Sequence[Rejected]) -> None:
        heard.extend((each.sequence, each.index) for each in rejected)

    async with service() as (cluster, place), connected(kind, place) as client:
        options = replace(SMALL, on_acknowledged=hear, batch_events=6)

        async def produce() -> None:
            producer = client.producer("p", options)
            for _ in range(rounds):
                await producer.send_batch([Event(user, "view") for user in USERS] + [Event("u0", "sold")] * 2)
                await asyncio.sleep(0.02)
            with pytest.raises(RejectedEventsError):
                await producer.flush(WAIT_S)
            assert producer.acknowledged_events == 12 * rounds
            await producer.close()

        async def disturb() -> None:
            while not producing.done():
                match random.randrange(3):
                    case 0:
                        await place.drain()
                        await asyncio.sleep(random.random() * 0.1)
                        await place.start()
                    case 1:
                        await place.kill()
                        await place.start()
                    case 2:
                        shard_id = random.randrange(2)
                        await cluster.kill(shard_id)
                        await asyncio.sleep(random.random() * 0.1)
                        await cluster.restart(shard_id)
                await asyncio.sleep(random.random() * 0.3)

        producing = asyncio.create_task(produce())
        await asyncio.gather(producing, disturb())
        assert await counts(client) == [rounds] * len(USERS)
        # Told once each, in order.
        assert heard == [(2 * number, index) for number in range(1, rounds + 1) for index in (4, 5)]


@both
async def test_batches_of_single_calls_count_once_through_the_same(kind: str, seed: int) -> None:
    random = Random(seed)
    async with service() as (cluster, place), connected(kind, place) as client:

        async def call() -> None:
            for _ in range(6):
                assert await client.ingest_events([Event(user, "view") for user in USERS]) == len(USERS)
                await asyncio.sleep(0.02)

        async def disturb() -> None:
            while not all(task.done() for task in calling):
                await (place.drain if random.random() < 0.5 else place.kill)()
                await place.start()
                await asyncio.sleep(random.random() * 0.5)
                shard_id = random.randrange(2)
                await cluster.kill(shard_id)
                await cluster.restart(shard_id)

        calling = [asyncio.create_task(call()) for _ in range(4)]
        await asyncio.gather(*calling, disturb())
        assert await counts(client) == [24] * len(USERS)


@both
async def test_a_full_disk_is_waited_for_and_nothing_is_lost_or_doubled(kind: str) -> None:
    async with service() as (cluster, place), connected(kind, place) as client:
        await client.ingest_events([Event(user, "view") for user in USERS])
        disk = cluster.disks[0]
        disk.capacity_bytes = 0
        async with client.producer(options=SMALL) as producer:
            calling = asyncio.ensure_future(client.ingest_events([Event(user, "view") for user in USERS]))
            # Segments are preallocated: the disk shows full once the one at hand is used up.
            for _ in range(40):
                await producer.send_batch([Event(user, "view", attributes={"pad": "x" * 1000}) for user in USERS] * 50)
                if producer.last_error is not None:
                    break
            flushing = asyncio.ensure_future(producer.flush())
            await until(lambda: isinstance(producer.last_error, ResourceExhaustedError))
            assert producer.last_error.reason == "STORAGE_FULL"
            await asyncio.sleep(0.1)
            assert not flushing.done()
            assert await counts(client), "reads go on"
            disk.capacity_bytes = None
            await flushing
            assert await calling == len(USERS)
            assert await counts(client) == [2 + producer.sent_events // len(USERS)] * len(USERS)


@both
async def test_of_two_producers_with_one_id_the_later_goes_on(kind: str) -> None:
    async with service() as (_, place), connected(kind, place) as client:
        earlier = client.producer("p")
        await earlier.send(Event("u0", "view"))
        await earlier.flush()
        later = client.producer("p")
        assert await later.acknowledged_sequence() <= 1
        with pytest.raises(AbortedError, match="newer stream has the producer_id 'p'"):
            await send_for_ever(earlier)
        await earlier.close(flush=False)
        await later.close()


async def test_a_request_id_is_the_same_over_grpc_and_rest() -> None:
    async with service() as (_, place), connected("asyncio", place) as client:
        events = [{"userId": "u0", "type": "view"}, {"userId": "u1", "type": "view"}, {"userId": 5}]
        async with httpx.AsyncClient(base_url=f"http://{place.http_address}") as http:
            for _ in range(2):
                answer = await http.post("/v1/events:ingest", json={"events": events, "requestId": "r1"})
                assert answer.json()["acceptedCount"] == 2
                assert [rejected["index"] for rejected in answer.json()["rejected"]] == [2]
            assert await client.ingest_events([Event("u0", "view"), Event("u1", "view")], "r1") == 2
            answer = await http.post("/v1/events:ingest", json={"events": events[:1], "request_id": "r2"})
            assert answer.json()["acceptedCount"] == 1
        assert [(await client.get_profile(user)).event_count for user in ("u0", "u1")] == [2, 1]
