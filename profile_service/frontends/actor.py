"""A frontend as a Ray actor: all Ray of this package is here. Ray starts the process and restarts it when it dies.

The coordinator imports this, too, to create frontends; so what takes long to import is imported in the constructor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence

import ray

from profile_service.allocator import keep_freed_memory, spare_what_stays
from profile_service.clock import system_clock
from profile_service.cluster.calls import CoordinatorCalls
from profile_service.cluster.changes import Changed
from profile_service.cluster.plan import FrontendDescription, Layout
from profile_service.cluster.topology import Topology
from profile_service.config import Settings
from profile_service.errors import StartupError, Unavailable

FAILED_EXIT_STATUS = 70
"""EX_SOFTWARE: it could not start again."""

RESTART_PAUSE_S = 1.0

PORT_PATIENCE_S = 5.0
"""How long the process before this one may take to let go of the ports."""

PORT_RETRY_S = 0.1

logger = logging.getLogger(__name__)


class FrontendActor:
    """One frontend's process.

    Args:
        schema: the schema file's text.
        settings: with ports that are not 0, so that a restarted frontend is found where it was.
    """

    async def __init__(self, schema: str, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it.
        logging.basicConfig(level=logging.INFO, format="%(asctime)s frontend %(levelname)s %(message)s")

        keep_freed_memory()
        from profile_service.domain.schema import parse_schema
        from profile_service.frontends.server import Frontend

        coordinator = CoordinatorCalls()

        async def topology() -> Topology:
            current: Topology = await coordinator.call("topology")
            return current

        self._schema = parse_schema(schema)
        self._is_local = settings.storage.is_local
        self._frontend = Frontend(self._schema, settings, topology, system_clock, _RayChanges(coordinator))
        self._started = asyncio.create_task(self._start())

    async def describe(self) -> FrontendDescription:
        """Where it listens, and whether it can be used."""
        frontend = self._frontend
        if self._started.done() and (error := self._started.exception()) is not None:
            return FrontendDescription(fault=str(error))
        return FrontendDescription(frontend.grpc_address, frontend.http_address, frontend.healthy)

    async def _start(self) -> None:
        # Loading the compiled kernels takes a moment, which the first batch shall not wait for.
        try:
            await asyncio.gather(self._listen(), asyncio.to_thread(self._warm))
            spare_what_stays()
        except Exception:
            if ray.get_runtime_context().was_current_actor_reconstructed:
                # Nobody waits to hear of it, as somebody does at the service's start. A new process tries again.
                logger.exception("the frontend cannot start; it is tried again")
                await asyncio.sleep(RESTART_PAUSE_S)
                os._exit(FAILED_EXIT_STATUS)
            raise

    def _warm(self) -> None:
        from profile_service.wire.warm import warm_scanning

        warm_scanning()
        if not self._is_local:
            from profile_service.shard.warm import warm_stored_kernels

            warm_stored_kernels(self._schema)

    async def _listen(self) -> None:
        """Starts the frontend, once the process that it replaces has let go of the ports."""
        give_up_at = time.monotonic() + PORT_PATIENCE_S
        while True:
            try:
                await self._frontend.start()
            except StartupError:
                if time.monotonic() > give_up_at:
                    raise
                await asyncio.sleep(PORT_RETRY_S)
            else:
                return

    async def drain(self) -> None:
        """Answers everything accepted, then serves no more. One that never served has nothing to answer."""
        if self._started.done() and self._started.exception() is None:
            await self._frontend.drain()


class _RayChanges:
    """`Changes` by calls to the coordinator's actor."""

    def __init__(self, coordinator: CoordinatorCalls) -> None:
        self._coordinator = coordinator

    async def layout(self) -> Layout:
        layout: Layout = await self._coordinator.call("layout")
        return layout

    async def move(self, partitions: Sequence[int], target_id: int) -> Changed:
        return await self._ask("move", partitions, target_id)

    async def scale(self, shard_count: int) -> Changed:
        return await self._ask("scale", shard_count)

    async def drain_node(self, node: str) -> Changed:
        return await self._ask("drain_node", node)

    async def _ask(self, method: str, *arguments: object) -> Changed:
        try:
            changed: Changed = await self._coordinator.call(method, *arguments)
        except (ray.exceptions.RayActorError, ValueError) as error:
            raise Unavailable(f"the coordinator was lost meanwhile, ask again: {error}", retry_after_s=1.0) from None
        return changed
