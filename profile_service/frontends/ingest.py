"""The way in: a producer's stream, and single batches; both go by way of the router to every owner.

    message ─▶ scan (kernel) ─▶ refused events, by index
                    │
                    └─▶ router: a part to each owner ─▶ all applied ─▶ acknowledged

How a stream goes is in `rpc.producer_streams`, which shards share.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from profile_service.clock import Clock
from profile_service.cluster.batches import Lane
from profile_service.cluster.router import Router
from profile_service.config import Settings
from profile_service.errors import InvalidArgument, ProfileServiceError
from profile_service.frontends.metrics import Metrics
from profile_service.rpc.producer_streams import ProducerStreams
from profile_service.wire.apply_request import REQUEST_PREFIX
from profile_service.wire.plan import WirePlan
from profile_service.wire.scan import ScannedBatch, scan_batch
from userprofile.v1 import event_pb2, event_service_pb2


class Ingest:
    """Takes events in."""

    def __init__(self, router: Router, plan: WirePlan, settings: Settings, metrics: Metrics, clock: Clock) -> None:
        self._router = router
        self._plan = plan
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._streams = ProducerStreams(
            _Owners(router, clock), self._scan, settings, metrics, clock, split=False, who="this frontend"
        )

    def drain(self) -> None:
        """From now on streams are not read; each ends when what it has read is acknowledged."""
        self._streams.drain()

    def stream_events(self, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """As `ProducerStreams.stream_events`."""
        return self._streams.stream_events(requests)

    async def ingest_events(self, request: bytes, deadline_s: float | None) -> bytes:
        """One batch: an encoded IngestEventsRequest for an encoded IngestEventsResponse, when it is durable and
        readable."""
        now_ns = self._clock()
        scanned = self._scan(request, now_ns)
        if not scanned.count:
            raise InvalidArgument("events", "must hold at least one event")
        request_id = scanned.name
        if len(request_id.encode()) > self._settings.limits.producer_id_bytes:
            raise InvalidArgument("request_id", f"must be at most {self._settings.limits.producer_id_bytes} bytes")
        rejected = self._streams.refuse(scanned)
        producer_id = REQUEST_PREFIX + request_id if request_id else ""
        await self._router.ingest(scanned, producer_id, 1 if request_id else 0, now_ns, deadline_s)
        accepted = scanned.count - scanned.rejected_count
        self._metrics.events_accepted(accepted)
        return event_service_pb2.IngestEventsResponse(
            accepted_count=accepted,
            rejected=(
                event_pb2.RejectedEvent(index=index, field=field, reason=reason) for index, field, reason in rejected
            ),
        ).SerializeToString()

    def _scan(self, message: bytes, now_ns: int) -> ScannedBatch:
        return scan_batch(message, self._plan, self._settings.limits, now_ns)


class _Owners:
    """Where a stream's batches go: to every shard that owns some of their users. A `Sink`."""

    def __init__(self, router: Router, clock: Clock) -> None:
        self._router = router
        self._clock = clock

    def open(self, producer_id: str) -> _WayToOwners:
        return _WayToOwners(self._router, Lane(producer_id, patient=True))

    async def acknowledged(self, producer_id: str) -> int:
        return await self._router.acknowledged(producer_id)

    def tell_acknowledged(self, producer_id: str, sequence: int) -> None:
        self._router.tell_acknowledged(producer_id, sequence, self._clock())


class _WayToOwners:
    """A lane of the router. A `Way`."""

    def __init__(self, router: Router, lane: Lane) -> None:
        self._router = router
        self._lane = lane

    async def submit(self, scanned: ScannedBatch, sequence: int, acknowledged_sequence: int) -> asyncio.Future[None]:
        batch = await self._router.submit(scanned, self._lane, sequence, acknowledged_sequence, scanned.now_ns)
        return batch.done

    def fail(self, error: ProfileServiceError) -> None:
        self._lane.fail(error)
