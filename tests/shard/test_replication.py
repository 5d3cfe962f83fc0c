"""What a shard acknowledges is with its standby, which takes over without a replay; and nothing is acknowledged without
a standby before the shard is released from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np
import pytest

from profile_service.cluster.partitioning import partition_of, user_hash
from profile_service.domain.population import Population
from profile_service.domain.schema import parse_schema
from profile_service.errors import InvalidArgument, Replaced, Unavailable
from profile_service.shard import replication as replication_module
from profile_service.shard import transfer as transfer_module
from profile_service.shard.log_records import RECORD_BEGINNING, RECORD_EVENTS
from profile_service.shard.replication import ReplicatedLog, Shipped
from profile_service.shard.replication_stream import decode, encode
from profile_service.shard.reports import BUILDING, IN_SYNC, LOST
from profile_service.shard.shard import Shard
from profile_service.shard.state import ShardState
from profile_service.storage.crashing_fs import CrashingFileSystem
from tests.shard import shards
from tests.shard.test_shard import SCHEMA, part, running
from userprofile.v1 import profile_pb2

USERS = [f"u{n}" for n in range(60)]


def read(shard: Shard, user: str) -> profile_pb2.Profile | None:
    (encoded,) = shard.read([user], [])
    return profile_pb2.Profile.FromString(encoded) if encoded else None


class Direct:
    """`replication.Standby`: the other shard, in the same loop, behind the bytes that go over the wire."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self.failure: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.asked = asyncio.Event()
        self.taken = 0
        self.kinds: list[int] = []

    async def take(self, replication: str, number: int, records: Sequence[Shipped]) -> None:
        self.asked.set()
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        message = decode(encode(replication, number, records))
        await self._shard.take(*message)
        self.taken += len(records)
        self.kinds += [kind for kind, _ in records]

    async def close(self) -> None:
        pass


def log_of(shard: Shard) -> ReplicatedLog:
    log = shard._log
    assert isinstance(log, ReplicatedLog)
    return log


def begin(owner: Shard, standby: Shard, name: str = "b/1") -> Direct:
    direct = Direct(standby)
    assert standby.following is not None
    standby.following.expect(name)
    assert isinstance(owner._state, ShardState)
    log_of(owner).replicate(name, direct, owner, owner._state)
    return direct


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  It is another task's doing, in the same loop.
            await asyncio.sleep(0)


async def in_sync(owner: Shard) -> None:
    await until(lambda: log_of(owner).shipping.state == IN_SYNC)


@asynccontextmanager
async def owner_and_standby(disk: CrashingFileSystem | None = None) -> AsyncIterator[tuple[Shard, Shard]]:
    """One that owns everything and holds some users, and one that owns nothing and holds what nobody needs."""
    async with AsyncExitStack() as stack:
        owner = await stack.enter_async_context(running())
        standby = await stack.enter_async_context(running(disk))
        await standby.submit([part(["stranger", *USERS[:3]], producer="stranger", sequence=9)], 100, 7)
        standby._owned[:] = False
        await owner.submit([part(USERS, producer="p", sequence=1, event_ids=[f"e of {u}" for u in USERS])], 100, 7)
        await owner.submit([part(USERS, producer="request:a")], 100, 7)
        yield owner, standby


def take_over(standby: Shard) -> Awaitable[None]:
    assert standby.following is not None
    return standby.following.promote()


def assert_same(owner: Shard, other: Shard) -> None:
    """Both hold the same, and know the same to be counted."""
    mine, theirs = owner._state, other._state
    assert isinstance(mine, ShardState)
    assert isinstance(theirs, ShardState)
    theirs.check_invariants()
    assert theirs.event_count == mine.event_count
    assert theirs.adopted == mine.adopted
    users = sorted(mine.table.users.bytes_of(number) for number in mine.table.users.numbers().tolist())
    assert users == sorted(theirs.table.users.bytes_of(number) for number in theirs.table.users.numbers().tolist())
    for user in users:
        name = user.decode()
        assert theirs.table.profile(name, shards.NOW_NS) == mine.table.profile(name, shards.NOW_NS)
    for held in mine.producers.producers(0, mine.producers.places):
        found = theirs.producers.producer(held.producer_id)
        assert found is not None
        assert np.array_equal(found.last, held.last)
        assert found.acknowledged == held.acknowledged
    requests = {r.request_id: r.reached for r in mine.producers.requests(*mine.producers.requests_held)}
    assert {r.request_id: r.reached for r in theirs.producers.requests(*theirs.producers.requests_held)} == requests
    assert set(theirs.event_ids.copy(*theirs.event_ids.held).keys) == set(
        mine.event_ids.copy(*mine.event_ids.held).keys
    )
    sums = [Population.merge(SCHEMA, [shard.population_state()]).profile(shards.NOW_NS) for shard in (owner, other)]
    assert sums[0] == sums[1]


