"""Replay of a log's events in large runs, on two processors.

    add, add, … ─▶ a run is decoded, numbered and added to the population ─▶ ┐ while the run before it
                                                                             └▶ goes into the users' rows

A run joins records of any size and position: what an event belongs to is decided by its own record's position.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.columns import EventColumns

LARGE_RUN = 1 << 12
"""Events from which a run is worth handing to a thread: some milliseconds of work."""

TextIds = NDArray[np.uint32]


class Replayed(Protocol):
    """What events are applied to. `received_ns` are their times of arrival (ns since 1970), `positions` those of their
    records."""

    def apply_run(self, columns: EventColumns, positions: NDArray[np.int64], received_ns: NDArray[np.int64]) -> None:
        """Applies a run as a whole."""

    def apply_to_population(self, columns: EventColumns, received_ns: NDArray[np.int64]) -> TextIds:
        """The first part of it, for which `apply_to_users` of the run before need not have ended."""

    def apply_to_users(
        self, columns: EventColumns, positions: NDArray[np.int64], received_ns: NDArray[np.int64], text_ids: TextIds
    ) -> None:
        """The second part of it."""


class ReplayRuns:
    """Applies runs in order; a thread begins with the first large one, and ends with `close`."""

    def __init__(self, replayed: Replayed) -> None:
        self._replayed = replayed
        self._applying: Future[None] | None = None
        self._applier: ThreadPoolExecutor | None = None

    def add(self, columns: EventColumns, positions: NDArray[np.int64], received_ns: NDArray[np.int64]) -> None:
        """Takes a run; it is applied when the next one has been taken, or `flush` returns. Raises what applying the one
        before raised."""
        if columns.count >= LARGE_RUN:
            if self._applier is None:
                self._applier = ThreadPoolExecutor(1, "replay")
            text_ids = self._replayed.apply_to_population(columns, received_ns)
            self.flush()
            self._applying = self._applier.submit(
                self._replayed.apply_to_users, columns, positions, received_ns, text_ids
            )
        elif columns.count:
            self.flush()
            self._replayed.apply_run(columns, positions, received_ns)

    def flush(self) -> None:
        """Returns when all that was added is applied."""
        applying, self._applying = self._applying, None
        if applying is not None:
            applying.result()

    def close(self) -> None:
        """Ends the thread."""
        if self._applier is not None:
            self._applier.shutdown()
