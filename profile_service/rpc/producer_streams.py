"""The producers' streams of one server: a frontend's, or a shard's for those who come straight to it.

    message ─▶ scan (kernel) ─▶ refused events, by index
                    │
                    └─▶ sink: every shard by way of a router, or one shard ─▶ durable ─▶ acknowledged, in order

A stream is pipelined: the next batch is scanned while those before it are on their way. It stops being read when the
bytes that wait for their acknowledgement exceed the stream's window, or the sink has no room.

Sequences: the first batch of a stream may have any sequence from 1, each later one is one more than the one before. In
a sparse stream, whose producer splits its batches by the owners of their users, it is only larger. A batch that was
acknowledged before the stream began is acknowledged again, with what is refused of it, and not applied. Of two streams
with the same producer_id the newer one stays; the older one ends with ABORTED, for two senders would mix up their
numbers.

What is acknowledged travels with each batch to the owners, so they are always a little behind. Where a stream is
sparse it has only parts of the batches: it is the producer who says up to where all parts of all batches are
acknowledged. When a stream ends, the sink is told the last of it: a producer that comes back then hears exactly where
it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from profile_service.clock import Clock
from profile_service.config import Settings
from profile_service.errors import InvalidArgument, ProfileServiceError, Superseded, Unavailable
from profile_service.rpc.acknowledgements import REJECTED_PER_RESPONSE, Acknowledgements
from profile_service.wire.apply_request import REQUEST_PREFIX
from profile_service.wire.scan import ScannedBatch
from userprofile.v1 import event_service_pb2

MOST_UNTOLD = 10 * REJECTED_PER_RESPONSE
"""Refused events of one stream that wait to be told; beyond it the stream is not read."""


class Way(Protocol):
    """The way of one stream's batches to where they are kept, in their order."""

    async def submit(self, scanned: ScannedBatch, sequence: int, acknowledged_sequence: int) -> asyncio.Future[None]:
        """Takes the valid events of a batch, waiting while there is no room; the future ends when they are durable and
        readable, or with why not: then nothing later of the way is kept either.

        Raises:
            ProfileServiceError: the batch is refused, or the way has failed.
        """

    def fail(self, error: ProfileServiceError) -> None:
        """Ends it: what was not sent on yet is dropped."""


class Sink(Protocol):
    """Where batches are kept."""

    def open(self, producer_id: str) -> Way:
        """A way for a stream; without a producer_id its batches count as often as they are sent."""

    async def acknowledged(self, producer_id: str) -> int:
        """Up to which sequence everything of the producer is known to be durable. Raises Unavailable."""

    def tell_acknowledged(self, producer_id: str, sequence: int) -> None:
        """Has it noted, at some time, that everything of the producer is durable up to this sequence."""


class Counts(Protocol):
    """What a frontend counts; `frontends.metrics.Metrics` does. A shard counts what it applies, in its status."""

    def events_accepted(self, count: int) -> None: ...
    def events_rejected(self, field: str) -> None: ...
    def events_duplicate(self, count: int) -> None: ...
    def attributes_ignored(self, count: int) -> None: ...


