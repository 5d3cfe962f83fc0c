"""Replay of a log's events in large runs, on a second processor beside whoever decodes them.

    add, add, … ─▶ a run is full ─▶ applied while the next one gathers ─┬▶ rows of users    ┐
                                                                       ├▶ numbers of texts  │ as pieces for
                                                                       ├▶ each feature      │ two threads
                                                                       └▶ the population    ┘

A record may hold one event or thousands; the kernels want many at once. What a record's event belongs to is decided by
its own position, so runs may join records of any positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.columns import EventColumns
from profile_service.domain.table import Together, in_turn

RUN_EVENTS = 1 << 14
"""Events of a run: some milliseconds of work, beside which handing it over costs nothing."""

Apply = Callable[[EventColumns, NDArray[np.int64], NDArray[np.int64], Together], None]
"""Applies events, each with its record's position and its time of arrival (ns since 1970)."""


class ReplayRuns:
    """Gathers records to runs and applies them in order.

    Threads begin with the first run that is full, and end with `close`.
    """

    def __init__(self, apply: Apply) -> None:
        self._apply = apply
        self._parts: list[tuple[EventColumns, int, int]] = []
        self._events = 0
        self._applying: Future[None] | None = None
        self._applier: ThreadPoolExecutor | None = None
        self._helper: ThreadPoolExecutor | None = None

    def add(self, columns: EventColumns, position: int, received_ns: int) -> None:
        """Takes the events of the record at `position`, which arrived at `received_ns`. They are applied by the next
        `flush` at the latest. Raises what applying those before raised."""
        if columns.count:
            self._parts.append((columns, position, received_ns))
            self._events += columns.count
        if self._events >= RUN_EVENTS:
            if self._applier is None:
                self._applier = ThreadPoolExecutor(1, "replay")
                self._helper = ThreadPoolExecutor(1, "replay-helper")
            parts = self._take()
            self._wait()
            self._applying = self._applier.submit(self._apply_parts, parts, self._together)

    def flush(self) -> None:
        """Returns when all that was added is applied."""
        self._wait()
        parts = self._take()
        if parts:
            self._apply_parts(parts, in_turn)

    def close(self) -> None:
        """Ends the threads; what is not flushed is lost."""
        for executor in (self._applier, self._helper):
            if executor is not None:
                executor.shutdown()

    def _take(self) -> list[tuple[EventColumns, int, int]]:
        parts, self._parts, self._events = self._parts, [], 0
        return parts

    def _wait(self) -> None:
        applying, self._applying = self._applying, None
        if applying is not None:
            applying.result()

    def _apply_parts(self, parts: list[tuple[EventColumns, int, int]], together: Together) -> None:
        counts = [columns.count for columns, _, _ in parts]
        columns = EventColumns.join([columns for columns, _, _ in parts]) if len(parts) > 1 else parts[0][0]
        positions = np.repeat(np.array([position for _, position, _ in parts], dtype=np.int64), counts)
        received = np.repeat(np.array([received_ns for _, _, received_ns in parts], dtype=np.int64), counts)
        self._apply(columns, positions, received, together)

    def _together(self, work: Sequence[Callable[[], None]]) -> None:
        left = deque(work)

        def do() -> None:
            while True:
                try:
                    piece = left.popleft()
                except IndexError:
                    return
                piece()

        assert self._helper is not None
        helping = self._helper.submit(do)
        try:
            do()
        finally:
            helping.result()
