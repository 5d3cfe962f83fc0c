"""What client and producer need of asyncio. `concurrency.py` offers the same over threads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self


class Condition:
    """A lock, and a signal to those who wait under it."""

    def __init__(self) -> None:
        self._condition = asyncio.Condition()

    async def __aenter__(self) -> Self:
        await self._condition.acquire()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._condition.release()

    async def wait(self, timeout_s: float | None = None) -> None:
        """Gives the lock away until it is notified, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._condition.wait()

    def notify_all(self) -> None:
        """Wakes all who wait; under the lock."""
        self._condition.notify_all()


class Background:
    """Something that runs beside its caller, from now on."""

    def __init__(self, run: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        self._task = asyncio.create_task(run(), name=name)

    async def join(self) -> None:
        """Returns when it has ended; at once where it is the caller itself."""
        if self._task is not asyncio.current_task():
            await asyncio.wait([self._task])


def begin(method: Any, request: Any, timeout_s: float) -> Any:
    """A call that is under way; `outcome` waits for it."""
    return method(request, timeout=timeout_s)


async def outcome(call: Any) -> Any:
    """What a call ended with: its answer, or an RpcError that is raised."""
    return await call
