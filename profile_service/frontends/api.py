"""What every call goes through, whichever protocol it came by: limits, deadline, counting, and on to what answers it.
Requests and responses are encoded messages, so that profiles pass through undecoded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import grpc

from profile_service.clock import Clock
from profile_service.cluster.changes import Changes
from profile_service.cluster.router import Router
from profile_service.config import Settings
from profile_service.domain.schema import Schema
from profile_service.errors import InvalidArgument, Unavailable, Unimplemented
from profile_service.frontends.admin import Admin
from profile_service.frontends.ingest import Ingest
from profile_service.frontends.metrics import Metrics
from profile_service.rpc.query import Query
from profile_service.rpc.status import grpc_code, is_foreseen
from profile_service.wire.plan import WirePlan

EVENT_SERVICE = "userprofile.v1.EventService"
PROFILE_SERVICE = "userprofile.v1.ProfileService"
ADMIN_SERVICE = "userprofile.v1.AdminService"
SERVICES = (EVENT_SERVICE, PROFILE_SERVICE, ADMIN_SERVICE)

STREAM_EVENTS = f"{EVENT_SERVICE}/StreamEvents"
WATCH_PROFILE = f"{PROFILE_SERVICE}/WatchProfile"

UnaryCall = Callable[[bytes, float | None], Awaitable[bytes]]
"""An encoded request and the seconds left, for an encoded response."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CallContext:
    """How a call came."""

    protocol: str
    """ "grpc" or "rest"."""
    deadline_s: float | None = None
    """Seconds left to answer; None where the caller waits for ever."""


class Api:
    """The three services of userprofile.v1."""

    def __init__(
        self,
        router: Router,
        schema: Schema,
        settings: Settings,
        metrics: Metrics,
        clock: Clock,
        changes: Changes,
    ) -> None:
        plan = WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)
        self._metrics = metrics
        self._in_flight = _InFlight()
        self._message_bytes = settings.limits.message_bytes
        self.ingest = Ingest(router, plan, settings, metrics, clock)
        self.query = Query(router, settings.limits, [feature.name for feature in schema.features])
        self.admin = Admin(router, schema, settings, clock, changes)
        self._calls: dict[str, UnaryCall] = {
            f"{EVENT_SERVICE}/IngestEvents": self.ingest.ingest_events,
            f"{PROFILE_SERVICE}/GetProfile": self.query.get_profile,
            f"{PROFILE_SERVICE}/BatchGetProfiles": self.query.batch_get_profiles,
            f"{PROFILE_SERVICE}/GetPopulation": self.query.get_population,
            f"{ADMIN_SERVICE}/GetSchema": self.admin.get_schema,
            f"{ADMIN_SERVICE}/GetTopology": self.admin.get_topology,
            f"{ADMIN_SERVICE}/GetStatus": self.admin.get_status,
            f"{ADMIN_SERVICE}/CreateSnapshot": self.admin.create_snapshot,
            f"{ADMIN_SERVICE}/MovePartitions": self.admin.move_partitions,
            f"{ADMIN_SERVICE}/ScaleShards": self.admin.scale_shards,
            f"{ADMIN_SERVICE}/DrainNode": self.admin.drain_node,
        }
        metrics.watch_shards(lambda: self.admin.last_shards)

    def drain(self) -> None:
        """From now on streams end when what they have read is acknowledged, and calls are told to come again."""
        self.admin.draining = True
        self.ingest.drain()

    async def idle(self) -> None:
        """Returns when no call is being answered."""
        await self._in_flight.none.wait()

    @property
    def calls_seen(self) -> int:
        """How many calls there were so far, answered or not."""
        return self._in_flight.seen

    async def call(self, method: str, request: bytes, context: CallContext) -> bytes:
        """Answers a call with one request and one response; `method` as in "userprofile.v1.ProfileService/GetProfile".

        Raises the errors of `profile_service.errors`.
        """
        with self._counted(method, context):
            answer = self._calls.get(method)
            if answer is None:
                raise _unimplemented(method)
            if self.admin.draining and not method.startswith(ADMIN_SERVICE):
                raise Unavailable("this frontend shuts down; connect again", retry_after_s=0.5)
            if len(request) > self._message_bytes:
                raise InvalidArgument("", f"a message must be at most {self._message_bytes} bytes, is {len(request)}")
            return await answer(request, context.deadline_s)

    async def stream(self, method: str, request: bytes, context: CallContext) -> AsyncGenerator[bytes, None]:
        """Answers a call with one request and many responses. Raises as `call` does."""
        with self._counted(method, context):
            raise _unimplemented(method)
            yield b""

    async def stream_events(self, requests: AsyncIterator[bytes], context: CallContext) -> AsyncGenerator[bytes, None]:
        """A producer's stream. Raises as `call` does."""
        with self._counted(STREAM_EVENTS, context):
            async for response in self.ingest.stream_events(requests):
                yield response

    def _counted(self, method: str, context: CallContext) -> _Counted:
        return _Counted(self._metrics, self._in_flight, method, context.protocol)


class _InFlight:
    """How many calls are being answered."""

    def __init__(self) -> None:
        self.count = 0
        self.seen = 0
        self.none = asyncio.Event()
        self.none.set()


class _Counted:
    """Counts a call's end, and logs an error that nobody foresaw. A class, for generator-based context managers cost
    more."""

    __slots__ = ("_in_flight", "_method", "_metrics", "_protocol", "_start_s")

    def __init__(self, metrics: Metrics, in_flight: _InFlight, method: str, protocol: str) -> None:
        self._metrics = metrics
        self._in_flight = in_flight
        self._method = method
        self._protocol = protocol

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()
        self._in_flight.count += 1
        self._in_flight.seen += 1
        self._in_flight.none.clear()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._in_flight.count -= 1
        if not self._in_flight.count:
            self._in_flight.none.set()
        if error is None:
            code = grpc.StatusCode.OK
        elif isinstance(error, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
        else:
            code = grpc_code(error)
            if not is_foreseen(error):
                logger.error("%s failed", self._method, exc_info=error)
        self._metrics.call(self._method, self._protocol, code, time.perf_counter() - self._start_s)


def _unimplemented(method: str) -> Unimplemented:
    return Unimplemented(f"{method.rpartition('/')[2]} is not served by this version yet")
