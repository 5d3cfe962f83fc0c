"""Snapshots while a shard goes on: due in time, bounded, abandoned on a full disk, never ahead of the log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TypeVar

import numpy as np
import pytest

from profile_service.config import Capacity
from profile_service.errors import StorageFull, Unavailable
from profile_service.shard.log_records import RECORD_EVENTS, RECORD_FORGET, encode_forget
from profile_service.shard.recovery import Recovered, recover
from profile_service.shard.snapshotter import (
    BUFFERS,
    HURRIED_REST_SHARE,
    LEAST_SYNC_BYTES,
    MOST_SYNC_BYTES,
    REST_SHARE,
    RETRY_S,
    Snapshotter,
    _Pace,
)
from profile_service.storage.crashing_fs import CrashingFileSystem
from profile_service.storage.wal import LogOptions, SyncMode
from profile_service.wire.apply_request import ApplyPart, encode_part
from profile_service.wire.decode import decode_events
from tests.domain.test_profile_table import NOW_NS, SCHEMA, encode
from tests.shard.test_state import (
    PARTITIONS,
    SECOND_NS,
    USERS,
    check_same,
    draw_batch,
    new_state,
    plan_of,
    small_steps,
)

T = TypeVar("T")
DIRECTORY = Path("/data/shard-0")
PLAN = plan_of(SCHEMA)


@pytest.fixture(autouse=True)
def _small_steps() -> Iterator[None]:
    with small_steps():
        yield


async def inline(work: Callable[[], T]) -> T:
    # As a thread would: the result is there later.
    await asyncio.sleep(0)
    return work()


class Gate:
    """A runner that waits until it is told to go on."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, work: Callable[[], T]) -> T:
        await self.open.wait()
        return work()


class Life:
    """A shard's commit loop, one step at a time."""

    def __init__(self, fs: CrashingFileSystem, recovered: Recovered, **options: float) -> None:
        self.fs = fs
        self.recovered = recovered
        self.state, self.log = recovered.state, recovered.log
        self.now_ns = NOW_NS
        self.ready = 0
        self.snapshotter = Snapshotter(
            recovered.snapshots,
            self.state,
            self.log,
            clock=lambda: self.now_ns,
            last=recovered.snapshot,
            log_bytes=int(options.get("log_bytes", 1 << 40)),
            interval_s=options.get("interval_s", 1e9),
        )
        self.snapshotter.on_ready(self._count_ready)

    def _count_ready(self) -> None:
        self.ready += 1

    @classmethod
    async def begin(
        cls, fs: CrashingFileSystem, *, sync: SyncMode = "always", gate: Gate | None = None, **options: float
    ) -> Life:
        recovered = await recover(
            fs,
            DIRECTORY,
            SCHEMA,
            identity=b"i" * 16,
            holder="test",
            reset_features=(),
            partition_bits=PARTITIONS.bit_length() - 1,
            capacity=Capacity(event_ids_per_shard=1000),
            options=LogOptions(segment_bytes=8192, sync_mode=sync, sync_interval_s=1e6),
            run=inline,
            run_snapshots=gate or inline,
            new_state=new_state,
        )
        return cls(fs, recovered, **options)

    async def commit(self, rng: Random) -> None:
        events = encode(draw_batch(SCHEMA, rng).events)
        columns = decode_events(events, PLAN, NOW_NS)
        part = ApplyPart(arrival_time_ns=NOW_NS, events=events, event_count=columns.count)
        await self._append(RECORD_EVENTS, encode_part(part))
        assert self.state.table.has_room(columns.count, len(events))
        self.state.apply(columns, 0, columns.count, NOW_NS)

    async def forget(self, users: list[str]) -> None:
        ids = [user.encode() for user in users]
        await self._append(RECORD_FORGET, encode_forget(ids))
        self.state.forget(ids)

    async def _append(self, kind: int, record: Sequence[bytes | memoryview]) -> None:
        await self.log.reserve(sum(map(len, record)), 1)
        self.log.append(kind, record)
        await self.log.sync()

    async def go_on(self, rng: Random, groups: int) -> None:
        """Some groups, each with a step behind it."""
        for _ in range(groups):
            if rng.random() < 0.8:
                await self.commit(rng)
            else:
                await self.forget(rng.sample(USERS, 2))
            await self.snapshotter.step()
            await asyncio.sleep(0)

    async def step_until_idle(self) -> int:
        steps = 0
        while await self.snapshotter.step() or self.snapshotter.is_running:
            steps += 1
            await asyncio.sleep(0)
        return steps

    async def end(self) -> None:
        await self.snapshotter.close()
        await self.log.close()
        self.recovered.lock.release()

    def positions(self) -> list[int]:
        return [info.replay_position for info in self.recovered.snapshots.list()]


