"""The coordinator as a Ray actor: lends the shards' actors, which the `Fleet` creates or finds, to `Coordinator`.

The actors are detached from whoever creates them: a coordinator that dies takes no shard with it. In `serve` they end
with the embedded Ray, and so with the process that started it; after `deploy` they end with `undeploy`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from profile_service.clock import boot_clock
from profile_service.cluster.changes import Changed
from profile_service.cluster.coordinator import Coordinator, reason_of
from profile_service.cluster.fleet import Fleet
from profile_service.cluster.leases import Leases
from profile_service.cluster.memory import CoordinatorMemory
from profile_service.cluster.mover import Mover, Undecided
from profile_service.cluster.places import PlaceRegister
from profile_service.cluster.plan import Layout, Plan, Progress
from profile_service.cluster.ports import listens
from profile_service.cluster.replicas import Replicas
from profile_service.cluster.shard_control import ShardDead
from profile_service.cluster.survey import expand
from profile_service.cluster.topology import Topology
from profile_service.config import Settings
from profile_service.errors import InvalidArgument, ProfileServiceError
from profile_service.shard.actor import ShardDescription
from profile_service.shard.lease import Grant
from profile_service.shard.reports import Departed
from profile_service.shard.store_opening import open_store
from profile_service.storage.data_directory import Manifest
from profile_service.storage.fs import LockHeld, RealFileSystem

if TYPE_CHECKING:
    from profile_service.cluster.store_lease import StoreLease
    from profile_service.storage.redis_store import RedisStore

LOCK_RETRY_S = 0.1
FIND_RETRY_S = 1.0

FAILED_EXIT_STATUS = 70
"""EX_SOFTWARE: it does not know what is durable."""

logger = logging.getLogger(__name__)


class CoordinatorActor:
    """The coordinator's process."""

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc]  # Ray awaits it, in the methods' loop.
        logging.basicConfig(level=logging.INFO, format="%(asctime)s coordinator %(levelname)s %(message)s")
        self._plan = plan
        settings, manifest = plan.settings, plan.manifest
        assert settings.storage.data_dir is not None, "the launcher has chosen one"
        here = expand(settings.storage.data_dir) if plan.node is None else plan.node.data_dir
        store = None if settings.storage.is_local else open_store(settings)
        self._memory = memory = await _own_memory(here, store)
        self._store_lease: StoreLease | None = None
        """Where no process that started the service stays to hold it."""
        if store is not None and plan.node is None:
            from profile_service.cluster.store_lease import StoreLease

            self._store_lease = StoreLease.of_deployment(store.url, manifest.id)
            self._store_lease.keep()
        leases = Leases(settings.lease_s, boot_clock, memory.last_holders())
        self._ownership = ownership = memory.last_ownership(manifest)
        register = PlaceRegister(memory.last_places(), memory.places)
        self._fleet = fleet = Fleet(plan, register, ownership.shard_ids)
        self._factory = _RayShards(fleet)
        self._replicas = Replicas(register, lambda shard_id: _RayShard(lambda: fleet.standby(shard_id)))
        self._coordinator = Coordinator(
            ownership,
            manifest.partition_bits,
            max(1, plan.first_epoch, memory.last_epoch()),
            {shard_id: self._factory.find(shard_id) for shard_id in ownership.shard_ids},
            settings.population_interval_s,
            memory,
            leases,
            self._replicas,
            listens,
        )
        self._mover = Mover(self._coordinator, self._factory)
        self._started = asyncio.create_task(self._start())
        self._kept = asyncio.create_task(self._keep())

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
        moved = self._mover.moved.since(before)
        if moved.partitions:
            logger.info(
                "%s: %d partitions, %d rows, %.1f MB in %.2f s",
                what,
                moved.partitions,
                moved.rows,
                moved.size_bytes / 1e6,
                time.monotonic() - began_s,
            )
        return Changed(epoch or self._coordinator.topology.epoch, moved=moved)

    async def progress(self) -> Progress:
        """How far the start is, or the update. Raises StartupError where it cannot be begun."""
        if self._started.done():
            self._started.result()
        fleet = self._fleet
        nodes = tuple(fleet.standings())
        return Progress(self._coordinator.standings, nodes, fleet.outdated, fleet.update_fault)

    async def layout(self) -> Layout:
        """The nodes, what is on each, and how standbys do."""
        standbys = {}
        if self._plan.settings.storage.replicas:
            for shard_id in self._coordinator.shards:
                standing = self._replicas.standing(shard_id)
                fault = self._fleet.standby_fault(shard_id)
                standbys[shard_id] = replace(standing, message=fault) if fault else standing
        return Layout(tuple(self._fleet.standings()), standbys)

    async def deployed(self) -> tuple[Manifest, Settings, str]:
        """What the service runs with: what it was made with, its settings as they were given, the schema's text."""
        return self._plan.manifest, self._plan.settings, self._plan.schema

    async def remember_schema(self) -> None:
        """Has the next start of the service know the schema before any process starts."""
        try:
            await self._memory.schema(self._plan.schema)
        except OSError as error:
            # It only makes the next start say earlier what the shards would say then.
            logger.warning("the schema cannot be written: %s", error)

    async def drain(self, timeout_s: float) -> None:
        """Has every process answer what it has accepted, and ends it; frontends before shards."""
        for task in (self._started, self._kept):
            task.cancel()
        await asyncio.gather(self._started, self._kept, return_exceptions=True)
        # Shards acknowledge only while they have a lease: they are looked at until the frontends have ended.
        await self._fleet.drain_frontends(timeout_s)
        await self._coordinator.close()
        await self._fleet.drain_shards(timeout_s)
        with contextlib.suppress(OSError):
            # Nobody holds a lease any more: whoever starts the service again, wherever, has none to wait for.
            await self._memory.holders({})
        self._memory.release()
        if self._store_lease is not None:
            await asyncio.to_thread(self._store_lease.release)

    async def _start(self) -> None:
        while True:
            try:
                await self._find()
                break
            except Exception as error:  # noqa: BLE001  # Ray, a node, a disk: whatever it is may pass.
                logger.warning("the service's processes cannot be looked for yet: %s", reason_of(error))
            await asyncio.sleep(FIND_RETRY_S)
        await self._coordinator.start()

    async def _find(self) -> None:
        await self._fleet.adopt()
        # What a coordinator before had no time to: shards that are in no topology any more.
        for shard_id in range(self._ownership.next_shard_id):
            if shard_id not in self._ownership.shard_ids:
                await self._fleet.remove(shard_id)

    async def _keep(self) -> None:
        """Follows the nodes, brings every process to this deployment, and to its end what was begun before."""
        try:
            await asyncio.shield(self._started)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._fleet.follow())
                tasks.create_task(self._fleet.update())
                tasks.create_task(self._change("what was begun before", self._mover.resume))
        except Exception as error:  # Ray starts the next one, which begins anew.
            logger.critical("the coordinator ends", exc_info=error)
            logging.shutdown()
            os._exit(FAILED_EXIT_STATUS)