async def test_a_standby_has_what_its_owner_has_whatever_happens_while_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer_module, "PIECE_BYTES", 1000)
    monkeypatch.setattr(transfer_module, "EVENT_IDS_A_PIECE", 7)
    disk = CrashingFileSystem()
    async with owner_and_standby(disk) as (owner, standby):
        direct = begin(owner, standby)
        number, last = 1, part([])
        while log_of(owner).shipping.state == BUILDING:
            number += 1
            last = part([*USERS[number % 50 :], f"new {number}"], producer="p", sequence=number)
            await owner.submit([last], 100, 7)
            if number % 5 == 0:
                await owner.moves.clean([])
                await owner.between_groups(lambda gone=USERS[number % 60]: forget(owner, gone))  # type: ignore[misc]
            if number == 4:
                await standby.create_snapshot()
        assert number > 5, "it was built in no time"
        assert log_of(owner).shipping.state == IN_SYNC
        await owner.submit([part(USERS, event_ids=[f"late {u}" for u in USERS])], 100, 7)
        await standby.between_groups(nothing)
        assert direct.kinds.count(RECORD_BEGINNING) == 1
        assert_same(owner, standby)
        await take_over(standby)
        standby.update_topology(8, range(256))
        # It counts nothing again, and goes on.
        before = read(standby, "u7")
        await standby.submit([last], 100, 8)
        await standby.submit([part(USERS, event_ids=[f"e of {u}" for u in USERS])], 100, 8)
        assert read(standby, "u7") == before
        await standby.submit([part(["u7"], producer="p", sequence=number + 1)], 100, 8)
        after = read(standby, "u7")
        assert before is not None
        assert after is not None
        assert after.event_count == before.event_count + 1
        reads = standby.read(USERS, [], 8)
    again = shards.make_shard(await shards.recovered(disk, SCHEMA), epoch=9)
    assert again.read(USERS, [], 9) == reads
    assert again.read(["stranger"], [], 9) == [b""]


async def forget(shard: Shard, user: str) -> None:
    """As the shard does by itself when a user's time is over."""
    from profile_service.shard.log_records import RECORD_FORGET, encode_forget

    await shard.log_now(RECORD_FORGET, encode_forget([user.encode()]))
    shard._state.forget([user.encode()])


async def nothing() -> None:
    """Only to be waited for."""


async def test_an_acknowledgement_waits_for_both_ends() -> None:
    async with owner_and_standby() as (owner, standby):
        direct = begin(owner, standby)
        await in_sync(owner)
        direct.open.clear()
        direct.asked.clear()
        sent = asyncio.ensure_future(owner.submit([part(["u1"], producer="p", sequence=2)], 100, 7))
        await direct.asked.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not sent.done()
        direct.open.set()
        await sent
        await standby.between_groups(nothing)
        assert_same(owner, standby)


async def test_without_its_standby_a_shard_acknowledges_nothing_until_it_is_released() -> None:
    async with owner_and_standby() as (owner, standby):
        direct = begin(owner, standby)
        await in_sync(owner)
        direct.failure = Unavailable("it is gone", 0.1)
        sent = asyncio.ensure_future(owner.submit([part(["u1"], producer="p", sequence=2)], 100, 7))
        await until(lambda: log_of(owner).shipping.state == LOST)
        assert log_of(owner).shipping.message == "it is gone"
        for _ in range(20):
            await asyncio.sleep(0)
        assert not sent.done()
        assert read(owner, "u1") is not None
        log_of(owner).release("b/another")
        await asyncio.sleep(0)
        assert not sent.done()
        log_of(owner).release("b/1")
        await sent
        assert log_of(owner).shipping.replication == ""
        # Another one is built, which has all of it.
        begin(owner, standby, "b/2")
        await in_sync(owner)
        await standby.between_groups(nothing)
        assert_same(owner, standby)


