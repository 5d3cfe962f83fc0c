"""Byte strings to dense numbers: user ids to rows, and texts to interned ids.

Open addressing with linear probing over XXH64. A table slot and what it points to:

    slot  (8 bytes)   | lower half of the hash | number + 1 |      0 is free
    entry (8 bytes)   | place in the arena << 16, length |
    arena             the bytes themselves

A lookup compares the bytes, never the hash alone. Removing shifts the following entries of the probe chain back, so no
tombstones gather. Everything lies in reserved address space and never moves as a whole.

A string's home is the slot that is as far into the table as the lower half of its hash is into all of them: the upper
half is what users are given to shards by, and a shard's would all be at home in a part of the table. So a longer table
has the same order, and the table grows by a quarter where it stands, from its end to its start, a few slots at each
call:

    slots   | homes as in the shorter table | left behind | homes as in the longer table | probe chains' end ...
            0                           frontier                                       homes

The frontier counts in homes of the shorter table: what would be at home below it still is. Homes do not wrap around; a
chain at the end goes on beyond it, where there is a slot for each string that can come.

A number that was given back has no hash and the uppermost bit of its extent set, and stands in a list of free ones. An
index either gives the next string any free number, and closes the gaps in the arena when that is full; or it gives it
one that a string of the same length had, together with that one's place in the arena, which then leaves no gaps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from profile_service.domain.hashing import xxh64
from profile_service.domain.kernel import copy_bytes, inlined_kernel, leaf_kernel, load_u64, prefetch, to_i64
from profile_service.domain.memory import reserve

_LENGTH_BITS = 16
MOST_BYTES = (1 << _LENGTH_BITS) - 1
"""The longest byte string that an entry can hold."""

_FULLEST = 0.8
"""Strings to a home when the table begins to grow."""
_GROWTH = 1.25
_SMALLEST = 1 << 10
"""Homes of an empty index."""
_PACE = 8
"""Homes that the frontier passes for each string that may come: so the shorter part never gets fuller than 0.93."""
_AT_ONCE = 256
"""Homes that the frontier passes together."""
MOST_BYTES_A_STRING = 8 + 8 * _GROWTH / _FULLEST
"""What the index takes beside a string's own bytes, when its table has just grown."""
_AHEAD = 256
"""Keys whose way is looked up ahead: their slots, entries and bytes together stay within a processor's nearest caches.
"""
_NEAR_SLOTS = 1 << 12
"""An index of so many slots is near anyway."""
_COUNT, _ARENA_END, _GARBAGE, HIGH_WATER, _HOMES, _LONGER, _FRONTIER = range(7)
"""Entries of the state. Numbers below `HIGH_WATER` have been in use at some time. `_LONGER` is the number of homes that
the table grows to, and `_HOMES` like `_FRONTIER` where it does not grow."""
_SHORT = 16
"""Bytes that are compared at once; the arena goes on for so many behind the last string."""
_FREE = np.uint64(1 << 63)
_PLACELESS = MOST_BYTES + 1
"""Where a list by length begins of those that have no place in the arena."""


class IndexArrays(NamedTuple):
    """An index as kernels see it."""

    slots: NDArray[np.uint64]
    entries: NDArray[np.uint64]
    arena: NDArray[np.uint8]
    state: NDArray[np.int64]
    free: NDArray[np.int64]
    """The number, plus 1, with which each list of free ones begins."""
    next_free: NDArray[np.int64]
    """How it goes on."""


