"""The coordinator as a Ray actor: creates the shards' actors or finds those that its predecessor left, and lends them
to `Coordinator`.

The actors are detached from whoever creates them: a coordinator that dies takes no shard with it. In `serve` they end
with the embedded Ray, and so with the process that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from profile_service.clock import boot_clock
from profile_service.cluster.coordinator import Coordinator, ShardDead, Standing
from profile_service.cluster.leases import Leases
from profile_service.cluster.memory import CoordinatorMemory
from profile_service.cluster.topology import ShardLocation, Topology
from profile_service.config import Settings
from profile_service.domain.schema import Schema
from profile_service.shard.actor import ShardActor, ShardDescription
from profile_service.shard.lease import Grant
from profile_service.shard.store_opening import open_store
from profile_service.storage.data_directory import Manifest, shard_directory
from profile_service.storage.fs import LockHeld, RealFileSystem
from profile_service.storage.redis_store import RedisStore

NAMESPACE = "profile-service"
COORDINATOR_NAME = "coordinator"

ACTOR_CPUS = 0.001
"""Ray places actors by it. The machine's cores are shared by all of them, so each asks for next to nothing."""

LOCK_RETRY_S = 0.1

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


def create_shards(schema: Schema, settings: Settings, manifest: Manifest) -> dict[int, ActorHandle[Any]]:
    """The actors of all shards, by shard id: created, or found where there are some."""
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
        for shard_id in range(manifest.shards)
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
        places = [ShardLocation(shard_id, "") for shard_id in range(manifest.shards)]
        topology = Topology.even(manifest.partition_bits, places, epoch=max(1, memory.last_epoch()))
        self._shards = create_shards(schema, settings, manifest)
        controls = {shard_id: _RayShard(handle) for shard_id, handle in self._shards.items()}
        self._coordinator = Coordinator(topology, controls, settings.population_interval_s, memory, leases)
        self._started = asyncio.create_task(self._coordinator.start())

    async def topology(self) -> Topology:
        """Who owns what, once the shards have been looked for."""
        await asyncio.shield(self._started)
        return self._coordinator.topology

    async def standings(self) -> dict[int, Standing]:
        """How each shard stands."""
        return self._coordinator.standings

    async def drain(self, grace_s: float) -> None:
        """Has every shard answer what it has accepted, and ends it."""
        self._started.cancel()
        await self._coordinator.close()
        drained = (handle.drain.remote(grace_s) for handle in self._shards.values())
        for answer in await asyncio.gather(*drained, return_exceptions=True):
            if isinstance(answer, BaseException):
                logger.warning("a shard could not be drained: %s", answer)
        for handle in self._shards.values():
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

    async def population_state(self) -> bytes:
        state: bytes = await self._handle.population_state.remote()
        return state

    async def set_population(self, states: Sequence[bytes]) -> None:
        await self._handle.set_population.remote(states)
