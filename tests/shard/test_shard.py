"""A whole shard without Ray, gRPC or a disk: what it promises of order, durability, bounds and death."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from profile_service.config import Capacity
from profile_service.domain.schema import parse_schema
from profile_service.domain.table import ProfileTable
from profile_service.errors import InvalidArgument, NotMine, ResourceExhausted, Unavailable
from profile_service.shard.shard import RECORD_FORGET, Shard
from profile_service.storage.log import MemoryLog
from userprofile.internal.v1 import shard_pb2
from userprofile.v1 import event_service_pb2, profile_pb2

NOW_NS = 1_790_000_000 * 10**9

SCHEMA = parse_schema(
    """
name: test
events: {view: {weight: 1}, contact: {weight: 8}}
half_life: 30d
ttl: 10d
features:
  color: {kind: categorical, attribute: color, values: [red, blue], prior: population, prior_strength: 2}
  price: {kind: distribution, attribute: price, bins: {scale: linear, min: 0, max: 100, count: 10}}
  views: {kind: counter, events: [view], half_life: none}
  items: {kind: recent, attribute: item, size: 3}
"""
)


class SlowLog(MemoryLog):
    """A log whose sync waits to be released, and may fail."""

    def __init__(self) -> None:
        super().__init__(retained_bytes=1 << 20)
        self.released = asyncio.Event()
        self.syncing = asyncio.Event()
        self.syncs = 0
        self.failure: OSError | None = None

    async def sync(self) -> None:
        self.syncs += 1
        self.syncing.set()
        await self.released.wait()
        if self.failure:
            raise self.failure


class ForgettingLog(MemoryLog):
    """A log that says when a record of forgotten users was synced."""

    def __init__(self) -> None:
        super().__init__(retained_bytes=1 << 20)
        self.forgotten = asyncio.Event()

    async def sync(self) -> None:
        if self.records[-1][1] == RECORD_FORGET:
            self.forgotten.set()


def part(
    users: Sequence[str], *, producer: str = "", sequence: int = 0, event_ids: Sequence[str] = ()
) -> shard_pb2.ApplyRequest.Part:
    request = event_service_pb2.IngestEventsRequest()
    for number, user in enumerate(users):
        event = request.events.add(user_id=user, type="view", event_id=event_ids[number] if event_ids else "")
        event.attributes.update({"color": "red", "price": 10.0 * number, "item": f"i{number}"})
    return shard_pb2.ApplyRequest.Part(
        producer_id=producer,
        sequence=sequence,
        arrival_time_ns=NOW_NS,
        events=request.SerializeToString(),
        event_count=len(users),
    )


class Clock:
    def __init__(self) -> None:
        self.now_ns = NOW_NS

    def __call__(self) -> int:
        return self.now_ns


@asynccontextmanager
async def running(
    log: MemoryLog | None = None, clock: Clock | None = None, owned: Sequence[int] = range(256), **capacity: int
) -> AsyncIterator[Shard]:
    shard = Shard(
        3,
        SCHEMA,
        partition_bits=8,
        owned=owned,
        epoch=7,
        log=log or MemoryLog(),
        capacity=Capacity(**capacity),
        clock=clock or Clock(),
        table=ProfileTable(SCHEMA, most_users=100_000, most_texts=100_000),
    )
    writer = asyncio.create_task(shard.run())
    try:
        yield shard
    finally:
        await shard.close()
        await asyncio.wait([writer])


def read(shard: Shard, user: str) -> profile_pb2.Profile | None:
    encoded = shard.read([user], [], 7)[0]
    return profile_pb2.Profile.FromString(encoded) if encoded else None


async def test_what_is_answered_is_readable() -> None:
    async with running() as shard:
        batch = part(["u1", "u2", "u1"])
        await shard.submit([batch], batch.ByteSize(), 7)
        profile = read(shard, "u1")
        assert profile is not None
        assert profile.event_count == 2
        assert profile.features["views"].counter.value == 2
        assert [entry.value for entry in profile.features["items"].recent.entries] == ["i2", "i0"]
        assert read(shard, "nobody") is None


async def test_nothing_is_readable_before_it_is_durable_and_groups_share_a_sync() -> None:
    log = SlowLog()
    async with running(log) as shard:
        first = asyncio.create_task(shard.submit([part(["u1"])], 100, 7))
        await log.syncing.wait()
        others = [asyncio.create_task(shard.submit([part([f"v{n}"])], 100, 7)) for n in range(5)]
        await asyncio.sleep(0)
        assert read(shard, "u1") is None
        assert not first.done()
        log.released.set()
        await asyncio.gather(first, *others)
        assert log.syncs == 2
        assert read(shard, "u1") is not None


async def test_a_failed_sync_ends_the_shard_and_answers_everyone() -> None:
    log = SlowLog()
    log.failure = OSError("disk gone")
    async with running(log) as shard:
        first = asyncio.create_task(shard.submit([part(["u1"])], 100, 7))
        await log.syncing.wait()
        second = asyncio.create_task(shard.submit([part(["u2"])], 100, 7))
        await asyncio.sleep(0)
        log.released.set()
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(result) for result in results] == [Unavailable, Unavailable]
        assert read(shard, "u1") is None
        with pytest.raises(Unavailable):
            await shard.submit([part(["u3"])], 100, 7)


async def test_a_batch_sent_again_is_counted_once() -> None:
    async with running() as shard:
        for _ in range(3):
            await shard.submit([part(["u1", "u2"], producer="p", sequence=1)], 100, 7)
        await shard.submit([part(["u1"], producer="p", sequence=2)], 100, 7)
        profile = read(shard, "u1")
        assert profile is not None
        assert profile.event_count == 2
        assert shard.status().duplicate_count == 4
        assert shard.status().event_count == 3


async def test_the_log_holds_each_part_as_it_came() -> None:
    log = MemoryLog(retained_bytes=1 << 20)
    async with running(log) as shard:
        parts = [part(["u1", "u2"], producer="p", sequence=1), part(["u1"] * 300)]
        parts += [part([f"v{n}" for n in range(n)], producer="q", sequence=n) for n in (1, 2, 3)]
        await asyncio.gather(*(shard.submit([given], 100, 7) for given in parts))
        held = [shard_pb2.ApplyRequest.Part.FromString(payload) for _, _, payload in log.records]
        assert held == parts


async def test_an_event_id_counts_once_for_a_user_and_not_across_users() -> None:
    async with running() as shard:
        await shard.submit([part(["u1", "u1", "u2"], event_ids=["a", "a", "a"])], 100, 7)
        await shard.submit([part(["u1"], event_ids=["a"])], 100, 7)
        counts = {user: profile.event_count for user in ("u1", "u2") if (profile := read(shard, user))}
        assert counts == {"u1": 1, "u2": 1}


async def test_refusals_keep_nothing_of_the_submission_and_spoil_no_other() -> None:
    async with running(owned=range(128)) as shard:
        damaged = part(["u1"])
        damaged.events = damaged.events[:-1]
        miscounted = part(["u1"])
        miscounted.event_count = 2
        with pytest.raises(NotMine, match="epoch"):
            await shard.submit([part(["u1"])], 100, 6)
        results = await asyncio.gather(
            *(shard.submit([given], 100, 7) for given in (damaged, miscounted, part([f"u{n}" for n in range(50)]))),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [InvalidArgument, InvalidArgument, NotMine]
        assert shard.status().user_count == 0
        assert shard.status().queued_bytes == 0
        with pytest.raises(NotMine):
            shard.read([f"u{n}" for n in range(50)], [], 7)


async def test_a_batch_that_waited_through_a_change_of_owners_goes_back_whole() -> None:
    log = SlowLog()
    async with running(log) as shard:
        first = asyncio.create_task(shard.submit([part(["u1"], producer="p", sequence=1)], 100, 7))
        await log.syncing.wait()
        waiting = asyncio.create_task(shard.submit([part(["u1"], producer="p", sequence=2)], 100, 7))
        await asyncio.sleep(0)
        shard.update_topology(8, range(256))
        log.released.set()
        await first
        with pytest.raises(NotMine, match="epoch 8"):
            await waiting
        await shard.submit([part(["u1"], producer="p", sequence=2)], 100, 8)
        assert shard.status().event_count == 2
        assert shard.status().duplicate_count == 0


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    log = SlowLog()
    async with running(log, shard_queue_bytes=1000) as shard:
        first = asyncio.create_task(shard.submit([part(["u1"])], 600, 7))
        await log.syncing.wait()
        second = asyncio.create_task(shard.submit([part(["u2"])], 300, 7))
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted) as caught:
            await shard.submit([part(["u3"])], 600, 7)
        assert caught.value.retry_after_s > 0
        log.released.set()
        await asyncio.gather(first, second)
        await shard.submit([part(["u3"])], 600, 7)


async def test_closing_answers_what_was_accepted() -> None:
    log = SlowLog()
    async with running(log) as shard:
        first = asyncio.create_task(shard.submit([part(["u1"])], 100, 7))
        await log.syncing.wait()
        second = asyncio.create_task(shard.submit([part(["u2"])], 100, 7))
        await asyncio.sleep(0)
        await shard.close()
        log.released.set()
        await asyncio.gather(first, second)
        assert read(shard, "u2") is not None


async def test_the_population_is_the_prior_of_every_shard() -> None:
    async with running() as one, running() as other:
        await one.submit([part(["u1"] * 3)], 100, 7)
        await other.submit([part(["u2"] * 5)], 100, 7)
        states = [one.population_state(), other.population_state()]
        one.set_population(states)
        population = profile_pb2.Profile.FromString(one.population_profile([]))
        assert population.event_count == 8
        assert population.features["color"].categorical.weight == pytest.approx(8)
        profile = read(one, "u1")
        assert profile is not None
        red = profile.features["color"].categorical.values[0]
        prior = (8 + 1) / (8 + 3)
        assert red.value == "red"
        assert red.likelihood == pytest.approx((3 + 2 * prior) / (3 + 2))
        assert red.lift == pytest.approx(red.likelihood / prior)


async def test_an_unknown_feature_is_named() -> None:
    async with running() as shard:
        with pytest.raises(InvalidArgument) as caught:
            shard.read(["u1"], ["color", "colour"], 7)
        assert caught.value.violations[0].field == "features[1]"


async def test_a_user_not_heard_of_for_the_ttl_is_forgotten_by_way_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profile_service.shard.shard.EXPIRY_INTERVAL_S", 0.01)
    log, clock = ForgettingLog(), Clock()
    async with running(log, clock) as shard:
        await shard.submit([part(["u1", "u2"])], 100, 7)
        clock.now_ns += 11 * 86400 * 10**9
        assert read(shard, "u1") is None
        async with asyncio.timeout(10):
            await log.forgotten.wait()
        assert shard.status().user_count == 0
        assert [record for _, record, _ in log.records][-1] == RECORD_FORGET
        fresh = part(["u1"])
        fresh.arrival_time_ns = clock.now_ns
        await shard.submit([fresh], 100, 7)
        profile = read(shard, "u1")
        assert profile is not None
        assert profile.event_count == 1


async def test_a_read_between_slices_sees_whole_events_only() -> None:
    """Each event of a user counts one view and one red: at no moment do the two differ."""
    async with running() as shard:
        big = asyncio.create_task(shard.submit([part(["u1"] * 9000)], 100, 7))
        seen = []
        while not big.done():
            profile = read(shard, "u1")
            if profile is not None:
                assert profile.features["views"].counter.value == profile.event_count
                assert profile.features["color"].categorical.weight == pytest.approx(profile.event_count)
                seen.append(profile.event_count)
            await asyncio.sleep(0)
        await big
        assert seen == sorted(seen)
        assert any(0 < count < 9000 for count in seen)
