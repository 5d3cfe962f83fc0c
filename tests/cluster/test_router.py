"""What the router promises: everything reaches its owner once and in order, whatever becomes of connections and
owners."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from profile_service.cluster import router as router_module
from profile_service.cluster.batches import Lane
from profile_service.cluster.link import ShardLink
from profile_service.cluster.partitioning import partition_of, user_hash
from profile_service.cluster.router import Router
from profile_service.cluster.topology import Topology
from profile_service.config import Capacity
from profile_service.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotMine,
    ResourceExhausted,
    StorageFull,
    Unavailable,
)
from profile_service.shard.shard import Sender
from profile_service.wire.apply_request import ApplyPart
from tests.cluster.local_cluster import PARTITION_BITS, FakeShard, encode, running, scan, until
from userprofile.v1 import event_service_pb2, profile_pb2

USERS = [f"u{number}" for number in range(40)]


async def put(router: Router, user_ids: Sequence[str], producer_id: str = "", sequence: int = 0) -> None:
    await router.ingest(scan(encode(user_ids)), producer_id, sequence, 1, None)


async def counts(router: Router, user_ids: Sequence[str]) -> list[int]:
    profiles = await router.read(user_ids, [])
    return [profile_pb2.Profile.FromString(profile).event_count for profile in profiles]


async def test_what_is_ingested_is_readable_in_the_order_asked_for() -> None:
    async with running(shards=3) as (cluster, router):
        await put(router, [*USERS, "u7", "u7"])
        asked = ["u7", "nobody", "u1", "u7"]
        profiles = [profile_pb2.Profile.FromString(encoded) for encoded in await router.read(asked, ["views"])]
        assert [profile.user_id for profile in profiles] == ["u7", "", "u1", "u7"]
        assert [profile.event_count for profile in profiles] == [3, 0, 1, 3]
        held = {number: shard.status().user_count for number, shard in cluster.shards.items()}
        assert sum(held.values()) == len(USERS)
        assert all(held.values())


async def test_what_waits_travels_together() -> None:
    release = asyncio.Event()

    class Slow(FakeShard):
        async def submit(self, parts: Sequence[ApplyPart], size_bytes: int, epoch: int, *rest: object) -> None:
            await super().submit(parts, size_bytes, epoch)
            await release.wait()

    async with running(shards=1, make_shard=Slow) as (cluster, router):
        lane = Lane("p", patient=True)
        batches = [await router.submit(scan(encode(USERS)), lane, number, 0, 1) for number in range(1, 201)]
        release.set()
        await asyncio.gather(*(batch.done for batch in batches))
        (shard,) = cluster.shards.values()
        sequences = [part.sequence for request in shard.requests for part in request]
        assert sequences == list(range(1, 201))
        assert len(shard.requests) < 20


class Remote(FakeShard):
    """Its rows lie in a store, which is away while `away`; it reads what was brought."""

    is_remote = True
    away = False

    def __init__(self, shard_id: int, epoch: int, owned: list[int]) -> None:
        super().__init__(shard_id, epoch, owned)
        self.brought: set[str] = set()

    async def bring(self, user_ids: Sequence[str] = (), producer_ids: Sequence[str] = ()) -> None:
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("the store is away", retry_after_s=0.1)
        self.brought.update(user_ids)

    def read(self, user_ids: Sequence[str], features: Sequence[str], epoch: int | None = None) -> list[bytes]:
        assert self.brought.issuperset(user_ids)
        return super().read(user_ids, features, epoch)


@pytest.mark.parametrize("count", [1, 1_000])
async def test_rows_of_a_store_are_brought_before_they_are_read(count: int) -> None:
    users = [f"u{number}" for number in range(count)]
    async with running(shards=1, make_shard=Remote) as (cluster, router):
        cluster.shards[0].away = True
        with pytest.raises(DeadlineExceeded, match="the store is away"):
            await router.read(users, [], deadline_s=0.3)
        cluster.shards[0].away = False
        assert await router.read(users, []) == [user_id.encode() for user_id in users]


async def test_reads_that_wait_travel_together_and_each_gets_its_own() -> None:
    async with running(shards=1, make_shard=FakeShard) as (_, router):
        answers = await asyncio.gather(*(router.read([f"a{n}", f"b{n}"], []) for n in range(300)))
        assert answers == [[f"a{n}".encode(), f"b{n}".encode()] for n in range(300)]


async def test_a_batch_that_names_its_producer_survives_a_lost_connection_and_counts_once() -> None:
    applied = asyncio.Event()

    class Forgetful(FakeShard):
        """Takes everything, and never answers its first request."""

        async def submit(self, parts: Sequence[ApplyPart], size_bytes: int, epoch: int, *rest: object) -> None:
            await super().submit(parts, size_bytes, epoch)
            applied.set()
            if len(self.requests) == 1:
                await asyncio.Event().wait()

    async with running(shards=1, make_shard=Forgetful) as (cluster, router):
        named = asyncio.create_task(put(router, USERS, "p", 1))
        await applied.wait()
        anonymous = asyncio.create_task(put(router, USERS))
        await until(lambda: len(cluster.shards[0].requests) == 2)
        await anonymous
        await cluster.cut(0)
        await cluster.serve(0)
        await named
        again = [part.sequence for part in cluster.shards[0].requests[-1]]
        assert again == [1]


async def test_an_anonymous_batch_that_may_have_been_counted_is_not_sent_again() -> None:
    applied = asyncio.Event()

    class Silent(FakeShard):
        async def submit(self, parts: Sequence[ApplyPart], size_bytes: int, epoch: int, *rest: object) -> None:
            await super().submit(parts, size_bytes, epoch)
            applied.set()
            await asyncio.Event().wait()

    async with running(shards=1, make_shard=Silent) as (cluster, router):
        ingesting = asyncio.create_task(put(router, USERS))
        await applied.wait()
        await cluster.cut(0)
        with pytest.raises(Unavailable, match="may have been counted"):
            await ingesting
        await cluster.serve(0)
        await until(lambda: router.ready)
        assert len(cluster.shards[0].requests) == 1


async def test_a_batch_waits_for_a_shard_that_is_away() -> None:
    async with running(shards=2) as (cluster, router):
        await put(router, USERS)
        await cluster.cut(1)
        await until(lambda: not router._links[1].applies.connected)
        ingesting = asyncio.create_task(put(router, USERS))
        reading = asyncio.create_task(counts(router, USERS))
        await cluster.serve(1)
        await ingesting
        assert all(count >= 1 for count in await reading)
        assert await counts(router, USERS) == [2] * len(USERS)


class Recovering(FakeShard):
    """Refuses everything until it is `there`."""

    there = False

    async def submit(self, parts: Sequence[ApplyPart], size_bytes: int, epoch: int, *rest: object) -> None:
        self._refuse()
        await super().submit(parts, size_bytes, epoch)

    def read(self, user_ids: Sequence[str], features: Sequence[str], epoch: int | None = None) -> list[bytes]:
        self._refuse()
        return super().read(user_ids, features, epoch)

    async def create_snapshot(self) -> int:
        self._refuse()
        return 8 * (1 + self.shard_id)

    def _refuse(self) -> None:
        if not self.there:
            raise Unavailable(f"shard {self.shard_id} recovers (43% done)", 0.01)


async def test_what_comes_while_a_shard_recovers_is_counted_and_answered_afterwards() -> None:
    async with running(shards=1, make_shard=Recovering) as (cluster, router):
        lane = Lane("p", patient=True)
        batches = [await router.submit(scan(encode(["u1"])), lane, sequence, 0, 1) for sequence in (1, 2, 3)]
        anonymous = asyncio.create_task(put(router, ["u2"]))
        reading = asyncio.create_task(router.read(["u1"], []))
        await asyncio.sleep(0.1)
        assert not cluster.shards[0].requests
        cluster.shards[0].there = True
        await asyncio.gather(anonymous, *(batch.done for batch in batches))
        assert await reading == [b"u1"]
        applied = [part.sequence for parts in cluster.shards[0].requests for part in parts if part.producer_id]
        assert applied == [1, 2, 3]


async def test_a_read_whose_deadline_passes_says_what_its_shard_said() -> None:
    async with running(shards=1, make_shard=Recovering) as (_, router):
        with pytest.raises(DeadlineExceeded, match=r"0\.2 s; shard 0 recovers \(43% done\)"):
            await router.read(["u1"], [], deadline_s=0.2)


class Full(FakeShard):
    """Has no room on its disk while `full`."""

    full = True

    async def submit(self, parts: Sequence[ApplyPart], size_bytes: int, epoch: int, *rest: object) -> None:
        if self.full:
            raise StorageFull(f"the disk of shard {self.shard_id} is full", 1.0)
        await super().submit(parts, size_bytes, epoch)


async def test_a_full_disk_is_said_at_once_and_nothing_later_overtakes_what_it_refused() -> None:
    async with running(shards=1, make_shard=Full) as (cluster, router):
        for producer_id in ("", "p"):
            with pytest.raises(StorageFull, match="the disk of shard 0 is full") as refused:
                await put(router, USERS, producer_id, 1)
            assert refused.value.retry_after_s > 0
            assert "other shards" not in refused.value.message
        lane, other = Lane("stream", patient=True), Lane("other", patient=True)
        batches = [await router.submit(scan(encode(["u1"])), lane, sequence, 0, 1) for sequence in (1, 2, 3)]
        with pytest.raises(StorageFull):
            await batches[0].done
        cluster.shards[0].full = False
        for batch in batches:
            with pytest.raises(StorageFull):
                await batch.done
        with pytest.raises(StorageFull):
            await router.submit(scan(encode(["u1"])), lane, 4, 0, 1)
        # Whoever comes now finds room; nothing of the lane that failed comes after all.
        await (await router.submit(scan(encode(["u2"])), other, 1, 0, 1)).done
        assert [part.producer_id for parts in cluster.shards[0].requests for part in parts] == ["other"]
        router._links[0].applies.check_invariants()


async def test_one_full_disk_of_two_is_said_to_spoil_a_batch_without_a_name_only() -> None:
    def make(shard_id: int, epoch: int, owned: list[int]) -> FakeShard:
        return (Full if shard_id else FakeShard)(shard_id, epoch, owned)

    async with running(shards=2, make_shard=make) as (_, router):
        with pytest.raises(StorageFull, match="shard 1 is full; other shards may have counted"):
            await put(router, USERS)
        with pytest.raises(StorageFull, match=r"shard 1 is full$"):
            await put(router, USERS, "p", 1)


async def test_every_shard_writes_a_snapshot_or_says_why_not() -> None:
    async with running(shards=2, make_shard=Recovering) as (cluster, router):
        cluster.shards[0].there = True
        with pytest.raises(Unavailable, match=r"shard 1 wrote no snapshot: shard 1 recovers"):
            await router.create_snapshot()
        cluster.shards[1].there = True
        assert await router.create_snapshot() == {0: 8, 1: 16}
        await cluster.cut(0)
        with pytest.raises((Unavailable, DeadlineExceeded), match="shard 0 wrote no snapshot"):
            await router.create_snapshot(deadline_s=0.5)


async def test_a_snapshot_takes_as_long_as_its_caller_waits() -> None:
    class Slow(FakeShard):
        async def create_snapshot(self) -> int:
            await asyncio.Event().wait()
            return 0

    async with running(shards=1, make_shard=Slow) as (_, router):
        with pytest.raises(DeadlineExceeded, match="shard 0 wrote no snapshot"):
            await router.create_snapshot(deadline_s=0.1)


async def test_a_coordinator_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "CONTROL_TIMEOUT_S", 0.05)
    monkeypatch.setattr(router_module, "FIRST_TOPOLOGY_TIMEOUT_S", 0.05)
    async with running(shards=1, make_shard=FakeShard) as (cluster, _):
        moods = ["dead", "hangs", "well"]

        async def source() -> Topology:
            mood = moods.pop(0) if moods else "well"
            if mood == "dead":
                raise ConnectionError("the coordinator restarts")
            if mood == "hangs":
                await asyncio.Event().wait()
            return await cluster.source()

        router = Router(source, scan, cluster.capacity)
        await router.start()
        try:
            assert not moods
            assert await router.read(["u1"], []) == [b"u1"]
            # Its shard is back at its place: that nobody tells where it is keeps nobody from finding it there.
            moods[:] = ["hangs"] * 3
            await router.refresh()
            assert moods == ["hangs"] * 2
            assert router.topology.epoch == cluster.topology.epoch
        finally:
            await router.close()


async def test_a_stale_epoch_is_refreshed_and_nothing_is_lost() -> None:
    async with running(shards=2) as (cluster, router):
        await put(router, USERS)
        asked = cluster.asked
        await cluster.cut(0)
        await cluster.serve(0)
        # The other shard's connection stands, but it goes by the new epoch already.
        await asyncio.gather(put(router, USERS, "p", 1), counts(router, USERS))
        assert await counts(router, USERS) == [2] * len(USERS)
        assert cluster.asked > asked
        assert router.topology.epoch == cluster.topology.epoch


async def test_an_idle_router_hears_of_a_later_epoch_when_it_asks_how_the_shards_do() -> None:
    async with running(shards=2) as (cluster, router):
        cluster.publish(cluster.topology.with_shards({}))
        assert router.topology.epoch < cluster.topology.epoch
        await router.status()
        assert router.topology.epoch == cluster.topology.epoch


async def test_of_a_shard_that_does_not_answer_it_is_asked_whether_it_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def hang(link: ShardLink, timeout_s: float) -> object:
        raise TimeoutError

    async with running(shards=2) as (cluster, router):
        cluster.publish(cluster.topology.with_shards({}))
        monkeypatch.setattr(ShardLink, "status", hang)
        assert [status for _, status in await router.status()] == [None, None]
        assert router.topology.epoch == cluster.topology.epoch


async def test_a_full_window_refuses_single_batches_and_holds_streams_back() -> None:
    release = asyncio.Event()

    class Slow(FakeShard):
        async def submit(self, parts: Sequence[ApplyPart], size_bytes: int, epoch: int, *rest: object) -> None:
            await super().submit(parts, size_bytes, epoch)
            await release.wait()

    capacity = Capacity(owner_window_bytes=10_000)
    async with running(shards=1, capacity=capacity, make_shard=Slow) as (_, router):
        lane = Lane("p", patient=True)
        sequence, batches = 0, []
        while router.held_bytes < 10_000:
            sequence += 1
            batches.append(await router.submit(scan(encode(USERS)), lane, sequence, 0, 1))
        with pytest.raises(ResourceExhausted, match="bytes waiting"):
            await put(router, USERS)
        held_back = asyncio.create_task(router.submit(scan(encode(USERS)), lane, sequence + 1, 0, 1))
        await asyncio.sleep(0)
        assert not held_back.done()
        assert router.held_bytes < 10_000 + 2_000
        release.set()
        await (await held_back).done
        await asyncio.gather(*(batch.done for batch in batches))
        await until(lambda: router.held_bytes == 0)


async def test_a_call_that_is_given_up_releases_what_it_holds() -> None:
    async with running(shards=1, make_shard=FakeShard) as (cluster, router):
        await cluster.cut(0)
        ingesting = asyncio.create_task(put(router, USERS))
        await until(lambda: router.held_bytes > 0)
        ingesting.cancel()
        await asyncio.wait([ingesting])
        await cluster.serve(0)
        await until(lambda: router.ready and router.held_bytes == 0)
        assert cluster.shards[0].requests == []


async def test_a_malformed_part_spoils_no_other() -> None:
    class Picky(FakeShard):
        async def submit(self, parts: Sequence[ApplyPart], size_bytes: int, epoch: int, *rest: object) -> None:
            if any(part.producer_id == "bad" for part in parts):
                raise InvalidArgument("parts", "cannot be read")
            await super().submit(parts, size_bytes, epoch)

    async with running(shards=1, make_shard=Picky) as (cluster, router):
        answers = await asyncio.gather(
            *(put(router, USERS, name, 1) for name in ("a", "b", "bad", "c", "d")), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [type(None), type(None), InvalidArgument, type(None), type(None)]
        kept = [part.producer_id for request in cluster.shards[0].requests for part in request]
        assert sorted(kept) == ["a", "b", "c", "d"]


async def test_a_read_keeps_its_deadline_and_tells_what_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(shards=1) as (cluster, router):
        await cluster.cut(0)
        with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
            await router.read(["u1"], [], deadline_s=0.05)
        monkeypatch.setattr(router_module, "PATIENCE_S", 0.05)
        with pytest.raises(Unavailable):
            await router.read(["u1"], [])
        with pytest.raises(Unavailable):
            await router.acknowledged("p")
        assert [status for _, status in await router.status()] == [None]


async def test_shards_answer_for_the_population_for_producers_and_for_themselves() -> None:
    async with running(shards=2) as (cluster, router):
        lane = Lane("p", patient=True)
        for sequence in (1, 2):
            await (await router.submit(scan(encode(USERS)), lane, sequence, sequence - 1, 1)).done
        assert await router.acknowledged("p") == 1
        assert await router.acknowledged("nobody") == 0
        states = [shard.population_state() for shard in cluster.shards.values()]
        for shard in cluster.shards.values():
            shard.set_population(states)
        population = profile_pb2.Profile.FromString(await router.population(["views"]))
        assert population.features["views"].counter.value == 2 * len(USERS)
        statuses = [status for _, status in await router.status()]
        assert [status.event_count > 0 for status in statuses if status is not None] == [True, True]


class Mover(FakeShard):
    """A shard whose partitions' state lives in a place that all share, as if every move carried it along. It applies
    late and in order, refuses now and then, and checks what it is sent."""

    world: dict[tuple[int, str], int]
    events: list[str]
    dice: list[int]

    def __init__(self, shard_id: int, epoch: int, owned: list[int]) -> None:
        super().__init__(shard_id, epoch, owned)
        self.turn = asyncio.Lock()

    async def submit(self, parts: Sequence[ApplyPart], size_bytes: int, epoch: int, *rest: object) -> None:
        (sender,) = rest
        assert isinstance(sender, Sender)
        self.check(epoch)
        self.dice.append((self.dice[-1] * 1_103_515_245 + 12_345) % (1 << 31))
        if self.dice[-1] % 11 == 0:
            raise ResourceExhausted("full", 0.01)
        if self.dice[-1] % 7 == 0:
            raise Unavailable("not now", 0.01)
        # Whoever sent it may go away; what was taken stays.
        await asyncio.shield(asyncio.create_task(self.take(parts, epoch, sender)))

    async def take(self, parts: Sequence[ApplyPart], epoch: int, sender: Sender) -> None:
        async with self.turn:
            for _ in range(self.dice[-1] % 5):
                await asyncio.sleep(0.002)
            try:
                sender.check()
                self.check(epoch)
            except Unavailable:
                sender.refused = True
                raise
            self.apply(parts)

    def check(self, epoch: int) -> None:
        if not self.oldest_epoch <= epoch <= self.epoch:
            raise NotMine("another epoch", self.epoch)

    def apply(self, parts: Sequence[ApplyPart]) -> None:
        for part in parts:
            batch = event_service_pb2.IngestEventsRequest.FromString(bytes(part.events))
            for partition in {partition_of(user_hash(event.user_id), PARTITION_BITS) for event in batch.events}:
                assert partition in self.owned
                ids = [event.user_id for event in batch.events]
                users = [user_id for user_id in ids if partition_of(user_hash(user_id), PARTITION_BITS) == partition]
                key = (partition, part.producer_id)
                if self.world.get(key, 0) < part.sequence:
                    self.world[key] = part.sequence
                    self.events.extend(f"{part.producer_id}:{part.sequence}:{user_id}" for user_id in users)


@pytest.mark.parametrize("seed", range(4))
async def test_streams_keep_their_order_through_moves_and_lost_connections(seed: int) -> None:
    world: dict[tuple[int, str], int] = {}
    events: list[str] = []
    dice = [seed + 1]

    def make(shard_id: int, epoch: int, owned: list[int]) -> Mover:
        shard = Mover(shard_id, epoch, owned)
        shard.world, shard.events, shard.dice = world, events, dice
        return shard

    owners = [{0: 0, 8: 1}, {0: 1, 4: 0, 12: 2}, {0: 2}, {0: 0, 3: 1, 6: 2, 9: 0, 13: 1}, {0: 1, 8: 2}]
    async with running(shards=3, make_shard=make) as (cluster, router):

        async def produce(producer_id: str) -> None:
            lane = Lane(producer_id, patient=True)
            batches = []
            for sequence in range(1, 61):
                batches.append(await router.submit(scan(encode(USERS)), lane, sequence, 0, 1))
                await asyncio.sleep(0.002)
            await asyncio.gather(*(batch.done for batch in batches))

        async def disturb() -> None:
            for number in range(10):
                cluster.give(owners[(seed + number) % len(owners)])
                await asyncio.sleep(0.01)
                await cluster.cut(number % 3)
                await cluster.serve(number % 3)

        await asyncio.gather(produce("p"), produce("q"), disturb())
        expected = {f"{name}:{number}:{user}" for name in "pq" for number in range(1, 61) for user in USERS}
        assert len(events) == len(expected)
        assert set(events) == expected
        for link in router._links.values():
            link.applies.check_invariants()


async def test_a_batch_that_was_woken_too_late_waits_for_the_owners_that_come() -> None:
    async with running(shards=2, make_shard=FakeShard) as (_, router):
        await router._stable.wait()
        router._stable.clear()
        submitting = asyncio.create_task(router.submit(scan(encode(USERS)), Lane("p", patient=True), 1, 0, 1))
        await asyncio.sleep(0)
        # Owners have settled, and change again before the batch's turn has come.
        router._stable.set()
        router._stable.clear()
        await asyncio.sleep(0.01)
        assert not submitting.done()
        router._stable.set()
        batch = await submitting
        await batch.done


async def test_a_stream_that_is_paused_before_it_has_gone_on_sends_nothing() -> None:
    async with running(shards=1, make_shard=FakeShard) as (cluster, router):
        (shard,) = cluster.shards.values()
        applies = router._links[0].applies
        await applies.pause()
        batch = await router.submit(scan(encode(USERS)), Lane("p", patient=True), 1, 0, 1)
        await asyncio.sleep(0.05)
        applies.resume()
        settled = applies.pause()
        await asyncio.sleep(0.1)
        assert not shard.requests
        await settled
        applies.resume()
        await batch.done
        assert shard.requests
