"""Replay of a log's events in large runs, on a second processor beside whoever decodes them.

    add, add, … ─▶ one run is applied while the next one is decoded ─┬▶ rows of users    ┐
                                                                     ├▶ numbers of texts  │ as pieces for
                                                                     ├▶ each feature      │ two threads
                                                                     └▶ the population    ┘

A run joins records of any size and position: what an event belongs to is decided by its own record's position.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.columns import EventColumns
from profile_service.domain.table import Together, in_turn

LARGE_RUN = 1 << 12
"""Events from which a run is worth handing to threads: some milliseconds of work."""

Apply = Callable[[EventColumns, NDArray[np.int64], NDArray[np.int64], Together], None]
"""Applies events, each with its record's position and its time of arrival (ns since 1970)."""


class ReplayRuns:
    """Applies runs in order; threads begin with the first large one, and end with `close`."""

    def __init__(self, apply: Apply) -> None:
        self._apply = apply
        self._applying: Future[None] | None = None
        self._applier: ThreadPoolExecutor | None = None
        self._helper: ThreadPoolExecutor | None = None

    def add(self, columns: EventColumns, positions: NDArray[np.int64], received_ns: NDArray[np.int64]) -> None:
        """Takes a run; it is applied when the next one has been taken, or `flush` returns. Raises what applying the one
        before raised."""
        self.flush()
        if columns.count >= LARGE_RUN:
            if self._applier is None:
                self._applier = ThreadPoolExecutor(1, "replay")
                self._helper = ThreadPoolExecutor(1, "replay-helper")
            self._applying = self._applier.submit(self._apply, columns, positions, received_ns, self._together)
        elif columns.count:
            self._apply(columns, positions, received_ns, in_turn)

    def flush(self) -> None:
        """Returns when all that was added is applied."""
        applying, self._applying = self._applying, None
        if applying is not None:
            applying.result()

    def close(self) -> None:
        """Ends the threads."""
        for executor in (self._applier, self._helper):
            if executor is not None:
                executor.shutdown()

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
