"""The two directions of a stream between a frontend and a shard: what is taken in is bounded by what is not yet
answered; beyond the bound the stream is not read, and the sender has to wait.

    requests ──▶ take ──▶ put, run ──▶ held: weight below the window ──▶ answers, as many as are ready at once
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from google.protobuf.message import DecodeError

from profile_service.errors import InvalidArgument
from profile_service.rpc.frames import Message

Answer = TypeVar("Answer")


class Exchange(Generic[Answer]):
    """One stream's: requests are taken in while their weight is below a window, answers go out as they come.

    Args:
        window: of weight, in whatever unit `put` and `run` are told.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._held = 0
        self._ready: list[Answer] = []
        self._ready_weight = 0
        # In their order, which a set would lose.
        self._running: dict[asyncio.Task[Answer], None] = {}
        self._changed = asyncio.Event()
        self._space = asyncio.Event()
        self._failure: BaseException | None = None

    def put(self, answer: Answer, weight: int) -> None:
        """Takes the answer to a request; its weight counts until the answer is on its way."""
        self._held += weight
        self._ready.append(answer)
        self._ready_weight += weight
        self._changed.set()

    def run(self, work: Coroutine[Any, Any, Answer], weight: int) -> None:
        """Starts the work on one request; its weight counts until the answer is on its way."""
        self._held += weight
        task = asyncio.create_task(work)
        self._running[task] = None
        task.add_done_callback(functools.partial(self._finish, weight))

    def _finish(self, weight: int, task: asyncio.Task[Answer]) -> None:
        self._running.pop(task, None)
        self._held -= weight
        if not task.cancelled():
            if (error := task.exception()) is not None:
                self._failure = error
            else:
                self.put(task.result(), weight)
        self._space.set()
        self._changed.set()

    async def carry(
        self, requests: AsyncIterator[Message], take: Callable[[Message], Awaitable[None]]
    ) -> AsyncIterator[list[Answer]]:
        """Gives each request to `take`, and yields the answers that are ready until all requests are answered. Raises
        InvalidArgument where one cannot be read."""

        async def take_all() -> None:
            async for encoded in requests:
                await take(encoded)
                while self._held >= self._window:
                    self._space.clear()
                    await self._space.wait()

        taking = asyncio.create_task(take_all())
        taking.add_done_callback(lambda _: self._changed.set())
        try:
            while not taking.done() or self._running or self._ready:
                self._changed.clear()
                if self._failure is not None:
                    raise self._failure
                if self._ready:
                    ready, self._ready = self._ready, []
                    weight, self._ready_weight = self._ready_weight, 0
                    yield ready
                    self._held -= weight
                    self._space.set()
                else:
                    await self._changed.wait()
            # The requests' own end, which may be an error.
            await taking
        except DecodeError as error:
            raise InvalidArgument("", f"a request cannot be read: {error}") from error
        finally:
            taking.cancel()
            for task in self._running:
                task.cancel()
