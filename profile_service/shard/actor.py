"""A shard as a Ray actor: all Ray of this package is here. Ray starts the process, restarts it when it dies, and
carries control; events and profiles go through the gRPC server that the process runs in its own event loop (see
`process.py`).

A restart runs the constructor again and nothing else, so the constructor begins everything. It returns before the shard
has recovered: from then on whoever asks hears how far it is. What takes long to import is imported in the constructor,
beside what need not wait for it (see `preload.py`); so its arguments are plain, too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from profile_service.allocator import keep_freed_memory
from profile_service.config import Settings
from profile_service.shard.lease import Grant
from profile_service.shard.preload import Preload
from profile_service.shard.startup import Startup

if TYPE_CHECKING:
    from profile_service.shard.reports import Departed, Shipping


@dataclass(frozen=True)
class ShardDescription:
    """Where an incarnation of a shard is, and how it does."""

    shard_id: int
    address: str
    node: str
    pid: int
    epoch: int
    state: str
    """As in GetShardStatusResponse."""
    progress: float
    """How much of its recovery is done, 0 to 1."""
    message: str
    incarnation: str
    """Tells this process from those before it."""
    lock: str
    """Identity of the lock that it has on its directory; empty before it has it."""
    asked_ns: int
    """When it asked for a lease, by its own clock: just now."""
    shipping: Shipping
    """How its standby does."""
    replication: str
    """What it follows as a standby; empty where it is none."""
    promoted: bool
    """Whether it was a standby, and takes nothing as one any more."""


class ShardActor:
    """One shard's process. Every method is control; none is on the way of an event or a read.

    Args:
        schema: the schema file's text.
        owned: the partitions it owns at `epoch`. After a restart they are those of the first start, until the
            coordinator says more.
        identity: of the shard's directory.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it, in the loop that runs the methods.
        self,
        shard_id: int,
        schema: str,
        settings: Settings,
        epoch: int,
        owned: Sequence[int],
        identity: bytes,
        directory: Path,
    ) -> None:
        logging.basicConfig(level=logging.INFO, format=f"%(asctime)s shard {shard_id} %(levelname)s %(message)s")
        keep_freed_memory()
        startup = Startup()
        preload = Preload(directory)
        from profile_service.shard.process import ShardProcess

        self._shard_id = shard_id
        self._process = ShardProcess(shard_id, schema, settings, epoch, owned, identity, directory, startup, preload)
        self._address = await self._process.start()

    async def describe(self, grant: Grant | None) -> ShardDescription:
        """Where it serves, and how it does. Takes the lease that comes with the question, and asks for the next one."""
        if grant is not None:
            self._process.lease.take(grant)
        health, following = self._process.health, self._process.following
        return ShardDescription(
            shard_id=self._shard_id,
            address=self._address,
            node=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            epoch=self._process.shard.epoch,
            state=health.state,
            progress=health.progress,
            message=health.message,
            incarnation=self._process.lease.incarnation,
            lock=self._process.lock,
            asked_ns=self._process.lease.ask(),
            shipping=self._process.shipping,
            replication="" if following is None else following.replication,
            promoted=following is not None and following.promoted,
        )

    async def update_topology(self, epoch: int, owned: Sequence[int]) -> None:
        """From now on it owns these partitions, and refuses what comes by another epoch."""
        self._process.shard.update_topology(epoch, owned)

    async def expect(self, move_id: str, epoch: int, partitions: Sequence[int]) -> None:
        """As Moves.expect."""
        await self._process.moves.expect(move_id, epoch, partitions)

    async def depart(self, move_id: str, epoch: int, partitions: Sequence[int], address: str) -> Departed:
        """As Moves.depart, to the shard at that address."""
        return await self._process.depart(move_id, epoch, partitions, address)

    async def finish(self, move_id: str) -> Departed:
        """As Moves.finish."""
        return await self._process.moves.finish(move_id)

    async def clean(self, partitions: Sequence[int]) -> None:
        """As Moves.clean."""
        await self._process.moves.clean(partitions)

    async def sums(self) -> bytes:
        """As Moves.sums."""
        return self._process.moves.sums()

    async def adopt(self, sums: bytes) -> None:
        """As Moves.adopt."""
        await self._process.moves.adopt(sums)

    async def follow(self, replication: str, incarnation: str) -> None:
        """As ShardProcess.follow."""
        await self._process.follow(replication, incarnation)

    async def promote(self, incarnation: str) -> None:
        """As ShardProcess.promote."""
        await self._process.promote(incarnation)

    async def replicate(self, replication: str, address: str) -> None:
        """As ShardProcess.replicate."""
        await self._process.replicate(replication, address)

    async def release(self, replication: str) -> None:
        """As ShardProcess.release."""
        await self._process.release(replication)

    async def population_state(self) -> bytes:
        """The sums over this shard's users. Raises Unavailable while it recovers."""
        return self._process.shard.population_state()

    async def set_population(self, states: Sequence[bytes]) -> None:
        """Takes the sums of all shards as the population."""
        self._process.shard.set_population(states)

    async def drain(self, grace_s: float) -> None:
        """Answers everything accepted, then serves no more."""
        await self._process.drain(grace_s)
