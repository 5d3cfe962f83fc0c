"""What makes a batch, a request and an event count once.

    producer batches   the last sequence of each producer, by partition: a batch applied in part is completed, never
    repeated request ids        the partitions that a request has reached, by request id event ids          a bounded
    window of 64-bit keys, the oldest out first

All three are bounded in number and in time; time is the arrival time that the log holds, so that a replay decides
alike.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.kernel import leaf_kernel, to_i64
from profile_service.domain.memory import reserve

REQUEST_PREFIX = "request:"
"""A producer id that starts so names a single request, which has no successor."""

MOST_PRODUCERS = 100_000
MOST_REQUESTS = 1_000_000


@dataclass
class _Producer:
    last: NDArray[np.int64]
    """(partitions,) the last sequence applied."""
    acknowledged: int
    used_ns: int


class ProducerSequences:
    """Which batches each producer has had applied, by partition."""

    def __init__(self, partitions: int, window_ns: int) -> None:
        self._partitions = partitions
        self._window_ns = window_ns
        self._producers: OrderedDict[str, _Producer] = OrderedDict()
        self._requests: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._producers)

    def acknowledged(self, producer_id: str) -> int:
        """The highest sequence up to which the producer is known to be acknowledged everywhere."""
        producer = self._producers.get(producer_id)
        return producer.acknowledged if producer else 0

    def admit(
        self, producer_id: str, sequence: int, acknowledged: int, partitions: NDArray[np.int64], now_ns: int
    ) -> NDArray[np.bool_] | None:
        """Which events of a part are not applied yet, and notes that they now are; None for all of them."""
        if producer_id.startswith(REQUEST_PREFIX):
            return self._admit_request(producer_id, partitions, now_ns)
        self._forget_idle(now_ns)
        producer = self._producers.get(producer_id)
        if producer is None:
            producer = _Producer(np.zeros(self._partitions, dtype=np.int64), 0, now_ns)
            self._producers[producer_id] = producer
        self._producers.move_to_end(producer_id)
        producer.used_ns = max(producer.used_ns, now_ns)
        producer.acknowledged = max(producer.acknowledged, acknowledged)
        fresh: NDArray[np.bool_] = producer.last[partitions] < sequence
        if fresh.all():
            producer.last[partitions] = sequence
            return None
        producer.last[partitions[fresh]] = sequence
        return fresh

    def _admit_request(self, request_id: str, partitions: NDArray[np.int64], now_ns: int) -> NDArray[np.bool_] | None:
        reached, _ = self._requests.get(request_id, (0, 0))
        touched = np.flatnonzero(np.bincount(partitions, minlength=self._partitions)).tolist()
        repeated = [partition for partition in touched if reached >> partition & 1]
        for partition in touched:
            reached |= 1 << partition
        self._requests[request_id] = (reached, now_ns)
        self._requests.move_to_end(request_id)
        while len(self._requests) > MOST_REQUESTS:
            self._requests.popitem(last=False)
        return ~np.isin(partitions, repeated) if repeated else None

    def _forget_idle(self, now_ns: int) -> None:
        while self._producers:
            oldest = next(iter(self._producers))
            idle = self._producers[oldest].used_ns < now_ns - self._window_ns
            if not idle and len(self._producers) < MOST_PRODUCERS:
                return
            del self._producers[oldest]


_HEAD, _TAIL = range(2)


@leaf_kernel
def _place(slots: NDArray[np.uint64], key: np.uint64) -> int:
    """Position of the key, or of the free slot where it belongs."""
    mask = np.uint64(len(slots) - 1)
    at = (key ^ (key >> np.uint64(29))) & mask
    while slots[at] != np.uint64(0) and slots[at] != key:
        at = (at + np.uint64(1)) & mask
    return to_i64(at)


@leaf_kernel
def _drop(slots: NDArray[np.uint64], key: np.uint64) -> None:
    mask = len(slots) - 1
    hole = _place(slots, key)
    probe = hole
    while True:
        probe = (probe + 1) & mask
        held = slots[probe]
        if held == np.uint64(0):
            break
        home = to_i64((held ^ (held >> np.uint64(29))) & np.uint64(mask))
        if ((probe - home) & mask) >= ((probe - hole) & mask):
            slots[hole] = held
            hole = probe
    slots[hole] = np.uint64(0)


@leaf_kernel
def _admit(
    slots: NDArray[np.uint64],
    ring: NDArray[np.uint64],
    times: NDArray[np.int64],
    ends: NDArray[np.int64],
    keys: NDArray[np.uint64],
    now_ns: int,
    oldest_ns: int,
    fresh: NDArray[np.bool_],
) -> int:
    """Marks in `fresh` the keys not in the window, puts them in; returns how many were there."""
    capacity = len(ring)
    repeated = 0
    while ends[_HEAD] < ends[_TAIL] and times[ends[_HEAD] % capacity] < oldest_ns:
        _drop(slots, ring[ends[_HEAD] % capacity])
        ends[_HEAD] += 1
    for i in range(len(keys)):
        key = keys[i]
        if key == np.uint64(0):
            continue
        at = _place(slots, key)
        if slots[at] == key:
            fresh[i] = False
            repeated += 1
            continue
        if ends[_TAIL] - ends[_HEAD] == capacity:
            _drop(slots, ring[ends[_HEAD] % capacity])
            ends[_HEAD] += 1
            at = _place(slots, key)
        slots[at] = key
        ring[ends[_TAIL] % capacity] = key
        times[ends[_TAIL] % capacity] = now_ns
        ends[_TAIL] += 1
    return repeated


class EventIdWindow:
    """The keys of the event ids seen lately: at most `capacity` of them, none older than `window_ns`.

    A key is the XXH64 of the event id seeded with that of the user id: among two million of them, two different ids
    share one with a probability of one in ten million.
    """

    def __init__(self, capacity: int, window_ns: int) -> None:
        slots = 1024
        while slots < 2 * capacity:
            slots *= 2
        self._window_ns = window_ns
        self._slots: NDArray[np.uint64] = reserve(slots, np.uint64)
        self._ring: NDArray[np.uint64] = reserve(capacity, np.uint64)
        self._times: NDArray[np.int64] = reserve(capacity, np.int64)
        self._ends = np.zeros(2, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[_TAIL] - self._ends[_HEAD])

    def admit(self, keys: NDArray[np.uint64], now_ns: int) -> NDArray[np.bool_] | None:
        """Which events are new (a key of 0 always is), and notes them; None for all of them."""
        fresh = np.ones(len(keys), dtype=np.bool_)
        repeated = _admit(
            self._slots, self._ring, self._times, self._ends, keys, now_ns, now_ns - self._window_ns, fresh
        )
        return fresh if repeated else None
