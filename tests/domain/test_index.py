"""ByteIndex against a dict: numbers are stable, dense and never shared, whatever is added and removed."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from profile_service.domain.index import MOST_BYTES_A_STRING, ByteIndex


class IndexMachine(RuleBasedStateMachine):
    """Adds and removes strings from a small pool, so that chains collide and numbers are reused."""

    @initialize(reuse_by_length=st.booleans())
    def start(self, reuse_by_length: bool) -> None:
        self.index = ByteIndex(capacity=3000, arena_bytes=20_000, reuse_by_length=reuse_by_length)
        self.model: dict[bytes, int] = {}

    @rule(strings=st.lists(st.integers(0, 400), max_size=80))
    def add(self, strings: list[int]) -> None:
        given = [b"%d" % (number * 7919) for number in strings]
        for string, number in zip(given, self.index.add(given), strict=True):
            if string in self.model:
                assert self.model[string] == number
            else:
                assert number not in self.model.values()
                self.model[string] = number

    @rule(numbers=st.lists(st.integers(0, 400), max_size=40))
    def remove(self, numbers: list[int]) -> None:
        for number in numbers:
            string = b"%d" % (number * 7919)
            assert self.index.remove(string) == self.model.pop(string, -1)

    @rule(kept=st.sets(st.integers(0, 400)), first=st.integers(0, 50), count=st.integers(0, 500))
    def remove_unmarked(self, kept: set[int], first: int, count: int) -> None:
        marks = np.zeros(self.index.high_water, np.uint8)
        marks[[number for string, number in self.model.items() if int(string) // 7919 in kept]] = 1
        gone = [s for s, n in self.model.items() if first <= n < first + count and not marks[n]]
        assert self.index.remove_unmarked(marks, first, first + count) == len(gone)
        for string in gone:
            del self.model[string]

    @rule(number=st.integers(0, 500))
    def get(self, number: int) -> None:
        string = b"%d" % (number * 7919)
        assert self.index.get(string) == self.model.get(string, -1)

    @invariant()
    def holds_the_same(self) -> None:
        if hasattr(self, "index"):
            assert len(self.index) == len(self.model)
            assert sorted(self.model.values()) == self.index.numbers().tolist()
            self.index.check_invariants()


TestIndexMachine = IndexMachine.TestCase


class GrowingMachine(IndexMachine):
    """The same with so many strings that the table grows, a part at a time, while others come and go."""

    @initialize(reuse_by_length=st.booleans())
    def start(self, reuse_by_length: bool) -> None:
        super().start(reuse_by_length)
        self.add(list(range(800)))

    @rule(first=st.integers(400, 1500), count=st.integers(1, 30))
    def add_run(self, first: int, count: int) -> None:
        self.add(list(range(first, first + count)))

    @rule(first=st.integers(0, 1500), count=st.integers(1, 30))
    def remove_run(self, first: int, count: int) -> None:
        self.remove(list(range(first, first + count)))


TestGrowingMachine = GrowingMachine.TestCase
TestGrowingMachine.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("seed", range(3))
def test_a_table_grows_a_part_at_a_time_and_everything_is_found_meanwhile(seed: int) -> None:
    rng = np.random.default_rng(seed)
    index = ByteIndex(capacity=40_000, arena_bytes=1_000_000)
    model: dict[bytes, int] = {}
    fresh = parts = 0
    while len(model) < 6_000:
        strings = [b"%d" % number for number in range(fresh, fresh + int(rng.integers(1, 60)))]
        fresh += len(strings)
        model.update(zip(strings, index.add(strings), strict=True))
        gone = [b"%d" % number for number in rng.integers(0, fresh, len(strings) // 3)]
        for string in gone:
            assert index.remove(string) == model.pop(string, -1)
        parts += index.is_growing
        if rng.random() < 0.03 and index.is_growing:
            index.check_invariants()
            assert len(index) == len(model)
            assert all(index.get(string) == number for string, number in model.items())
    assert parts > 20
    index.check_invariants()
    assert sorted(model.values()) == index.numbers().tolist()


def test_a_growing_table_keeps_strings_of_one_home_apart() -> None:
    index = ByteIndex(capacity=5000, arena_bytes=100_000)
    count = 3000
    buffer = np.frombuffer(b"".join(b"%04d" % number for number in range(count)), dtype=np.uint8)
    # All hashes are among three, of which one is the last of all: its chain goes on beyond the table.
    keys = np.array([0, 1 << 31, (1 << 32) - 1], dtype=np.uint64)[np.arange(count) % 3]
    offsets, lengths = np.arange(count) * 4, np.full(count, 4, dtype=np.int32)
    numbers = np.empty(count, dtype=np.int64)
    for at in range(0, count, 20):
        part = slice(at, at + 20)
        assert index.make_room(20, 80)
        index.find(buffer, offsets[part], lengths[part], keys[part], numbers[part], insert=True)
        found = np.empty(at + 20, dtype=np.int64)
        index.find(buffer, offsets[: at + 20], lengths[: at + 20], keys[: at + 20], found, insert=False)
        assert np.array_equal(found, np.arange(at + 20))


def test_an_index_that_has_just_grown_takes_no_more_than_it_says() -> None:
    index = ByteIndex(capacity=100_000, arena_bytes=1_000_000)
    for first in range(0, 60_000, 50):
        index.add([b"%06d" % number for number in range(first, first + 50)])
        if first > 2_000:
            assert index.memory_bytes - 6 * len(index) <= MOST_BYTES_A_STRING * len(index) * 1.01


@given(st.lists(st.binary(max_size=40), max_size=60))
def test_any_bytes_come_back(strings: list[bytes]) -> None:
    index = ByteIndex(capacity=100, arena_bytes=10_000)
    numbers = index.add(strings)
    assert [index.bytes_of(number) for number in numbers] == strings
    assert len(index) == len(set(strings))


def test_equal_hashes_are_told_apart_by_their_bytes() -> None:
    index = ByteIndex(capacity=10, arena_bytes=100)
    buffer = np.frombuffer(b"abxy", dtype=np.uint8)
    numbers = np.empty(2, dtype=np.int64)
    index.find(
        buffer,
        np.array([0, 2]),
        np.array([2, 2], dtype=np.int32),
        np.array([42, 42], dtype=np.uint64),
        numbers,
        insert=True,
    )
    assert numbers.tolist() == [0, 1]
    assert index.bytes_of(0) == b"ab"
    assert index.bytes_of(1) == b"xy"


def test_a_full_index_says_so() -> None:
    index = ByteIndex(capacity=2, arena_bytes=100)
    index.add([b"a", b"b"])
    with pytest.raises(OverflowError, match="2 of at most 2"):
        index.add([b"c"])


def test_the_arena_of_removed_strings_is_used_again() -> None:
    index = ByteIndex(capacity=1000, arena_bytes=1000)
    for round_number in range(50):
        strings = [b"%04d-%04d" % (round_number, number) for number in range(50)]
        index.add(strings)
        for string in strings[1:]:
            index.remove(string)
        index.check_invariants()
    assert len(index) == 50


def test_an_index_that_reuses_by_length_takes_no_more_room_and_is_full_when_it_is() -> None:
    index = ByteIndex(capacity=100, arena_bytes=1000, reuse_by_length=True)
    for turn in range(50):
        strings = [b"%03d" % n + b"x" * (n % 3) for n in range(turn, turn + 60)]
        index.add(strings)
        memory = index.memory_bytes
        index.remove_unmarked(np.zeros(index.high_water, np.uint8), 0, index.high_water)
        assert len(index) == 0
        assert memory <= 8 * 1024 + 60 * (8 + 5)
        index.check_invariants()
    # Of other lengths: numbers are taken from those that had a place that does not fit.
    assert len(set(index.add([b"%02d" % n for n in range(100)]))) == 100
    index.check_invariants()
    with pytest.raises(OverflowError):
        index.add([b"one more"])


def test_what_is_copied_out_is_loaded_again_with_its_numbers() -> None:
    index = ByteIndex(capacity=100, arena_bytes=10_000, reuse_by_length=True)
    strings = [b"", b"a", b"bb" * 20, "日産".encode(), *(b"%d" % n for n in range(40))]
    index.add(strings)
    for string in strings[::3]:
        index.remove(string)
    other = ByteIndex(capacity=100, arena_bytes=10_000, reuse_by_length=True)
    number = 0
    while number < index.high_water:
        lengths, target = np.empty(7, np.int32), np.empty(45, np.uint8)
        following, size = index.copy_strings(number, min(number + 7, index.high_water), lengths, target)
        other.load_numbered(number, lengths[: following - number], target[:size])
        number = following
    other.check_invariants()
    assert [other.get(string) for string in strings] == [index.get(string) for string in strings]
    with pytest.raises(ValueError, match="do not follow"):
        other.load_numbered(3, np.array([1], np.int32), np.frombuffer(b"z", np.uint8))
    with pytest.raises(ValueError, match="do not add up"):
        other.load_numbered(other.high_water, np.array([2], np.int32), np.frombuffer(b"z", np.uint8))


@pytest.mark.parametrize("partitions", [1, 2, 256])
def test_the_users_of_a_shard_stand_near_their_homes_however_few_partitions_it_owns(partitions: int) -> None:
    """A shard's users share the upper bits of their hashes."""
    candidates = [b"user %d" % number for number in range(5000 * partitions)]
    own = [string for string in candidates if xxhash.xxh64_intdigest(string) * partitions >> 64 == 0]
    index = ByteIndex(capacity=10_000, arena_bytes=1 << 20)
    for start in range(0, len(own), 500):
        index.add(own[start : start + 500])
    taken = index.arrays.slots != 0
    ends = np.flatnonzero(np.diff(np.concatenate([[False], taken, [False]]).astype(np.int8)))
    # A string is at most so far from its home. By chance a run of slots at this load has some hundreds, not thousands.
    assert int((ends[1::2] - ends[::2]).max()) < 1000
