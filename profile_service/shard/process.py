"""One shard's process, but for Ray (`actor.py`): recovers the shard from its directory, or from a store, and serves it.

    start ─▶ recovering ─▶ serving ◀─▶ full          the process exits when the commit loop ends with an error
                  └──────▶ failed                    and stays when it cannot recover: somebody has to look

It serves from the first moment on: whoever asks while the shard recovers hears how far it is.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from profile_service.allocator import spare_what_stays
from profile_service.clock import boot_clock, system_clock
from profile_service.config import Settings
from profile_service.domain.schema import Schema, parse_schema
from profile_service.errors import ProfileServiceError, Unavailable
from profile_service.shard.absent import AbsentShard
from profile_service.shard.following import Following
from profile_service.shard.health import Health
from profile_service.shard.keeping import NoSnapshots
from profile_service.shard.lease import Lease, lock_identity
from profile_service.shard.move_target import RemoteTarget
from profile_service.shard.moves import Moves, StoredMoves
from profile_service.shard.preload import Preload
from profile_service.shard.recovery import recover
from profile_service.shard.replication import ReplicatedLog
from profile_service.shard.replication_stream import RemoteStandby
from profile_service.shard.reports import Departed, Shipping
from profile_service.shard.service import ShardServer
from profile_service.shard.shard import Shard
from profile_service.shard.snapshotter import Snapshotter
from profile_service.shard.startup import Startup
from profile_service.shard.state import ShardState
from profile_service.shard.warm import warm_kernels, warm_stored_kernels
from profile_service.storage.fs import DiskFull, LockHeld, RealFileSystem, Runner
from profile_service.storage.wal import LogOptions

FAILED_EXIT_STATUS = 70
"""EX_SOFTWARE: the commit loop has failed."""

RETRY_S = 0.5
"""How soon a recovery is tried again that another process or a full disk keeps from beginning."""

logger = logging.getLogger(__name__)


class ShardProcess:
    """A shard from the start of its process on.

    Args:
        schema: the schema file's text.
        epoch, owned: the partitions that it owns at `epoch`, until `update_topology` says more.
        identity: of the shard's directory.
        startup, preload: what was begun before this module was loaded.
    """

    def __init__(
        self,
        shard_id: int,
        schema: str,
        settings: Settings,
        epoch: int,
        owned: Sequence[int],
        identity: bytes,
        directory: Path,
        startup: Startup,
        preload: Preload,
    ) -> None:
        self._startup = startup
        self._startup.done("code")
        self._shard_id = shard_id
        self._schema = parse_schema(schema)
        self._settings = settings
        self._identity = identity
        self._directory = directory
        self._preload = preload
        self.health = Health()
        self.lease = Lease(boot_clock)
        self.lock = ""
        """Identity of the lock on the shard's directory; empty before it is held."""
        self._absent = AbsentShard(shard_id, epoch, owned, settings.storage.sync, self.health)
        self.shard: Shard | AbsentShard = self._absent
        """The shard, or what stands in for it until it has recovered."""
        self._writer: asyncio.Task[None] | None = None
        self._target: RemoteTarget | None = None
        self._log: ReplicatedLog | None = None
        """Once it has recovered, where the state is not in a store."""
        self._draining = False
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._server = ShardServer(self._absent, settings, self.health)

    async def start(self) -> str:
        """Begins to serve and to recover; returns host:port."""
        address = await self._server.start()
        self._recovery = asyncio.create_task(self._recover())
        return address

    async def drain(self, grace_s: float) -> None:
        """Answers everything accepted, then serves no more."""
        self._draining = True
        self._recovery.cancel()
        if isinstance(self.shard, Shard) and self._writer is not None:
            await self.shard.close()
            await self._writer
        await self._server.stop(grace_s)

    @property
    def moves(self) -> Moves | StoredMoves:
        """The shard's moves. Raises Unavailable before it has recovered."""
        if not isinstance(self.shard, Shard):
            raise Unavailable(f"shard {self._shard_id} recovers", RETRY_S)
        return self.shard.moves

    async def depart(self, move_id: str, epoch: int, partitions: Sequence[int], address: str) -> Departed:
        """As Moves.depart, to the shard at that address. The connection stays for `finish`, until the next
        departure."""
        target = RemoteTarget(address)
        before, self._target = self._target, target
        if before is not None:
            await before.close()
        return await self.moves.depart(move_id, epoch, partitions, target)

    # --- standbys ---

    @property
    def shipping(self) -> Shipping:
        """How its standby does, as far as it ships to one."""
        return Shipping() if self._log is None else self._log.shipping

    @property
    def following(self) -> Following | None:
        """What it follows as another's standby; None before it has recovered, and with a store."""
        return self.shard.following if isinstance(self.shard, Shard) else None

    async def follow(self, replication: str, incarnation: str) -> None:
        """From now on this process is a standby, and takes this replication.

        A process that has owned partitions was replaced by another one: it ends, to begin anew without them.

        Raises Unavailable before it has recovered, and where another incarnation is meant.
        """
        following = self._followed(incarnation)
        assert isinstance(self.shard, Shard)
        if self.lease.was_held or self.shard.owns_any:
            logger.critical("shard %d was replaced by another process, and ends", self._shard_id)
            self._exit()
        following.expect(replication)

    async def promote(self, incarnation: str) -> None:
        """From now on this process takes nothing as a standby. Raises as `follow`."""
        await self._followed(incarnation).promote()

    async def replicate(self, replication: str, address: str) -> None:
        """Begins to build the standby at that address. Raises Unavailable where that cannot be done now."""
        shard = self.shard
        if self._log is None or not isinstance(shard, Shard) or not isinstance(shard.moves, Moves):
            raise Unavailable(f"shard {self._shard_id} recovers", RETRY_S)
        self._log.replicate(replication, RemoteStandby(address), shard, shard.moves.state)

    async def release(self, replication: str) -> None:
        """Goes on without that standby."""
        if self._log is not None:
            self._log.release(replication)

    def _followed(self, incarnation: str) -> Following:
        if incarnation != self.lease.incarnation:
            raise Unavailable(f"shard {self._shard_id} is another process by now", RETRY_S)
        if self.following is None:
            raise Unavailable(f"shard {self._shard_id} recovers", RETRY_S)
        return self.following

    async def _recover(self) -> None:
        """Brings the shard back from its directory and begins to serve it."""
        try:
            # Loading the compiled kernels takes half a second, which the first batch shall not wait for.
            warm = asyncio.create_task(asyncio.to_thread(self._warm))
            shard = await (self._recovered_shard() if self._settings.storage.is_local else self._stored_shard())
            await warm
        except Exception as error:  # Whatever it is: who asks hears of it, and what is stored stays.
            logger.critical("shard %d cannot recover", self._shard_id, exc_info=error)
            expected = isinstance(error, ProfileServiceError)
            self.health.failed(str(error) if expected else f"{type(error).__name__}: {error}")
            self._startup.over()
            return
        shard.update_topology(self._absent.epoch, self._absent.owned)
        self.shard = shard
        self._writer = asyncio.create_task(shard.run())
        self._writer.add_done_callback(self._writer_ended)
        self.health.serving()
        self._server.serve(shard)
        spare_what_stays()
        self._startup.done("serving")
        self._startup.over()
        logger.info("serving after %s", self._startup)

    def _warm(self) -> None:
        warm_kernels(self._schema)
        if not self._settings.storage.is_local:
            warm_stored_kernels(self._schema)
        self._startup.done("kernels")

    def _new_state(self, schema: Schema) -> ShardState:
        partitions = 1 << self._settings.fixed.partition_bits
        space = self._preload.space()
        return ShardState(schema, partitions=partitions, capacity=self._settings.capacity, space=space)

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
                    new_state=self._new_state,
                    options=LogOptions(storage.segment_bytes, storage.sync, storage.sync_interval_s),
                    run=self._runner("log"),
                    run_snapshots=self._runner("snapshots"),
                    progress=self.health.recovering,
                    done=self._startup.done,
                    locked=self._locked,
                )
                break
            except (LockHeld, DiskFull) as error:
                # The process before this one still ends, or there is no room to begin: both pass.
                logger.warning("shard %d waits: %s", self._shard_id, error)
                self.health.recovering(0.0, f"waits: {error}")
                await asyncio.sleep(RETRY_S)
        self._lock = recovered.lock
        self._log = ReplicatedLog(recovered.log)
        return Shard(
            self._shard_id,
            partition_bits=partition_bits,
            owned=self._absent.owned,
            epoch=self._absent.epoch,
            state=recovered.state,
            log=self._log,
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
            health=self.health,
            lease=self.lease,
        )

    async def _stored_shard(self) -> Shard:
        """A shard whose state is in the store, where it stays until it is asked for."""
        from profile_service.shard.store_opening import open_store
        from profile_service.shard.stored_schema import meta_of
        from profile_service.shard.stored_state import StoredState
        from profile_service.storage.redis_client import StoreFault

        store, capacity = open_store(self._settings), self._settings.capacity
        # What the process before still writes, the store refuses as soon as this one has claimed its partitions.
        self.lock = f"shard {self._shard_id} of {store.url.shown}"
        while True:
            try:
                sync_mode = await store.sync_mode()
                break
            except StoreFault as fault:
                logger.warning("shard %d waits: %s", self._shard_id, fault.message)
                self.health.recovering(0.0, f"waits: {fault.message}")
                await asyncio.sleep(RETRY_S)
        meta = meta_of(self._schema, self._settings.fixed.partition_bits)
        state = StoredState(self._schema, store, meta, capacity=capacity, clock=system_clock, sync_mode=sync_mode)
        return Shard(
            self._shard_id,
            partition_bits=meta.partition_bits,
            owned=self._absent.owned,
            epoch=self._absent.epoch,
            state=state,
            log=state,
            snapshotter=NoSnapshots(),
            capacity=capacity,
            clock=system_clock,
            health=self.health,
            lease=self.lease,
        )

    def _locked(self, path: Path) -> None:
        self.lock = lock_identity(path)

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
        self._exit()

    def _exit(self) -> NoReturn:
        logging.shutdown()
        os._exit(FAILED_EXIT_STATUS)
