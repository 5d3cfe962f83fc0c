"""A shard that dies at any step of an exchange: what names its producer or its request counts once and in order, what
names neither is never sent twice, and nobody waits longer than they said."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import pytest

from profile_service.cluster import router as router_module
from profile_service.cluster.batches import Lane
from profile_service.cluster.router import Router
from profile_service.config import Capacity
from profile_service.errors import DeadlineExceeded, Superseded, Unavailable
from profile_service.wire.apply_request import REQUEST_PREFIX
from tests.cluster.local_cluster import LocalCluster, encode, running, scan, until
from userprofile.v1 import profile_pb2

USERS = [f"u{number}" for number in range(40)]
BATCHES = 5

Hang = Callable[[], Awaitable[None]]
Die = Callable[[Any, Hang], None]
"""Makes a Shard hang at a step of its work."""


def before_reading(shard: Any, hang: Hang) -> None:
    async def submit(*_: Any) -> None:
        await hang()

    shard.submit = submit


def before_logging(shard: Any, hang: Hang) -> None:
    shard._log.sync = hang


def after_logging(shard: Any, hang: Hang) -> None:
    sync = shard._log.sync

    async def sync_and_hang() -> None:
        await sync()
        await hang()

    shard._log.sync = sync_and_hang


def after_applying(shard: Any, hang: Hang) -> None:
    apply = shard._apply

    async def apply_and_hang(*arguments: Any) -> None:
        await apply(*arguments)
        await hang()

    shard._apply = apply_and_hang


def before_answering(shard: Any, hang: Hang) -> None:
    submit = shard.submit

    async def submit_and_hang(*arguments: Any) -> None:
        await submit(*arguments)
        await hang()

    shard.submit = submit_and_hang


STEPS = [before_reading, before_logging, after_logging, after_applying, before_answering]
LOGGED = {after_logging, after_applying, before_answering}

step = pytest.mark.parametrize("die", STEPS, ids=lambda die: str(die.__name__))


class Death:
    """A shard that hangs at a step, and is then killed."""

    def __init__(self, cluster: LocalCluster, shard_id: int, die: Die) -> None:
        self._cluster = cluster
        self._shard_id = shard_id
        self._reached = asyncio.Event()
        die(cluster.shards[shard_id], self._hang)

    async def _hang(self) -> None:
        self._reached.set()
        await asyncio.Event().wait()

    async def happen(self, within_s: float = 10) -> None:
        """The kill, once the step is reached.

        Raises:
            TimeoutError: It was not reached within the time; the shard lives.
        """
        await asyncio.wait_for(self._reached.wait(), within_s)
        await self._cluster.kill(self._shard_id)


async def counts(router: Router) -> set[int]:
    """How many events each user has; one number where all is well."""
    profiles = await router.read(USERS, [])
    return {profile_pb2.Profile.FromString(profile).event_count for profile in profiles}


async def put(router: Router, name: str = "", deadline_s: float | None = None) -> None:
    await router.ingest(scan(encode(USERS)), name, 1 if name else 0, 1, deadline_s)


@step
async def test_a_stream_s_batches_count_once_and_in_order(die: Die) -> None:
    async with running(shards=2) as (cluster, router):
        lane = Lane("p", patient=True)
        await (await router.submit(scan(encode(USERS)), lane, 1, 0, 1)).done
        death = Death(cluster, 0, die)
        batches = [await router.submit(scan(encode(USERS)), lane, n, 1, 1) for n in range(2, BATCHES + 1)]
        await death.happen()
        # More come while the shard is away.
        batches.append(await router.submit(scan(encode(USERS)), lane, BATCHES + 1, 1, 1))
        await cluster.restart(0)
        await asyncio.wait_for(asyncio.gather(*(batch.done for batch in batches)), 20)
        assert await counts(router) == {BATCHES + 1}
        await until(lambda: router.held_bytes == 0)
        for link in router._links.values():
            link.applies.check_invariants()


@step
async def test_a_request_counts_once(die: Die) -> None:
    async with running(shards=2) as (cluster, router):
        death = Death(cluster, 0, die)
        ingesting = asyncio.create_task(put(router, REQUEST_PREFIX + "r"))
        await death.happen()
        await cluster.restart(0)
        await asyncio.wait_for(ingesting, 20)
        assert await counts(router) == {1}
        # And once more by its caller, who did not hear of it.
        await put(router, REQUEST_PREFIX + "r")
        assert await counts(router) == {1}


@step
async def test_a_batch_without_a_name_is_not_sent_again_once_it_was_sent(die: Die) -> None:
    async with running(shards=1) as (cluster, router):
        death = Death(cluster, 0, die)
        ingesting = asyncio.create_task(put(router))
        await death.happen()
        with pytest.raises(Unavailable, match="may have been counted"):
            await asyncio.wait_for(ingesting, 20)
        await cluster.restart(0)
        await until(lambda: router.ready)
        assert await counts(router) == ({1} if die in LOGGED else {0})


async def test_a_batch_without_a_name_that_was_not_sent_waits_for_the_shard_and_counts() -> None:
    async with running(shards=2) as (cluster, router):
        await cluster.kill(0)
        await until(lambda: not router._links[0].applies.connected)
        ingesting = asyncio.create_task(put(router))
        await asyncio.sleep(0.1)
        await cluster.restart(0)
        await asyncio.wait_for(ingesting, 20)
        assert await counts(router) == {1}


@step
async def test_a_deadline_is_kept_and_what_was_given_up_can_be_sent_again(die: Die) -> None:
    async with running(shards=2) as (cluster, router):
        death = Death(cluster, 0, die)
        loop = asyncio.get_running_loop()
        began = loop.time()
        ingesting = asyncio.create_task(put(router, REQUEST_PREFIX + "r", deadline_s=0.3))
        await death.happen()
        with pytest.raises(DeadlineExceeded, match="may have been counted in part"):
            await ingesting
        assert loop.time() - began < 5
        await cluster.restart(0)
        await until(lambda: router.ready and router.held_bytes == 0)
        await asyncio.wait_for(put(router, REQUEST_PREFIX + "r"), 20)
        assert await counts(router) == {1}


async def test_patience_ends_where_no_deadline_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "PATIENCE_S", 0.2)
    async with running(shards=2) as (cluster, router):
        await cluster.kill(0)
        with pytest.raises(Unavailable, match="counted in part") as raised:
            await put(router, REQUEST_PREFIX + "r")
        assert raised.value.retry_after_s > 0
        await cluster.restart(0)
        monkeypatch.undo()
        await put(router, REQUEST_PREFIX + "r")
        assert await counts(router) == {1}


async def test_what_waits_for_a_shard_that_is_away_is_bounded() -> None:
    capacity = Capacity(owner_window_bytes=20_000, event_ids_per_shard=1024)
    async with running(shards=2, capacity=capacity) as (cluster, router):
        await cluster.kill(0)
        size = len(encode(USERS))

        async def produce(number: int) -> None:
            lane = Lane(f"p{number}", patient=True)
            batches = [await router.submit(scan(encode(USERS)), lane, n, 0, 1) for n in range(1, 31)]
            await asyncio.gather(*(batch.done for batch in batches))

        producing = [asyncio.create_task(produce(number)) for number in range(5)]
        for number in range(200):
            # A stream that ends wants an owner to know of it, and is never worth more room.
            router.tell_acknowledged(f"q{number}", 1, 1)
        for _ in range(200):
            await asyncio.sleep(0)
            assert all(link.applies.held_bytes < 20_000 + 2 * size for link in router._links.values())
        await cluster.restart(0)
        await asyncio.wait_for(asyncio.gather(*producing), 30)
        assert await counts(router) == {150}


async def test_a_lane_that_fails_while_its_shard_is_away_takes_what_waits_with_it() -> None:
    async with running(shards=2) as (cluster, router):
        await cluster.kill(0)
        lane = Lane("p", patient=True)
        batches = [await router.submit(scan(encode(USERS)), lane, n, 0, 1) for n in (1, 2, 3)]
        lane.fail(Superseded("a newer stream"))
        await cluster.restart(0)
        assert all(isinstance(batch.done.exception(), Superseded) for batch in batches)
        await until(lambda: router.held_bytes == 0)
        newer = Lane("p", patient=True)
        for number in (1, 2, 3):
            await (await router.submit(scan(encode(USERS)), newer, number, 0, 1)).done
        assert await counts(router) == {3}


async def test_streams_and_requests_count_once_through_many_deaths(seed: int) -> None:
    random = Random(seed)
    async with running(shards=3) as (cluster, router):
        done = 0

        async def stream(name: str) -> int:
            nonlocal done
            lane = Lane(name, patient=True)
            batches = []
            for number in range(1, 41):
                batches.append(await router.submit(scan(encode(USERS)), lane, number, 0, 1))
                await asyncio.sleep(random.random() * 0.02)
            await asyncio.gather(*(batch.done for batch in batches))
            done += 1
            return len(batches)

        async def call(name: str) -> int:
            nonlocal done
            for number in range(20):
                for _ in range(random.choice((1, 1, 2))):
                    await put(router, f"{REQUEST_PREFIX}{name}-{number}")
            done += 1
            return 20

        async def kill() -> None:
            while done < 4:
                shard_id = random.randrange(3)
                death = Death(cluster, shard_id, random.choice(STEPS))
                try:
                    await death.happen(within_s=1)
                except TimeoutError:
                    await cluster.kill(shard_id)
                await asyncio.sleep(random.random() * 0.05)
                await cluster.restart(shard_id)

        *counted, _ = await asyncio.gather(stream("p"), stream("q"), call("r"), call("s"), kill())
        assert await counts(router) == {sum(counted)}
        await until(lambda: router.held_bytes == 0)
        for link in router._links.values():
            link.applies.check_invariants()