@inlined_kernel
def _is_equal(arena: NDArray[np.uint8], place: int, buffer: NDArray[np.uint8], start: int, length: int) -> bool:
    if length <= _SHORT and start + _SHORT <= buffer.size:
        # No branch depends on the length, which no processor could foresee. Two shifts, as one of 64 bits is undefined.
        head = min(length, 8)
        shift, rest_shift = np.uint64(32 - 4 * head), np.uint64(32 - 4 * (length - head))
        first = (load_u64(arena, place) ^ load_u64(buffer, start)) << shift << shift
        second = (load_u64(arena, place + 8) ^ load_u64(buffer, start + 8)) << rest_shift << rest_shift
        return bool(first | second == np.uint64(0))
    k = 0
    while k + 8 <= length:
        if load_u64(arena, place + k) != load_u64(buffer, start + k):
            return False
        k += 8
    if length >= 8:
        # What is left, together with some of what was equal.
        return bool(load_u64(arena, place + length - 8) == load_u64(buffer, start + length - 8))
    while k < length:
        if arena[place + k] != buffer[start + k]:
            return False
        k += 1
    return True


@inlined_kernel
def _half(key: np.uint64) -> np.uint64:
    """The half of a hash that a slot holds."""
    return key & np.uint64(0xFFFFFFFF)


@inlined_kernel
def _home(state: NDArray[np.int64], half: np.uint64) -> int:
    """The slot where the search for strings with this half of the hash begins."""
    home = (to_i64(half) * state[_HOMES]) >> 32
    if home >= state[_FRONTIER]:
        home = (to_i64(half) * state[_LONGER]) >> 32
    return int(home)


@leaf_kernel
def _find(
    state: NDArray[np.int64],
    slots: NDArray[np.uint64],
    entries: NDArray[np.uint64],
    arena: NDArray[np.uint8],
    buffer: NDArray[np.uint8],
    start: int,
    length: int,
    key: np.uint64,
) -> int:
    """Position of the key's slot, or -1 - the position of the free slot where it belongs."""
    half = _half(key)
    at = _home(state, half)
    while slots[at] != np.uint64(0):
        if slots[at] >> np.uint64(32) == half:
            extent = to_i64(entries[to_i64(slots[at] & np.uint64(0xFFFFFFFF)) - 1])
            if (extent & MOST_BYTES) == length and _is_equal(arena, extent >> _LENGTH_BITS, buffer, start, length):
                return at
        at += 1
    return -1 - at


@leaf_kernel
def _look_ahead(
    state: NDArray[np.int64],
    slots: NDArray[np.uint64],
    entries: NDArray[np.uint64],
    arena: NDArray[np.uint8],
    length: NDArray[np.int32],
    key: NDArray[np.uint64],
    first: int,
    last: int,
    likely: NDArray[np.int64],
) -> None:
    """For the keys from `first` up to `last` the number whose slot has the same half of the hash; -1 for none.

    The answers are hints. What counts is that slot, entry and bytes are near when the search needs them: in each of the
    loops no load waits for the one before, so the processor has as many under way as it can.
    """
    for i in range(first, last):
        prefetch(slots, _home(state, _half(key[i])))
    for i in range(first, last):
        number = -1
        if length[i] >= 0:
            half = _half(key[i])
            at = _home(state, half)
            while slots[at] != np.uint64(0):
                if slots[at] >> np.uint64(32) == half:
                    number = to_i64(slots[at] & np.uint64(0xFFFFFFFF)) - 1
                    prefetch(entries, number)
                    break
                at += 1
        likely[i] = number
    for i in range(first, last):
        if likely[i] >= 0:
            prefetch(arena, to_i64(entries[likely[i]] >> np.uint64(_LENGTH_BITS)))


