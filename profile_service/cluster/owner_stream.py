"""One long-lived stream from a frontend to a shard: opened, written, read, and opened again when it is lost.

            ┌──────────────── resume ◀──────────────┐
            ▼                                       │
    opening ──▶ in session ──▶ finishing ──▶ settled ──▶ (held while paused)
                    │   lost, or closed by the shard  ▲
                    └─────────────────────────────────┘

What waits goes into one message: while a message is on its way (the write is awaited), the next one gathers.
`finishing` closes our side and reads on until the shard has answered everything. `settle` decides what becomes of what
has no answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from grpc import aio

from profile_service.rpc.frames import END, FrameStream, Message, StreamLost

FIRST_BACKOFF_S = 0.02
LAST_BACKOFF_S = 0.5

_TURNS_TO_GATHER = 2

logger = logging.getLogger(__name__)

Connect = Callable[[str], Coroutine[Any, Any, FrameStream]]


class OwnerStream(ABC):
    """A stream to one shard.

    Args:
        shard_id: the shard's.
        method: the stream's name.
        connect: opens a stream of a method; raises where that cannot be.
        lost: awaited before the stream is opened again; returns whether something has changed, so that it is worth
            while to open it at once.
    """

    def __init__(self, shard_id: int, method: str, connect: Connect, lost: Callable[[], Awaitable[bool]]) -> None:
        self._shard_id = shard_id
        self._method = method
        self._connect = connect
        self._opening: asyncio.Task[FrameStream] | None = None
        self._stream: FrameStream | None = None
        self._lost = lost
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._released = asyncio.Event()
        self._released.set()
        self._finishing = False
        self._served = False
        self._task: asyncio.Task[None] | None = None
        self.connected = False

    @abstractmethod
    def _next_message(self) -> Sequence[Message] | None:
        """The next message in pieces, made of all that waits; None when nothing does."""

    async def _gather(self) -> None:
        """Returns when what waits may leave: what arrived with the first one is a turn or two behind it."""
        for _ in range(_TURNS_TO_GATHER):
            await asyncio.sleep(0)

    @abstractmethod
    def _take_answer(self, message: Message) -> bool:
        """Handles one message of the shard; returns whether the shard did something of what it was asked."""

    @abstractmethod
    def _settle(self, reason: str) -> None:
        """The stream has ended: decides what becomes of what was sent and has no answer."""

    def start(self) -> None:
        """Begins to connect."""
        self._task = asyncio.create_task(self._run(), name=self._method)
        self._task.add_done_callback(_log_failure)

    async def close(self) -> None:
        """Ends the stream at once; what has no answer is settled."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def cut(self) -> None:
        """Loses the stream that is open, or is being opened; it is opened again."""
        if self._opening is not None:
            self._opening.cancel()
        if self._stream is not None:
            self._stream.abort("the shard is elsewhere")

    def pause(self) -> Awaitable[object]:
        """Sends nothing from now on, until `resume`. What it returns is done when everything sent is answered or
        settled."""
        self._released.clear()
        self._finish()
        return self._settled.wait()

    def resume(self) -> None:
        """Goes on after `pause`."""
        self._released.set()

    def _finish(self) -> None:
        self._finishing = True
        self._wake.set()

    async def _run(self) -> None:
        delay_s = FIRST_BACKOFF_S
        logged = ""
        while True:
            # It may have been paused again since it was woken.
            while not self._released.is_set():
                await self._released.wait()
            self._finishing = self._served = False
            self._settled.clear()
            reason = "the stream was given up"
            try:
                reason = await self._session()
            finally:
                self._settle(reason)
                self.connected = False
                self._settled.set()
            if not self._released.is_set():
                continue
            if reason != logged or self._served:
                # Not again and again while a shard is away.
                logger.warning("the %s stream to shard %d was lost: %s", self._method, self._shard_id, reason)
                logged = reason
            changed = await self._lost()
            delay_s = FIRST_BACKOFF_S if self._served or changed else min(2 * delay_s, LAST_BACKOFF_S)
            if not changed:
                await asyncio.sleep(delay_s)

    async def _session(self) -> str:
        """One stream from its opening to its end; returns why it ended."""
        self._opening = opening = asyncio.create_task(self._connect(self._method))
        try:
            await asyncio.wait({opening})
        finally:
            self._opening = None
            opening.cancel()
        if opening.cancelled() or opening.exception() is not None:
            return _reason(opening)
        self._stream = stream = opening.result()
        self.connected = True
        reader = asyncio.create_task(self._read(stream))
        writer = asyncio.create_task(self._write(stream))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done() and not _reason(writer):
                await asyncio.wait({reader})
            return _reason(reader) or _reason(writer) or "the shard ended the stream"
        finally:
            self._stream = None
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            stream.abort()

    async def _write(self, stream: FrameStream) -> None:
        while not self._finishing:
            message = self._next_message()
            if message is None:
                self._wake.clear()
                await self._wake.wait()
                await self._gather()
            else:
                await stream.write(*message)
        stream.put(END)
        await stream.drain()

    async def _read(self, stream: FrameStream) -> None:
        while (message := await stream.read()) is not None:
            self._served |= self._take_answer(message)


def _reason(task: asyncio.Task[Any]) -> str:
    """Why the stream was not opened, or a side of it ended early; empty where it ended well, or has not."""
    if not task.done():
        return ""
    if task.cancelled():
        return "the shard is elsewhere"
    error = task.exception()
    if isinstance(error, aio.AioRpcError):
        return error.details() or error.code().name
    if isinstance(error, StreamLost):
        return str(error)
    return "" if error is None else f"{type(error).__name__}: {error}"


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("%s failed for good", task.get_name(), exc_info=error)
