"""`latest`: the newest value by event time; of two at the same time, the one that arrived later."""

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


class LatestOptions(KindOptions):
    """Which attribute."""

    attribute: str = Field(min_length=1)


HELD, WHEN = range(OWN, OWN + 2)

_FIELD = profile_pb2.Feature.LATEST_FIELD_NUMBER
_VALUE = profile_pb2.Latest.VALUE_FIELD_NUMBER
_TIME = profile_pb2.Latest.TIME_FIELD_NUMBER


@inlined_kernel
def update(
    views: RowViews, operation: NDArray[np.int64], tables: Tables, events: Events, rows: NDArray[np.int64]
) -> None:
    """Takes the values that are as new as what is held, or newer."""
    u4, i8 = views.u4, views.i8
    held, when = entry(operation, HELD), entry(operation, WHEN)
    weight = tables.reals[operation[WEIGHTS] :]
    values = events.text_ids[operation[ATTRIBUTE]]
    for i in range(len(rows)):
        row = rows[i]
        if row < 0 or values[i] == 0 or weight[events.types[i]] == 0.0:
            continue
        if u4[row, held] == 0 or events.time_ns[i] >= i8[row, when]:
            u4[row, held] = values[i]
            i8[row, when] = events.time_ns[i]


@inlined_kernel
def encode(
    views: RowViews, row: int, operation: NDArray[np.int64], reading: Reading, out: NDArray[np.uint8], at: int
) -> int:
    """Writes a Latest before `at`; returns where it begins, or `NO_ROOM`."""
    end, held = at, views.u4[row, entry(operation, HELD)]
    if held != 0:
        at = put_time(out, at, _TIME, views.i8[row, entry(operation, WHEN)])
        at = put_text(out, at, _VALUE, reading, held)
        if at == NO_ROOM:
            return NO_ROOM
    return put_head(out, at, _FIELD, end)


class LatestFeature(Feature):
    """An interned id, 0 before anything was seen, and its time."""

    interns: ClassVar[bool] = True

    def __init__(self, given: FeatureInput, slots: SlotAllocator) -> None:
        super().__init__(given)
        self.held = slots.take("u4")
        self.when = slots.take("i8")

    def strings(self) -> list[tuple[int, int]]:
        return [(self.held, 1)]

    def operation(self, starts: SlotStarts, constants: Constants) -> list[int]:
        return [starts.u4 + self.held, starts.i8 + self.when]

    def merge(self, target: RowViews, row: int, source: RowViews, source_row: int) -> None:
        theirs = source.u4[source_row, self.held]
        if theirs == 0:
            return
        if target.u4[row, self.held] == 0 or source.i8[source_row, self.when] > target.i8[row, self.when]:
            target.u4[row, self.held] = theirs
            target.i8[row, self.when] = source.i8[source_row, self.when]

    def answer_bytes(self) -> int:
        return 2 * HEAD_BYTES + TIME_BYTES


class Latest(FeatureKind):
    """The newest value."""

    name = "latest"
    Options = LatestOptions
    reads = "text"
    decays = False

    def bind(self, given: FeatureInput, slots: SlotAllocator) -> Feature:
        return LatestFeature(given, slots)
