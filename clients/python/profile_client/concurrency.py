"""What client and producer need of threads. `aio_concurrency.py` offers the same over asyncio."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self


class Condition:
    """A lock, and a signal to those who wait under it."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())

    def __enter__(self) -> Self:
        self._condition.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._condition.release()

    def wait(self, timeout_s: float | None = None) -> None:
        """Gives the lock away until it is notified, or the time is over."""
        self._condition.wait(timeout_s)

    def notify_all(self) -> None:
        """Wakes all who wait; under the lock."""
        self._condition.notify_all()


class Background:
    """Something that runs beside its caller, from now on."""

    def __init__(self, run: Callable[[], None], name: str) -> None:
        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Returns when it has ended; at once where it is the caller itself."""
        if self._thread is not threading.current_thread():
            self._thread.join()


def begin(method: Any, request: Any, timeout_s: float) -> Any:
    """A call that is under way; `outcome` waits for it."""
    return method.future(request, timeout=timeout_s)


def outcome(call: Any) -> Any:
    """What a call ended with: its answer, or an RpcError that is raised."""
    return call.result()