@leaf_kernel
def find_many(
    index: IndexArrays,
    buffer: NDArray[np.uint8],
    offset: NDArray[np.int64],
    length: NDArray[np.int32],
    key: NDArray[np.uint64],
    insert: bool,
    numbers: NDArray[np.int64],
) -> int:
    """Fills `numbers`; -1 for absent (length below 0, or not found where `insert` is off). Returns how many were new.

    There is room for what may be inserted. Freed numbers are given before those that were never used.
    """
    slots, entries, arena, state = index.slots, index.entries, index.arena, index.state
    free, next_free = index.free, index.next_free
    new = 0
    for start in range(0, len(key), _AHEAD):
        stop = min(start + _AHEAD, len(key))
        if state[_HOMES] > _NEAR_SLOTS:
            _look_ahead(state, slots, entries, arena, length, key, start, stop, numbers)
        else:
            numbers[start:stop] = -1
        for i in range(start, stop):
            size = to_i64(length[i])
            if size < 0:
                continue
            likely = numbers[i]
            if likely >= 0:
                extent = to_i64(entries[likely])
                if (extent & MOST_BYTES) == size and _is_equal(arena, extent >> _LENGTH_BITS, buffer, offset[i], size):
                    continue
            at = _find(state, slots, entries, arena, buffer, offset[i], size, key[i])
            if at >= 0:
                numbers[i] = to_i64(slots[at] & np.uint64(0xFFFFFFFF)) - 1
                continue
            if not insert:
                numbers[i] = -1
                continue
            of_its_length = size if len(free) > 1 else 0
            any_other = len(free) - 1
            if len(free) > 1 and free[of_its_length] != 0:
                number = free[of_its_length] - 1
                free[of_its_length] = next_free[number]
                place = to_i64((entries[number] & ~_FREE) >> np.uint64(_LENGTH_BITS))
            else:
                if free[any_other] == 0 and state[HIGH_WATER] == len(entries):
                    # All numbers were in use at some time: one whose place does not fit is better than none.
                    any_other = 0
                    while free[any_other] == 0:
                        any_other += 1
                if free[any_other] != 0:
                    number = free[any_other] - 1
                    free[any_other] = next_free[number]
                else:
                    number = state[HIGH_WATER]
                    state[HIGH_WATER] = number + 1
                place = state[_ARENA_END]
                state[_ARENA_END] = place + size
            copy_bytes(arena, place, buffer, offset[i], size)
            entries[number] = np.uint64((place << _LENGTH_BITS) | size)
            slots[-1 - at] = (_half(key[i]) << np.uint64(32)) | np.uint64(number + 1)
            state[_COUNT] += 1
            numbers[i] = number
            new += 1
    return new


@leaf_kernel
def _remove(state: NDArray[np.int64], slots: NDArray[np.uint64], at: int) -> None:
    """Frees a slot, moving back what would no longer be found behind the hole."""
    hole = at
    probe = at + 1
    while slots[probe] != np.uint64(0):
        if _home(state, slots[probe] >> np.uint64(32)) <= hole:
            slots[hole] = slots[probe]
            hole = probe
        probe += 1
    slots[hole] = np.uint64(0)


@leaf_kernel
def _grow(state: NDArray[np.int64], slots: NDArray[np.uint64], homes: int) -> None:
    """Moves the frontier down by so many homes, or to where the table has grown."""
    while homes > 0 and state[_FRONTIER] > 0:
        end = state[_FRONTIER]
        start = max(0, end - min(homes, _AT_ONCE))
        homes -= end - start
        while slots[end] != np.uint64(0):
            end += 1
        # From here on `_home` tells where each is to be. What was at home from `start` up to the old frontier stands
        # before `end`, mostly ahead of its new home, where nothing but this search would find it.
        state[_FRONTIER] = start
        # From the end on, so that mostly nothing stands behind one that leaves.
        for at in range(end - 1, start - 1, -1):
            held = slots[at]
            home = _home(state, held >> np.uint64(32))
            if held == np.uint64(0) or home <= at:
                continue
            _remove(state, slots, at)
            while slots[home] != np.uint64(0):
                home += 1
            slots[home] = held
    if state[_FRONTIER] == 0:
        state[_HOMES] = state[_LONGER]
        state[_FRONTIER] = state[_LONGER]


@leaf_kernel
def _give_back(
    slots: NDArray[np.uint64],
    entries: NDArray[np.uint64],
    state: NDArray[np.int64],
    free: NDArray[np.int64],
    next_free: NDArray[np.int64],
    number: int,
    at: int,
) -> None:
    """Frees a number and the slot that points to it."""
    _remove(state, slots, at)
    size = to_i64(entries[number] & np.uint64(MOST_BYTES))
    if len(free) > 1:
        entries[number] |= _FREE
        which = size
    else:
        entries[number] = _FREE
        state[_GARBAGE] += size
        which = 0
    next_free[number] = free[which]
    free[which] = number + 1
    state[_COUNT] -= 1


