"""`counter`: the sum of decayed event weights, or the plain number of events where nothing decays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.decay import RESCALE_STEPS, align, power_of_two, read_scale, steps_from_landmark
from profile_service.domain.encoding import HEAD_BYTES, NUMBER_BYTES, Reading, put_double, put_head
from profile_service.domain.features.base import (
    HALF_LIFE,
    HALF_LIFE_NS,
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


class CounterOptions(KindOptions):
    """A counter has no options of its own."""


SLOT, LANDMARK = range(OWN, OWN + 2)

_FIELD = profile_pb2.Feature.COUNTER_FIELD_NUMBER
_VALUE = profile_pb2.Counter.VALUE_FIELD_NUMBER


@inlined_kernel
def update(
    views: RowViews, operation: NDArray[np.int64], tables: Tables, events: Events, rows: NDArray[np.int64]
) -> None:
    """Adds the events' weights, or counts them where nothing decays."""
    f8, i8 = views.f8, views.i8
    slot, landmark = entry(operation, SLOT), operation[LANDMARK]
    weight = tables.reals[operation[WEIGHTS] :]
    grid, mantissa = events.grids[operation[HALF_LIFE]], events.mantissas[operation[HALF_LIFE]]
    for i in range(len(rows)):
        row = rows[i]
        w = weight[events.types[i]]
        if row < 0 or w == 0.0:
            continue
        if landmark < 0:
            f8[row, slot] += 1.0
            continue
        w *= mantissa[i]
        steps = steps_from_landmark(i8, row, landmark, grid[i])
        if steps > RESCALE_STEPS:
            f8[row, slot] *= power_of_two(-steps)
            i8[row, landmark] = grid[i]
        elif steps != 0:
            w *= power_of_two(steps)
        f8[row, slot] += w


@inlined_kernel
def encode(
    views: RowViews, row: int, operation: NDArray[np.int64], reading: Reading, out: NDArray[np.uint8], at: int
) -> int:
    """Writes a Counter before `at`; returns where it begins."""
    value, landmark = views.f8[row, entry(operation, SLOT)], operation[LANDMARK]
    if landmark >= 0:
        value *= read_scale(views.i8[row, landmark], reading.read_ns, operation[HALF_LIFE_NS])
    return put_head(out, put_double(out, at, _VALUE, value), _FIELD, at)


class CounterFeature(Feature):
    """One float64, and a landmark where it decays."""

    def __init__(self, given: FeatureInput, slots: SlotAllocator) -> None:
        super().__init__(given)
        self.slot = slots.take("f8")
        self.landmark = slots.landmark() if self.half_life_ns else -1

    def operation(self, starts: SlotStarts, constants: Constants) -> list[int]:
        return [starts.f8 + self.slot, starts.i8 + self.landmark if self.half_life_ns else -1]

    def merge(self, target: RowViews, row: int, source: RowViews, source_row: int) -> None:
        mine = theirs = 1.0
        if self.half_life_ns:
            common, mine, theirs = align(int(target.i8[row, self.landmark]), int(source.i8[source_row, self.landmark]))
            target.i8[row, self.landmark] = common
        target.f8[row, self.slot] = target.f8[row, self.slot] * mine + source.f8[source_row, self.slot] * theirs

    def answer_bytes(self) -> int:
        return HEAD_BYTES + NUMBER_BYTES


class Counter(FeatureKind):
    """Counts events."""

    name = "counter"
    Options = CounterOptions
    reads = None
    decays = True

    def bind(self, given: FeatureInput, slots: SlotAllocator) -> Feature:
        return CounterFeature(given, slots)
