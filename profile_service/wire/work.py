"""The one array of i8 that the kernels work with: it holds what was read of an event, the limits, and the stacks.

    [0, LIMITS)        the event read last
    [LIMITS, STACKS)   limits, constant
    [STACKS, ROWS)     three explicit stacks
    [ROWS, LAST)       rows of the name tables where the names of the event before were: of its type and attributes
    [LAST, …)          for each declared attribute: serial of the last event that had it << 3 | kind of its last value

It is one array and not a tuple of a dozen, because numba counts references, atomically, to each array taken out of a
tuple: that cost more than all the parsing (see also `domain.kernel.leaf_kernel`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profile_service.config import Limits
from profile_service.domain.kernel import kernel

# Of an event. An offset points into the buffer; a length is in bytes.
USER_OFFSET = 0
USER_LENGTH = 1
TYPE_OFFSET = 2
TYPE_LENGTH = 3
TYPE_INDEX = 4
HAS_TIME = 5
SECONDS = 6
NANOS = 7
ID_OFFSET = 8
ID_LENGTH = 9
ATTRIBUTES = 10
"""Attributes as sent."""
IGNORED = 11
"""Attributes as sent that the schema does not declare, or that protobuf does not take for attributes."""
WRONG = 12
"""Declared attributes whose last value is of the wrong type."""
LARGE_STATUS = 13
LARGE_SIZE = 14
LARGE_OFFSET = 15
LARGE_LENGTH = 16
"""The first attribute beyond a limit: LARGE_NAME or LARGE_VALUE, the size in bytes, the extent of its name."""
FIELD = 17
"""Number of the known field being read, else 0: where a fault is."""
PARSED_SLOTS = 18
"""What begins at 0 (but for TYPE_INDEX) for each event lies before this."""

VALUE_KIND = 18
VALUE_OFFSET = 19
VALUE_LENGTH = 20
"""The attribute's value read last: a KIND of `wire.value`, where its text or number is, its size."""
SERIAL = 21
"""Number of the current event."""

STATUS = 22
POSITION = 23
BEGIN = 24
WRONG_ATTRIBUTE = 25
WRONG_KIND = 26
"""What `explain_event` adds: the status; where a malformed event stopped to parse (see `protobuf.fault_offset`); where
the event begins; the first declared attribute of the wrong type and the kind of its value.
"""
EVENT_SLOTS = 27

LIMITS = 27
LIMIT_USER_ID = 27
LIMIT_EVENT_ID = 28
LIMIT_ATTRIBUTES = 29
LIMIT_ATTRIBUTE = 30
LIMIT_TIME = 31
"""Sizes in bytes, the number of attributes, the latest time in nanoseconds since 1970."""

STACK_SIZE = 128
"""Entries of a stack: more than a message may be deep."""
STACKS = 32
KINDS_STACK = STACKS
ENDS_STACK = STACKS + STACK_SIZE
"""Kind and end of the messages around the position."""
GROUPS_STACK = STACKS + 2 * STACK_SIZE
"""Field numbers of the groups around the position."""
ROWS = STACKS + 3 * STACK_SIZE
TYPE_ROW = ROWS
ATTRIBUTE_ROWS = ROWS + 1
MOST_ATTRIBUTE_ROWS = 63
"""Of the first attributes, in the order in which they were sent: a producer's events are mostly alike."""
LAST = ATTRIBUTE_ROWS + MOST_ATTRIBUTE_ROWS

UNLIMITED = int(np.iinfo(np.int64).max)


def limit_slots(limits: Limits | None, now_ns: int) -> NDArray[np.int64]:
    """The slots [LIMITS, STACKS); without limits any size and any time goes."""
    if limits is None:
        return np.full(STACKS - LIMITS, UNLIMITED, np.int64)
    latest_ns = min(now_ns + round(limits.future_s * 1e9), UNLIMITED)
    return np.array(
        [
            limits.user_id_bytes,
            limits.event_id_bytes,
            limits.attributes_per_event,
            limits.attribute_bytes,
            latest_ns,
        ],
        np.int64,
    )


@kernel
def make_work(limits: NDArray[np.int64], declared: int) -> NDArray[np.int64]:
    """The array, for a plan of `declared` attributes."""
    work = np.zeros(LAST + declared, np.int64)
    work[LIMITS:STACKS] = limits
    return work
