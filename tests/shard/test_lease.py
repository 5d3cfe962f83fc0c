"""A shard without its lease acknowledges nothing, and loses nothing by it."""

from __future__ import annotations

import asyncio
from copy import deepcopy
from pathlib import Path

import pytest

from profile_service.errors import Unavailable
from profile_service.shard.lease import Grant, Lease, lock_identity
from profile_service.shard.transfer import Departure
from profile_service.storage.crashing_fs import CrashingFileSystem
from profile_service.storage.fs import RealFileSystem
from tests.shard.shards import Gate
from tests.shard.test_shard import part, read, running

SECOND = 10**9


class BootClock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> int:
        return int(self.now_s * SECOND)


def granted(clock: BootClock, duration_s: float = 10.0) -> Lease:
    lease = Lease(clock)
    lease.take(Grant(lease.incarnation, lease.ask(), int(duration_s * SECOND)))
    return lease


def test_a_grant_counts_from_when_it_was_asked_for() -> None:
    clock = BootClock()
    lease = Lease(clock)
    assert not lease.is_held
    asked_ns = lease.ask()
    clock.now_s += 4
    lease.take(Grant(lease.incarnation, asked_ns, 10 * SECOND))
    assert lease.is_held
    clock.now_s += 6
    assert not lease.is_held
    # The process was stopped while this one was on its way.
    lease.take(Grant(lease.incarnation, asked_ns, 10 * SECOND))
    assert not lease.is_held


def test_a_grant_for_another_process_or_an_older_one_changes_nothing() -> None:
    clock = BootClock()
    lease = granted(clock)
    lease.take(Grant("another", lease.ask(), 100 * SECOND))
    lease.take(Grant(lease.incarnation, lease.ask() - 5 * SECOND, 10 * SECOND))
    clock.now_s += 9.9
    assert lease.is_held
    clock.now_s += 0.1
    assert not lease.is_held
    with pytest.raises(Unavailable, match="shard 3 has no lease"):
        lease.check(3)


def test_a_lock_is_named_after_its_file_and_not_after_its_name(tmp_path: Path) -> None:
    fs = RealFileSystem()
    identities = []
    for name in ("one", "other"):
        fs.make_directory(tmp_path / name)
        lock = fs.lock(tmp_path / name / "LOCK", "a test")
        identities.append(lock_identity(tmp_path / name / "LOCK"))
        lock.release()
        again = fs.lock(tmp_path / name / "LOCK", "another one")
        assert lock_identity(tmp_path / name / "LOCK") == identities[-1]
        again.release()
    assert identities[0] != identities[1]


async def test_without_a_lease_writes_are_refused_and_reads_go_on() -> None:
    clock = BootClock()
    lease = granted(clock)
    async with running(lease=lease) as shard:
        await shard.submit([part(["u1"], producer="p", sequence=1)], 100, 7)
        clock.now_s += 10
        with pytest.raises(Unavailable, match="no lease"):
            await shard.submit([part(["u1"], producer="p", sequence=2)], 100, 7)
        profile = read(shard, "u1")
        assert profile is not None
        assert profile.event_count == 1
        lease.take(Grant(lease.incarnation, lease.ask(), 10 * SECOND))
        await shard.submit([part(["u1"], producer="p", sequence=2)], 100, 7)
        profile = read(shard, "u1")
        assert profile is not None
        assert profile.event_count == 2


async def test_without_a_lease_no_step_of_a_move_is_answered() -> None:
    clock = BootClock()
    lease, target = granted(clock), Nowhere()
    async with running(lease=lease) as source, running(lease=lease, owned=()) as heir:
        await source.submit([part(["u1"])], 100, 7)
        await source.moves.depart("m", 7, range(256), target)
        await heir.moves.expect("m", 7, range(256))
        sums = heir.moves.sums()
        clock.now_s += 10
        for step in (
            source.moves.finish("m"),
            heir.receive("m", Departure(source._state, range(256)).step()),  # type: ignore[arg-type]
            heir.moves.adopt(sums),
            heir.moves.expect("n", 7, range(256)),
            heir.moves.clean([3]),
        ):
            with pytest.raises(Unavailable, match="no lease"):
                await step
        with pytest.raises(Unavailable, match="no lease"):
            heir.moves.sums()


class Nowhere:
    """`moves.Target` that takes everything."""

    async def receive(self, move_id: str, piece: bytes) -> None:
        pass


async def test_what_was_under_way_when_the_process_was_stopped_is_not_acknowledged() -> None:
    clock, gate = BootClock(), Gate()
    lease = granted(clock)
    async with running(lease=lease, gate=gate) as shard:
        gate.close()
        committing = asyncio.create_task(shard.submit([part(["u1"], producer="p", sequence=1)], 100, 7))
        await gate.waiting.wait()
        queued = asyncio.create_task(shard.submit([part(["u2"], producer="p", sequence=2)], 100, 7))
        await asyncio.sleep(0)
        clock.now_s += 60
        gate.open()
        results = await asyncio.gather(committing, queued, return_exceptions=True)
        assert [type(result) for result in results] == [Unavailable, Unavailable]
        # Nobody was promoted: it has its lease again, and whoever sends again finds everything counted once.
        lease.take(Grant(lease.incarnation, lease.ask(), 10 * SECOND))
        for sequence, user in ((1, "u1"), (2, "u2")):
            await shard.submit([part([user], producer="p", sequence=sequence)], 100, 7)
        assert shard.status().event_count == 2
        assert shard.status().user_count == 2


async def test_an_owner_that_wakes_after_its_replacement_was_promoted_acknowledges_nothing() -> None:
    clock, gate, disk = BootClock(), Gate(), CrashingFileSystem()
    old_lease = granted(clock)
    async with running(disk, lease=old_lease, gate=gate) as old:
        await old.submit([part(["u1"], producer="p", sequence=1)], 100, 7)
        gate.close()
        held_up = asyncio.create_task(old.submit([part(["u1"], producer="p", sequence=2)], 100, 7))
        await gate.waiting.wait()
        # It is stopped. What its disk holds is brought to another machine, and promoted when the lease has run out.
        copy = deepcopy(disk).kill()
        stale = Grant(old_lease.incarnation, old_lease.ask(), 10 * SECOND)
        clock.now_s += 10.1
        async with running(copy, lease=granted(clock)) as new:
            await new.submit([part(["u1"], producer="p", sequence=2)], 100, 7)
            # It wakes, and the coordinator's last answer reaches it.
            old_lease.take(stale)
            gate.open()
            with pytest.raises(Unavailable):
                await held_up
            for sequence in (2, 3):
                with pytest.raises(Unavailable, match="no lease"):
                    await old.submit([part(["u1"], producer="p", sequence=sequence)], 100, 7)
            profile = read(new, "u1")
            assert profile is not None
            assert profile.event_count == 2