async def test_a_standby_that_does_not_answer_in_time_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async with owner_and_standby() as (owner, standby):
        direct = begin(owner, standby)
        await in_sync(owner)
        monkeypatch.setattr(replication_module, "TAKE_TIMEOUT_S", 0.01)
        direct.open.clear()
        sent = asyncio.ensure_future(owner.submit([part(["u1"])], 100, 7))
        await until(lambda: log_of(owner).shipping.state == LOST)
        assert not sent.done()
        log_of(owner).release("b/1")
        await sent


async def test_a_standby_that_is_lost_while_it_is_built_holds_nothing_up() -> None:
    async with owner_and_standby() as (owner, standby):
        direct = begin(owner, standby)
        direct.failure = Unavailable("it is gone", 0.1)
        await owner.submit([part(["u1"])], 100, 7)
        await until(lambda: log_of(owner).shipping.replication == "")
        assert log_of(owner).shipping.message == "it is gone"


async def test_an_owner_whose_standby_was_promoted_acknowledges_nothing_and_ends() -> None:
    async with AsyncExitStack() as stack:
        standby = await stack.enter_async_context(running(owned=()))
        owner = shards.make_shard(await shards.recovered(CrashingFileSystem(), SCHEMA))
        writer = asyncio.ensure_future(owner.run())
        await owner.submit([part(USERS, producer="p", sequence=1)], 100, 7)
        begin(owner, standby)
        await in_sync(owner)
        await take_over(standby)
        standby.update_topology(8, range(256))
        with pytest.raises(Unavailable, match="promoted"):
            await owner.submit([part(["u1"], producer="p", sequence=2)], 100, 7)
        with pytest.raises(Replaced):
            await writer
        found = read(standby, "u1")
        assert found is not None
        assert found.event_count == 1


async def test_an_owner_whose_standby_was_promoted_ends_whatever_it_was_about_to_log() -> None:
    async with AsyncExitStack() as stack:
        standby = await stack.enter_async_context(running(owned=()))
        owner = shards.make_shard(await shards.recovered(CrashingFileSystem(), SCHEMA))
        writer = asyncio.ensure_future(owner.run())
        await owner.submit([part(["u1"])], 100, 7)
        begin(owner, standby)
        await in_sync(owner)
        await take_over(standby)
        # Nobody sends events: it is a move that has something to log, and whoever asked for it hears an error.
        left = partition_of(user_hash("u1"), 8)
        owner.update_topology(8, set(range(256)) - {left})
        with pytest.raises(Replaced):
            await owner.moves.clean([left])
        with pytest.raises(Replaced):
            await asyncio.wait_for(writer, 10)


async def test_only_the_replication_that_is_expected_is_taken_in_its_order() -> None:
    async with owner_and_standby() as (owner, standby):
        beginning = (RECORD_BEGINNING, memoryview(owner._state.beginning().SerializeToString()))  # type: ignore[attr-defined]
        with pytest.raises(Unavailable, match="does not expect"):
            await standby.take("b/1", 1, [beginning])
        assert standby.following is not None
        standby.following.expect("b/1")
        with pytest.raises(Unavailable, match="does not expect"):
            await standby.take("b/2", 1, [beginning])
        with pytest.raises(Unavailable, match="does not expect message 2"):
            await standby.take("b/1", 2, [beginning])
        with pytest.raises(InvalidArgument, match="begins with its beginning"):
            await standby.take("b/1", 1, [(RECORD_EVENTS, memoryview(b""))])
        await standby.take("b/1", 1, [beginning])
        with pytest.raises(InvalidArgument, match="begins with its beginning"):
            await standby.take("b/1", 2, [beginning])
        with pytest.raises(InvalidArgument, match="of type 77"):
            await standby.take("b/1", 2, [(77, memoryview(b""))])
        await standby.take("b/1", 2, [])


async def test_a_standby_of_another_schema_is_refused() -> None:
    other = parse_schema(SCHEMA.text.replace("size: 3", "size: 4"))
    async with AsyncExitStack() as stack:
        owner = await stack.enter_async_context(running())
        standby = await stack.enter_async_context(shards.running(other, owned=()))
        begin(owner, standby)
        await until(lambda: log_of(owner).shipping.replication == "")
        assert "another schema" in log_of(owner).shipping.message
