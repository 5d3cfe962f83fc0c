"""Users by the million, quickly: batches in which each of them has one event.

Serialising takes some microseconds an event, so only some ten thousand events are serialised. Every other user gets one
of those, with his own id written over the id in it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from benchmarks.load import encoded_events
from profile_service.sample.shoppers import shopper_id

FIRST_USER = 10_000_000
"""The crowd's users are numbered from here on, so all their ids have 16 bytes, up to 90 million of them."""

_DIGITS = 8
_SERIALISED = 50_000


class Crowd:
    """Events of a schema, ready to be given to anybody.

    >>> crowd = Crowd("preferences", batch=100, seed=7)
    >>> [batch.count(b"shopper-") for batch in crowd.batches(0, 250)]
    [100, 100, 50]
    """

    def __init__(self, schema: str, batch: int, seed: int, serialised: int = _SERIALISED) -> None:
        """`schema` is a key of `load.SCHEMAS`; so many events are serialised."""
        self._batch = batch
        runs, _ = encoded_events(schema, serialised, serialised, seed, every_user=True, first_user=FIRST_USER)
        self._data = np.zeros(0, np.uint8)
        offsets = [np.zeros(1, np.int64)]
        for run in runs:
            offsets.append(len(self._data) + run.offsets[1:] - run.offsets[0])
            self._data = np.concatenate([self._data, np.frombuffer(run.view(0, len(run)), np.uint8)])
        self._offsets: NDArray[np.int64] = np.concatenate(offsets)
        begin = self._offsets[:-1]
        # A tag and a length of one or two bytes, a tag and a length of one, and what all ids begin with.
        head = 2 + (self._data[begin + 1] >= 0x80) + 2 + len(shopper_id(FIRST_USER)) - _DIGITS
        self._digits_at = (begin + head)[:, None] + np.arange(_DIGITS)

    def batches(self, start: int, stop: int) -> Iterator[bytes]:
        """One event of each of the users from `start` up to `stop`, counted from `FIRST_USER`."""
        count = len(self._digits_at)
        powers = 10 ** np.arange(_DIGITS - 1, -1, -1)
        for first in range(start, stop, count):
            held = min(count, stop - first)
            for at in range(0, held, self._batch):
                end = min(at + self._batch, held)
                users = FIRST_USER + first + np.arange(at, end)
                self._data[self._digits_at[at:end]] = (users[:, None] // powers % 10 + ord("0")).astype(np.uint8)
                yield self._data[self._offsets[at] : self._offsets[end]].tobytes()
