"""The coordinator as a Ray actor: creates the shards' actors or finds those that its predecessor left, and lends them
to `Coordinator`.

The actors are detached from whoever creates them: a coordinator that dies takes no shard with it. In `serve` they end
with the embedded Ray, and so with the process that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from profile_service.clock import boot_clock
from profile_service.cluster.changes import Changed
from profile_service.cluster.coordinator import Coordinator, ShardDead, Standing
from profile_service.cluster.leases import Leases
from profile_service.cluster.memory import CoordinatorMemory
from profile_service.cluster.mover import Mover, Undecided
from profile_service.cluster.ownership import Ownership
from profile_service.cluster.topology import Topology
from profile_service.config import Settings
from profile_service.domain.schema import Schema
from profile_service.errors import InvalidArgument, ProfileServiceError
from profile_service.shard.actor import ShardActor, ShardDescription
from profile_service.shard.lease import Grant
from profile_service.shard.moves import Departed
from profile_service.shard.store_opening import open_store
from profile_service.storage.data_directory import Manifest, shard_directory
from profile_service.storage.fs import LockHeld, RealFileSystem

if TYPE_CHECKING:
    from profile_service.storage.redis_store import RedisStore

NAMESPACE = "profile-service"
COORDINATOR_NAME = "coordinator"

ACTOR_CPUS = 0.001
"""Ray places actors by it. The machine's cores are shared by all of them, so each asks for next to nothing."""

LOCK_RETRY_S = 0.1

FAILED_EXIT_STATUS = 70
"""EX_SOFTWARE: it does not know what is durable."""

logger = logging.getLogger(__name__)


def create_actor(actor_class: type, name: str, *arguments: object) -> ActorHandle[Any]:
    """The actor of this name in the service's namespace: created, or found where there is one. Ray restarts it for
    ever."""
    remote_class: Any = ray.remote(actor_class)
    handle: ActorHandle[Any] = remote_class.options(
        name=name,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=ACTOR_CPUS,
        max_restarts=-1,
    ).remote(*arguments)
    return handle


def create_shards(
    schema: Schema, settings: Settings, manifest: Manifest, shard_ids: Iterable[int]
) -> dict[int, ActorHandle[Any]]:
    """The actors of these shards, by shard id: created, or found where there are some."""
    assert settings.storage.data_dir is not None, "the launcher has chosen one"
    return {
        shard_id: create_actor(
            ShardActor,
            f"shard-{shard_id}",
            shard_id,
            schema.text,
            settings,
            # It owns nothing until the coordinator says so. A restart gets these arguments again, however old they are.
            0,
            (),
            manifest.identity(shard_id),
            shard_directory(settings.storage.data_dir, shard_id),
        )
        for shard_id in shard_ids
    }


class CoordinatorActor:
    """The coordinator's process."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it, in the loop that runs the methods.
        self, schema: Schema, settings: Settings, manifest: Manifest
    ) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s coordinator %(levelname)s %(message)s")
        assert settings.storage.data_dir is not None, "the launcher has chosen one"
        store = None if settings.storage.is_local else open_store(settings)
        self._memory = memory = await _own_memory(settings.storage.data_dir, store)
        leases = Leases(settings.lease_s, boot_clock, memory.last_holders())
        ownership = memory.last_ownership(manifest)
        self._factory = _RayShards(schema, settings, manifest)
        await self._factory.remove_retired(ownership)
        self._coordinator = Coordinator(
            ownership,
            manifest.partition_bits,
            max(1, memory.last_epoch()),
            {shard_id: self._factory.create(shard_id) for shard_id in ownership.shard_ids},
            settings.population_interval_s,
            memory,
            leases,
        )
        self._mover = Mover(self._coordinator, self._factory)
        self._started = asyncio.create_task(self._coordinator.start())
        self._resumed = asyncio.create_task(self._resume())

    async def _resume(self) -> None:
        """Brings to its end what the coordinator before has begun."""
        await asyncio.shield(self._started)
        await self._change("what was begun before", self._mover.resume)

    async def topology(self) -> Topology:
        """Who owns what, once the shards have been looked for. Where that is just changing, what comes of it."""
        await asyncio.shield(self._started)
        async with self._coordinator.changing:
            return self._coordinator.topology

    async def move(self, partitions: Sequence[int], target_id: int) -> Changed:
        """As Mover.move."""
        return await self._change(
            f"move of {len(partitions)} partitions to shard {target_id}",
            lambda: self._mover.move(partitions, target_id),
        )

    async def scale(self, shard_count: int) -> Changed:
        """As Mover.scale."""
        return await self._change(f"scale to {shard_count} shards", lambda: self._mover.scale(shard_count))

    async def drain_node(self, node: str) -> Changed:
        """As Mover.drain."""
        return await self._change(f"drain of node {node}", lambda: self._mover.drain(node))

    async def _change(self, what: str, change: Callable[[], Awaitable[int | None]]) -> Changed:
        before, began_s = replace(self._mover.moved), time.monotonic()
        try:
            epoch = await change()
        except Undecided as error:
            # The next coordinator reads what became of it.
            logger.critical("%s: %s; the coordinator ends", what, error)
            logging.shutdown()
            os._exit(FAILED_EXIT_STATUS)
        except ProfileServiceError as error:
            logger.warning("%s: %s", what, error)
            field = error.violations[0].field if isinstance(error, InvalidArgument) else ""
            reason = error.violations[0].description if isinstance(error, InvalidArgument) else error.message
            return Changed(self._coordinator.topology.epoch, field, reason)
        moved = self._mover.moved
        if moved.partitions > before.partitions:
            logger.info(
                "%s: %d partitions, %d rows, %.1f MB in %.2f s",
                what,
                moved.partitions - before.partitions,
                moved.rows - before.rows,
                (moved.size_bytes - before.size_bytes) / 1e6,
                time.monotonic() - began_s,
            )
        return Changed(epoch or self._coordinator.topology.epoch)

    async def standings(self) -> dict[int, Standing]:
        """How each shard stands."""
        return self._coordinator.standings

    async def drain(self, grace_s: float) -> None:
        """Has every shard answer what it has accepted, and ends it."""
        self._started.cancel()
        self._resumed.cancel()
        await self._coordinator.close()
        handles = self._factory.handles
        drained = (handle.drain.remote(grace_s) for handle in handles.values())
        for answer in await asyncio.gather(*drained, return_exceptions=True):
            if isinstance(answer, BaseException):
                logger.warning("a shard could not be drained: %s", answer)
        for handle in handles.values():
            ray.kill(handle)
        with contextlib.suppress(OSError):
            # Nobody holds a lease any more: whoever starts the service again, wherever, has none to wait for.
            await self._memory.holders({})
        self._memory.release()


async def _own_memory(data_dir: Path, store: RedisStore | None) -> CoordinatorMemory:
    """The service's memory, once no other coordinator has it."""
    while True:
        try:
            return CoordinatorMemory(RealFileSystem(), data_dir, store)
        except LockHeld as error:
            logger.warning("the coordinator waits: %s", error)
            await asyncio.sleep(LOCK_RETRY_S)


