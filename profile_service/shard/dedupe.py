"""What makes a batch, a request and an event count once.

    producer batches   the last sequence of each producer, by partition: a batch applied in part is completed, never
                       repeated
    request ids        the partitions that a request has reached, by request id
    event ids          a bounded window of 64-bit keys, each with its partition, the oldest out first

All three are bounded in number and in time; time is the arrival time that the log holds, so that a replay decides
alike. Only what is to be counted, and so goes to the log, is noted: what is held is a function of the log. Noting is
idempotent, so a snapshot may hold more of it than the log had when the snapshot began. So each is copied piece by piece
while it changes: what changes meanwhile is in the log.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from profile_service.config import Capacity
from profile_service.domain.decay import NS
from profile_service.domain.kernel import inlined_kernel, leaf_kernel, prefetch, to_i64
from profile_service.domain.memory import reserve
from profile_service.wire.apply_request import REQUEST_PREFIX

MOST_PRODUCERS = 100_000
MOST_REQUESTS = 1_000_000


@dataclass
class Producer:
    """What is held of a producer."""

    producer_id: str
    number: int
    """Its place among those that are copied for a snapshot."""
    last: NDArray[np.int64]
    """(partitions,) the last sequence applied."""
    acknowledged: int
    used_ns: int


@dataclass
class Request:
    """What is held of a request."""

    request_id: str
    reached: int
    """The partitions that it has reached, a bit each."""
    used_ns: int

    def among(self, partitions: NDArray[np.int64]) -> list[int]:
        """Which of these partitions it has reached."""
        return [partition for partition in np.unique(partitions).tolist() if self.reached >> partition & 1]


class ProducerSequences:
    """Which batches each producer has had applied, by partition, and which requests."""

    def __init__(self, partitions: int, window_ns: int) -> None:
        self.partitions = partitions
        self._window_ns = window_ns
        self._producers: OrderedDict[str, Producer] = OrderedDict()
        """The longest idle first."""
        self._places: list[Producer | None] = []
        """The same by number."""
        self._free_places: list[int] = []
        self._requests: dict[str, Request] = {}
        self._ring: list[Request | None] = []
        """The same in the order of their coming; number n stands at n modulo MOST_REQUESTS."""
        self._first_request = 0
        self._next_request = 0

    def __len__(self) -> int:
        return len(self._producers)

    def __contains__(self, producer_id: str) -> bool:
        return producer_id in self._producers

    def acknowledged(self, producer_id: str) -> int:
        """The highest sequence up to which the producer is known to be acknowledged everywhere."""
        producer = self._producers.get(producer_id)
        return producer.acknowledged if producer else 0

    def fresh(
        self, producer_id: str, sequence: int, partitions: NDArray[np.int64], now_ns: int
    ) -> NDArray[np.bool_] | None:
        """Which events of a part, of these partitions, are not applied yet; None for all of them."""
        if producer_id.startswith(REQUEST_PREFIX):
            request = self._requests.get(producer_id)
            repeated = request.among(partitions) if request else []
            return ~np.isin(partitions, repeated) if repeated else None
        producer = self._producers.get(producer_id)
        if producer is None or producer.used_ns < now_ns - self._window_ns:
            return None
        fresh: NDArray[np.bool_] = producer.last[partitions] < sequence
        return None if fresh.all() else fresh

    def note(
        self, producer_id: str, sequence: int, acknowledged: int, partitions: NDArray[np.int64], now_ns: int
    ) -> None:
        """Learns that a part was applied to these partitions; to learn it again changes nothing."""
        if producer_id.startswith(REQUEST_PREFIX):
            self._reach(producer_id, partitions, now_ns)
        else:
            last = self._use(producer_id, acknowledged, now_ns).last
            last[partitions] = np.maximum(last[partitions], sequence)

    def _use(self, producer_id: str, acknowledged: int, now_ns: int) -> Producer:
        self._forget_idle(now_ns)
        producer = self._producers.get(producer_id)
        if producer is None:
            producer = self._add(producer_id, np.zeros(self.partitions, dtype=np.int64), 0, now_ns)
        self._producers.move_to_end(producer_id)
        producer.used_ns = max(producer.used_ns, now_ns)
        producer.acknowledged = max(producer.acknowledged, acknowledged)
        return producer

    def _add(self, producer_id: str, last: NDArray[np.int64], acknowledged: int, used_ns: int) -> Producer:
        if not self._free_places:
            self._free_places.append(len(self._places))
            self._places.append(None)
        number = self._free_places.pop()
        producer = Producer(producer_id, number, last, acknowledged, used_ns)
        self._producers[producer_id] = self._places[number] = producer
        return producer

    def _forget_idle(self, now_ns: int) -> None:
        while self._producers:
            oldest = next(iter(self._producers.values()))
            idle = oldest.used_ns < now_ns - self._window_ns
            if not idle and len(self._producers) < MOST_PRODUCERS:
                return
            del self._producers[oldest.producer_id]
            self._places[oldest.number] = None
            self._free_places.append(oldest.number)

    def _reach(self, request_id: str, partitions: NDArray[np.int64], now_ns: int) -> None:
        """Notes that the request has reached the partitions."""
        request = self._requests.get(request_id)
        if request is None:
            self._forget_requests(now_ns)
            request = self._add_request(request_id, 0, now_ns)
        for partition in np.unique(partitions).tolist():
            request.reached |= 1 << partition
        request.used_ns = max(request.used_ns, now_ns)

    def _add_request(self, request_id: str, reached: int, used_ns: int) -> Request:
        request = Request(request_id, reached, used_ns)
        self._requests[request_id] = request
        if self._next_request < MOST_REQUESTS:
            self._ring.append(request)
        else:
            self._ring[self._next_request % MOST_REQUESTS] = request
        self._next_request += 1
        return request

    def _forget_requests(self, now_ns: int) -> None:
        """A request is repeated soon or never: they go in the order of their coming."""
        while self._requests:
            place = self._first_request % MOST_REQUESTS
            oldest = self._ring[place]
            assert oldest is not None
            if oldest.used_ns >= now_ns - self._window_ns and len(self._requests) < MOST_REQUESTS:
                return
            del self._requests[oldest.request_id]
            self._ring[place] = None
            self._first_request += 1

    def producer(self, producer_id: str) -> Producer | None:
        """What is held of a producer."""
        return self._producers.get(producer_id)

    def request(self, request_id: str) -> Request | None:
        """What is held of a request."""
        return self._requests.get(request_id)

    def receive(self, producer_id: str, last: NDArray[np.int64], acknowledged: int, used_ns: int) -> None:
        """Adds what another shard held of a producer, (partitions,) last sequences among it."""
        if producer_id not in self._producers:
            self._forget_idle(used_ns)
        self.load_producers([(producer_id, last, acknowledged, used_ns)])

    def receive_request(self, request_id: str, reached: Sequence[int], used_ns: int) -> None:
        """Adds what another shard held of a request: partitions that it has reached."""
        self._reach(request_id, np.array(reached, np.int64), used_ns)

    @property
    def places(self) -> int:
        """Producers have numbers below this one."""
        return len(self._places)

    def producers(self, first: int, last: int) -> list[Producer]:
        """The producers with numbers from `first` up to `last`."""
        return [producer for producer in self._places[first:last] if producer is not None]

    @property
    def requests_held(self) -> tuple[int, int]:
        """The numbers of the requests: the first one's, and the next one's."""
        return self._first_request, self._next_request

    def requests(self, first: int, last: int) -> list[Request]:
        """The requests with numbers from `first` up to `last` that are still held."""
        numbers = range(max(first, self._first_request), last)
        return [request for n in numbers if (request := self._ring[n % MOST_REQUESTS]) is not None]

    def load_producers(self, producers: Sequence[tuple[str, NDArray[np.int64], int, int]]) -> None:
        """Takes (id, last sequences, acknowledged, used ns) of producers that were copied; one may come twice."""
        for producer_id, last, acknowledged, used_ns in producers:
            held = self._producers.get(producer_id)
            if held is None:
                self._add(producer_id, last.copy(), acknowledged, used_ns)
            else:
                np.maximum(held.last, last, out=held.last)
                held.acknowledged = max(held.acknowledged, acknowledged)
                held.used_ns = max(held.used_ns, used_ns)

    def load_requests(self, requests: Sequence[tuple[str, int, int]]) -> None:
        """Takes (id, partitions reached, used ns) of requests that were copied, in their order."""
        for request_id, reached, used_ns in requests:
            if request_id not in self._requests and len(self._requests) < MOST_REQUESTS:
                self._add_request(request_id, reached, used_ns)

    def finish_load(self) -> None:
        """Puts the producers that were loaded in the order in which they are forgotten."""
        for producer in sorted(self._producers.values(), key=lambda producer: producer.used_ns):
            self._producers.move_to_end(producer.producer_id)

    def check_invariants(self) -> None:
        """Both ways of finding a producer, and a request, agree; for tests."""
        assert len(self._producers) <= MOST_PRODUCERS
        assert [p for p in self._places if p is not None] == sorted(self._producers.values(), key=lambda p: p.number)
        assert all(p.last.shape == (self.partitions,) for p in self._producers.values())
        assert len(self._places) == len(self._producers) + len(self._free_places)
        assert len(self._requests) <= MOST_REQUESTS
        held = self.requests(*self.requests_held)
        assert [r.request_id for r in held] == list(self._requests)
        assert len(held) == self._next_request - self._first_request


_HEAD, _TAIL = range(2)

_AHEAD = 8
"""Keys between asking for a slot and using it: as many as a core can wait for at once."""


@inlined_kernel
def _home(slots: NDArray[np.uint64], key: np.uint64) -> int:
    """The slot where the search for a key begins."""
    return to_i64((key ^ (key >> np.uint64(29))) & np.uint64(len(slots) - 1))


@leaf_kernel
def _place(slots: NDArray[np.uint64], key: np.uint64) -> int:
    """Position of the key, or of the free slot where it belongs."""
    mask = np.uint64(len(slots) - 1)
    at = np.uint64(_home(slots, key))
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
        home = _home(slots, held)
        if ((probe - home) & mask) >= ((probe - hole) & mask):
            slots[hole] = held
            hole = probe
    slots[hole] = np.uint64(0)


@leaf_kernel
def _load(
    slots: NDArray[np.uint64],
    ring: NDArray[np.uint64],
    times: NDArray[np.int64],
    partitions: NDArray[np.int32],
    ends: NDArray[np.int64],
    keys: NDArray[np.uint64],
    keys_times: NDArray[np.int64],
    keys_partitions: NDArray[np.int32],
) -> None:
    capacity = len(ring)
    for i in range(len(keys)):
        key = keys[i]
        if key == np.uint64(0) or slots[_place(slots, key)] == key:
            continue
        if ends[_TAIL] - ends[_HEAD] == capacity:
            _drop(slots, ring[ends[_HEAD] % capacity])
            ends[_HEAD] += 1
        slots[_place(slots, key)] = key
        ring[ends[_TAIL] % capacity] = key
        times[ends[_TAIL] % capacity] = keys_times[i]
        partitions[ends[_TAIL] % capacity] = keys_partitions[i]
        ends[_TAIL] += 1


@leaf_kernel
def _admit(
    slots: NDArray[np.uint64],
    ring: NDArray[np.uint64],
    times: NDArray[np.int64],
    partitions: NDArray[np.int32],
    ends: NDArray[np.int64],
    keys: NDArray[np.uint64],
    keys_partitions: NDArray[np.int64],
    now_ns: int,
    oldest_ns: int,
    fresh: NDArray[np.bool_],
) -> int:
    """Marks in `fresh` the keys not in the window, puts them in; returns how many were there.

    The slots are far more than a cache holds: those that are needed soon are asked for ahead.
    """
    capacity = len(ring)
    head = ends[_HEAD]
    tail = ends[_TAIL]
    # Their places in the ring, kept beside them: a division an event would show.
    first = head % capacity
    last = tail % capacity
    repeated = 0
    while head < tail and times[first] < oldest_ns:
        if first + _AHEAD < capacity:
            prefetch(slots, _home(slots, ring[first + _AHEAD]))
        _drop(slots, ring[first])
        head += 1
        first = first + 1 if first + 1 < capacity else 0
    for i in range(min(_AHEAD, len(keys))):
        prefetch(slots, _home(slots, keys[i]))
    for i in range(len(keys)):
        if i + _AHEAD < len(keys):
            prefetch(slots, _home(slots, keys[i + _AHEAD]))
        if tail - head + _AHEAD >= capacity and first + _AHEAD < capacity:
            prefetch(slots, _home(slots, ring[first + _AHEAD]))
        key = keys[i]
        if key == np.uint64(0):
            continue
        at = _place(slots, key)
        if slots[at] == key:
            fresh[i] = False
            repeated += 1
            continue
        if tail - head == capacity:
            _drop(slots, ring[first])
            head += 1
            first = first + 1 if first + 1 < capacity else 0
            at = _place(slots, key)
        slots[at] = key
        ring[last] = key
        times[last] = now_ns
        partitions[last] = keys_partitions[i]
        tail += 1
        last = last + 1 if last + 1 < capacity else 0
    ends[_HEAD] = head
    ends[_TAIL] = tail
    return repeated


class EventIds(NamedTuple):
    """Keys that were copied out of a window, in the order of their coming."""

    keys: NDArray[np.uint64]
    times: NDArray[np.int64]
    """When each came, ns since 1970."""
    partitions: NDArray[np.int32]
    """Of their users; NO_PARTITION where a snapshot of an earlier version did not say."""


NO_PARTITION = -1


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
        self._partitions: NDArray[np.int32] = reserve(capacity, np.int32)
        self._ends = np.zeros(2, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[_TAIL] - self._ends[_HEAD])

    def admit(self, keys: NDArray[np.uint64], partitions: NDArray[np.int64], now_ns: int) -> NDArray[np.bool_] | None:
        """Which events, of these partitions, are new (a key of 0 always is), and notes them; None for all of them."""
        fresh = np.ones(len(keys), dtype=np.bool_)
        repeated = _admit(
            self._slots,
            self._ring,
            self._times,
            self._partitions,
            self._ends,
            keys,
            partitions,
            now_ns,
            now_ns - self._window_ns,
            fresh,
        )
        return fresh if repeated else None

    def note(self, keys: NDArray[np.uint64], partitions: NDArray[np.int64], now_ns: int) -> None:
        """Learns that events with these keys were counted; to learn it again changes nothing."""
        self.admit(keys, partitions, now_ns)

    @property
    def held(self) -> tuple[int, int]:
        """The numbers of the keys in the order of their coming: the oldest one's, and the next one's."""
        return int(self._ends[_HEAD]), int(self._ends[_TAIL])

    def copy(self, first: int, last: int) -> EventIds:
        """The keys with numbers from `first` up to `last` that are still held."""
        places = np.arange(max(first, self.held[0]), last) % max(1, len(self._ring))
        return EventIds(self._ring[places], self._times[places], self._partitions[places])

    def load(self, copied: EventIds) -> None:
        """Takes keys that were copied, in their order; beyond the capacity the oldest go."""
        _load(self._slots, self._ring, self._times, self._partitions, self._ends, *copied)

    def check_invariants(self) -> None:
        """What is in the ring is found, and nothing else is there; for tests."""
        first, last = self.held
        assert 0 <= last - first <= len(self._ring)
        keys = self._ring[np.arange(first, last) % len(self._ring)]
        assert np.array_equal(np.sort(keys), np.sort(self._slots[self._slots != 0]))
        assert all(self._slots[_place(self._slots, key)] == key for key in keys)


class Admission:
    """Decides which events are counted, and notes that they are.

    Args:
        partitions: of the whole service.
        capacity: bounds of what is remembered.
    """

    def __init__(self, partitions: int, capacity: Capacity) -> None:
        self._partitions = partitions
        self._bounds = capacity
        self.duplicate_count = 0
        """Events left out because they were counted before; what came after the last snapshot is not known to a
        recovery."""
        self.forget_admitted()

    def forget_admitted(self) -> None:
        """Remembers nothing any more."""
        bounds = self._bounds
        self.producers = ProducerSequences(self._partitions, int(bounds.producer_window_s * NS))
        self.event_ids = EventIdWindow(bounds.event_ids_per_shard, int(bounds.event_id_window_s * NS))

    def admit(
        self,
        producer_id: str,
        sequence: int,
        acknowledged_sequence: int,
        partitions: NDArray[np.int64],
        event_id_hashes: NDArray[np.uint64],
        now_ns: int,
    ) -> NDArray[np.bool_] | None:
        """Which events of a part were not counted before, and notes that they now are; None for all of them. A part
        without events only tells up to where its producer is acknowledged."""
        fresh = None
        if producer_id:
            fresh = self.producers.fresh(producer_id, sequence, partitions, now_ns)
        chosen = None if fresh is None else np.flatnonzero(fresh)
        keys = event_id_hashes if chosen is None else event_id_hashes[chosen]
        if keys.any():
            new = self.event_ids.admit(keys, partitions if chosen is None else partitions[chosen], now_ns)
            if new is not None:
                chosen = np.flatnonzero(new) if chosen is None else chosen[new]
                fresh = np.zeros(len(event_id_hashes), dtype=np.bool_)
                fresh[chosen] = True
        counted = partitions if fresh is None else partitions[fresh]
        self.duplicate_count += len(partitions) - len(counted)
        if producer_id and (len(counted) or not len(partitions)):
            self.producers.note(producer_id, sequence, acknowledged_sequence, counted, now_ns)
        return fresh
