"""`recent`: the newest values by event time, each once, the newest first; of two at the same time, the later arrival
first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from profile_service.domain.encoding import HEAD_BYTES, NO_ROOM, TIME_BYTES, Reading, put_head, put_text, put_time
from profile_service.domain.features.base import (
    ATTRIBUTE,
    OWN,
    WEIGHTS,
    Constants,
    Events,
    Feature,
    FeatureInput,
    FeatureKind,
    KindOptions,
    RowViews,
    SlotAllocator,
    SlotStarts,
    Tables,
    entry,
)
from profile_service.domain.kernel import inlined_kernel
from userprofile.v1 import profile_pb2


class RecentOptions(KindOptions):
    """Which attribute, and how many values to keep."""

    attribute: str = Field(min_length=1)
    size: int = Field(default=20, ge=1, le=1000)

    convertible: ClassVar[frozenset[str]] = frozenset({"size"})


IDS, TIMES, SIZE = range(OWN, OWN + 3)

_FIELD = profile_pb2.Feature.RECENT_FIELD_NUMBER
_ENTRIES = profile_pb2.Recent.ENTRIES_FIELD_NUMBER
_VALUE = profile_pb2.Recent.Entry.VALUE_FIELD_NUMBER
_TIME = profile_pb2.Recent.Entry.TIME_FIELD_NUMBER


@inlined_kernel
def update(
    views: RowViews, operation: NDArray[np.int64], tables: Tables, events: Events, rows: NDArray[np.int64]
) -> None:
    """Puts the values in their places by time."""
    u4, i8 = views.u4, views.i8
    ids, times, size = entry(operation, IDS), entry(operation, TIMES), entry(operation, SIZE)
    weight = tables.reals[operation[WEIGHTS] :]
    values = events.text_ids[operation[ATTRIBUTE]]
    for i in range(len(rows)):
        row, value, when = rows[i], values[i], events.time_ns[i]
        if row < 0 or value == 0 or weight[events.types[i]] == 0.0:
            continue
        place = 0
        while place < size and u4[row, ids + place] != 0 and i8[row, times + place] > when:
            # Held already, and seen later than now: nothing changes.
            if u4[row, ids + place] == value:
                place = size
                break
            place += 1
        if place == size:
            continue
        # Everything from `place` moves back by one, up to a free slot, the value's own old one, or off the end.
        last = place
        while last < size - 1 and u4[row, ids + last] != 0 and u4[row, ids + last] != value:
            last += 1
        for j in range(last, place, -1):
            u4[row, ids + j] = u4[row, ids + j - 1]
            i8[row, times + j] = i8[row, times + j - 1]
        u4[row, ids + place] = value
        i8[row, times + place] = when


@inlined_kernel
def encode(
    views: RowViews, row: int, operation: NDArray[np.int64], reading: Reading, out: NDArray[np.uint8], at: int
) -> int:
    """Writes a Recent before `at`; returns where it begins, or `NO_ROOM`."""
    end, ids, times = at, entry(operation, IDS), entry(operation, TIMES)
    for place in range(entry(operation, SIZE) - 1, -1, -1):
        held = views.u4[row, ids + place]
        if held == 0:
            continue
        last = at
        at = put_time(out, at, _TIME, views.i8[row, times + place])
        at = put_text(out, at, _VALUE, reading, held)
        if at == NO_ROOM:
            return NO_ROOM
        at = put_head(out, at, _ENTRIES, last)
    return put_head(out, at, _FIELD, end)


class RecentFeature(Feature):
    """Interned ids and their times, the newest first; an id of 0 ends the list."""

    interns: ClassVar[bool] = True

    def __init__(self, given: FeatureInput, slots: SlotAllocator) -> None:
        super().__init__(given)
        options: RecentOptions = given.options
        self.size = options.size
        self.ids = slots.take("u4", self.size)
        self.times = slots.take("i8", self.size)

    def strings(self) -> list[tuple[int, int]]:
        return [(self.ids, self.size)]

    def operation(self, starts: SlotStarts, constants: Constants) -> list[int]:
        return [starts.u4 + self.ids, starts.i8 + self.times, self.size]

    def _entries(self, views: RowViews, row: int) -> list[tuple[int, int]]:
        """(time, interned id), the newest first."""
        ids = views.u4[row, self.ids : self.ids + self.size].tolist()
        times = views.i8[row, self.times : self.times + self.size].tolist()
        return [(when, held) for when, held in zip(times, ids, strict=True) if held != 0]

    def merge(self, target: RowViews, row: int, source: RowViews, source_row: int) -> None:
        # A stable sort keeps each list's own order of arrival among equal times.
        entries = sorted([*self._entries(target, row), *self._entries(source, source_row)], key=lambda entry: -entry[0])
        newest: dict[int, int] = {}
        for when, held in entries:
            newest.setdefault(held, when)
        kept = list(newest.items())[: self.size]
        target.u4[row, self.ids : self.ids + self.size] = 0
        target.i8[row, self.times : self.times + self.size] = 0
        for j, (held, when) in enumerate(kept):
            target.u4[row, self.ids + j] = held
            target.i8[row, self.times + j] = when

    def convert(self, target: RowViews, old: Feature, source: RowViews) -> None:
        assert isinstance(old, RecentFeature)
        count = min(self.size, old.size)
        target.u4[:, self.ids : self.ids + count] = source.u4[:, old.ids : old.ids + count]
        target.i8[:, self.times : self.times + count] = source.i8[:, old.times : old.times + count]

    def answer_bytes(self) -> int:
        return HEAD_BYTES + self.size * (2 * HEAD_BYTES + TIME_BYTES)


class Recent(FeatureKind):
    """The newest values, each once."""

    name = "recent"
    Options = RecentOptions
    reads = "text"
    decays = False

    def bind(self, given: FeatureInput, slots: SlotAllocator) -> Feature:
        return RecentFeature(given, slots)