@pytest.mark.parametrize("sync", ["always", "interval", "never"])
@pytest.mark.parametrize("attempt", range(5))
async def test_what_is_recovered_is_what_was(seed: int, attempt: int, sync: SyncMode) -> None:
    rng = Random(seed + attempt)
    fs = CrashingFileSystem(rng.randrange(2**32))
    life = await Life.begin(fs, sync=sync)
    for _ in range(4):
        await life.go_on(rng, rng.randint(0, 15))
        asked = life.snapshotter.request()
        await life.go_on(rng, rng.randint(0, 15))
        await life.step_until_idle()
        assert await asked == life.snapshotter.last_position
        assert life.snapshotter.problem == ""
        await life.go_on(rng, rng.randint(0, 5))
        if rng.random() < 0.5:
            await life.end()
            recovered = await Life.begin(fs, sync=sync)
        else:
            await life.log.sync()
            fs = fs.kill()
            recovered = await Life.begin(fs, sync=sync)
        assert recovered.recovered.snapshot is not None
        check_same(life.state, recovered.state)
        life = recovered
    await life.end()


@pytest.mark.parametrize("sync", ["interval", "never"])
@pytest.mark.parametrize("attempt", range(5))
async def test_a_snapshot_is_never_ahead_of_the_log_on_the_disk(seed: int, attempt: int, sync: SyncMode) -> None:
    """When the machine goes down, the log may end earlier than it did; not before what a snapshot holds."""
    rng = Random(seed + attempt)
    fs = CrashingFileSystem(rng.randrange(2**32))
    life = await Life.begin(fs, sync=sync)
    await life.go_on(rng, 5)
    asked = life.snapshotter.request()
    await life.go_on(rng, 10)
    await life.step_until_idle()
    position = await asked
    await life.go_on(rng, 5)
    life = await Life.begin(fs.crash(), sync=sync)
    assert life.recovered.snapshot is not None
    assert life.recovered.snapshot.replay_position == position
    assert life.log.position >= life.state.newest_stamp
    life.state.check_invariants()
    await life.end()


async def test_it_is_due_by_bytes_of_log(seed: int) -> None:
    rng = Random(seed)
    life = await Life.begin(CrashingFileSystem(seed), log_bytes=4000)
    begun = []
    for _ in range(60):
        await life.commit(rng)
        was_running = life.snapshotter.is_running
        await life.snapshotter.step()
        if life.snapshotter.is_running and not was_running:
            begun.append(life.log.position)
        await life.step_until_idle()
    assert len(begun) >= 3
    assert all(4000 <= after - before < 12_000 for before, after in zip([0, *begun], begun, strict=False))
    assert life.positions() == [begun[-1], begun[-2]]
    # Before the older one nothing is needed; the log goes by segments.
    assert 0 < life.log.start <= begun[-2]
    await life.end()


async def test_it_is_due_by_time_if_anything_was_logged(seed: int) -> None:
    life = await Life.begin(CrashingFileSystem(seed), interval_s=600)
    await life.commit(Random(seed))
    life.now_ns += 599 * SECOND_NS
    assert await life.step_until_idle() == 0
    life.now_ns += 2 * SECOND_NS
    await life.step_until_idle()
    first = life.snapshotter.last_time_ns
    assert first == life.now_ns
    life.now_ns += 10_000 * SECOND_NS
    await life.step_until_idle()
    assert life.snapshotter.last_time_ns == first
    await life.commit(Random(seed))
    await life.step_until_idle()
    assert life.snapshotter.last_time_ns == life.now_ns
    await life.end()


async def test_a_request_gets_a_snapshot_that_begins_after_it(seed: int) -> None:
    rng = Random(seed)
    life = await Life.begin(CrashingFileSystem(seed))
    await life.go_on(rng, 5)
    first = life.snapshotter.request()
    await life.snapshotter.step()
    before = life.log.position
    await life.go_on(rng, 3)
    second, third = life.snapshotter.request(), life.snapshotter.request()
    asked_at = life.log.position
    await life.step_until_idle()
    assert await first == before
    assert await second == await third == asked_at
    assert life.positions() == [asked_at, before]
    await life.end()