@leaf_kernel
def _give_back_unmarked(
    slots: NDArray[np.uint64],
    entries: NDArray[np.uint64],
    arena: NDArray[np.uint8],
    state: NDArray[np.int64],
    free: NDArray[np.int64],
    next_free: NDArray[np.int64],
    marks: NDArray[np.uint8],
    first: int,
    last: int,
) -> int:
    """Frees the numbers from `first` up to `last` that are in use and not marked; returns how many."""
    freed = 0
    for number in range(first, last):
        if marks[number] != 0 or entries[number] & _FREE != np.uint64(0):
            continue
        extent = to_i64(entries[number])
        at = _home(state, _half(xxh64(arena, extent >> _LENGTH_BITS, extent & MOST_BYTES, 0)))
        while slots[at] & np.uint64(0xFFFFFFFF) != np.uint64(number + 1):
            at += 1
        _give_back(slots, entries, state, free, next_free, number, at)
        freed += 1
    return freed


@leaf_kernel
def _copy_out(
    entries: NDArray[np.uint64],
    arena: NDArray[np.uint8],
    first: int,
    last: int,
    lengths: NDArray[np.int32],
    target: NDArray[np.uint8],
) -> tuple[int, int]:
    """Copies the strings with numbers from `first` on, up to `last` or to where `target` is full; -1 is the length of a
    number that is not in use. Returns the number to go on with and the bytes copied."""
    size = 0
    for number in range(first, last):
        if entries[number] & _FREE != np.uint64(0):
            lengths[number - first] = -1
            continue
        extent = to_i64(entries[number])
        length = extent & MOST_BYTES
        if size + length > len(target):
            return number, size
        copy_bytes(target, size, arena, extent >> _LENGTH_BITS, length)
        lengths[number - first] = length
        size += length
    return last, size


@leaf_kernel
def _join(
    buffer: NDArray[np.uint8], offset: NDArray[np.int64], length: NDArray[np.int32], out: NDArray[np.uint8]
) -> None:
    at = 0
    for i in range(len(offset)):
        copy_bytes(out, at, buffer, offset[i], to_i64(length[i]))
        at += to_i64(length[i])


@leaf_kernel
def _copy_chosen(
    entries: NDArray[np.uint64],
    arena: NDArray[np.uint8],
    numbers: NDArray[np.int64],
    lengths: NDArray[np.int32],
    target: NDArray[np.uint8],
) -> int:
    """Copies the strings with these numbers one behind the other, as far as `target` reaches; returns the bytes that
    all of them have. -1 is the length of a number that is not in use."""
    size = 0
    for i in range(len(numbers)):
        entry = entries[numbers[i]]
        if entry & _FREE != np.uint64(0):
            lengths[i] = -1
            continue
        extent = to_i64(entry)
        length = extent & MOST_BYTES
        lengths[i] = length
        if size + length <= len(target):
            copy_bytes(target, size, arena, extent >> _LENGTH_BITS, length)
        size += length
    return size


@leaf_kernel
def _hash_chosen(
    entries: NDArray[np.uint64], arena: NDArray[np.uint8], numbers: NDArray[np.int64], keys: NDArray[np.uint64]
) -> None:
    for i in range(len(numbers)):
        extent = to_i64(entries[numbers[i]] & ~_FREE)
        keys[i] = xxh64(arena, extent >> _LENGTH_BITS, extent & MOST_BYTES, 0)


