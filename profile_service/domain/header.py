"""The part of a row that every schema has: how many events, the first and last event time, and when one last
arrived."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.kernel import leaf_kernel
from profile_service.domain.layout import EVENT_COUNT, FIRST_SEEN, LAST_RECEIVED, LAST_SEEN


@leaf_kernel
def update_header(
    i8: NDArray[np.int64],
    first: int,
    rows: NDArray[np.int64],
    time_ns: NDArray[np.int64],
    received_ns: NDArray[np.int64],
) -> None:
    """Counts each event into its row's header, which begins with the slot `first`; those with a row below 0 are left
    out."""
    for i in range(len(rows)):
        row = rows[i]
        if row < 0:
            continue
        i8[row, first + EVENT_COUNT] += 1
        i8[row, first + FIRST_SEEN] = min(i8[row, first + FIRST_SEEN], time_ns[i])
        i8[row, first + LAST_SEEN] = max(i8[row, first + LAST_SEEN], time_ns[i])
        i8[row, first + LAST_RECEIVED] = max(i8[row, first + LAST_RECEIVED], received_ns[i])


def merge_header(target: NDArray[np.int64], row: int, source: NDArray[np.int64], source_row: int) -> None:
    """Adds the source row's header to the target row's."""
    target[row, EVENT_COUNT] += source[source_row, EVENT_COUNT]
    target[row, FIRST_SEEN] = min(target[row, FIRST_SEEN], source[source_row, FIRST_SEEN])
    target[row, LAST_SEEN] = max(target[row, LAST_SEEN], source[source_row, LAST_SEEN])
    target[row, LAST_RECEIVED] = max(target[row, LAST_RECEIVED], source[source_row, LAST_RECEIVED])
