"""`counter`: the sum of decayed event weights, or the plain number of events where nothing decays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.decay import NO_LANDMARK, RESCALE_STEPS, align, power_of_two, read_scale
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


class CounterOptions(KindOptions):
    """A counter has no options of its own."""


@leaf_kernel
def _count(
    f8: NDArray[np.float64], slot: int, rows: NDArray[np.int64], types: NDArray[np.int16], weight: NDArray[np.float64]
) -> None:
    for i in range(len(rows)):
        if weight[types[i]] != 0.0:
            f8[rows[i], slot] += 1.0


@leaf_kernel
def _sum(
    f8: NDArray[np.float64],
    i8: NDArray[np.int64],
    slot: int,
    landmark: int,
    rows: NDArray[np.int64],
    types: NDArray[np.int16],
    weight: NDArray[np.float64],
    grid: NDArray[np.int64],
    mantissa: NDArray[np.float64],
) -> None:
    for i in range(len(rows)):
        w = weight[types[i]]
        if w == 0.0:
            continue
        row = rows[i]
        w *= mantissa[i]
        if i8[row, landmark] == NO_LANDMARK:
            i8[row, landmark] = grid[i]
        steps = grid[i] - i8[row, landmark]
        if steps > RESCALE_STEPS:
            f8[row, slot] *= power_of_two(-steps)
            i8[row, landmark] = grid[i]
        elif steps != 0:
            w *= power_of_two(steps)
        f8[row, slot] += w


class CounterFeature(Feature):
    """One float64, and a landmark where it decays."""

    def __init__(self, given: FeatureInput, slots: SlotAllocator) -> None:
        super().__init__(given)
        self.slot = slots.take("f8")
        self.landmark = slots.landmark() if self.half_life_ns else -1

    def update(self, views: RowViews, batch: Batch) -> None:
        if not self.half_life_ns:
            _count(views.f8, self.slot, batch.rows, batch.types, self.event_weight)
            return
        index = self.half_life_index
        _sum(
            views.f8,
            views.i8,
            self.slot,
            self.landmark,
            batch.rows,
            batch.types,
            self.event_weight,
            batch.grids[index],
            batch.mantissas[index],
        )

    def merge(self, target: RowViews, row: int, source: RowViews, source_row: int) -> None:
        mine = theirs = 1.0
        if self.half_life_ns:
            common, mine, theirs = align(int(target.i8[row, self.landmark]), int(source.i8[source_row, self.landmark]))
            target.i8[row, self.landmark] = common
        target.f8[row, self.slot] = target.f8[row, self.slot] * mine + source.f8[source_row, self.slot] * theirs

    def finalize(self, views: RowViews, row: int, context: ReadContext, message: profile_pb2.Feature) -> None:
        scale = 1.0
        if self.half_life_ns:
            scale = read_scale(int(views.i8[row, self.landmark]), context.read_ns, self.half_life_ns)
        message.counter.value = float(views.f8[row, self.slot]) * scale


class Counter(FeatureKind):
    """Counts events."""

    name = "counter"
    Options = CounterOptions
    reads = None
    decays = True

    def bind(self, given: FeatureInput, slots: SlotAllocator) -> Feature:
        return CounterFeature(given, slots)
