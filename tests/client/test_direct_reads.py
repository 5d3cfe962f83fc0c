"""Reads that go straight to the owners: the same answers, and never fewer of them than through a frontend."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from random import Random
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2

from profile_client import AsyncProfileClient, Event, InvalidArgumentError, NotFoundError, ProfileClient
from profile_client.owners import ASK_AGAIN_S
from profile_service.cluster.partitioning import partition_of, user_hash
from profile_service.cluster.topology import Topology
from tests.client.both import Both, awaitable
from tests.client.fake_service import FakeService, serving
from tests.client.test_owners import topology
from tests.client.test_with_frontends import USERS, WAIT_S, Place, connected, counts, service

of_both = pytest.mark.parametrize("kind", ["sync", "asyncio"])


async def calls(place: Place, method: str) -> int:
    """How many calls of a method of ProfileService the frontend has answered."""
    async with httpx.AsyncClient(base_url=f"http://{place.http_address}") as http:
        lines = (await http.get("/metrics")).text.splitlines()
    name = f'method="userprofile.v1.ProfileService/{method}"'
    return sum(int(float(line.split()[-1])) for line in lines if "_calls_total{" in line and name in line)


def same(one: Any, other: Any) -> bool:
    """Whether two profiles say the same of a user, whenever each was read."""
    messages = []
    for profile in (one, other):
        message = type(profile.message)()
        message.CopyFrom(profile.message)
        message.ClearField("read_time")
        messages.append(message)
    return bool(messages[0] == messages[1])


@of_both
async def test_owners_answer_what_a_frontend_answers_and_no_frontend_is_asked(kind: str) -> None:
    async with service() as (_, place), connected(kind, place) as client:
        await client.ingest_events(
            [Event(user, "view", attributes={"color": "red"}) for user in USERS for _ in range(int(user[1:]) + 1)]
        )
        async with AsyncProfileClient(place.address, direct=False) as through:
            asked = ["u3", "nobody", "u1", "u3", "u9", "nobody"]
            for features in ((), ("views",)):
                for user in USERS:
                    assert same(await client.get_profile(user, features), await through.get_profile(user, features))
                direct = await client.batch_get_profiles(asked, features)
                expected = await through.batch_get_profiles(asked, features)
                assert [profile.user_id for profile in direct.profiles] == ["u3", "u1", "u3", "u9"]
                assert all(map(same, direct.profiles, expected.profiles))
                assert direct.missing_user_ids == expected.missing_user_ids == ["nobody", "nobody"]
        assert await calls(place, "GetProfile") == 2 * len(USERS)
        assert await calls(place, "BatchGetProfiles") == 2


@of_both
async def test_reads_go_on_while_an_owner_is_away_and_go_straight_to_it_when_it_is_back(kind: str) -> None:
    async with service() as (cluster, place), connected(kind, place) as client:
        await client.ingest_events([Event(user, "view") for user in USERS])
        assert await counts(client) == [1] * len(USERS)
        for shard_id in (0, 1):
            await cluster.kill(shard_id)
            reading = [asyncio.ensure_future(client.get_profile(user)) for user in USERS]
            batch = asyncio.ensure_future(counts(client))
            await asyncio.sleep(0.05)
            await cluster.restart(shard_id)
            assert [(await read).event_count for read in reading] == [1] * len(USERS)
            assert await batch == [1] * len(USERS)
            await until_direct(client, place)


@of_both
async def test_an_owner_that_gave_users_away_is_not_believed_and_the_new_one_is_found(kind: str, seed: int) -> None:
    random = Random(seed)
    async with service() as (cluster, place), connected(kind, place) as client:
        await client.ingest_events([Event(user, "view") for user in USERS])
        for _ in range(5):
            # Rows do not move here. So who owns a user shows in what is known of it.
            border = random.randrange(1, cluster.topology.partition_count)
            cluster.give({0: 1, border: 0} if random.random() < 0.5 else {0: 0, border: 1})
            for user in random.sample(USERS, len(USERS)):
                expected = cluster.shards[owner_of(cluster.topology, user)].read([user], [])[0]
                if expected:
                    assert (await client.get_profile(user)).event_count == 1
                else:
                    with pytest.raises(NotFoundError):
                        await client.get_profile(user)
            await until_direct(client, place)


@of_both
async def test_what_is_wrong_with_a_request_is_said_as_a_frontend_says_it(kind: str) -> None:
    async with service() as (_, place), connected(kind, place) as client:
        await client.ingest_events([Event(user, "view") for user in USERS])
        async with AsyncProfileClient(place.address, direct=False) as through:
            for method, *arguments in (
                ("get_profile", ""),
                ("get_profile", "u1", ["colour"]),
                ("get_profile", "é" * 129),
                ("batch_get_profiles", []),
                ("batch_get_profiles", [*USERS, ""]),
                ("batch_get_profiles", USERS, ["views", "colour"]),
                ("batch_get_profiles", [f"u{number}" for number in range(1001)]),
            ):
                said = []
                for each in (client, through):
                    with pytest.raises(InvalidArgumentError) as info:
                        await getattr(each, method)(*arguments)
                    said.append((str(info.value), info.value.violations, info.value.reason))
                assert said[0] == said[1]


async def test_a_frontend_that_is_told_to_be_used_is_used() -> None:
    async with service() as (_, place):
        async with AsyncProfileClient(place.address, timeout_s=WAIT_S, direct=False) as client:
            await client.ingest_events([Event("u0", "view")])
            await client.get_profile("u0")
        synchronous = awaitable(ProfileClient(place.address, timeout_s=WAIT_S, direct=False))
        async with synchronous as client:
            await client.get_profile("u0")
        assert await calls(place, "GetProfile") == 2


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "nobody there"])
def test_an_owner_that_does_not_answer_is_not_waited_for_again(both: Both, fake: FakeService, silent: bool) -> None:
    fake.counts.update(dict.fromkeys(USERS, 1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if not silent:
            server.close()
        fake.topology = topology(4, [address])

        async def scenario(client: Any) -> None:
            for _ in range(3):
                assert await counts(client) == [1] * len(USERS)
                for user in USERS:
                    assert (await client.get_profile(user)).event_count == 1
            (owner,) = client._owners._by_address.values()
            # A new try for each of the 33 reads would be as many failures.
            assert 1 <= owner.failures <= 6
            assert not owner.answered

        both.run(scenario)


@pytest.mark.parametrize("reason", ["NOT_MINE", "UNAVAILABLE"])
def test_an_owner_s_refusal_is_the_frontend_s_to_answer(both: Both, fake: FakeService, reason: str) -> None:
    owner = FakeService()  # type: ignore[abstract]
    fake.counts.update(dict.fromkeys(USERS, 1))
    owner.counts.update(dict.fromkeys(USERS, 2))
    with serving(owner) as address:
        fake.topology = topology(4, [address])

        async def scenario(client: Any) -> None:
            assert (await client.get_profile("u0")).event_count == 2
            owner.failures = [unavailable(reason)]
            assert (await client.get_profile("u0")).event_count == 1
            owner.failures = [unavailable(reason)]
            assert (await counts(client))[0] in ((1,) if reason == "NOT_MINE" else (1, 2))
            fake.topology = topology(4, [""])
            client._owners.not_mine()
            await asyncio.sleep(ASK_AGAIN_S)
            assert (await client.get_profile("u0")).event_count == 1
            assert not client._owners._by_address

        both.run(scenario)


def unavailable(reason: str) -> status_pb2.Status:
    status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="said by the test")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="profile-service"))
    return status


async def until_direct(client: Any, place: Place) -> None:
    """Returns when reads of every user get by without the frontend."""
    while True:
        before = await calls(place, "GetProfile")
        for user in USERS:
            with contextlib.suppress(NotFoundError):
                await client.get_profile(user)
        if await calls(place, "GetProfile") == before:
            return
        await asyncio.sleep(0.05)


def owner_of(current: Topology, user: str) -> int:
    return current.owner_of(partition_of(user_hash(user), current.partition_bits))
