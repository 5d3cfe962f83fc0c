"""Events on their way to one owner: in order, bounded in bytes, sent again where that cannot count them twice.

The shard keeps a prefix of what a stream carries (see shard.proto): once it has refused a request it refuses the later
ones too. So on the first refusal our side is closed, and when the shard has answered everything, what it refused goes
back to the head of the queue in the old order.

| what became of a request | what becomes of its parts |
|---|---|
| applied | done |
| no answer: the stream was lost | sent again if they name a producer, otherwise UNAVAILABLE: they may be applied |
| not mine, shutting down, after a refusal | sent again when the topology is fresh |
| overloaded | sent again if the lane is patient, otherwise RESOURCE_EXHAUSTED |
| the disk is full | RESOURCE_EXHAUSTED: it takes longer than a stream can wait |
| malformed | each sent again alone; one that was alone is INVALID_ARGUMENT |
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

from profile_service.cluster.batches import Part
from profile_service.cluster.owner_stream import Connect, OwnerStream
from profile_service.config import MIB
from profile_service.errors import InvalidArgument, ProfileServiceError, ResourceExhausted, StorageFull, Unavailable
from profile_service.rpc.frames import Message
from profile_service.wire.apply_request import encode_request
from userprofile.internal.v1 import shard_pb2

METHOD = "Apply"
MESSAGE_BYTES = MIB
"""Parts are put together up to this size; one larger part is a message of its own."""

OVERLOAD_RETRY_S = 0.1
FULL_RETRY_S = 1.0
"""A full disk gets room by a snapshot, or by a person."""

Status = shard_pb2.ApplyResponse.Status


class ApplyStream(OwnerStream):
    """The queue of one owner and the stream that empties it.

    Args:
        window_bytes: bytes queued or unanswered beyond which `full` holds.
        epoch: gives the epoch of the topology that the queued parts were routed by.
    """

    def __init__(
        self,
        shard_id: int,
        connect: Connect,
        lost: Callable[[], Awaitable[bool]],
        window_bytes: int,
        epoch: Callable[[], int],
    ) -> None:
        super().__init__(shard_id, METHOD, connect, lost)
        self._window_bytes = window_bytes
        self._epoch = epoch
        self._queue: deque[Part] = deque()
        self._sent: dict[int, list[Part]] = {}
        self._refused: dict[int, tuple[list[Part], Status.ValueType, str]] = {}
        self._last_request_id = 0
        self._held_bytes = 0
        self._space = asyncio.Event()
        self._space.set()

    @property
    def held_bytes(self) -> int:
        """Bytes queued or unanswered."""
        return self._held_bytes

    @property
    def full(self) -> bool:
        """Whether the window is used up; one part more may go beyond it, so that no size of part can starve."""
        return self._held_bytes >= self._window_bytes

    async def wait_for_space(self) -> None:
        """Returns when the window has room again."""
        await self._space.wait()

    def put(self, part: Part) -> None:
        """Queues a part behind the others."""
        self._queue.append(part)
        self._held_bytes += part.size_bytes
        if self.full:
            self._space.clear()
        self._wake.set()

    def take_all(self) -> list[Part]:
        """Everything queued, taken out; meant for a paused stream, where nothing is unanswered."""
        assert not self._sent
        parts = [part for part in self._queue if not part.dropped]
        self._queue.clear()
        self._held_bytes = 0
        self._space.set()
        return parts

    def fail_all(self, error: ProfileServiceError) -> None:
        """Ends everything queued."""
        for part in self.take_all():
            part.batch.lane.fail(error)

    def _next_message(self) -> list[Message] | None:
        parts: list[Part] = []
        size_bytes = 0
        while self._queue:
            part = self._queue[0]
            if part.dropped:
                self._release(self._queue.popleft())
                continue
            if parts and (size_bytes + part.size_bytes > MESSAGE_BYTES or part.alone or parts[-1].alone):
                break
            parts.append(self._queue.popleft())
            size_bytes += part.size_bytes
        if not parts:
            return None
        self._last_request_id += 1
        self._sent[self._last_request_id] = parts
        return encode_request(self._last_request_id, self._epoch(), [part.content for part in parts])

    def _take_answer(self, message: Message) -> bool:
        applied = False
        response = shard_pb2.ApplyResponse.FromString(bytes(message))
        for result in response.results:
            parts = self._sent.pop(result.request_id, [])
            if result.status == Status.STATUS_APPLIED:
                applied = True
                for part in parts:
                    self._release(part)
                    part.batch.part_applied()
            else:
                self._refused[result.request_id] = (parts, result.status, result.message)
                self._finish()
        return applied

    def _settle(self, reason: str) -> None:
        again: list[Part] = []
        for request_id in sorted([*self._sent, *self._refused]):
            parts, status, message = self._refused.get(request_id) or (
                self._sent[request_id],
                Status.STATUS_UNSPECIFIED,
                reason,
            )
            for part in parts:
                error = None if part.dropped else self._verdict(part, status, message, alone=len(parts) == 1)
                if error is not None:
                    part.batch.lane.fail(error)
                if part.dropped:
                    self._release(part)
                else:
                    again.append(part)
        self._sent.clear()
        self._refused.clear()
        self._queue.extendleft(reversed(again))

    def _verdict(
        self, part: Part, status: Status.ValueType, message: str, *, alone: bool
    ) -> ProfileServiceError | None:
        """What the part ends with; None where it is sent again."""
        match status:
            case Status.STATUS_UNSPECIFIED | Status.STATUS_LOST if not part.batch.lane.producer_id:
                return Unavailable(
                    f"shard {self._shard_id} was lost before it answered ({message}); "
                    "the events may have been counted, and without a producer_id they are not sent again",
                    retry_after_s=1.0,
                )
            case Status.STATUS_OVERLOADED if not part.batch.lane.patient:
                return ResourceExhausted(message + _others(part), retry_after_s=OVERLOAD_RETRY_S)
            case Status.STATUS_FULL:
                return StorageFull(message + _others(part), retry_after_s=FULL_RETRY_S)
            case Status.STATUS_MALFORMED if alone:
                return InvalidArgument("events", f"shard {self._shard_id} refused them: {message}")
            case Status.STATUS_MALFORMED:
                part.alone = True
        return None

    def _release(self, part: Part) -> None:
        self._held_bytes -= part.size_bytes
        if not self.full:
            self._space.set()

    def check_invariants(self) -> None:
        """Asserts that the bytes held are those of the parts held, and that the window's event says so."""
        held = [*self._queue, *(part for parts in self._sent.values() for part in parts)]
        held += [part for parts, _, _ in self._refused.values() for part in parts]
        assert self._held_bytes == sum(part.size_bytes for part in held)
        assert self._space.is_set() == (not self.full)


def _others(part: Part) -> str:
    """What is to be said of the rest of a batch when one owner has kept nothing of it."""
    if part.batch.parts == 1 or part.batch.lane.producer_id:
        return ""
    return "; other shards may have counted their events of this batch, which names no producer and no request_id"


def parts_in_order(streams: Iterable[ApplyStream]) -> list[Part]:
    """Everything queued on paused streams, taken out, in the order in which it was routed."""
    return sorted((part for stream in streams for part in stream.take_all()), key=lambda part: part.serial)
