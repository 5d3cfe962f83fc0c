"""One frontend: gRPC and HTTP in one process and one event loop, from opening its ports to the last answer.

bind ──▶ connect to the shards ──▶ serving ──▶ draining ──▶ closed
         (not ready)               (ready)     (not ready, nothing new is accepted, everything accepted is answered)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

import grpc
import uvicorn
from google.protobuf.descriptor import MethodDescriptor
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from profile_service.clock import Clock
from profile_service.cluster.changes import Changes
from profile_service.cluster.ports import bind, port_fault
from profile_service.cluster.router import Router
from profile_service.cluster.topology import Topology
from profile_service.config import STREAM_LOOKAHEAD_BYTES, Settings
from profile_service.domain.schema import Schema
from profile_service.errors import StartupError
from profile_service.frontends.api import SERVICES, STREAM_EVENTS, Api, CallContext
from profile_service.frontends.metrics import Metrics
from profile_service.frontends.rest.app import build_app
from profile_service.frontends.rest.http_protocol import HttpProtocol
from profile_service.rpc.server import Server
from profile_service.rpc.status import abort
from profile_service.shard.store_opening import open_store
from profile_service.wire.plan import WirePlan
from profile_service.wire.scan import scan_batch
from userprofile.v1 import admin_service_pb2, event_service_pb2, profile_service_pb2

if TYPE_CHECKING:
    from profile_service.shard.stored_profiles import StoredProfiles

OVERSIZE_FACTOR = 2
"""gRPC itself refuses what is so many times the limit; what is less over it is refused by us, and says by which
limit."""

TURN_AWAY_S = 0.3
MOST_TURN_AWAY_S = 1.5
"""How long calls that come while draining are told to come again: until none came for so long, and at most so long.
When gRPC stops, it breaks off as cancelled what has arrived and was not read yet; by then a burst of calls has been
read."""

HEALTH_INTERVAL_S = 0.05
"""How often readiness is looked at."""

FLUSH_S = 0.5
"""For the last answers to leave after everything is answered."""

SERVICE_DESCRIPTORS = (
    event_service_pb2.DESCRIPTOR.services_by_name["EventService"],
    profile_service_pb2.DESCRIPTOR.services_by_name["ProfileService"],
    admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"],
)

logger = logging.getLogger(__name__)

ServerContext = aio.ServicerContext[bytes, bytes]


class Frontend:
    """Serves the API on settings.host.

    Args:
        source: asks the coordinator for the topology.
        changes: asks it for another one.
    """

    def __init__(
        self,
        schema: Schema,
        settings: Settings,
        source: Callable[[], Awaitable[Topology]],
        clock: Clock,
        changes: Changes,
    ) -> None:
        plan = WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)
        self._settings = settings
        self._away = None if settings.storage.is_local else _stored_profiles(schema, settings, clock)
        self._router = Router(
            source,
            lambda events, now_ns: scan_batch(events, plan, settings.limits, now_ns),
            settings.capacity,
            self._away,
        )
        self._metrics = Metrics()
        self.api = Api(self._router, schema, settings, self._metrics, clock, changes)
        self._health = health.aio.HealthServicer()
        self._grpc = _grpc_server(self.api, self._health, settings)
        self._draining = False
        self._healthy = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.grpc_address = ""
        self.http_address = ""

    @property
    def ready(self) -> bool:
        """Whether every shard is connected and answers, and calls are accepted."""
        return not self._draining and self._router.ready and self.api.admin.shards_read

    @property
    def healthy(self) -> bool:
        """Whether it is ready, and the health service has said so."""
        return self.ready and self._healthy.is_set()

    async def start(self) -> None:
        """Opens the ports, connects to the shards and serves. Raises StartupError where a port cannot be had."""
        http_socket = bind(self._settings, self._settings.http_port, "--http-port")
        try:
            self.grpc_address = self._settings.address(self._bind_grpc())
            self.http_address = self._settings.address(http_socket.getsockname()[1])
            await self._router.start()
            self._http = _HttpServer(
                uvicorn.Config(
                    build_app(self.api, self._metrics, lambda: self.ready, self._settings.limits),
                    http=HttpProtocol,
                    ws="none",
                    lifespan="off",
                    access_log=False,
                    log_config=None,
                    log_level="warning",
                    server_header=False,
                    # Who a caller is behind a proxy, nobody asks.
                    proxy_headers=False,
                    timeout_graceful_shutdown=int(self._settings.drain_timeout_s),
                )
            )
            await self._grpc.start()
        except BaseException:
            http_socket.close()
            raise
        self._tasks = [
            asyncio.create_task(self._http.serve(sockets=[http_socket]), name="http"),
            asyncio.create_task(self.api.admin.watch(), name="status"),
            asyncio.create_task(self._report_health(), name="health"),
        ]
        logger.info("gRPC on %s, HTTP on %s", self.grpc_address, self.http_address)

    async def wait_until_ready(self) -> None:
        """Returns when every shard is connected and answers, and the health service says so."""
        await self._healthy.wait()

    async def drain(self) -> None:
        """Accepts nothing new, answers everything accepted, and closes. May be called more than once."""
        if self._draining:
            return
        self._draining = True
        await self._health.enter_graceful_shutdown()
        self.api.drain()
        http, *others = self._tasks
        self._http.should_exit = True
        await self._turn_away()
        stopping = asyncio.create_task(self._grpc.stop(self._settings.drain_timeout_s))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await self.api.idle()
        # Calls that only watch (health, reflection) would keep the server for the whole time allowed.
        await self._grpc.stop(FLUSH_S)
        await asyncio.gather(stopping, http)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._router.close()
        if self._away is not None:
            await self._away.close()

    async def _turn_away(self) -> None:
        deadline_s = time.monotonic() + MOST_TURN_AWAY_S
        seen = -1
        while seen != self.api.calls_seen and time.monotonic() < deadline_s:
            seen = self.api.calls_seen
            await asyncio.sleep(TURN_AWAY_S)

    def _bind_grpc(self) -> int:
        port = self._settings.grpc_port
        try:
            return self._grpc.add_insecure_port(self._settings.address(port))
        except RuntimeError as error:
            raise StartupError(port_fault(self._settings, port, "--grpc-port", str(error))) from None

    async def _report_health(self) -> None:
        """Tells the health service what `ready` says. A frontend that lost a shard still serves the others' users."""
        known: bool | None = None
        while True:
            if self.ready != known:
                known = self.ready
                status = health_pb2.HealthCheckResponse.SERVING if known else health_pb2.HealthCheckResponse.NOT_SERVING
                for service in ("", *SERVICES):
                    await self._health.set(service, status)
                if known:
                    self._healthy.set()
            await asyncio.sleep(HEALTH_INTERVAL_S)


