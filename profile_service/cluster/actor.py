"""The coordinator as a Ray actor: creates the shards' actors or finds those that its predecessor left, and lends them
to `Coordinator`.

The actors are detached from whoever creates them: a coordinator that dies takes no shard with it. In `serve` they end
with the embedded Ray, and so with the process that started it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from profile_service.cluster.coordinator import Coordinator
from profile_service.cluster.topology import ShardLocation, Topology
from profile_service.config import Settings
from profile_service.domain.schema import Schema
from profile_service.shard.actor import ShardActor, ShardDescription

NAMESPACE = "profile-service"
COORDINATOR_NAME = "coordinator"

ACTOR_CPUS = 0.001
"""Ray places actors by it. The machine's cores are shared by all of them, so each asks for next to nothing."""

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


def create_shards(schema: Schema, settings: Settings) -> dict[int, ActorHandle[Any]]:
    """The actors of all shards, by shard id: created, or found where there are some."""
    topology = _first_topology(settings)
    return {
        shard.shard_id: create_actor(
            ShardActor,
            f"shard-{shard.shard_id}",
            shard.shard_id,
            schema,
            settings,
            topology.epoch,
            topology.owned_by(shard.shard_id),
        )
        for shard in topology.shards
    }


class CoordinatorActor:
    """The coordinator's process."""

    async def __init__(self, schema: Schema, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it.
        logging.basicConfig(level=logging.INFO, format="%(asctime)s coordinator %(levelname)s %(message)s")
        topology = _first_topology(settings)
        self._shards = create_shards(schema, settings)
        controls = {shard_id: _RayShard(handle) for shard_id, handle in self._shards.items()}
        self._coordinator = Coordinator(topology, controls, settings.population_interval_s)
        self._started = asyncio.create_task(self._coordinator.start())

    async def topology(self) -> Topology:
        """Who owns what, once every shard has been found. Raises what kept a shard from starting."""
        await asyncio.shield(self._started)
        return self._coordinator.topology

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


def _first_topology(settings: Settings) -> Topology:
    """Who owns what before anyone has said where they are."""
    places = [ShardLocation(shard_id, "") for shard_id in range(settings.shard_count)]
    return Topology.even(settings.fixed.partition_bits, places)


class _RayShard:
    """`ShardControl` by calls to a shard's actor."""

    def __init__(self, handle: ActorHandle[ShardActor]) -> None:
        self._handle = handle

    async def describe(self) -> ShardDescription:
        description: ShardDescription = await self._handle.describe.remote()
        return description

    async def update_topology(self, epoch: int, owned: Sequence[int]) -> None:
        await self._handle.update_topology.remote(epoch, owned)

    async def population_state(self) -> bytes:
        state: bytes = await self._handle.population_state.remote()
        return state

    async def set_population(self, states: Sequence[bytes]) -> None:
        await self._handle.set_population.remote(states)