@leaf_kernel
def _choose(
    entries: NDArray[np.uint64],
    arena: NDArray[np.uint8],
    first: int,
    last: int,
    shift: int,
    wanted: NDArray[np.bool_],
    numbers: NDArray[np.int64],
) -> int:
    """Puts into `numbers` those from `first` up to `last` whose string's hash, shifted right, is wanted; returns how
    many there are."""
    count = 0
    for number in range(first, last):
        if entries[number] & _FREE != np.uint64(0):
            continue
        extent = to_i64(entries[number])
        key = xxh64(arena, extent >> _LENGTH_BITS, extent & MOST_BYTES, 0)
        if wanted[to_i64(key >> np.uint64(shift))]:
            numbers[count] = number
            count += 1
    return count


@leaf_kernel
def _hash_all(
    buffer: NDArray[np.uint8],
    lengths: NDArray[np.int32],
    offsets: NDArray[np.int64],
    keys: NDArray[np.uint64],
) -> int:
    """Offsets and hashes of strings that stand one behind the other; returns the end of the last one."""
    at = 0
    for i in range(len(lengths)):
        length = max(0, to_i64(lengths[i]))
        offsets[i] = at
        keys[i] = xxh64(buffer, at, length, 0)
        at += length
    return at


@leaf_kernel
def _place_numbered(
    slots: NDArray[np.uint64],
    entries: NDArray[np.uint64],
    arena: NDArray[np.uint8],
    state: NDArray[np.int64],
    free: NDArray[np.int64],
    next_free: NDArray[np.int64],
    buffer: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int32],
    keys: NDArray[np.uint64],
    first: int,
) -> None:
    """Gives the strings the numbers from `first` on; those of negative length stay free."""
    for i in range(len(lengths)):
        size = to_i64(lengths[i])
        number = first + i
        if size < 0:
            entries[number] = _FREE
            next_free[number] = free[len(free) - 1]
            free[len(free) - 1] = number + 1
            continue
        place = state[_ARENA_END]
        copy_bytes(arena, place, buffer, offsets[i], size)
        state[_ARENA_END] = place + size
        entries[number] = np.uint64((place << _LENGTH_BITS) | size)
        at = _home(state, _half(keys[i]))
        while slots[at] != np.uint64(0):
            at += 1
        slots[at] = (_half(keys[i]) << np.uint64(32)) | np.uint64(number + 1)
        state[_COUNT] += 1


class Strings(NamedTuple):
    """Byte strings as kernels take them: joined, with where each begins, its length, and its XXH64."""

    buffer: NDArray[np.uint8]
    offset: NDArray[np.int64]
    length: NDArray[np.int32]
    key: NDArray[np.uint64]

    @classmethod
    def join(cls, strings: Sequence[bytes], keys: Sequence[int] | None = None) -> Strings:
        """Of strings of Python's, whose hashes may be known."""
        lengths = list(map(len, strings))
        return cls(
            np.frombuffer(b"".join(strings) or b"\0", np.uint8),
            np.array([0, *accumulate(lengths[:-1])] if lengths else [], np.int64),
            np.array(lengths, np.int32),
            np.array(list(map(xxhash.xxh64_intdigest, strings)) if keys is None else keys, np.uint64),
        )

    def take(self, chosen: NDArray[np.int64]) -> Strings:
        """Those at these places; the buffer is shared."""
        return Strings(self.buffer, self.offset[chosen], self.length[chosen], self.key[chosen])

    def joined(self) -> NDArray[np.uint8]:
        """Their bytes, one behind the other."""
        out = np.empty(int(self.length.sum(dtype=np.int64)), np.uint8)
        _join(self.buffer, self.offset, self.length, out)
        return out

    def to_list(self) -> list[bytes]:
        """As strings of Python's."""
        joined = self.joined().tobytes()
        ends = np.cumsum(self.length, dtype=np.int64).tolist()
        return [joined[start:end] for start, end in zip([0, *ends], ends, strict=False)]