def _stored_profiles(schema: Schema, settings: Settings, clock: Clock) -> StoredProfiles:
    from profile_service.shard.stored_profiles import StoredProfiles

    return StoredProfiles(schema, open_store(settings), clock)


class _HttpServer(uvicorn.Server):
    """uvicorn, but signals belong to the process that started the service."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _grpc_server(api: Api, servicer: health.aio.HealthServicer, settings: Settings) -> aio.Server:
    server = Server(
        options=[
            ("grpc.max_receive_message_length", OVERSIZE_FACTOR * settings.limits.message_bytes),
            ("grpc.max_send_message_length", -1),
            # A port in use shall be an error, not a share of its calls.
            ("grpc.so_reuseport", 0),
            # Or else gRPC takes in as much ahead of a reader that waits as the connection is fast: some 40 MiB a stream
            # where both ends are on one machine.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", STREAM_LOOKAHEAD_BYTES),
            # Clients may ping as often as once a second, also between calls.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 1000),
            ("grpc.http2.max_ping_strikes", 0),
        ]
    )
    for service in SERVICE_DESCRIPTORS:
        handlers = {method.name: _handler(api, method) for method in service.methods}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    names = (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return server


def _handler(api: Api, method: MethodDescriptor) -> grpc.RpcMethodHandler[bytes, bytes]:
    """Passes raw bytes to the API, and an error on as a status."""
    name = f"{method.containing_service.full_name}/{method.name}"

    async def unary(request: bytes, context: ServerContext) -> bytes:
        try:
            return await api.call(name, request, _call_context(context))
        except Exception as error:
            await abort(context, error)
            raise

    async def server_stream(request: bytes, context: ServerContext) -> AsyncIterator[bytes]:
        try:
            async for response in api.stream(name, request, _call_context(context)):
                yield response
        except Exception as error:  # noqa: BLE001  # Whatever it is, it becomes a status.
            await abort(context, error)

    async def bidirectional(requests: AsyncIterator[bytes], context: ServerContext) -> AsyncIterator[bytes]:
        try:
            async for response in api.stream_events(requests, _call_context(context)):
                yield response
        except Exception as error:  # noqa: BLE001  # Whatever it is, it becomes a status.
            await abort(context, error)

    if name == STREAM_EVENTS:
        return grpc.stream_stream_rpc_method_handler(bidirectional)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(server_stream)
    return grpc.unary_unary_rpc_method_handler(unary)


def _call_context(context: ServerContext) -> CallContext:
    return CallContext("grpc", context.time_remaining())
