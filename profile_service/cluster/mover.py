"""Moves partitions between shards while events come in, and makes of it what people ask for: other owners, more shards
or fewer, a node without any. Without Ray, as `coordinator.py`, whose shards it moves.

    remember that the target may hold something ─▶ expect ─▶ depart: copies, then follows ─▶ ┐
                                                                                           │ from here on no other
    clean ◀─ a new epoch: the target owns them ◀─ remembered: they are the target's ◀─ finish ┘ change, for milliseconds
      ▲                                                                      │ anything fails
      └────────────────── a new epoch: all as before ◀───────────────────────┘

A move is decided by one write, that of the owners. Before it the source has everything, and after a crash everything is
as it was; after it the target has everything durable. Who finds something left over somewhere cleans it away. While the
source takes no more writes nobody is told of any topology: neither end can begin anew in between and forget what it has
promised.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from profile_service.cluster.changes import Moved
from profile_service.cluster.coordinator import Coordinator, reason_of
from profile_service.cluster.ownership import MOVED_AT_ONCE, Move, Ownership, Retirement, next_moves
from profile_service.cluster.shard_control import ShardControl
from profile_service.cluster.topology import Topology
from profile_service.errors import InvalidArgument, Unavailable
from profile_service.storage.fs import DiskFull

COPY_TIMEOUT_S = 600.0
"""A copy of some partitions takes less than so long."""

FREEZE_TIMEOUT_S = 1.0
"""Writes wait so long at most for what is left to be copied; then the move is given up, and tried again."""

CALL_TIMEOUT_S = 10.0
START_TIMEOUT_S = 120.0
"""A new shard serves by then."""

MOST_ATTEMPTS = 20
RETRY_S = 0.2
"""Between two attempts at the same move."""

logger = logging.getLogger(__name__)


class ShardFactory(Protocol):
    """Makes shards, and makes away with them."""

    def create(self, shard_id: int) -> ShardControl:
        """Begins to start a new shard."""

    async def remove(self, shard_id: int) -> None:
        """Ends a shard that is in no topology, and removes what it has stored."""


class Undecided(Exception):
    """Whether a change of owners is durable is not known: whoever reads it next will know. The coordinator ends."""


class Mover:
    """Moves of one coordinator's partitions, one after the other."""

    def __init__(self, coordinator: Coordinator, factory: ShardFactory) -> None:
        self._coordinator = coordinator
        self._factory = factory
        self._one_at_a_time = asyncio.Lock()
        self._serials = itertools.count(1)
        self._name = uuid.uuid4().hex[:8]
        self.moved = Moved()
        """So far."""

    async def resume(self) -> None:
        """Brings to its end what a coordinator before has begun."""
        async with self._one_at_a_time:
            await self._finish_what_is_begun()

    async def move(self, partitions: Sequence[int], target_id: int) -> int:
        """Gives the partitions to the target; returns the epoch from which it has all of them.

        Raises:
            InvalidArgument: there are no such partitions, or no such shard.
            Unavailable: a shard is away, or full; some of the partitions may have moved.
        """
        coordinator = self._coordinator
        async with self._one_at_a_time:
            await self._finish_what_is_begun()
            owners = coordinator.ownership.owners
            for index, partition in enumerate(partitions):
                if not 0 <= partition < len(owners):
                    raise InvalidArgument(f"partitions[{index}]", f"must be 0 to {len(owners) - 1}, is {partition}")
            if not partitions:
                raise InvalidArgument("partitions", "names none")
            if target_id not in coordinator.ownership.shard_ids:
                known = ", ".join(map(str, coordinator.ownership.shard_ids))
                raise InvalidArgument("target_shard_id", f"there is no shard {target_id}; there are {known}")
            by_source: dict[int, list[int]] = {}
            for partition in sorted(set(partitions)):
                if owners[partition] != target_id:
                    by_source.setdefault(owners[partition], []).append(partition)
            for source_id, moving in by_source.items():
                for at in range(0, len(moving), MOVED_AT_ONCE):
                    await self._move(Move(tuple(moving[at : at + MOVED_AT_ONCE]), source_id, target_id))
            return coordinator.topology.epoch

    async def scale(self, shard_count: int) -> int:
        """Has so many shards share the partitions evenly; new ones are started, or the last ones go. Returns the epoch
        from which it is so.

        Raises:
            InvalidArgument: there cannot be so many.
            Unavailable: a shard is away, or full; asked again, it goes on from where it is.
        """
        coordinator = self._coordinator
        async with self._one_at_a_time:
            await self._finish_what_is_begun()
            if not 1 <= shard_count <= len(coordinator.ownership.owners):
                most = len(coordinator.ownership.owners)
                raise InvalidArgument("shard_count", f"must be 1 to {most}, is {shard_count}")
            missing = shard_count - len(coordinator.ownership.shard_ids)
            if missing > 0:
                await self._add(missing)
            await self._keep(coordinator.ownership.shard_ids[:shard_count])
            return coordinator.topology.epoch

    async def drain(self, node: str) -> int:
        """Moves everything away from the shards of a node, which then are no more. Returns the epoch.

        Raises:
            InvalidArgument: no shard is there, or there are none elsewhere.
            Unavailable: as `scale`.
        """
        coordinator = self._coordinator
        async with self._one_at_a_time:
            await self._finish_what_is_begun()
            nodes = {shard.shard_id: shard.node for shard in coordinator.topology.shards}
            if node not in nodes.values():
                known = ", ".join(sorted(set(filter(None, nodes.values()))))
                raise InvalidArgument("node", f"no shard is on node {node!r}; there are shards on {known}")
            kept = [shard_id for shard_id in coordinator.ownership.shard_ids if nodes.get(shard_id) != node]
            if not kept:
                raise InvalidArgument("node", f"every shard is on node {node!r}: start some on another one first")
            await self._keep(kept)
            return coordinator.topology.epoch

    async def _finish_what_is_begun(self) -> None:
        """A shard whose sums may be another's already has to go before anything else happens."""
        if self._coordinator.ownership.retiring is not None:
            await self._finish_retirement()
        await self._clean()

    async def _add(self, count: int) -> None:
        # One after the other: to start one takes a processor for seconds, and events go on. None is a member that was
        # not begun to start.
        coordinator = self._coordinator
        for _ in range(count):
            before = coordinator.ownership
            joined = before.joined(1)
            (shard_id,) = set(joined.shard_ids) - set(before.shard_ids)
            async with coordinator.changing:
                await coordinator.install(coordinator.topology.with_members(joined.shard_ids), joined)
            coordinator.add_shard(shard_id, self._factory.create(shard_id))
            await self._until_serving(shard_id)

    async def _until_serving(self, shard_id: int) -> None:
        coordinator = self._coordinator

        def found() -> bool:
            places = {shard.shard_id for shard in coordinator.topology.shards if shard.address}
            return coordinator.standings[shard_id].state == "serving" and shard_id in places

        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await coordinator.until(found)
        except TimeoutError:
            raise Unavailable(f"shard {shard_id} does not serve", RETRY_S) from None

    async def _keep(self, kept: Sequence[int]) -> None:
        """These shards share everything, the others go."""
        coordinator = self._coordinator
        for move in next_moves(coordinator.ownership.owners, kept):
            await self._move(move)
        for shard_id in coordinator.ownership.shard_ids:
            if shard_id not in kept:
                heir_id = min(kept)
                await coordinator.remember(replace(coordinator.ownership, retiring=Retirement(shard_id, heir_id)))
                await self._finish_retirement()

    async def _finish_retirement(self) -> None:
        coordinator = self._coordinator
        retiring = coordinator.ownership.retiring
        assert retiring is not None
        for attempt in range(MOST_ATTEMPTS):
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    sums = await coordinator.shards[retiring.shard_id].sums()
                    await coordinator.shards[retiring.heir_id].adopt(sums)
                break
            except Exception as error:  # noqa: BLE001  # The calls are remote: whatever it is, it is tried again.
                logger.warning("shard %d cannot retire yet: %s", retiring.shard_id, reason_of(error))
                if attempt + 1 == MOST_ATTEMPTS:
                    raise Unavailable(f"shard {retiring.shard_id} cannot retire: {reason_of(error)}", RETRY_S) from None
                await asyncio.sleep(RETRY_S)
        coordinator.forget_population(retiring.shard_id)
        async with coordinator.changing:
            retired = coordinator.ownership.retired()
            await self._decide(coordinator.topology.with_members(retired.shard_ids), retired, ())
        await coordinator.remove_shard(retiring.shard_id)
        await self._factory.remove(retiring.shard_id)
        logger.info("shard %d has retired; shard %d has its sums", retiring.shard_id, retiring.heir_id)

    async def _move(self, move: Move) -> None:
        for attempt in range(MOST_ATTEMPTS):
            self.moved.attempts += 1
            try:
                await self._attempt(move)
                break
            except (Undecided, InvalidArgument):
                raise
            except Exception as error:  # noqa: BLE001  # The calls are remote: whatever it is, it is tried again.
                logger.warning(
                    "partitions %s stay at shard %d: %s", list(move.partitions), move.source_id, reason_of(error)
                )
                if attempt + 1 == MOST_ATTEMPTS:
                    await self._give_up()
                    reason = f"partitions {list(move.partitions)} cannot move: {reason_of(error)}"
                    raise Unavailable(reason, RETRY_S) from None
            await asyncio.sleep(RETRY_S)
        self.moved.partitions += len(move.partitions)
        await self._clean()

    async def _give_up(self) -> None:
        """No end of a move waits for the other any more: what has arrived can be cleaned away."""
        coordinator = self._coordinator
        async with coordinator.changing:
            await self._as_before(coordinator.topology.epoch)

    async def _as_before(self, epoch: int) -> None:
        """The same owners, one epoch later: whatever was begun by an earlier one has ended. The caller holds
        `changing`."""
        coordinator = self._coordinator
        await coordinator.install(replace(coordinator.topology, epoch=epoch + 1), coordinator.ownership)

    async def _attempt(self, move: Move) -> None:
        coordinator = self._coordinator
        source, target = coordinator.shards[move.source_id], coordinator.shards[move.target_id]
        move_id = f"{self._name}-{next(self._serials)}"
        await coordinator.remember(coordinator.ownership.expecting(move.target_id, move.partitions))
        epoch = coordinator.topology.epoch
        address = next(shard.address for shard in coordinator.topology.shards if shard.shard_id == move.target_id)
        async with asyncio.timeout(COPY_TIMEOUT_S):
            await target.expect(move_id, epoch, move.partitions)
            await source.depart(move_id, epoch, move.partitions, address)
        async with coordinator.changing:
            if coordinator.topology.epoch != epoch:
                raise Unavailable("another change came between", RETRY_S)
            try:
                async with asyncio.timeout(FREEZE_TIMEOUT_S):
                    departed = await source.finish(move_id)
            except BaseException:
                # The source may take no more writes: it does again from another epoch on.
                await self._as_before(coordinator.topology.epoch)
                raise
            owned = coordinator.topology.with_owner(move.partitions, move.target_id)
            moved = coordinator.ownership.moved(move.partitions, move.source_id, move.target_id)
            await self._decide(owned, moved, [move.source_id])
        self.moved.rows += departed.rows
        self.moved.size_bytes += departed.size_bytes

    async def _decide(self, topology: Topology, ownership: Ownership, first: Sequence[int]) -> None:
        """Makes durable, and known, who owns what from now on."""
        try:
            await self._coordinator.install(topology, ownership, first)
        except (DiskFull, Unavailable):
            # The owners are as before; but a source that has sent the rest takes no writes until another epoch.
            await self._as_before(topology.epoch)
            raise
        except OSError as error:
            raise Undecided(str(error)) from error

    async def _clean(self) -> None:
        """Has what is left over cleaned away, wherever that can be done now."""
        coordinator = self._coordinator
        for shard_id, partitions in coordinator.ownership.leftovers.items():
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await coordinator.shards[shard_id].clean(sorted(partitions))
                await coordinator.remember(coordinator.ownership.cleaned(shard_id, partitions))
            except Exception as error:  # noqa: BLE001  # The call is remote: it is tried again with the next move.
                logger.warning("shard %d is not clean yet: %s", shard_id, reason_of(error))
