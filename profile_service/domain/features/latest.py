"""`latest`: the newest value by event time; of two at the same time, the one that arrived later."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from profile_service.domain.features.base import (
    Batch,
    Feature,
    FeatureInput,
    FeatureKind,
    KindOptions,
    ReadContext,
    RowViews,
    SlotAllocator,
)
from profile_service.domain.kernel import leaf_kernel
from userprofile.v1 import profile_pb2


class LatestOptions(KindOptions):
    """Which attribute."""

    attribute: str = Field(min_length=1)


@leaf_kernel
def _update(
    u4: NDArray[np.uint32],
    i8: NDArray[np.int64],
    held: int,
    when: int,
    rows: NDArray[np.int64],
    types: NDArray[np.int16],
    weight: NDArray[np.float64],
    time_ns: NDArray[np.int64],
    values: NDArray[np.uint32],
) -> None:
    for i in range(len(rows)):
        value = values[i]
        if value == 0 or weight[types[i]] == 0.0:
            continue
        row = rows[i]
        if u4[row, held] == 0 or time_ns[i] >= i8[row, when]:
            u4[row, held] = value
            i8[row, when] = time_ns[i]


class LatestFeature(Feature):
    """An interned id, 0 before anything was seen, and its time."""

    interns: ClassVar[bool] = True

    def __init__(self, given: FeatureInput, slots: SlotAllocator) -> None:
        super().__init__(given)
        self.held = slots.take("u4")
        self.when = slots.take("i8")

    def strings(self) -> list[tuple[int, int]]:
        return [(self.held, 1)]

    def update(self, views: RowViews, batch: Batch) -> None:
        _update(
            views.u4,
            views.i8,
            self.held,
            self.when,
            batch.rows,
            batch.types,
            self.event_weight,
            batch.time_ns,
            batch.text_ids[self.attribute],
        )

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
