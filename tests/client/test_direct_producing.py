"""Producers that go straight to the owners: what they send counts once, by whichever way it could go."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing
from dataclasses import replace
from typing import Any

import httpx
import pytest

from profile_client import AsyncProfileClient, Event, ProfileClient, RejectedEventsError
from profile_client import aio_producer as aio_producer_module
from profile_client import producer as producer_module
from profile_service.cluster.partitioning import partition_of, user_hash
from tests.client.both import awaitable
from tests.client.test_with_frontends import SMALL, USERS, WAIT_S, Place, connected, counts, service
from tests.cluster.local_cluster import LocalCluster, until
from userprofile.v1 import profile_pb2

of_both = pytest.mark.parametrize("kind", ["sync", "asyncio"])


async def accepted_by_frontend(place: Place) -> int:
    """Events that the frontend has brought to their owners."""
    async with httpx.AsyncClient(base_url=f"http://{place.http_address}") as http:
        lines = (await http.get("/metrics")).text.splitlines()
    return next(
        int(float(line.split()[-1])) for line in lines if line.startswith("profile_service_events_accepted_total")
    )


def held(cluster: LocalCluster, user: str) -> int:
    """Events of a user over all shards: rows do not move here when their owner changes."""
    total = 0
    for shard in cluster.shards.values():
        row = shard._state.table.users.get(user.encode())
        if row >= 0:
            encoded = shard._state.table.profile(user, 1 << 62, (), None)
            total += profile_pb2.Profile.FromString(encoded).event_count
    return total


def owner_of(cluster: LocalCluster, user: str) -> int:
    return cluster.topology.owner_of(partition_of(user_hash(user), cluster.topology.partition_bits))


def owners_of(client: Any) -> Any:
    """What the client knows of the owners."""
    return client._owners


@of_both
async def test_events_go_straight_to_their_owners_and_what_is_refused_is_told_by_its_place(kind: str) -> None:
    async with service() as (cluster, place), connected(kind, place) as client:
        assert {owner_of(cluster, user) for user in USERS} == {0, 1}
        producer = client.producer("p", SMALL)
        for number in range(20):
            await producer.send_batch([Event(user, "view") for user in USERS])
            await producer.send(Event("u0", f"sold{number}"))
        with pytest.raises(RejectedEventsError) as info:
            await producer.flush(WAIT_S)
        assert [each.position for each in info.value.rejected] == [11 * number + 10 for number in range(20)]
        assert all(b"sold%d" % n in each.serialized for n, each in enumerate(info.value.rejected))
        assert producer.acknowledged_events == producer.sent_events == 220
        assert await counts(client) == [20] * len(USERS)
        await producer.close()
        assert await accepted_by_frontend(place) == 0


@of_both
async def test_a_client_that_is_told_to_goes_through_the_frontend(kind: str) -> None:
    async with service() as (_, place):
        if kind == "asyncio":
            client: Any = AsyncProfileClient(place.address, timeout_s=WAIT_S, direct=False)
        else:
            client = awaitable(ProfileClient(place.address, timeout_s=WAIT_S, direct=False))
        async with client, client.producer("p", SMALL) as producer:
            await producer.send_batch([Event(user, "view") for user in USERS])
        assert await accepted_by_frontend(place) == len(USERS)


@of_both
@pytest.mark.parametrize("silent", [True, False], ids=["silent", "nobody there"])
async def test_what_has_an_owner_that_cannot_be_reached_goes_through_the_frontend(kind: str, silent: bool) -> None:
    async with service() as (cluster, place), connected(kind, place) as client:
        server = socket.create_server(("127.0.0.1", 0))
        with closing(server):
            dead = f"127.0.0.1:{server.getsockname()[1]}"
            if not silent:
                server.close()
            owners = owners_of(client)
            install = owners.install
            unreachable = {shard.address for shard in cluster.topology.shards if shard.shard_id == 1}

            def install_with_a_hole(topology: Any) -> set[str]:
                for shard in topology.shards:
                    if shard.address in unreachable:
                        shard.address = dead
                found: set[str] = install(topology)
                return found

            owners.install = install_with_a_hole
            async with client.producer("p", SMALL) as producer:
                for _ in range(20):
                    await producer.send_batch([Event(user, "view") for user in USERS])
                await producer.flush(WAIT_S)
                theirs = [user for user in USERS if owner_of(cluster, user) == 1]
                assert await accepted_by_frontend(place) == 20 * len(theirs)
                # When it can be reached, the producer finds out by itself.
                owners.install = install
                owners.not_mine()
                if kind == "sync":
                    client._held._learn_owners(1.0)
                else:
                    await client._learn_owners(1.0)
                owners.not_mine()
                before = -1
                while before != (before := await accepted_by_frontend(place)):
                    await producer.send_batch([Event(user, "view") for user in USERS] * 5)
                    await producer.flush(WAIT_S)
                    await asyncio.sleep(0.3)
                sent = producer.sent_events // len(USERS)
            assert await counts(client) == [sent] * len(USERS)


@of_both
async def test_users_that_change_owners_mid_stream_count_once_and_go_straight_to_the_new_one(kind: str) -> None:
    async with service() as (cluster, place), connected(kind, place) as client:
        async with client.producer("p", SMALL) as producer:
            rounds = 0
            for border in (4, 12, 8, 1):
                for _ in range(5):
                    await producer.send_batch([Event(user, "view") for user in USERS])
                    rounds += 1
                # Nothing is on its way: what was counted here is not known there.
                await producer.flush(WAIT_S)
                cluster.give({0: 1, border: 0})
                await producer.send_batch([Event(user, "view") for user in USERS])
                rounds += 1
                await producer.flush(WAIT_S)
        assert [held(cluster, user) for user in USERS] == [rounds] * len(USERS)


@of_both
async def test_a_producer_that_comes_back_hears_where_it_was(kind: str) -> None:
    async with service() as (cluster, place), connected(kind, place) as client:
        producer = client.producer("p", SMALL)
        for _ in range(30):
            await producer.send_batch([Event(user, "view") for user in USERS])
        await producer.flush(WAIT_S)
        known = await producer.acknowledged_sequence()
        assert known == 60
        await producer.close()
        await until(lambda: max(shard.acknowledged("p") for shard in cluster.shards.values()) == known)
        again = client.producer("p", SMALL)
        assert await again.acknowledged_sequence() == known
        await again.close()


@of_both
async def test_what_is_told_while_a_stream_goes_on_is_known_when_the_client_dies(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (producer_module, aio_producer_module):
        monkeypatch.setattr(module, "GOODBYE_S", 0.0)
    async with service() as (cluster, place), connected(kind, place) as client:
        producer = client.producer("p", replace(SMALL, batch_events=10))
        for _ in range(10):
            await producer.send_batch([Event(user, "view") for user in USERS])
        await producer.flush(WAIT_S)
        streams = place.frontend.api.ingest._streams._streams
        await until(lambda: streams["p"].acknowledged == 10)
        await producer.close(flush=False)
        await until(lambda: max(shard.acknowledged("p") for shard in cluster.shards.values()) == 10)
        assert await counts(client) == [10] * len(USERS)


@of_both
async def test_a_part_that_is_held_up_lets_nothing_be_told_ahead_of_it(kind: str) -> None:
    async with service() as (cluster, place), connected(kind, place) as client:
        gate = asyncio.Event()
        sync = cluster.shards[1]._log.sync

        async def wait_and_sync() -> None:
            await gate.wait()
            await sync()

        cluster.shards[1]._log.sync = wait_and_sync
        producer = client.producer("p", replace(SMALL, batch_events=10))
        for _ in range(3):
            await producer.send_batch([Event(user, "view") for user in USERS])
        flushing = asyncio.ensure_future(producer.flush(WAIT_S))
        await until(lambda: cluster.shards[0].status().event_count > 0)
        await asyncio.sleep(0.2)
        assert not flushing.done()
        assert producer.acknowledged_events == 0
        assert [shard.acknowledged("p") for shard in cluster.shards.values()] == [0, 0]
        gate.set()
        await flushing
        await producer.close()
        assert await counts(client) == [3] * len(USERS)
