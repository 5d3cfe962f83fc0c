"""The API over shards in the test's own event loop: no Ray, no port but the shards'."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from profile_service.clock import system_clock
from profile_service.cluster.router import Router
from profile_service.config import Capacity, Limits, Settings
from profile_service.frontends.api import Api, CallContext
from profile_service.frontends.metrics import Metrics
from tests.cluster.local_cluster import SCHEMA, LocalCluster, running, scan
from userprofile.v1 import event_service_pb2

GRPC = CallContext("grpc")


@asynccontextmanager
async def api_over_shards(
    shards: int = 2,
    *,
    limits: Limits | None = None,
    capacity: Capacity | None = None,
    make_shard: Callable[[int, int, list[int]], Any] | None = None,
) -> AsyncIterator[tuple[Api, LocalCluster, Metrics]]:
    async with running(shards, capacity, make_shard) as (cluster, router):
        settings = Settings(limits=limits or Limits(), capacity=cluster.capacity)
        metrics = Metrics()
        yield Api(router, SCHEMA, settings, metrics, system_clock, cluster), cluster, metrics


@asynccontextmanager
async def another_api(cluster: LocalCluster) -> AsyncIterator[Api]:
    """A second frontend's API over the same shards."""
    router = Router(cluster.source, scan, cluster.capacity)
    await router.start()
    try:
        yield Api(router, SCHEMA, Settings(capacity=cluster.capacity), Metrics(), system_clock, cluster)
    finally:
        await router.close()


class Producer:
    """The client's side of a stream: what it sends, and what it has been told."""

    def __init__(self, api: Api) -> None:
        self._requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.last_told = -1
        self._responses = api.stream_events(self._sent(), GRPC)

    def send(self, *user_ids: str, event_type: str = "view", **fields: Any) -> None:
        request = event_service_pb2.StreamEventsRequest(**fields)
        for user_id in user_ids:
            request.events.add(user_id=user_id, type=event_type)
        self.send_bytes(request.SerializeToString())

    def send_bytes(self, message: bytes) -> None:
        self._requests.put_nowait(message)

    def end(self) -> None:
        """Nothing more is sent."""
        self._requests.put_nowait(None)

    async def told(self) -> event_service_pb2.StreamEventsResponse:
        """The next acknowledgement."""
        return self._read(await anext(self._responses))

    async def told_up_to(self, sequence: int) -> list[event_service_pb2.StreamEventsResponse]:
        """The acknowledgements until one reaches the sequence."""
        responses = [await self.told()]
        while responses[-1].sequence < sequence:
            responses.append(await self.told())
        return responses

    async def rest(self) -> list[event_service_pb2.StreamEventsResponse]:
        """The acknowledgements until the stream ends."""
        return [self._read(response) async for response in self._responses]

    async def leave(self) -> None:
        """The client goes away."""
        await self._responses.aclose()

    def _read(self, encoded: bytes) -> event_service_pb2.StreamEventsResponse:
        response = event_service_pb2.StreamEventsResponse.FromString(encoded)
        self.last_told = response.sequence
        return response

    async def _sent(self) -> AsyncIterator[bytes]:
        while (message := await self._requests.get()) is not None:
            yield message
