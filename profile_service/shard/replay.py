"""Replay of a log's events in large runs, on a second processor beside whoever decodes them.

    add, add, … ─▶ one run is applied while the next one is decoded

A run joins records of any size and position: what an event belongs to is decided by its own record's position.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.columns import EventColumns

LARGE_RUN = 1 << 12
"""Events from which a run is worth handing to a thread: some milliseconds of work."""

Apply = Callable[[EventColumns, NDArray[np.int64], NDArray[np.int64]], None]
"""Applies events, each with its record's position and its time of arrival (ns since 1970)."""


class ReplayRuns:
    """Applies runs in order; a thread begins with the first large one, and ends with `close`."""

    def __init__(self, apply: Apply) -> None:
        self._apply = apply
        self._applying: Future[None] | None = None
        self._applier: ThreadPoolExecutor | None = None

    def add(self, columns: EventColumns, positions: NDArray[np.int64], received_ns: NDArray[np.int64]) -> None:
        """Takes a run; it is applied when the next one has been taken, or `flush` returns. Raises what applying the one
        before raised."""
        self.flush()
        if columns.count >= LARGE_RUN:
            if self._applier is None:
                self._applier = ThreadPoolExecutor(1, "replay")
            self._applying = self._applier.submit(self._apply, columns, positions, received_ns)
        elif columns.count:
            self._apply(columns, positions, received_ns)

    def flush(self) -> None:
        """Returns when all that was added is applied."""
        applying, self._applying = self._applying, None
        if applying is not None:
            applying.result()

    def close(self) -> None:
        """Ends the thread."""
        if self._applier is not None:
            self._applier.shutdown()
