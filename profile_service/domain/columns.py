"""Events as columns: what `wire` makes of raw bytes and `domain` applies. Nothing here is an object per event."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass
class EventColumns:
    """`count` decoded events; every array has at least `count` entries along its last axis.

    Text stays where it was: an offset and a length into `buffer`, with the XXH64 of its bytes beside them.
    """

    count: int
    buffer: NDArray[np.uint8]
    """The raw bytes that the offsets point into."""
    user_offset: NDArray[np.int64]
    user_length: NDArray[np.int32]
    user_hash: NDArray[np.uint64]
    """XXH64 (seed 0) of the user id's bytes."""
    type_index: NDArray[np.int16]
    """Index into the schema's event types."""
    time_ns: NDArray[np.int64]
    """Event time, nanoseconds since 1970; the arrival time where the event carried none."""
    event_id_hash: NDArray[np.uint64]
    """XXH64 of the event id's bytes seeded with `user_hash`; 0 where the event carried none."""
    text_offset: NDArray[np.int64]
    """(text attributes, events)"""
    text_length: NDArray[np.int32]
    """(text attributes, events); -1 where the attribute is absent."""
    text_hash: NDArray[np.uint64]
    """(text attributes, events); XXH64 (seed 0) of the value's bytes."""
    number: NDArray[np.float64]
    """(number attributes, events); NaN where the attribute is absent."""

    def select(self, chosen: NDArray[np.int64]) -> EventColumns:
        """The events at the positions `chosen`, in that order; the buffer is shared."""
        return EventColumns(
            count=len(chosen),
            buffer=self.buffer,
            user_offset=self.user_offset[chosen],
            user_length=self.user_length[chosen],
            user_hash=self.user_hash[chosen],
            type_index=self.type_index[chosen],
            time_ns=self.time_ns[chosen],
            event_id_hash=self.event_id_hash[chosen],
            # Not by an index, whose answer would lie in memory the other way round.
            text_offset=self.text_offset.take(chosen, axis=1),
            text_length=self.text_length.take(chosen, axis=1),
            text_hash=self.text_hash.take(chosen, axis=1),
            number=self.number.take(chosen, axis=1),
        )
