"""A shard as a Ray actor: all Ray of this package is here. Ray starts the process, restarts it when it dies, and
carries control; events and profiles go through the gRPC server that the actor runs in its own event loop (see
`service.py`).

A restart runs the constructor again and nothing else, so the constructor does everything: the shard serves from then
on, and its coordinator finds the new address by asking. A shard whose commit loop has ended must not serve: the process
exits.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from profile_service.clock import system_clock
from profile_service.config import Settings
from profile_service.domain.schema import Schema
from profile_service.shard.service import ShardServer
from profile_service.shard.shard import Shard
from profile_service.shard.warm import warm_kernels
from profile_service.storage.log import MemoryLog

FAILED_EXIT_STATUS = 70
"""EX_SOFTWARE: the commit loop has failed."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardDescription:
    """Where an incarnation of a shard is."""

    shard_id: int
    address: str
    node: str
    pid: int
    epoch: int
    state: str = "serving"
    progress: float = 1.0
    message: str = ""


class ShardActor:
    """One shard's process. Every method is control; none is on the way of an event or a read.

    Args:
        owned: the partitions it owns at `epoch`. After a restart they are those of the first start, until the
            coordinator says more.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it, in the loop that runs the methods.
        self,
        shard_id: int,
        schema: Schema,
        settings: Settings,
        epoch: int,
        owned: Sequence[int],
        identity: bytes,
        directory: Path,
    ) -> None:
        logging.basicConfig(level=logging.INFO, format=f"%(asctime)s shard {shard_id} %(levelname)s %(message)s")
        self._shard_id = shard_id
        self._shard = Shard(
            shard_id,
            schema,
            partition_bits=settings.fixed.partition_bits,
            owned=owned,
            epoch=epoch,
            log=MemoryLog(),
            capacity=settings.capacity,
            clock=system_clock,
        )
        self._draining = False
        # Loading the compiled kernels takes a third of a second, which the first batch shall not wait for.
        await asyncio.to_thread(warm_kernels, schema)
        self._writer = asyncio.create_task(self._shard.run())
        self._writer.add_done_callback(self._writer_ended)
        self._server = ShardServer(self._shard, settings)
        self._address = await self._server.start()

    async def describe(self) -> ShardDescription:
        """Where it serves."""
        return ShardDescription(
            shard_id=self._shard_id,
            address=self._address,
            node=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            epoch=self._shard.epoch,
        )

    async def update_topology(self, epoch: int, owned: Sequence[int]) -> None:
        """From now on it owns these partitions, and refuses what comes by another epoch."""
        self._shard.update_topology(epoch, owned)

    async def population_state(self) -> bytes:
        """The sums over this shard's users."""
        return self._shard.population_state()

    async def set_population(self, states: Sequence[bytes]) -> None:
        """Takes the sums of all shards as the population."""
        self._shard.set_population(states)

    async def drain(self, grace_s: float) -> None:
        """Answers everything accepted, then serves no more."""
        self._draining = True
        await self._shard.close()
        await self._writer
        await self._server.stop(grace_s)

    def _writer_ended(self, writer: asyncio.Task[None]) -> None:
        if self._draining:
            return
        error = None if writer.cancelled() else writer.exception()
        logger.critical("shard %d: the commit loop ended; the process exits", self._shard_id, exc_info=error)
        logging.shutdown()
        os._exit(FAILED_EXIT_STATUS)
