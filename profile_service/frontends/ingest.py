"""The way in: a producer's stream, and single batches.

    message ─▶ scan (kernel) ─▶ refused events, by index
                    │
                    └─▶ router: a part to each owner ─▶ all applied ─▶ acknowledged, in the order of the sequences

A stream is pipelined: the next batch is scanned while those before it are on their way. It stops being read when the
bytes that wait for their acknowledgement exceed the stream's window, or an owner's window is full.

Sequences: the first batch of a stream may have any sequence from 1, each later one is one more than the one before. A
batch that was acknowledged before the stream began is acknowledged again, with what is refused of it, and not applied.
Of two streams with the same producer_id the newer one stays; the older one ends with ABORTED, for two senders would mix
up their numbers.

What is acknowledged travels with each batch to the owners, so they are always a little behind. When a stream ends, one
of them is told the last of it: a producer that comes back then hears exactly where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator

from profile_service.clock import Clock
from profile_service.cluster.batches import Lane
from profile_service.cluster.router import Router
from profile_service.config import Settings
from profile_service.errors import InvalidArgument, ProfileServiceError, Superseded, Unavailable
from profile_service.frontends.acknowledgements import REJECTED_PER_RESPONSE, Acknowledgements
from profile_service.frontends.metrics import Metrics
from profile_service.shard.dedupe import REQUEST_PREFIX
from profile_service.wire.plan import WirePlan
from profile_service.wire.scan import ScannedBatch, scan_batch
from userprofile.v1 import event_pb2, event_service_pb2

MOST_UNTOLD = 10 * REJECTED_PER_RESPONSE
"""Refused events of one stream that wait to be told; beyond it the stream is not read."""


class Ingest:
    """Takes events in."""

    def __init__(self, router: Router, plan: WirePlan, settings: Settings, metrics: Metrics, clock: Clock) -> None:
        self._router = router
        self._plan = plan
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._streams: dict[str, _ProducerStream] = {}
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """From now on streams are not read; each ends when what it has read is acknowledged."""
        self._draining.set()

    async def ingest_events(self, request: bytes, deadline_s: float | None) -> bytes:
        """One batch: an encoded IngestEventsRequest for an encoded IngestEventsResponse, when it is durable and
        readable."""
        now_ns = self._clock()
        scanned = self.scan(request, now_ns)
        if not scanned.count:
            raise InvalidArgument("events", "must hold at least one event")
        request_id = scanned.name
        if len(request_id.encode()) > self._settings.limits.producer_id_bytes:
            raise InvalidArgument("request_id", f"must be at most {self._settings.limits.producer_id_bytes} bytes")
        rejected = self.refuse(scanned)
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

    async def stream_events(self, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """A producer's stream: encoded StreamEventsRequests in, encoded StreamEventsResponses out.

        Raises:
            InvalidArgument: a message is damaged, or its sequence is not the next one.
            Superseded: a newer stream has the same producer_id.
            Unavailable: an owner was lost and the stream is anonymous, or the frontend shuts down.
        """
        first = await anext(requests, None)
        if first is None:
            return
        scanned = self.scan(first, self._clock())
        producer_id = self._producer_id(scanned)
        stream = _ProducerStream(self, self._router, Lane(producer_id, patient=True))
        if producer_id:
            # By the order in which they came, not in which owners answer: the older may be one whose client has gone.
            older = self._streams.get(producer_id)
            if older is not None:
                older.fail(Superseded(f"a newer stream has the producer_id {producer_id!r}"))
            self._streams[producer_id] = stream
        held = 0
        try:
            if producer_id:
                held = await self._router.acknowledged(producer_id)
            stream.begin(held)
            yield event_service_pb2.StreamEventsResponse(sequence=held).SerializeToString()
            async for response in stream.carry(requests, scanned, self._draining):
                yield response
        finally:
            stream.close()
            if self._streams.get(producer_id) is stream:
                del self._streams[producer_id]
            if producer_id and stream.acknowledged > held:
                self._router.tell_acknowledged(producer_id, stream.acknowledged, self._clock())

    def scan(self, message: bytes, now_ns: int) -> ScannedBatch:
        """Looks a message through."""
        return scan_batch(message, self._plan, self._settings.limits, now_ns)

    def refuse(self, scanned: ScannedBatch) -> list[tuple[int, str, str]]:
        """The refused events of a batch, counted."""
        rejected = scanned.rejected()
        for _, field, _ in rejected:
            self._metrics.events_rejected(field)
        if scanned.ignored_attributes:
            self._metrics.attributes_ignored(scanned.ignored_attributes)
        return rejected

    @property
    def window_bytes(self) -> int:
        """Bytes of one stream that may wait for their acknowledgement."""
        return self._settings.capacity.stream_window_bytes

    @property
    def clock(self) -> Clock:
        """The time of arrival."""
        return self._clock

    @property
    def metrics(self) -> Metrics:
        """Where events are counted."""
        return self._metrics

    def _producer_id(self, scanned: ScannedBatch) -> str:
        producer_id = scanned.name
        if len(producer_id.encode()) > self._settings.limits.producer_id_bytes:
            raise InvalidArgument("producer_id", f"must be at most {self._settings.limits.producer_id_bytes} bytes")
        if producer_id.startswith(REQUEST_PREFIX):
            raise InvalidArgument(
                "producer_id", f"must not begin with {REQUEST_PREFIX!r}, which stands for single requests"
            )
        return producer_id


class _ProducerStream:
    """One producer's stream after its first message: what is on its way and what can be told."""

    def __init__(self, ingest: Ingest, router: Router, lane: Lane) -> None:
        self._ingest = ingest
        self._router = router
        self._lane = lane
        self._ledger = Acknowledgements(0)
        self._last_sequence = 0
        self._held_bytes = 0
        self._failure: ProfileServiceError | None = None
        self._changed = asyncio.Event()
        self._space = asyncio.Event()

    @property
    def acknowledged(self) -> int:
        """Everything up to this sequence is durable and readable."""
        return self._ledger.acknowledged

    def begin(self, held: int) -> None:
        """Everything up to this sequence is durable from before. Raises what the stream has failed with meanwhile."""
        if self._failure is not None:
            raise self._failure
        self._ledger = Acknowledgements(held)

    async def carry(
        self, requests: AsyncIterator[bytes], first: ScannedBatch, draining: asyncio.Event
    ) -> AsyncIterator[bytes]:
        """Reads batches and yields acknowledgements, until the producer has sent its last and all are acknowledged."""
        reading = asyncio.create_task(self._read(requests, first))
        drained = asyncio.create_task(draining.wait())
        for task in (reading, drained):
            task.add_done_callback(lambda _: self._changed.set())
        try:
            while True:
                self._changed.clear()
                if draining.is_set():
                    reading.cancel()
                if (response := self._ledger.take()) is not None:
                    self._space.set()
                    yield response.SerializeToString()
                elif self._failure is not None:
                    raise self._failure
                elif reading.done() and not self._ledger.in_flight:
                    break
                else:
                    await self._changed.wait()
            if draining.is_set():
                raise Unavailable("this frontend shuts down; connect again", retry_after_s=0.5)
            await reading
        finally:
            for task in (reading, drained):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ProfileServiceError):
                await reading

    def fail(self, error: ProfileServiceError) -> None:
        """Ends the stream."""
        self._failure = self._failure or error
        self._lane.fail(error)
        self._changed.set()

    def close(self) -> None:
        """The stream has ended: what was not sent on yet is dropped."""
        self._lane.fail(Unavailable("the stream has ended", retry_after_s=1.0))

    async def _read(self, requests: AsyncIterator[bytes], first: ScannedBatch) -> None:
        if first.count or first.sequence:
            await self._take(first)
        async for message in requests:
            now_ns = self._ingest.clock()
            scanned = self._ingest.scan(message, now_ns)
            if scanned.name and scanned.name != self._lane.producer_id:
                raise InvalidArgument(
                    "producer_id",
                    f"is {self._lane.producer_id!r} since the stream's first message, not {scanned.name!r}",
                )
            await self._take(scanned)

    async def _take(self, scanned: ScannedBatch) -> None:
        sequence = scanned.sequence
        self._check_sequence(sequence)
        self._last_sequence = sequence
        # Whoever does not listen to what is refused is not listened to.
        while self._held_bytes >= self._ingest.window_bytes or self._ledger.rejected_count >= MOST_UNTOLD:
            self._space.clear()
            await self._space.wait()
        if sequence <= self._ledger.held:
            self._ingest.metrics.events_duplicate(scanned.count - scanned.rejected_count)
            self._ledger.repeat(sequence, scanned.rejected())
            self._changed.set()
            return
        batch = await self._router.submit(scanned, self._lane, sequence, self._ledger.acknowledged, scanned.now_ns)
        self._ledger.begin(sequence, self._ingest.refuse(scanned))
        self._held_bytes += scanned.buffer.size
        accepted = scanned.count - scanned.rejected_count
        batch.done.add_done_callback(functools.partial(self._ended, sequence, accepted, scanned.buffer.size))

    def _check_sequence(self, sequence: int) -> None:
        if sequence < 1:
            raise InvalidArgument("sequence", f"must be 1 or more, is {sequence}")
        if self._last_sequence and sequence != self._last_sequence + 1:
            raise InvalidArgument(
                "sequence", f"must be {self._last_sequence + 1}, one more than the batch before, is {sequence}"
            )

    def _ended(self, sequence: int, accepted: int, size_bytes: int, done: asyncio.Future[None]) -> None:
        self._held_bytes -= size_bytes
        self._space.set()
        error = None if done.cancelled() else done.exception()
        if isinstance(error, ProfileServiceError):
            self.fail(error)
        elif not done.cancelled():
            self._ingest.metrics.events_accepted(accepted)
            self._ledger.end(sequence)
            self._changed.set()
