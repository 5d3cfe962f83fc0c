"""One long-lived call from a frontend to a shard: opened, written, read, and opened again when it is lost.

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
from collections.abc import Awaitable, Callable

from grpc import aio

FIRST_BACKOFF_S = 0.02
LAST_BACKOFF_S = 0.5

_TURNS_TO_GATHER = 2

logger = logging.getLogger(__name__)


class OwnerStream(ABC):
    """A bidirectional call to one shard.

    Args:
        method: full name of the call, `/package.Service/Method`.
        channel: gives the channel to open the next call on.
        lost: awaited before the call is opened again; returns whether something has changed, so that it is worth while
            to open it at once.
    """

    def __init__(self, method: str, channel: Callable[[], aio.Channel], lost: Callable[[], Awaitable[bool]]) -> None:
        self._method = method
        self._channel = channel
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
    def _next_message(self) -> bytes | None:
        """The next message, made of all that waits; None when nothing does."""

    async def _gather(self) -> None:
        """Returns when what waits may leave: what arrived with the first one is a turn or two behind it."""
        for _ in range(_TURNS_TO_GATHER):
            await asyncio.sleep(0)

    @abstractmethod
    def _take_answer(self, message: bytes) -> bool:
        """Handles one message of the shard; returns whether the shard did something of what it was asked."""

    @abstractmethod
    def _settle(self, reason: str) -> None:
        """The call has ended: decides what becomes of what was sent and has no answer."""

    def start(self) -> None:
        """Begins to connect."""
        self._task = asyncio.create_task(self._run(), name=self._method)
        self._task.add_done_callback(_log_failure)

    async def close(self) -> None:
        """Ends the call at once; what has no answer is settled."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

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
        while True:
            # It may have been paused again since it was woken.
            while not self._released.is_set():
                await self._released.wait()
            self._finishing = self._served = False
            self._settled.clear()
            reason = "the call was given up"
            try:
                reason = await self._session()
            finally:
                self._settle(reason)
                self.connected = False
                self._settled.set()
            if not self._released.is_set():
                continue
            changed = await self._lost()
            delay_s = FIRST_BACKOFF_S if self._served or changed else min(2 * delay_s, LAST_BACKOFF_S)
            if not changed:
                await asyncio.sleep(delay_s)

    async def _session(self) -> str:
        """One call from its opening to its end; returns why it ended."""
        call: aio.StreamStreamCall[bytes, bytes] = self._channel().stream_stream(self._method)()
        reader = asyncio.create_task(self._read(call))
        writer = asyncio.create_task(self._write(call))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done() and not _reason(writer):
                await asyncio.wait({reader})
            return _reason(reader) or _reason(writer) or "the shard ended the call"
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            call.cancel()

    async def _write(self, call: aio.StreamStreamCall[bytes, bytes]) -> None:
        await call.wait_for_connection()
        self.connected = True
        while not self._finishing:
            message = self._next_message()
            if message is None:
                self._wake.clear()
                await self._wake.wait()
                await self._gather()
            else:
                await call.write(message)
        await call.done_writing()

    async def _read(self, call: aio.StreamStreamCall[bytes, bytes]) -> None:
        while True:
            message = await call.read()
            if not isinstance(message, bytes):
                # aio.EOF: the shard has ended the call well.
                return
            self._served |= self._take_answer(message)


def _reason(task: asyncio.Task[None]) -> str:
    """Why a side of the call ended early; empty where it ended well, or has not."""
    if not task.done():
        return ""
    if task.cancelled():
        return "the channel was closed"
    error = task.exception()
    if isinstance(error, aio.AioRpcError):
        return error.details() or error.code().name
    # The call's end shows on the other side as a write or a read that comes too late.
    return "" if error is None else f"{type(error).__name__}: {error}"


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("%s failed for good", task.get_name(), exc_info=error)
