"""A frontend as a Ray actor: all Ray of this package is here. Ray starts the process and restarts it when it dies."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from profile_service.allocator import keep_freed_memory, spare_what_stays
from profile_service.clock import system_clock
from profile_service.cluster.changes import Changed
from profile_service.cluster.topology import Topology
from profile_service.config import Settings
from profile_service.domain.schema import Schema
from profile_service.errors import Unavailable
from profile_service.frontends.server import Frontend
from profile_service.shard.warm import warm_stored_kernels
from profile_service.wire.warm import warm_scanning

FAILED_EXIT_STATUS = 70
"""EX_SOFTWARE: it could not start again."""

RESTART_PAUSE_S = 1.0

logger = logging.getLogger(__name__)


class FrontendActor:
    """One frontend's process.

    Args:
        settings: with ports that are not 0, so that a restarted frontend is found where it was.
        coordinator: the CoordinatorActor.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it, in the loop that runs the methods.
        self, schema: Schema, settings: Settings, coordinator: ActorHandle[Any]
    ) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s frontend %(levelname)s %(message)s")

        keep_freed_memory()

        async def topology() -> Topology:
            current: Topology = await coordinator.topology.remote()
            return current

        self._schema = schema
        self._is_local = settings.storage.is_local
        self._frontend = Frontend(schema, settings, topology, system_clock, _RayChanges(coordinator))
        self._started = asyncio.create_task(self._start())

    async def wait_until_ready(self) -> tuple[str, str]:
        """(gRPC address, HTTP address) once every shard is connected. Raises StartupError."""
        await asyncio.shield(self._started)
        await self._frontend.wait_until_ready()
        return self._frontend.grpc_address, self._frontend.http_address

    async def _start(self) -> None:
        # Loading the compiled kernels takes a moment, which the first batch shall not wait for.
        try:
            await asyncio.gather(self._frontend.start(), asyncio.to_thread(self._warm))
            spare_what_stays()
        except Exception:
            if ray.get_runtime_context().was_current_actor_reconstructed:
                # Nobody waits to hear of it, as somebody does at the service's start. A new process tries again.
                logger.exception("the frontend cannot start; it is tried again")
                await asyncio.sleep(RESTART_PAUSE_S)
                os._exit(FAILED_EXIT_STATUS)
            raise

    def _warm(self) -> None:
        warm_scanning()
        if not self._is_local:
            warm_stored_kernels(self._schema)

    async def drain(self) -> None:
        """Answers everything accepted, then serves no more. One that never served has nothing to answer."""
        if self._started.done() and self._started.exception() is None:
            await self._frontend.drain()


class _RayChanges:
    """`Changes` by calls to the coordinator's actor."""

    def __init__(self, coordinator: ActorHandle[Any]) -> None:
        self._coordinator = coordinator

    async def move(self, partitions: Sequence[int], target_id: int) -> Changed:
        return await _answer(self._coordinator.move.remote(partitions, target_id))

    async def scale(self, shard_count: int) -> Changed:
        return await _answer(self._coordinator.scale.remote(shard_count))

    async def drain_node(self, node: str) -> Changed:
        return await _answer(self._coordinator.drain_node.remote(node))


async def _answer(asked: Any) -> Changed:
    try:
        changed: Changed = await asked
    except ray.exceptions.RayActorError as error:
        raise Unavailable(f"the coordinator was lost meanwhile, ask again: {error}", retry_after_s=1.0) from None
    return changed
