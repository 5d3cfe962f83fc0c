"""A whole shard without Ray, gRPC or a disk: what it promises of order, durability, bounds and death."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from profile_service.cluster.partitioning import user_hash
from profile_service.domain.schema import parse_schema
from profile_service.errors import InvalidArgument, NotMine, ResourceExhausted, StorageFull, Unavailable
from profile_service.shard.health import Health
from profile_service.shard.log_records import RECORD_EVENTS, RECORD_FORGET, RECORD_SCHEMA
from profile_service.shard.shard import Shard
from profile_service.storage.crashing_fs import CrashingFileSystem
from profile_service.storage.wal import LogOptions
from profile_service.wire.apply_request import ApplyPart, decode_part
from tests.shard import shards
from tests.shard.shards import NOW_NS, Clock, Gate
from userprofile.v1 import event_service_pb2, profile_pb2

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


def part(users: Sequence[str], *, producer: str = "", sequence: int = 0, event_ids: Sequence[str] = ()) -> ApplyPart:
    request = event_service_pb2.IngestEventsRequest()
    for number, user in enumerate(users):
        event = request.events.add(user_id=user, type="view", event_id=event_ids[number] if event_ids else "")
        event.attributes.update({"color": "red", "price": 10.0 * number, "item": f"i{number}"})
    return ApplyPart(
        producer_id=producer,
        sequence=sequence,
        arrival_time_ns=NOW_NS,
        events=request.SerializeToString(),
        event_count=len(users),
    )


running = functools.partial(shards.running, SCHEMA)


def read(shard: Shard, user: str) -> profile_pb2.Profile | None:
    encoded = shard.read([user], [], 7)[0]
    return profile_pb2.Profile.FromString(encoded) if encoded else None


async def test_what_is_answered_is_readable() -> None:
    async with running() as shard:
        batch = part(["u1", "u2", "u1"])
        await shard.submit([batch], batch.size_bytes, 7)
        profile = read(shard, "u1")
        assert profile is not None
        assert profile.event_count == 2
        assert profile.features["views"].counter.value == 2
        assert [entry.value for entry in profile.features["items"].recent.entries] == ["i2", "i0"]
        assert read(shard, "nobody") is None


async def test_nothing_is_readable_before_it_is_durable_and_groups_share_a_sync() -> None:
    gate = Gate()
    async with running(gate=gate) as shard:
        gate.close()
        before = gate.passed
        first = asyncio.create_task(shard.submit([part(["u1"])], 100, 7))
        await gate.waiting.wait()
        others = [asyncio.create_task(shard.submit([part([f"v{n}"])], 100, 7)) for n in range(5)]
        await asyncio.sleep(0)
        assert read(shard, "u1") is None
        assert not first.done()
        gate.open()
        await asyncio.gather(first, *others)
        assert gate.passed - before == 2
        assert read(shard, "u1") is not None


async def test_a_failed_sync_ends_the_shard_and_answers_everyone() -> None:
    gate, fs = Gate(), CrashingFileSystem()
    async with running(fs, gate=gate) as shard:
        fs.fail_once("sync")
        gate.close()
        first = asyncio.create_task(shard.submit([part(["u1"])], 100, 7))
        await gate.waiting.wait()
        second = asyncio.create_task(shard.submit([part(["u2"])], 100, 7))
        await asyncio.sleep(0)
        gate.open()
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(result) for result in results] == [Unavailable, Unavailable]
        assert read(shard, "u1") is None
        with pytest.raises(Unavailable):
            await shard.submit([part(["u3"])], 100, 7)


async def test_a_sync_that_fails_when_nobody_waits_for_it_ends_the_shard() -> None:
    """With `interval` it comes after the answer; an idle shard has no later group by which to hear of it."""
    fs = CrashingFileSystem()
    options = LogOptions(1 << 16, sync_mode="interval", sync_interval_s=0.001)
    shard = shards.make_shard(await shards.recovered(fs, SCHEMA, options=options))
    writer = asyncio.create_task(shard.run())
    fs.fail_once("sync")
    await shard.submit([part(["u1"])], 100, 7)
    ended, _ = await asyncio.wait([writer], timeout=10)
    assert ended, "the shard goes on"
    with pytest.raises(OSError, match="injected"):
        await writer
    with pytest.raises(Unavailable):
        await shard.submit([part(["u2"])], 100, 7)


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


async def test_the_log_holds_what_is_counted_and_nothing_else() -> None:
    fs = CrashingFileSystem()
    async with running(fs) as shard:
        parts = [part(["u1", "u2"], producer="p", sequence=1), part(["u1"] * 300)]
        parts += [part([f"v{n}" for n in range(n)], producer="q", sequence=n) for n in (1, 2, 3)]
        await asyncio.gather(*(shard.submit([given], 100, 7) for given in parts))
        # Counted already; and one of two events counted already.
        await shard.submit([part(["u1", "u2"], producer="p", sequence=1)], 100, 7)
        await shard.submit([part(["w", "w", "w"], event_ids=["a", "b", "a"])], 100, 7)
    found = await shards.recovered(fs, SCHEMA)
    records = list(found.log.records(0))
    assert [record.type for record in records] == [RECORD_SCHEMA, *[RECORD_EVENTS] * 6]
    held = [decode_part(record.payload) for record in records[1:]]
    assert held[:-1] == parts
    assert held[-1].event_count == 2
    events = event_service_pb2.IngestEventsRequest.FromString(bytes(held[-1].events)).events
    assert [event.event_id for event in events] == ["a", "b"]


async def test_an_event_id_counts_once_for_a_user_and_not_across_users() -> None:
    async with running() as shard:
        await shard.submit([part(["u1", "u1", "u2"], event_ids=["a", "a", "a"])], 100, 7)
        await shard.submit([part(["u1"], event_ids=["a"])], 100, 7)
        counts = {user: profile.event_count for user in ("u1", "u2") if (profile := read(shard, user))}
        assert counts == {"u1": 1, "u2": 1}


async def test_refusals_keep_nothing_of_the_submission_and_spoil_no_other() -> None:
    async with running(owned=range(128)) as shard:
        good = part(["u1"])
        damaged = replace(good, events=good.events[:-1])
        miscounted = replace(good, event_count=2)
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
    gate = Gate()
    async with running(gate=gate) as shard:
        gate.close()
        first = asyncio.create_task(shard.submit([part(["u1"], producer="p", sequence=1)], 100, 7))
        await gate.waiting.wait()
        waiting = asyncio.create_task(shard.submit([part(["u1"], producer="p", sequence=2)], 100, 7))
        await asyncio.sleep(0)
        lost = next(n for n in range(256) if n != user_hash("u1") >> 56)
        shard.update_topology(8, set(range(256)) - {lost})
        gate.open()
        await first
        with pytest.raises(NotMine, match="epoch 8"):
            await waiting
        await shard.submit([part(["u1"], producer="p", sequence=2)], 100, 8)
        assert shard.status().event_count == 2
        assert shard.status().duplicate_count == 0


async def test_what_was_routed_before_other_shards_changed_is_taken() -> None:
    """Nobody else can have answered for these users since."""
    async with running(owned=range(128)) as shard:
        user = next(f"u{n}" for n in range(50) if user_hash(f"u{n}") >> 56 < 128)
        shard.update_topology(8, range(128))
        shard.update_topology(9, range(160))
        await shard.submit([part([user], producer="p", sequence=1)], 100, 7)
        assert shard.read([user], [], 7) == shard.read([user], [], 9)
        for epoch in (6, 10):
            with pytest.raises(NotMine, match="epoch 9"):
                await shard.submit([part([user], producer="p", sequence=2)], 100, epoch)
        shard.update_topology(10, range(159))
        for epoch in (7, 9):
            with pytest.raises(NotMine, match="epoch 10"):
                await shard.submit([part([user], producer="p", sequence=2)], 100, epoch)
            with pytest.raises(NotMine, match="epoch 10"):
                shard.read([user], [], epoch)
        assert shard.status().event_count == 1


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    gate = Gate()
    async with running(gate=gate, shard_queue_bytes=1000) as shard:
        gate.close()
        first = asyncio.create_task(shard.submit([part(["u1"])], 600, 7))
        await gate.waiting.wait()
        second = asyncio.create_task(shard.submit([part(["u2"])], 300, 7))
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted) as caught:
            await shard.submit([part(["u3"])], 600, 7)
        assert caught.value.retry_after_s > 0
        gate.open()
        await asyncio.gather(first, second)
        await shard.submit([part(["u3"])], 600, 7)


async def test_closing_answers_what_was_accepted() -> None:
    gate = Gate()
    async with running(gate=gate) as shard:
        gate.close()
        first = asyncio.create_task(shard.submit([part(["u1"])], 100, 7))
        await gate.waiting.wait()
        second = asyncio.create_task(shard.submit([part(["u2"])], 100, 7))
        await asyncio.sleep(0)
        await shard.close()
        gate.open()
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
    monkeypatch.setattr("profile_service.shard.shard.LOOK_INTERVAL_S", 0.01)
    fs, clock = CrashingFileSystem(), Clock()
    async with running(fs, clock=clock) as shard:
        await shard.submit([part(["u1", "u2"])], 100, 7)
        clock.now_ns += 11 * 86400 * 10**9
        assert read(shard, "u1") is None
        await until(lambda: shard.status().user_count == 0)
        fresh = replace(part(["u1"]), arrival_time_ns=clock.now_ns)
        await shard.submit([fresh], 100, 7)
        profile = read(shard, "u1")
        assert profile is not None
        assert profile.event_count == 1
    found = await shards.recovered(fs, SCHEMA)
    assert [record.type for record in found.log.records(0)][1:] == [RECORD_EVENTS, RECORD_FORGET, RECORD_EVENTS]
    assert len(found.state.table) == 1


async def test_a_restart_finds_what_was_acknowledged_and_what_counts_once() -> None:
    fs = CrashingFileSystem()
    async with running(fs) as shard:
        await shard.submit([part(["u1", "u2"], producer="p", sequence=1, event_ids=["a", "b"])], 100, 7)
        await shard.submit([part(["u1"], producer="request:r")], 100, 7)
        before = shard.read(["u1", "u2"], [], 7)
    async with running(fs.crash()) as shard:
        assert shard.read(["u1", "u2"], [], 7) == before
        await shard.submit([part(["u1", "u2"], producer="p", sequence=1)], 100, 7)
        await shard.submit([part(["u1"], producer="request:r")], 100, 7)
        await shard.submit([part(["u2"], event_ids=["b"])], 100, 7)
        assert shard.read(["u1", "u2"], [], 7) == before
        assert shard.status().duplicate_count == 4


async def test_a_producer_without_events_tells_up_to_where_it_is_acknowledged_and_that_lasts() -> None:
    fs = CrashingFileSystem()
    async with running(fs) as shard:
        told = ApplyPart(producer_id="p", acknowledged_sequence=9, arrival_time_ns=NOW_NS)
        await shard.submit([told], told.size_bytes, 7)
        assert shard.acknowledged("p") == 9
    async with running(fs.crash()) as shard:
        assert shard.acknowledged("p") == 9


async def test_a_snapshot_is_where_a_restart_begins() -> None:
    fs = CrashingFileSystem()
    async with running(fs) as shard:
        await shard.submit([part([f"u{n}" for n in range(100)], producer="p", sequence=1)], 100, 7)
        position = await shard.create_snapshot()
        await shard.submit([part(["u1"], producer="p", sequence=2)], 100, 7)
        before = shard.read([f"u{n}" for n in range(100)], [], 7)
        assert shard.status().snapshot_position == position
    found = await shards.recovered(fs.crash(), SCHEMA)
    assert found.snapshot is not None
    assert (found.snapshot.replay_position, found.replayed_events) == (position, 1)
    shard = shards.make_shard(found)
    assert shard.read([f"u{n}" for n in range(100)], [], 7) == before
    assert shard.status().event_count == 101


async def test_a_full_disk_refuses_writes_serves_reads_and_takes_writes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profile_service.shard.shard.LOOK_INTERVAL_S", 0.01)
    fs, health = CrashingFileSystem(), Health()
    async with running(fs, health=health) as shard:
        await shard.submit([part(["u1"], producer="p", sequence=1)], 100, 7)
        fs.capacity_bytes = 1 << 17
        big = part(["u1"] * 3000, producer="p", sequence=2)
        with pytest.raises(StorageFull, match="room") as caught:
            await shard.submit([big], big.size_bytes, 7)
        assert caught.value.retry_after_s > 0
        assert health.state == "full"
        profile = read(shard, "u1")
        assert profile is not None
        assert profile.event_count == 1
        fs.capacity_bytes = None
        await until(lambda: health.state == "serving")
        await shard.submit([big], big.size_bytes, 7)
        await shard.submit([big], big.size_bytes, 7)
        assert shard.status().event_count == 3001


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


async def until(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds; the test's timeout ends it otherwise."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.002)