class _RayShards:
    """`ShardFactory` by actors."""

    def __init__(self, schema: Schema, settings: Settings, manifest: Manifest) -> None:
        self._schema = schema
        self._settings = settings
        self._manifest = manifest
        self.handles: dict[int, ActorHandle[Any]] = {}

    def create(self, shard_id: int) -> _RayShard:
        self.handles |= create_shards(self._schema, self._settings, self._manifest, [shard_id])
        return _RayShard(self.handles[shard_id])

    async def remove_retired(self, ownership: Ownership) -> None:
        """Ends and removes what a coordinator before had no time to: shards that are in no topology any more."""
        assert self._settings.storage.data_dir is not None, "the launcher has chosen one"
        for shard_id in range(ownership.next_shard_id):
            if shard_id not in ownership.shard_ids:
                with contextlib.suppress(ValueError):  # There is no such actor.
                    self.handles[shard_id] = ray.get_actor(f"shard-{shard_id}", NAMESPACE)
                if shard_id in self.handles or shard_directory(self._settings.storage.data_dir, shard_id).exists():
                    await self.remove(shard_id)

    async def remove(self, shard_id: int) -> None:
        assert self._settings.storage.data_dir is not None, "the launcher has chosen one"
        if (handle := self.handles.pop(shard_id, None)) is not None:
            ray.kill(handle)
        directory = shard_directory(self._settings.storage.data_dir, shard_id)
        # Nothing of it is used any more, and its number is never given again.
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


class _RayShard:
    """`ShardControl` by calls to a shard's actor."""

    def __init__(self, handle: ActorHandle[ShardActor]) -> None:
        self._handle = handle

    async def describe(self, grant: Grant | None) -> ShardDescription:
        try:
            description: ShardDescription = await self._handle.describe.remote(grant)
        except ray.exceptions.ActorDiedError as error:
            # Ray restarts a process for ever; this is what remains when its constructor raises.
            raise ShardDead(str(error)) from None
        return description

    async def update_topology(self, epoch: int, owned: Sequence[int]) -> None:
        await self._handle.update_topology.remote(epoch, owned)

    async def expect(self, move_id: str, epoch: int, partitions: Sequence[int]) -> None:
        await self._handle.expect.remote(move_id, epoch, partitions)

    async def depart(self, move_id: str, epoch: int, partitions: Sequence[int], address: str) -> Departed:
        departed: Departed = await self._handle.depart.remote(move_id, epoch, partitions, address)
        return departed

    async def finish(self, move_id: str) -> Departed:
        departed: Departed = await self._handle.finish.remote(move_id)
        return departed

    async def clean(self, partitions: Sequence[int]) -> None:
        await self._handle.clean.remote(partitions)

    async def sums(self) -> bytes:
        sums: bytes = await self._handle.sums.remote()
        return sums

    async def adopt(self, sums: bytes) -> None:
        await self._handle.adopt.remote(sums)

    async def population_state(self) -> bytes:
        state: bytes = await self._handle.population_state.remote()
        return state

    async def set_population(self, states: Sequence[bytes]) -> None:
        await self._handle.set_population.remote(states)
