"""A shard takes part in moves as it is told, refuses what it was not told of, and knows all of it after a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import xxhash

from profile_service.domain.schema import parse_schema
from profile_service.errors import InvalidArgument, NotMine, ResourceExhausted, Unavailable
from profile_service.shard import moves as moves_module
from profile_service.shard.shard import Shard
from profile_service.storage.crashing_fs import CrashingFileSystem
from tests.shard import shards
from tests.shard.test_shard import SCHEMA, part, read, running
from userprofile.internal.v1 import shard_log_pb2


@pytest.fixture(autouse=True)
def _few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A departure of so few users does not wait for its end to send them."""
    monkeypatch.setattr(moves_module, "NEARLY_THERE", 0)


USERS = [f"u{n}" for n in range(60)]
LOWER, UPPER = range(128), range(128, 256)


def is_lower(user: str) -> bool:
    return xxhash.xxh64_intdigest(user.encode()) >> 63 == 0


class Direct:
    """`moves.Target`: the other shard, in the same loop."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self.pieces: list[bytes] = []

    async def receive(self, move_id: str, piece: bytes) -> None:
        self.pieces.append(piece)
        await self._shard.receive(move_id, piece)


@asynccontextmanager
async def two_shards(
    disk: CrashingFileSystem | None = None,
) -> AsyncIterator[tuple[Shard, Shard]]:
    """One that owns every partition and holds some users, and one that owns none."""
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(running())
        target = await stack.enter_async_context(running(disk, owned=()))
        await source.submit([part(USERS, producer="p", sequence=1, event_ids=[f"e of {u}" for u in USERS])], 100, 7)
        await source.submit([part(USERS, producer="request:a")], 100, 7)
        yield source, target


async def test_what_has_moved_is_read_counted_once_and_survives_a_restart() -> None:
    disk = CrashingFileSystem()
    async with two_shards(disk) as (source, target):
        before = {user: read(source, user) for user in USERS}
        direct = Direct(target)
        await target.moves.expect("m", 7, LOWER)
        await source.moves.depart("m", 7, LOWER, direct)
        # What comes meanwhile follows.
        await source.submit([part(USERS, producer="p", sequence=2)], 100, 7)
        await source.moves.finish("m")
        lower = [user for user in USERS if is_lower(user)]
        with pytest.raises(NotMine, match="about to leave"):
            await source.submit([part(lower, producer="p", sequence=3)], 100, 7)
        # Others are written to, and everything is read where it is still owned.
        await source.submit([part([u for u in USERS if not is_lower(u)], producer="p", sequence=3)], 100, 7)
        assert read(source, lower[0]) is not None
        source.update_topology(8, UPPER)
        target.update_topology(8, LOWER)
        await source.moves.clean(LOWER)
        assert source.status().user_count == len(USERS) - len(lower)
        assert target.status().user_count == len(lower)
        for again in (
            part(USERS, producer="p", sequence=2),
            part(USERS, producer="request:a"),
            part(USERS, event_ids=[f"e of {user}" for user in USERS]),
        ):
            for shard, mine in ((source, False), (target, True)):
                users = [user for user in USERS if is_lower(user) == mine]
                ids = [f"e of {user}" for user in users] if not again.producer_id else ()
                repeated = part(users, producer=again.producer_id, sequence=again.sequence, event_ids=ids)
                await shard.submit([repeated], 100, 8)
        for user in lower:
            held = before[user]
            found = target.read([user], [], 8)[0]
            assert held is not None
            assert type(held).FromString(found).event_count == held.event_count + 1
        reads = target.read(lower, [], 8)
    recovered = await shards.recovered(disk, SCHEMA)
    after = shards.make_shard(recovered, owned=LOWER, epoch=9)
    assert after.read(lower, [], 9) == reads
    assert len(recovered.state.table) == len(lower)
    # The sums stayed where the events were counted.
    assert recovered.state.event_count == 0


async def test_pieces_of_a_move_that_is_over_are_refused() -> None:
    async with two_shards() as (source, target):
        direct = Direct(target)
        await target.moves.expect("m", 7, LOWER)
        await source.moves.depart("m", 7, LOWER, direct)
        with pytest.raises(Unavailable, match="does not expect move other"):
            await target.receive("other", direct.pieces[0])
        target.update_topology(8, ())
        with pytest.raises(Unavailable, match="does not expect"):
            await source.moves.finish("m")
        # It takes no writes for what it was to give away until it hears of a new epoch.
        with pytest.raises(NotMine):
            await source.submit([part(USERS)], 100, 7)
        source.update_topology(8, range(256))
        await source.submit([part(USERS)], 100, 8)
        with pytest.raises(Unavailable, match="not in move"):
            await source.moves.finish("m")
        # What came is not this shard's, and goes.
        await target.moves.clean(LOWER)
        assert target.status().user_count == 0


async def test_nothing_is_cleaned_away_that_is_owned_or_on_its_way() -> None:
    async with two_shards() as (source, target):
        with pytest.raises(NotMine):
            await source.moves.clean([3])
        with pytest.raises(NotMine):
            await source.moves.expect("m", 7, [3])
        await target.moves.expect("m", 7, LOWER)
        with pytest.raises(NotMine):
            await target.moves.clean([3])
        await target.moves.clean([200])
        assert source.status().user_count == len(USERS)


async def test_a_move_by_another_epoch_or_of_others_partitions_is_refused() -> None:
    async with two_shards() as (source, target):
        direct = Direct(target)
        for epoch in (6, 8):
            with pytest.raises(NotMine, match="epoch"):
                await target.moves.expect("m", epoch, LOWER)
            with pytest.raises(NotMine, match="epoch"):
                await source.moves.depart("m", epoch, LOWER, direct)
        with pytest.raises(NotMine, match="does not own"):
            await target.moves.depart("m", 7, LOWER, direct)
        assert direct.pieces == []


async def test_a_piece_that_is_none_changes_nothing_and_is_not_logged() -> None:
    async with two_shards() as (source, target):
        direct = Direct(target)
        await target.moves.expect("m", 7, LOWER)
        await source.moves.depart("m", 7, LOWER, direct)
        await target.moves.expect("n", 7, LOWER)
        position = target.status().log_position
        whole = shard_log_pb2.Transfer.FromString(direct.pieces[0])
        assert whole.ids
        for change in (
            {"layout": b"another"},
            {"rows": whole.rows[:-8]},
            {"ids": whole.ids[:-1]},
            {"texts": whole.texts[:-1]},
            {"partitions": [200]},
            {"partitions": [3, 3]},
            {"event_id_times": b""},
        ):
            damaged = shard_log_pb2.Transfer()
            damaged.CopyFrom(whole)
            for name, value in change.items():
                damaged.ClearField(name)  # type: ignore[arg-type]
                damaged.MergeFrom(shard_log_pb2.Transfer(**{name: value}))  # type: ignore[arg-type]
            with pytest.raises(InvalidArgument):
                await target.receive("n", damaged.SerializeToString())
        with pytest.raises(InvalidArgument):
            await target.receive("n", b"\xff\xff")
        assert target.status().log_position == position
        assert len(target._state.table) == 0


async def test_a_target_without_room_refuses_and_serves_on() -> None:
    async with two_shards() as (source, target):
        await target.moves.expect("m", 7, LOWER)
        target._state.table.users.capacity = 3
        with pytest.raises(ResourceExhausted, match="no room"):
            await source.moves.depart("m", 7, LOWER, Direct(target))
        assert target.status().user_count == 0
        await target.moves.clean([3 + 128])


async def test_sums_are_adopted_once_and_survive_a_restart() -> None:
    disk = CrashingFileSystem()
    async with two_shards(disk) as (source, heir):
        with pytest.raises(NotMine):
            source.moves.sums()
        source.update_topology(8, ())
        sums = source.moves.sums()
        for _ in range(2):
            await heir.moves.adopt(sums)
        assert heir.status().event_count == source.status().event_count == 2 * len(USERS)
        assert heir.population_state() == source.population_state()
    for _ in range(2):
        found = await shards.recovered(disk, SCHEMA)
        assert found.state.event_count == 2 * len(USERS)
        assert found.state.adopted == {3}
        again = shards.make_shard(found)
        found.lock.release()
        assert again.population_state()
        await found.log.close()


async def test_sums_of_another_schema_are_refused() -> None:
    other = parse_schema("{name: other, events: {view: {weight: 1}}, features: {views: {kind: counter}}}")
    async with running(owned=()) as heir, shards.running(other, owned=()) as gone:
        position = heir.status().log_position
        with pytest.raises(InvalidArgument, match="schema"):
            await heir.moves.adopt(gone.moves.sums())
        assert heir.status().log_position == position
        await heir.moves.clean([3])