async def _own_memory(data_dir: Path, store: RedisStore | None) -> CoordinatorMemory:
    """The service's memory, once no other coordinator has it."""
    while True:
        try:
            return CoordinatorMemory(RealFileSystem(), data_dir, store)
        except LockHeld as error:
            logger.warning("the coordinator waits: %s", error)
            await asyncio.sleep(LOCK_RETRY_S)


class _RayShards:
    """`ShardFactory` by the fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def create(self, shard_id: int) -> _RayShard:
        self._fleet.add(shard_id)
        return self.find(shard_id)

    def find(self, shard_id: int) -> _RayShard:
        """The shard, wherever it is just then."""
        return _RayShard(lambda: self._fleet.shard(shard_id))

    async def remove(self, shard_id: int) -> None:
        await self._fleet.remove(shard_id)


class _RayShard:
    """`ShardControl` by calls to an actor of a shard, whichever that is just now."""

    def __init__(self, find: Callable[[], ActorHandle[Any]]) -> None:
        self._find = find

    @property
    def _handle(self) -> ActorHandle[Any]:
        return self._find()

    async def describe(self, grant: Grant | None) -> ShardDescription:
        try:
            description: ShardDescription = await self._handle.describe.remote(grant)
        except ray.exceptions.ActorDiedError as error:
            # Ray restarts a process for ever; this is what remains when its constructor raises, or its node has left.
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

    async def follow(self, replication: str, incarnation: str) -> None:
        await self._handle.follow.remote(replication, incarnation)

    async def promote(self, incarnation: str) -> None:
        await self._handle.promote.remote(incarnation)

    async def replicate(self, replication: str, address: str) -> None:
        await self._handle.replicate.remote(replication, address)

    async def release(self, replication: str) -> None:
        await self._handle.release.remote(replication)

    async def population_state(self) -> bytes:
        state: bytes = await self._handle.population_state.remote()
        return state

    async def set_population(self, states: Sequence[bytes]) -> None:
        await self._handle.set_population.remote(states)
