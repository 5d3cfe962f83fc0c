"""An event loop without I/O whose time is made up: when nothing can run, it leaps to the next timer.

The same callbacks run in the same order every time, so that a seed replays a whole run.
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
from collections.abc import Coroutine, Generator
from typing import Any

MOST_TURNS = 500_000
"""A run that takes more turns of its loop does not come to an end."""


class SimulationStuck(AssertionError):
    """Everybody waits, and for nothing that will come; or nobody ever comes to an end."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """Runs what needs neither sockets nor threads, at once."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._selector = _Leap(self)
        self._tasks: list[tuple[asyncio.Task[Any], contextvars.Context]] = []
        self.turns = 0
        self.set_task_factory(self._make_task)
        # What a crash left undone is looked at by the simulation itself.
        self.set_exception_handler(lambda _, __: None)

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._now_s

    def leap(self, timeout_s: float | None) -> None:
        """Nothing can run for so long: it is over at once."""
        self.turns += 1
        if self.turns > MOST_TURNS:
            raise SimulationStuck(f"no end after {MOST_TURNS} turns of the loop: {self._pending()}")
        if timeout_s is None:
            raise SimulationStuck(f"everybody waits for ever: {self._pending()}")
        self._now_s += timeout_s

    def end_tasks(self) -> None:
        """Cancels every task, in the order in which they were made, until none is left."""
        for _ in range(100):
            left = [task for task, _ in self.live_tasks()]
            if not left:
                break
            for task in left:
                task.cancel()
            self.run_until_complete(_turns(20))
        else:
            raise SimulationStuck(f"tasks that cannot be cancelled: {self._pending()}")
        for task, _ in self._tasks:
            if not task.cancelled():
                task.exception()
        self._tasks.clear()

    def live_tasks(self) -> list[tuple[asyncio.Task[Any], contextvars.Context]]:
        """Tasks that have not ended, in the order in which they were made, each with the context that it runs in."""
        return [held for held in self._tasks if not held[0].done()]

    def _pending(self) -> str:
        return "; ".join(repr(task) for task, _ in self.live_tasks())

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coro: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[Any]:
        context = contextvars.copy_context() if context is None else context
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, context=context)
        self._tasks.append((task, context))
        if len(self._tasks) % 200 == 0:
            self._tasks = self.live_tasks()
        return task

    # What BaseEventLoop asks of its subclasses.

    def _process_events(self, event_list: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


class _Leap(selectors.SelectSelector):
    """In place of the kernel: nothing ever happens outside."""

    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self._loop.leap(timeout)
        else:
            self._loop.leap(0.0)
        return []


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
