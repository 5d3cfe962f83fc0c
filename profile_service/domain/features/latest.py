"""`latest`: the newest value by event time; of two at the same time, the one that arrived later."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

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
    ReadContext,
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

    def finalize(self, views: RowViews, row: int, context: ReadContext, message: profile_pb2.Feature) -> None:
        message.latest.SetInParent()
        held = int(views.u4[row, self.held])
        if held:
            message.latest.value = context.text_of(held)
            message.latest.time.FromNanoseconds(int(views.i8[row, self.when]))


class Latest(FeatureKind):
    """The newest value."""

    name = "latest"
    Options = LatestOptions
    reads = "text"
    decays = False

    def bind(self, given: FeatureInput, slots: SlotAllocator) -> Feature:
        return LatestFeature(given, slots)