async def test_a_step_never_waits_for_the_writer(seed: int) -> None:
    gate = Gate()
    gate.open.set()
    life = await Life.begin(CrashingFileSystem(seed), gate=gate)
    await life.go_on(Random(seed), 10)
    gate.open.clear()
    asked = asyncio.ensure_future(life.snapshotter.request())
    taken = 0
    while await life.snapshotter.step():
        taken += 1
        await asyncio.sleep(0)
    assert taken == BUFFERS - 1
    for _ in range(5):
        await life.commit(Random(seed))
        assert not await life.snapshotter.step()
    ready = life.ready
    gate.open.set()
    await asyncio.sleep(0.05)
    assert life.ready > ready
    await life.step_until_idle()
    await asked
    await life.end()


async def test_a_full_disk_abandons_it_and_it_is_tried_again(seed: int) -> None:
    rng = Random(seed)
    fs = CrashingFileSystem(seed)
    life = await Life.begin(fs, log_bytes=2000)
    while life.log.position < 2000:
        await life.commit(rng)
    used = sum(len(fs.map(DIRECTORY / "log" / name)) for name in fs.names(DIRECTORY / "log"))
    fs.capacity_bytes = used + 3000
    asked = asyncio.ensure_future(life.snapshotter.request())
    await life.step_until_idle()
    with pytest.raises(StorageFull, match="no room for a snapshot"):
        await asked
    assert "no room" in life.snapshotter.problem
    assert fs.names(DIRECTORY / "snapshots") == []
    # The log goes on, and for a while nothing is tried.
    await life.step_until_idle()
    assert not life.snapshotter.is_running
    fs.capacity_bytes = None
    life.now_ns += int(RETRY_S * SECOND_NS)
    await life.step_until_idle()
    assert life.snapshotter.problem == ""
    assert life.positions() == [life.log.position]
    await life.end()


@pytest.mark.parametrize("operation", ["write", "sync", "create"])
async def test_any_other_failure_is_the_shards_end(seed: int, operation: str) -> None:
    fs = CrashingFileSystem(seed)
    life = await Life.begin(fs)
    await life.go_on(Random(seed), 5)
    asked = asyncio.ensure_future(life.snapshotter.request())
    await life.snapshotter.step()
    fs.fail_once(operation)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="Errno 5"):
        await life.step_until_idle()
    with pytest.raises(OSError, match="Errno 5"):
        await life.snapshotter.step()
    with pytest.raises(Unavailable):
        await asked
    with pytest.raises(Unavailable):
        await life.snapshotter.request()
    await life.snapshotter.close()


async def test_closing_abandons_what_is_not_complete(seed: int) -> None:
    fs = CrashingFileSystem(seed)
    life = await Life.begin(fs)
    await life.go_on(Random(seed), 8)
    running = asyncio.ensure_future(life.snapshotter.request())
    await life.snapshotter.step()
    waiting = asyncio.ensure_future(life.snapshotter.request())
    await asyncio.sleep(0)
    await life.snapshotter.close()
    for asked in (running, waiting):
        with pytest.raises(Unavailable):
            await asked
    assert fs.names(DIRECTORY / "snapshots") == []
    assert not await life.snapshotter.step()
    await life.end()


async def test_it_rests_less_when_the_log_outgrows_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = Random(seed)
    shares: list[float] = []

    def end(self: _Pace, rest_share: float, *, synced: bool) -> float:
        shares.append(rest_share)
        return 0.0

    monkeypatch.setattr(_Pace, "end", end)
    gate = Gate()
    life = await Life.begin(CrashingFileSystem(seed), gate=gate, log_bytes=4000)
    while not life.snapshotter.is_running:
        await life.go_on(rng, 1)
    gate.open.set()
    await life.step_until_idle()
    assert shares
    assert set(shares) == {REST_SHARE}
    shares.clear()
    gate.open.clear()
    begun = life.log.position
    while life.log.position < begun + 12_000:
        await life.go_on(rng, 1)
    gate.open.set()
    await life.step_until_idle()
    assert shares[0] == HURRIED_REST_SHARE
    await life.end()


async def test_a_stretch_that_syncs_slowly_becomes_shorter() -> None:
    class Time:
        now = 0.0

        def time(self) -> float:
            return self.now

    time = Time()
    pace = _Pace(time)  # type: ignore[arg-type]
    stretches = []
    for bytes_per_s in [1e9] * 8 + [5e7] * 8:
        written = 0
        while True:
            pace.begin()
            written += 1 << 17
            is_stretch = pace.wrote(1 << 17)
            time.now += (1 << 17) / bytes_per_s
            rest_s = pace.end(3.0, synced=is_stretch)
            if is_stretch:
                break
        assert rest_s == pytest.approx(3 * written / bytes_per_s)
        stretches.append(written)
    assert 3 << 19 < stretches[7] <= MOST_SYNC_BYTES
    assert stretches[-1] == LEAST_SYNC_BYTES
    assert np.diff(stretches[:8]).min() >= 0
