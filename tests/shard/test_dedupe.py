"""Sequences, request ids and event ids count once, within their bounds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from profile_service.shard.dedupe import EventIdWindow, ProducerSequences

HOUR = 3600 * 10**9


def admit(
    sequences: ProducerSequences, producer_id: str, sequence: int, partitions: NDArray[np.int64], now_ns: int
) -> NDArray[np.bool_] | None:
    """Asks, and counts what is fresh."""
    fresh = sequences.fresh(producer_id, sequence, partitions, now_ns)
    sequences.note(producer_id, sequence, 0, partitions if fresh is None else partitions[fresh], now_ns)
    return fresh


@given(st.data())
def test_each_partition_of_each_batch_is_admitted_once(data: st.DataObject) -> None:
    """A producer sends its batches in order, and any of them again, whole or the part that one owner has."""
    sequences = ProducerSequences(8, HOUR)
    batches = {s: data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=12)) for s in range(1, 6)}
    admitted: dict[tuple[int, int], int] = {}
    newest = 0
    for _ in range(data.draw(st.integers(1, 25))):
        sequence = data.draw(st.integers(1, min(5, newest + 1)))
        newest = max(newest, sequence)
        partitions = np.array(batches[sequence], dtype=np.int64)
        fresh = admit(sequences, "p", sequence, partitions, 0)
        for position, partition in enumerate(batches[sequence]):
            if fresh is None or fresh[position]:
                key = sequence, partition
                admitted[key] = admitted.get(key, 0) + 1
    for sequence in range(1, newest + 1):
        for partition in set(batches[sequence]):
            # One admission for each event of the partition: the batch's first way through, and never again.
            assert admitted.get((sequence, partition), 0) == batches[sequence].count(partition)


def test_a_request_id_counts_once_for_each_partition() -> None:
    sequences = ProducerSequences(8, HOUR)
    assert admit(sequences, "request:r", 1, np.array([1, 1, 2]), 0) is None
    fresh = admit(sequences, "request:r", 1, np.array([1, 3, 2]), 0)
    assert fresh is not None
    assert fresh.tolist() == [False, True, False]


def test_idle_producers_are_forgotten_and_busy_ones_are_not() -> None:
    sequences = ProducerSequences(4, HOUR)
    sequences.note("idle", 1, 0, np.array([0]), 0)
    sequences.note("busy", 1, 1, np.array([0]), 0)
    assert sequences.fresh("idle", 1, np.array([0]), HOUR) is not None
    assert sequences.fresh("idle", 1, np.array([0]), HOUR + 1) is None
    sequences.note("busy", 2, 1, np.array([0]), 2 * HOUR)
    assert len(sequences) == 1
    assert sequences.acknowledged("busy") == 1
    assert sequences.acknowledged("idle") == 0


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), max_size=200), st.integers(2, 12))
def test_event_ids_count_once_within_the_window(steps: list[tuple[int, int]], capacity: int) -> None:
    window = EventIdWindow(capacity, window_ns=10)
    held: dict[int, int] = {}
    now = 0
    for key, elapsed in steps:
        now += elapsed
        held = {k: t for k, t in held.items() if t >= now - 10}
        fresh = window.admit(np.array([key], dtype=np.uint64), np.array([key % 4]), now)
        expected = key == 0 or key not in held
        assert (fresh is None or bool(fresh[0])) == expected
        if expected and key:
            if len(held) == capacity:
                held.pop(next(iter(held)))
            held[key] = now
        assert len(window) == len(held)


def test_an_id_twice_in_one_batch_counts_once() -> None:
    fresh = EventIdWindow(10, 10).admit(np.array([5, 5, 0, 0], dtype=np.uint64), np.zeros(4, np.int64), 0)
    assert fresh is not None
    assert fresh.tolist() == [True, False, True, True]