class ByteIndex:
    """Gives every byte string a dense number from 0 on, and takes it back when the string is removed.

    Args:
        capacity: the most strings that it can hold at once.
        arena_bytes: the most bytes that they can have together.

    >>> index = ByteIndex(capacity=1000, arena_bytes=10_000)
    >>> index.add([b"u1", b"u2", b"u1"])
    [0, 1, 0]
    >>> index.get(b"u2"), index.get(b"nobody"), index.bytes_of(1)
    (1, -1, b'u2')
    """

    def __init__(self, capacity: int, arena_bytes: int, *, reuse_by_length: bool = False) -> None:
        self.capacity = capacity
        most_homes = _SMALLEST + int(capacity * _GROWTH / _FULLEST)
        self._slots: NDArray[np.uint64] = reserve(most_homes + capacity + 1, np.uint64)
        self._entries: NDArray[np.uint64] = reserve(capacity, np.uint64)
        self._next_free: NDArray[np.int64] = reserve(capacity, np.int64)
        self._arena_bytes = arena_bytes
        self._arena: NDArray[np.uint8] = reserve(arena_bytes + _SHORT, np.uint8)
        self._free: NDArray[np.int64] = reserve(_PLACELESS + 1 if reuse_by_length else 1, np.int64)
        self._state = np.zeros(7, dtype=np.int64)
        self._state[[_HOMES, _LONGER, _FRONTIER]] = _SMALLEST
        self.arrays = IndexArrays(self._slots, self._entries, self._arena, self._state, self._free, self._next_free)
        """For kernels."""

    def __len__(self) -> int:
        return int(self._state[_COUNT])

    @property
    def high_water(self) -> int:
        """Numbers below this one have been in use at some time."""
        return int(self._state[HIGH_WATER])

    @property
    def memory_bytes(self) -> int:
        """Bytes in use: slots, entries and arena."""
        slots = int(self._state[_LONGER])
        return self._slots.itemsize * slots + self._entries.itemsize * self.high_water + int(self._state[_ARENA_END])

    @property
    def is_growing(self) -> bool:
        """Whether a part of the table still has the homes of a shorter one."""
        return bool(self._state[_HOMES] != self._state[_LONGER])

    def make_room(self, strings: int, size_bytes: int) -> bool:
        """Makes sure that so many more strings of so many bytes together fit; False when the index is full.

        It takes as long as there are strings to come, however many there are already.
        """
        if len(self) + strings > self.capacity:
            return False
        if int(self._state[_ARENA_END]) + size_bytes > self._arena_bytes:
            self._compact()
            if int(self._state[_ARENA_END]) + size_bytes > self._arena_bytes:
                return False
        state, needed = self._state, math.ceil((len(self) + strings) / _FULLEST)
        while self.is_growing or needed > state[_HOMES]:
            if not self.is_growing:
                state[_LONGER] = max(int(state[_HOMES] * _GROWTH), needed)
            _grow(state, self._slots, max(_PACE * strings, _AT_ONCE))
            if self.is_growing:
                break
        return True

    def find(
        self,
        buffer: NDArray[np.uint8],
        offset: NDArray[np.int64],
        length: NDArray[np.int32],
        key: NDArray[np.uint64],
        numbers: NDArray[np.int64],
        *,
        insert: bool,
    ) -> int:
        """Numbers of the strings at `offset`, `length` of `buffer` with the hashes `key`, into `numbers`.

        A negative length is an absent string, whose number is -1, as is that of one not found when `insert` is off. The
        caller has made room for what may be inserted. Returns how many were new.
        """
        return int(find_many(self.arrays, buffer, offset, length, key, insert, numbers))

    def add(self, strings: Iterable[bytes]) -> list[int]:
        """Numbers of the strings, new ones inserted.

        Raises:
            OverflowError: the index is full.
        """
        given = list(strings)
        if not self.make_room(len(given), sum(map(len, given))):
            raise OverflowError(f"the index holds {len(self)} of at most {self.capacity} strings")
        answer: list[int] = self._find_joined(Strings.join(given), insert=True).tolist()
        return answer

    def get(self, string: bytes) -> int:
        """The string's number, -1 if there is none."""
        return int(self.get_many(Strings.join([string]))[0])

    def get_many(self, strings: Strings) -> NDArray[np.int64]:
        """Each string's number, -1 for those that there are not."""
        return self._find_joined(strings, insert=False)

    def _find_joined(self, strings: Strings, *, insert: bool) -> NDArray[np.int64]:
        numbers = np.empty(len(strings.key), dtype=np.int64)
        self.find(*strings, numbers, insert=insert)
        return numbers

    def bytes_of(self, number: int) -> bytes:
        """The string behind a number that is in use."""
        extent = int(self._entries[number])
        place = extent >> _LENGTH_BITS
        return self._arena[place : place + (extent & MOST_BYTES)].tobytes()

    def remove(self, string: bytes) -> int:
        """Removes the string and returns its number, which may be given to another one; -1 if there was none."""
        data = np.frombuffer(string or b"\0", dtype=np.uint8)
        key = np.uint64(xxhash.xxh64_intdigest(string))
        at = int(_find(self._state, self._slots, self._entries, self._arena, data, 0, len(string), key))
        if at < 0:
            return -1
        number = int(self._slots[at] & np.uint64(0xFFFFFFFF)) - 1
        _give_back(self._slots, self._entries, self._state, self._free, self._next_free, number, at)
        return number

    def remove_unmarked(self, marks: NDArray[np.uint8], first: int, last: int) -> int:
        """Removes the strings with numbers from `first` up to `last` whose mark is 0; returns how many."""
        last = min(last, len(marks))
        if first >= last:
            return 0
        return int(
            _give_back_unmarked(
                self._slots,
                self._entries,
                self._arena,
                self._state,
                self._free,
                self._next_free,
                marks,
                first,
                last,
            )
        )

    def numbers(self) -> NDArray[np.int64]:
        """Every number in use, ascending."""
        return np.flatnonzero(self._entries[: self.high_water] & _FREE == 0)

    def copy_strings(
        self, first: int, last: int, lengths: NDArray[np.int32], target: NDArray[np.uint8]
    ) -> tuple[int, int]:
        """Copies the strings with numbers from `first` up to `last` into `target`, one behind the other, as far as it
        reaches; `lengths` gets theirs, -1 for a number not in use.

        Returns the number to go on with, and the bytes copied.
        """
        following, size = _copy_out(self._entries, self._arena, first, last, lengths, target)
        return int(following), int(size)

    def choose(self, first: int, last: int, shift: int, wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The numbers from `first` up to `last` of strings whose XXH64, shifted right by `shift`, is wanted."""
        last = min(last, self.high_water)
        numbers = np.empty(max(0, last - first), np.int64)
        count = int(_choose(self._entries, self._arena, first, last, shift, wanted, numbers))
        return numbers[:count]

    def hashes(self, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The XXH64 of the strings with these numbers; of one that is not in use, of what it was or of nothing."""
        keys = np.empty(len(numbers), np.uint64)
        _hash_chosen(self._entries, self._arena, numbers, keys)
        return keys

    def copy_chosen(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """The strings with these numbers, one behind the other, and their lengths: -1 for a number not in use."""
        lengths = np.empty(len(numbers), np.int32)
        size = _copy_chosen(self._entries, self._arena, numbers, lengths, np.empty(0, np.uint8))
        joined = np.empty(int(size), np.uint8)
        _copy_chosen(self._entries, self._arena, numbers, lengths, joined)
        return lengths, joined

    def load_numbered(self, first: int, lengths: NDArray[np.int32], buffer: NDArray[np.uint8]) -> None:
        """Gives strings that `copy_strings` copied, of an index that held each once, their numbers from `first` on.

        Raises:
            ValueError: they do not fit, do not go on where the ones before ended, or are not what the lengths say.
        """
        if first != self.high_water or first + len(lengths) > self.capacity:
            raise ValueError(f"strings {first} to {first + len(lengths)} do not follow the {self.high_water} before")
        offsets, keys = self._hash(lengths, buffer)
        if not self.make_room(len(lengths), len(buffer)):
            raise ValueError(f"{len(lengths)} strings of {len(buffer)} bytes do not fit")
        _place_numbered(
            self._slots,
            self._entries,
            self._arena,
            self._state,
            self._free,
            self._next_free,
            buffer,
            offsets,
            lengths,
            keys,
            first,
        )
        self._state[HIGH_WATER] = first + len(lengths)

    def load(self, lengths: NDArray[np.int32], buffer: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Numbers of strings that stand one behind the other in `buffer`, new ones inserted.

        Raises:
            ValueError: they do not fit, or are not what the lengths say.
        """
        offsets, keys = self._hash(lengths, buffer)
        if not self.make_room(len(lengths), len(buffer)):
            raise ValueError(f"{len(lengths)} strings of {len(buffer)} bytes do not fit")
        numbers = np.empty(len(lengths), dtype=np.int64)
        self.find(buffer, offsets, lengths, keys, numbers, insert=True)
        return numbers

    def clear(self) -> None:
        """Forgets every string; the table keeps its size."""
        self._slots[: int(self._state[_LONGER]) + self.high_water + 1] = 0
        homes = int(self._state[_LONGER])
        self._free[:] = 0
        self._state[:] = 0
        self._state[[_HOMES, _LONGER, _FRONTIER]] = homes

    def strings(self) -> Strings:
        """All strings, in the order of their numbers, of which none was ever given back."""
        lengths = np.empty(self.high_water, np.int32)
        joined = np.empty(int(self._state[_ARENA_END]) or 1, np.uint8)
        _, size = self.copy_strings(0, self.high_water, lengths, joined)
        offsets, keys = self._hash(lengths, joined[:size])
        return Strings(joined, offsets, lengths, keys)

    def _hash(
        self, lengths: NDArray[np.int32], buffer: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        if np.maximum(lengths, 0).sum(dtype=np.int64) != len(buffer) or (lengths > MOST_BYTES).any():
            raise ValueError(f"the lengths do not add up to {len(buffer)} bytes")
        offsets, keys = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.uint64)
        _hash_all(buffer, lengths, offsets, keys)
        return offsets, keys

    def _compact(self) -> None:
        """Closes the gaps that removed strings left in the arena."""
        if not self._state[_GARBAGE]:
            return
        numbers = self.numbers()
        order = numbers[np.argsort(self._entries[numbers] >> np.uint64(_LENGTH_BITS), kind="stable")]
        end = 0
        for number in order.tolist():
            extent = int(self._entries[number])
            place, size = extent >> _LENGTH_BITS, extent & MOST_BYTES
            self._arena[end : end + size] = self._arena[place : place + size]
            self._entries[number] = (end << _LENGTH_BITS) | size
            end += size
        self._state[_ARENA_END] = end
        self._state[_GARBAGE] = 0

    def check_invariants(self) -> None:
        """Every string is found where it should be, and nothing else is; for tests."""
        numbers = self.numbers()
        assert len(numbers) == len(self) == len(set(numbers.tolist()))
        homes, longer, frontier = self._state[[_HOMES, _LONGER, _FRONTIER]].tolist()
        assert 0 < frontier <= homes <= longer
        assert self.is_growing or frontier == homes
        assert len(self) <= longer * _FULLEST
        held = self._slots[: longer + len(self) + 1]
        assert np.array_equal(np.sort((held[held != 0] & np.uint64(0xFFFFFFFF)).astype(np.int64) - 1), numbers)
        for number in numbers.tolist():
            assert self.get(self.bytes_of(number)) == number
        free = []
        for head in self._free[self._free != 0].tolist():
            at = head
            while at:
                free.append(at - 1)
                at = int(self._next_free[at - 1])
        assert set(free).isdisjoint(numbers.tolist())
        assert len(free) + len(numbers) == self.high_water
        extents = self._entries[: self.high_water] & ~_FREE
        places = sorted((int(e) >> _LENGTH_BITS, int(e) & MOST_BYTES) for e in extents.tolist() if e & MOST_BYTES)
        assert all(place + size <= after for (place, size), (after, _) in pairwise(places))
