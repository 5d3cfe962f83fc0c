"""A shard as a Ray actor: all Ray of this package is here. Ray starts the process, restarts it when it dies, and
carries control; events and profiles go through the gRPC server that the actor runs in its own event loop (see
`service.py`).

    start ─▶ recovering ─▶ serving ◀─▶ full          the process exits when the commit loop ends with an error
                  └──────▶ failed                    and stays when it cannot recover: somebody has to look

A restart runs the constructor again and nothing else, so the constructor begins everything. It returns before the shard
has recovered: from then on whoever asks hears how far it is.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ray

from profile_service.clock import system_clock
from profile_service.config import Settings
from profile_service.domain.schema import Schema
from profile_service.errors import ProfileServiceError
from profile_service.shard.absent import AbsentShard
from profile_service.shard.health import Health
from profile_service.shard.recovery import recover
from profile_service.shard.service import ShardServer
from profile_service.shard.shard import Shard
from profile_service.shard.snapshotter import Snapshotter
from profile_service.shard.startup import Startup
from profile_service.shard.warm import warm_kernels
from profile_service.storage.fs import DiskFull, LockHeld, RealFileSystem, Runner
from profile_service.storage.wal import LogOptions

FAILED_EXIT_STATUS = 70
"""EX_SOFTWARE: the commit loop has failed."""

RETRY_S = 0.5
"""How soon a recovery is tried again that another process or a full disk keeps from beginning."""

logger = logging.getLogger(__name__)


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


class ShardActor:
    """One shard's process. Every method is control; none is on the way of an event or a read.

    Args:
        owned: the partitions it owns at `epoch`. After a restart they are those of the first start, until the
            coordinator says more.
        identity: of the shard's directory.
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
        self._startup = Startup()
        self._startup.done("code")
        self._shard_id = shard_id
        self._schema = schema
        self._settings = settings
        self._identity = identity
        self._directory = directory
        self._health = Health()
        self._absent = AbsentShard(shard_id, epoch, owned, settings.storage.sync, self._health)
        self._shard: Shard | AbsentShard = self._absent
        self._writer: asyncio.Task[None] | None = None
        self._draining = False
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._server = ShardServer(self._absent, settings, self._health)
        self._address = await self._server.start()
        self._recovery = asyncio.create_task(self._recover())

    async def describe(self) -> ShardDescription:
        """Where it serves, and how it does."""
        return ShardDescription(
            shard_id=self._shard_id,
            address=self._address,
            node=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            epoch=self._shard.epoch,
            state=self._health.state,
            progress=self._health.progress,
            message=self._health.message,
        )

    async def update_topology(self, epoch: int, owned: Sequence[int]) -> None:
        """From now on it owns these partitions, and refuses what comes by another epoch."""
        self._shard.update_topology(epoch, owned)

    async def population_state(self) -> bytes:
        """The sums over this shard's users. Raises Unavailable while it recovers."""
        return self._shard.population_state()

    async def set_population(self, states: Sequence[bytes]) -> None:
        """Takes the sums of all shards as the population."""
        self._shard.set_population(states)

    async def drain(self, grace_s: float) -> None:
        """Answers everything accepted, then serves no more."""
        self._draining = True
        self._recovery.cancel()
        if isinstance(self._shard, Shard) and self._writer is not None:
            await self._shard.close()
            await self._writer
        await self._server.stop(grace_s)

    async def _recover(self) -> None:
        """Brings the shard back from its directory and begins to serve it."""
        try:
            # Loading the compiled kernels takes a third of a second, which the first batch shall not wait for.
            await asyncio.to_thread(warm_kernels, self._schema)
            self._startup.done("kernels")
            shard = await self._recovered_shard()
        except Exception as error:  # Whatever it is: who asks hears of it, and what is stored stays.
            logger.critical("shard %d cannot recover", self._shard_id, exc_info=error)
            expected = isinstance(error, ProfileServiceError)
            self._health.failed(str(error) if expected else f"{type(error).__name__}: {error}")
            return
        shard.update_topology(self._absent.epoch, self._absent.owned)
        self._shard = shard
        self._writer = asyncio.create_task(shard.run())
        self._writer.add_done_callback(self._writer_ended)
        self._health.serving()
        self._server.serve(shard)
        self._startup.done("serving")
        logger.info("serving after %s", self._startup)

    async def _recovered_shard(self) -> Shard:
        storage, capacity = self._settings.storage, self._settings.capacity
        partition_bits = self._settings.fixed.partition_bits
        while True:
            try:
                recovered = await recover(
                    RealFileSystem(),
                    self._directory,
                    self._schema,
                    identity=self._identity,
                    holder=f"shard {self._shard_id}, process {os.getpid()} on {socket.gethostname()}",
                    reset_features=storage.reset_features,
                    partition_bits=partition_bits,
                    capacity=capacity,
                    options=LogOptions(storage.segment_bytes, storage.sync, storage.sync_interval_s),
                    run=self._runner("log"),
                    run_snapshots=self._runner("snapshots"),
                    progress=self._health.recovering,
                    done=self._startup.done,
                )
                break
            except (LockHeld, DiskFull) as error:
                # The process before this one still ends, or there is no room to begin: both pass.
                logger.warning("shard %d waits: %s", self._shard_id, error)
                self._health.recovering(0.0, f"waits: {error}")
                await asyncio.sleep(RETRY_S)
        self._lock = recovered.lock
        return Shard(
            self._shard_id,
            partition_bits=partition_bits,
            owned=self._absent.owned,
            epoch=self._absent.epoch,
            state=recovered.state,
            log=recovered.log,
            snapshotter=Snapshotter(
                recovered.snapshots,
                recovered.state,
                recovered.log,
                clock=system_clock,
                last=recovered.snapshot,
                log_bytes=storage.snapshot_log_bytes,
                interval_s=storage.snapshot_interval_s,
            ),
            capacity=capacity,
            clock=system_clock,
            health=self._health,
        )

    def _runner(self, name: str) -> Runner:
        """Runs blocking work, one piece after the other, in a thread of its own."""
        if name not in self._threads:
            self._threads[name] = ThreadPoolExecutor(1, thread_name_prefix=name)
        return functools.partial(asyncio.get_running_loop().run_in_executor, self._threads[name])

    def _writer_ended(self, writer: asyncio.Task[None]) -> None:
        if self._draining:
            return
        error = None if writer.cancelled() else writer.exception()
        logger.critical("shard %d: the commit loop ended; the process exits", self._shard_id, exc_info=error)
        logging.shutdown()
        os._exit(FAILED_EXIT_STATUS)