class ProducerStreams:
    """Answers StreamEvents.

    Args:
        scan: looks a message through, which came at a time in nanoseconds.
        split: whether every stream is sparse, since this server is one owner among others.
        who: what shuts down, for people.
    """

    def __init__(
        self,
        sink: Sink,
        scan: Callable[[bytes, int], ScannedBatch],
        settings: Settings,
        counts: Counts | None,
        clock: Clock,
        *,
        split: bool,
        who: str,
    ) -> None:
        self.sink = sink
        self.scan = scan
        self.counts = counts
        self.clock = clock
        self.split = split
        self.who = who
        self.window_bytes = settings.capacity.stream_window_bytes
        self._producer_id_bytes = settings.limits.producer_id_bytes
        self._streams: dict[str, _ProducerStream] = {}
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """From now on streams are not read; each ends when what it has read is acknowledged."""
        self._draining.set()

    async def stream_events(self, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """A producer's stream: encoded StreamEventsRequests in, encoded StreamEventsResponses out.

        Raises:
            InvalidArgument: a message is damaged, or its sequence is not the next one.
            NotMine: this server is a shard, and does not own every user of a batch.
            Superseded: a newer stream has the same producer_id.
            Unavailable: an owner was lost and the stream is anonymous, or the server shuts down.
        """
        first = await anext(requests, None)
        if first is None:
            return
        scanned = self.scan(first, self.clock())
        producer_id = self._producer_id(scanned)
        stream = _ProducerStream(self, producer_id, sparse=self.split or scanned.acknowledged_sequence is not None)
        if producer_id:
            # By the order in which they came, not in which owners answer: the older may be one whose client has gone.
            older = self._streams.get(producer_id)
            if older is not None:
                older.fail(Superseded(f"a newer stream has the producer_id {producer_id!r}"))
            self._streams[producer_id] = stream
        held = 0
        try:
            if producer_id:
                held = await self.sink.acknowledged(producer_id)
            stream.begin(held)
            yield event_service_pb2.StreamEventsResponse(sequence=held).SerializeToString()
            async for response in stream.carry(requests, scanned, self._draining):
                yield response
        finally:
            stream.close()
            if self._streams.get(producer_id) is stream:
                del self._streams[producer_id]
            if producer_id and stream.acknowledged > held:
                self.sink.tell_acknowledged(producer_id, stream.acknowledged)

    def refuse(self, scanned: ScannedBatch) -> list[tuple[int, str, str]]:
        """The refused events of a batch, counted."""
        rejected = scanned.rejected()
        if self.counts is None:
            return rejected
        for _, field, _ in rejected:
            self.counts.events_rejected(field)
        if scanned.ignored_attributes:
            self.counts.attributes_ignored(scanned.ignored_attributes)
        return rejected

    def _producer_id(self, scanned: ScannedBatch) -> str:
        producer_id = scanned.name
        if len(producer_id.encode()) > self._producer_id_bytes:
            raise InvalidArgument("producer_id", f"must be at most {self._producer_id_bytes} bytes")
        if producer_id.startswith(REQUEST_PREFIX):
            raise InvalidArgument(
                "producer_id", f"must not begin with {REQUEST_PREFIX!r}, which stands for single requests"
            )
        return producer_id


class _ProducerStream:
    """One producer's stream after its first message: what is on its way and what can be told."""

    def __init__(self, streams: ProducerStreams, producer_id: str, *, sparse: bool) -> None:
        self._streams = streams
        self._producer_id = producer_id
        self._sparse = sparse
        self._way = streams.sink.open(producer_id)
        self._ledger = Acknowledgements(0)
        self._last_sequence = 0
        self._told_sequence = 0
        self._held_bytes = 0
        self._failure: ProfileServiceError | None = None
        self._changed = asyncio.Event()
        self._space = asyncio.Event()

    @property
    def acknowledged(self) -> int:
        """Everything of the producer up to this sequence is durable and readable."""
        return self._told_sequence if self._sparse else self._ledger.acknowledged

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
                raise Unavailable(f"{self._streams.who} shuts down; connect again", retry_after_s=0.5)
            await reading
        finally:
            for task in (reading, drained):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ProfileServiceError):
                await reading

    def fail(self, error: ProfileServiceError) -> None:
        """Ends the stream."""
        self._failure = self._failure or error
        self._way.fail(error)
        self._changed.set()

    def close(self) -> None:
        """The stream has ended: what was not sent on yet is dropped."""
        self._way.fail(Unavailable("the stream has ended", retry_after_s=1.0))

    async def _read(self, requests: AsyncIterator[bytes], first: ScannedBatch) -> None:
        await self._take(first)
        async for message in requests:
            scanned = self._streams.scan(message, self._streams.clock())
            if scanned.name and scanned.name != self._producer_id:
                raise InvalidArgument(
                    "producer_id",
                    f"is {self._producer_id!r} since the stream's first message, not {scanned.name!r}",
                )
            await self._take(scanned)

    async def _take(self, scanned: ScannedBatch) -> None:
        self._hear(scanned.acknowledged_sequence)
        sequence = scanned.sequence
        if not scanned.count and not sequence and (self._sparse or not self._last_sequence):
            return
        self._check_sequence(sequence)
        self._last_sequence = sequence
        # Whoever does not listen to what is refused is not listened to.
        while self._held_bytes >= self._streams.window_bytes or self._ledger.rejected_count >= MOST_UNTOLD:
            self._space.clear()
            await self._space.wait()
        if sequence <= self._ledger.held:
            if (counts := self._streams.counts) is not None:
                counts.events_duplicate(scanned.count - scanned.rejected_count)
            self._ledger.repeat(sequence, scanned.rejected())
            self._changed.set()
            return
        done = await self._way.submit(scanned, sequence, self.acknowledged)
        self._ledger.begin(sequence, self._streams.refuse(scanned))
        self._held_bytes += scanned.buffer.size
        accepted = scanned.count - scanned.rejected_count
        done.add_done_callback(functools.partial(self._ended, sequence, accepted, scanned.buffer.size))

    def _hear(self, acknowledged_sequence: int | None) -> None:
        if acknowledged_sequence is None:
            return
        if not self._sparse:
            raise InvalidArgument("acknowledged_sequence", "must be set on the stream's first message, or on none")
        if acknowledged_sequence < 0:
            raise InvalidArgument("acknowledged_sequence", "must be 0 or more")
        self._told_sequence = max(self._told_sequence, acknowledged_sequence)

    def _check_sequence(self, sequence: int) -> None:
        if sequence < 1:
            raise InvalidArgument("sequence", f"must be 1 or more, is {sequence}")
        if not self._last_sequence:
            return
        if self._sparse:
            if sequence <= self._last_sequence:
                raise InvalidArgument(
                    "sequence", f"must be more than {self._last_sequence}, that of the batch before, is {sequence}"
                )
        elif sequence != self._last_sequence + 1:
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
            if (counts := self._streams.counts) is not None:
                counts.events_accepted(accepted)
            self._ledger.end(sequence)
            self._changed.set()
