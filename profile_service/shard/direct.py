"""Producers that come straight to a shard, with events of its own users: how their streams end up in its log.

    rpc.producer_streams ─▶ scanned batch ─▶ its events as they lie in the message, but for the refused ones ─▶ submit

Nothing is split, gathered or encoded anew. A stream is a sender like a frontend's: what is kept of it is a prefix, so
that no batch overtakes the one before it; what the shard refuses ends the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol

import numpy as np

from profile_service.clock import Clock
from profile_service.config import Settings
from profile_service.errors import ProfileServiceError
from profile_service.rpc.producer_streams import ProducerStreams
from profile_service.shard.shard import Sender
from profile_service.wire.apply_request import ApplyPart
from profile_service.wire.event import VALID
from profile_service.wire.gather import gather
from profile_service.wire.plan import WirePlan
from profile_service.wire.scan import ScannedBatch, scan_batch
from profile_service.wire.warm import warm_scanning


class Owner(Protocol):
    """The shard, as far as streams need it."""

    epoch: int

    @property
    def plan(self) -> WirePlan: ...

    @property
    def is_remote(self) -> bool: ...

    async def bring(self, user_ids: Sequence[str] = (), producer_ids: Sequence[str] = ()) -> None: ...

    def acknowledged(self, producer_id: str) -> int: ...


Submit = Callable[[Sequence[ApplyPart], int, int, Sender], Coroutine[Any, Any, asyncio.Future[None]]]
"""(parts, bytes, epoch, sender) -> the submission, once the shard has taken or refused it."""


class DirectIngest:
    """Answers StreamEvents for one shard.

    Args:
        shard: gives what is the shard just now.
        submit: waits while the shard is full.
    """

    def __init__(self, shard: Callable[[], Owner], submit: Submit, settings: Settings, clock: Clock) -> None:
        self._shard = shard
        self._submit = submit
        self._limits = settings.limits
        self._streams = ProducerStreams(self, self._scan, settings, None, clock, split=True, who="this shard")
        self._clock = clock
        self._telling: set[asyncio.Task[None]] = set()
        self._warming: asyncio.Task[None] | None = None

    def drain(self) -> None:
        """From now on streams are not read; each ends when what it has read is acknowledged."""
        self._streams.drain()

    def warm_up(self) -> None:
        """Begins to load the kernels that only streams need, beside what else goes on."""
        if self._warming is None:
            self._warming = asyncio.create_task(asyncio.to_thread(warm_scanning))

    async def stream_events(self, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """As `ProducerStreams.stream_events`."""
        self.warm_up()
        assert self._warming is not None
        await asyncio.shield(self._warming)
        async for response in self._streams.stream_events(requests):
            yield response

    def _scan(self, message: bytes, now_ns: int) -> ScannedBatch:
        return scan_batch(message, self._shard().plan, self._limits, now_ns)

    # --- a Sink ---

    def open(self, producer_id: str) -> _WayToLog:
        """For `ProducerStreams`."""
        return _WayToLog(producer_id, self._shard, self._submit)

    async def acknowledged(self, producer_id: str) -> int:
        """For `ProducerStreams`: what this shard has heard."""
        shard = self._shard()
        if shard.is_remote:
            await shard.bring(producer_ids=[producer_id])
        return shard.acknowledged(producer_id)

    def tell_acknowledged(self, producer_id: str, sequence: int) -> None:
        """For `ProducerStreams`. Where the shard has no room, it is not told: what a producer hears may lag."""
        telling = asyncio.create_task(self._tell(producer_id, sequence))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    async def _tell(self, producer_id: str, sequence: int) -> None:
        part = ApplyPart(producer_id=producer_id, acknowledged_sequence=sequence, arrival_time_ns=self._clock())
        with contextlib.suppress(ProfileServiceError):
            await (await self._submit([part], part.size_bytes, self._shard().epoch, Sender()))


class _WayToLog:
    """One stream's batches, in their order, into the log. A `Way`."""

    def __init__(self, producer_id: str, shard: Callable[[], Owner], submit: Submit) -> None:
        self._producer_id = producer_id
        self._shard = shard
        self._submit = submit
        self._sender = Sender()

    async def submit(self, scanned: ScannedBatch, sequence: int, acknowledged_sequence: int) -> asyncio.Future[None]:
        accepted = scanned.count - scanned.rejected_count
        if not accepted:
            # What it says is in the next part, or told at the end.
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        part = ApplyPart(
            producer_id=self._producer_id,
            sequence=sequence,
            acknowledged_sequence=acknowledged_sequence,
            arrival_time_ns=scanned.now_ns,
            events=_valid_events(scanned),
            event_count=accepted,
        )
        submission = await self._submit([part], scanned.buffer.size, self._shard().epoch, self._sender)
        # Known before the next batch is submitted.
        self._sender.refused |= submission.done() and submission.exception() is not None
        return submission

    def fail(self, error: ProfileServiceError) -> None:
        # What the shard has not logged yet it refuses, as everything of a sender after a refusal.
        self._sender.refused = True


def _valid_events(scanned: ScannedBatch) -> memoryview:
    """The valid events one after the other; there is at least one. Nearly always they are so in the message."""
    if scanned.all_valid:
        begin, end = int(scanned.offset[0]), int(scanned.offset[-1]) + int(scanned.length[-1])
        if int(scanned.length.sum()) == end - begin:
            return scanned.buffer.data[begin:end]
    valid = np.flatnonzero(scanned.status == VALID)
    return gather(scanned.buffer, scanned.offset, scanned.length, valid)
