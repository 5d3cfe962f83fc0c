"""`top_k`: the heaviest values of an open vocabulary, by Space-Saving over decayed weights.

Metwally, Agrawal, El Abbadi: Efficient Computation of Frequent and Top-k Elements in Data Streams, ICDT 2005. A value
that finds no free counter takes over the lightest one: it starts from that one's weight, which is also the most it can
be overcounted by. So `weight - error <= true weight <= weight`, and with at most k different values everything is
exact. Two summaries merge as in Agarwal et al., Mergeable Summaries, PODS 2012: what one of them does not list may have
had as much as its lightest counter.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from profile_service.domain.decay import (
    RESCALE_STEPS,
    add_rounded,
    align,
    power_of_two,
    read_scale,
    steps_from_landmark,
)
from profile_service.domain.encoding import (
    HEAD_BYTES,
    NO_ROOM,
    NUMBER_BYTES,
    Reading,
    put_double,
    put_head,
    put_text,
    sort_descending,
)
from profile_service.domain.features.base import (
    ATTRIBUTE,
    HALF_LIFE,
    HALF_LIFE_NS,
    OWN,
    ROUNDED_BITS,
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
    Weights,
    entry,
)
from profile_service.domain.kernel import LANES, equal_lanes, inlined_kernel, least_lane, trailing_zeros
from userprofile.v1 import profile_pb2

POPULATION_COUNTERS = 64
"""The population keeps at least so many counters: one row for all users can afford the smaller errors."""


_DRIFT = 1e-4
"""By how much of the total the sum of many weights of 32 bits may be off."""


class TopKOptions(KindOptions):
    """Which attribute, and how many values to keep."""

    attribute: str = Field(min_length=1)
    k: int = Field(default=10, ge=1, le=1000)

    convertible: ClassVar[frozenset[str]] = frozenset({"k"})


TOTAL, COUNTERS, IDS, K, LANDMARK, LISTED = range(OWN, OWN + 6)

_FIELD = profile_pb2.Feature.TOP_K_FIELD_NUMBER
_WEIGHT = profile_pb2.TopK.WEIGHT_FIELD_NUMBER
_ENTRIES = profile_pb2.TopK.ENTRIES_FIELD_NUMBER
_VALUE = profile_pb2.TopK.Entry.VALUE_FIELD_NUMBER
_ENTRY_WEIGHT = profile_pb2.TopK.Entry.WEIGHT_FIELD_NUMBER
_ERROR = profile_pb2.TopK.Entry.ERROR_FIELD_NUMBER
_SHARE = profile_pb2.TopK.Entry.SHARE_FIELD_NUMBER


@inlined_kernel
def update(
    views: RowViews, operation: NDArray[np.int64], tables: Tables, events: Events, rows: NDArray[np.int64]
) -> None:
    """Adds the events' weights to their values' counters."""
    f8, f4, u4, i8 = views.f8, views.f4, views.u4, views.i8
    total, counters, ids, k = (
        entry(operation, TOTAL),
        entry(operation, COUNTERS),
        entry(operation, IDS),
        entry(operation, K),
    )
    landmark = entry(operation, LANDMARK)
    weight = tables.reals[operation[WEIGHTS] :]
    grid, mantissa = events.grids[operation[HALF_LIFE]], events.mantissas[operation[HALF_LIFE]]
    values = events.text_ids[operation[ATTRIBUTE]]
    for i in range(len(rows)):
        row, value = rows[i], values[i]
        w = weight[events.types[i]]
        if row < 0 or value == 0 or w == 0.0:
            continue
        w *= mantissa[i]
        steps = steps_from_landmark(i8, row, landmark, grid[i])
        if steps > RESCALE_STEPS:
            scale = power_of_two(-steps)
            f8[row, total] *= scale
            for j in range(counters, counters + 2 * k):
                f4[row, j] *= scale
            i8[row, landmark] = grid[i]
        elif steps != 0:
            w *= power_of_two(steps)
        f8[row, total] += w
        place = _place_of(u4, row, ids, k, value)
        if place == k:
            place = _lightest(f4, row, counters, k)
            f4[row, counters + k + place] = f4[row, counters + place]
        # Written where it changes alone: all ids are read at once, which waits for one written just before.
        if u4[row, ids + place] != value:
            u4[row, ids + place] = value
        f4[row, counters + place] = add_rounded(f4[row, counters + place], w, operation[ROUNDED_BITS])


@inlined_kernel
def _place_of(u4: NDArray[np.uint32], row: int, ids: int, k: int, value: np.uint32) -> int:
    """The value's counter, or the first free one; k for neither."""
    if k < LANES:
        for j in range(k):
            held = u4[row, ids + j]
            if held == value or held == 0:
                return j
        return k
    # The last lanes lie over those before, rather than beyond the ids.
    last = k - LANES
    for first in range(0, k, 2 * LANES):
        one, two = min(first, last), min(first + LANES, last)
        found = _taken_or_free(u4, row, ids + one, value) | (_taken_or_free(u4, row, ids + two, value) << (two - one))
        if found != 0:
            return one + trailing_zeros(found)
    return k


@inlined_kernel
def _taken_or_free(u4: NDArray[np.uint32], row: int, first: int, value: np.uint32) -> int:
    return equal_lanes(u4, row, first, value) | equal_lanes(u4, row, first, np.uint32(0))


@inlined_kernel
def _lightest(f4: Weights, row: int, counters: int, k: int) -> int:
    """The first of the lightest counters."""
    least = f4[row, counters]
    if k < LANES:
        place = 0
        for j in range(1, k):
            if f4[row, counters + j] < least:
                least, place = f4[row, counters + j], j
        return place
    last = k - LANES
    for first in range(0, k, LANES):
        least = min(least, least_lane(f4, row, counters + min(first, last)))
    for first in range(0, k, LANES):
        found = equal_lanes(f4, row, counters + min(first, last), least)
        if found != 0:
            return min(first, last) + trailing_zeros(found)
    return 0


@inlined_kernel
def encode(
    views: RowViews, row: int, operation: NDArray[np.int64], reading: Reading, out: NDArray[np.uint8], at: int
) -> int:
    """Writes a TopK before `at`; returns where it begins, or `NO_ROOM`."""
    f4, u4 = views.f4, views.u4
    counters, ids, k = entry(operation, COUNTERS), entry(operation, IDS), entry(operation, K)
    total = views.f8[row, entry(operation, TOTAL)]
    scale = read_scale(views.i8[row, entry(operation, LANDMARK)], reading.read_ns, operation[HALF_LIFE_NS])
    keys, held = reading.keys, 0
    for place in range(k):
        is_held = u4[row, ids + place] != 0
        keys[place] = f4[row, counters + place] if is_held else -np.inf
        held += is_held
    sort_descending(keys, k, reading.order, reading.beside)
    end = at
    for n in range(min(held, entry(operation, LISTED)) - 1, -1, -1):
        place, last = reading.order[n], at
        at = put_double(out, at, _SHARE, keys[place] / total if total > 0.0 else 0.0)
        at = put_double(out, at, _ERROR, f4[row, counters + k + place] * scale)
        at = put_double(out, at, _ENTRY_WEIGHT, keys[place] * scale)
        at = put_text(out, at, _VALUE, reading, u4[row, ids + place])
        if at == NO_ROOM:
            return NO_ROOM
        at = put_head(out, at, _ENTRIES, last)
    at = put_double(out, at, _WEIGHT, total * scale)
    return put_head(out, at, _FIELD, end)


class TopKFeature(Feature):
    """The total; k weights, then k errors; k interned ids, filled from the front.

    A counter that is free, and so has no id, holds as weight and error what a value may have had that is not listed:
    whoever takes it starts from there. That is 0 unless the row has had fewer counters, or was merged with one that
    had none free.
    """

    interns: ClassVar[bool] = True

    def __init__(self, given: FeatureInput, slots: SlotAllocator) -> None:
        super().__init__(given)
        options: TopKOptions = given.options
        self.listed = options.k
        self.k = max(options.k, POPULATION_COUNTERS) if slots.population else options.k
        self.total = slots.take("f8")
        self.counters = slots.take("f4", 2 * self.k)
        self.ids = slots.take("u4", self.k)
        self.landmark = slots.landmark()

    def strings(self) -> list[tuple[int, int]]:
        return [(self.ids, self.k)]

    def operation(self, starts: SlotStarts, constants: Constants) -> list[int]:
        slots = [starts.f8 + self.total, starts.f4 + self.counters, starts.u4 + self.ids]
        return [*slots, self.k, starts.i8 + self.landmark, self.listed]

    def _entries(self, views: RowViews, row: int) -> dict[int, tuple[float, float]]:
        """Interned id → stored weight and error."""
        ids = views.u4[row, self.ids : self.ids + self.k].tolist()
        weights = views.f4[row, self.counters : self.counters + self.k].tolist()
        errors = views.f4[row, self.counters + self.k : self.counters + 2 * self.k].tolist()
        return {held: (weight, error) for held, weight, error in zip(ids, weights, errors, strict=True) if held != 0}

    def merge(self, target: RowViews, row: int, source: RowViews, source_row: int) -> None:
        common, mine, theirs = align(int(target.i8[row, self.landmark]), int(source.i8[source_row, self.landmark]))
        merged: dict[int, tuple[float, float]] = {}
        summaries = [(self._entries(target, row), mine), (self._entries(source, source_row), theirs)]
        # The most that a value can have had which a summary does not list. A free counter is as light as any.
        own = slice(self.counters, self.counters + self.k)
        unlisted = [float(target.f4[row, own].min()) * mine, float(source.f4[source_row, own].min()) * theirs]
        for value in {**summaries[0][0], **summaries[1][0]}:
            weight = error = 0.0
            for (entries, scale), most in zip(summaries, unlisted, strict=True):
                held = entries.get(value)
                weight += held[0] * scale if held else most
                error += held[1] * scale if held else most
            merged[value] = (weight, error)
        kept = sorted(merged.items(), key=lambda item: -item[1][0])[: self.k]
        target.f8[row, self.total] = target.f8[row, self.total] * mine + source.f8[source_row, self.total] * theirs
        target.u4[row, self.ids : self.ids + self.k] = 0
        target.f4[row, self.counters : self.counters + 2 * self.k] = sum(unlisted)
        for j, (value, (weight, error)) in enumerate(kept):
            target.u4[row, self.ids + j] = value
            target.f4[row, self.counters + j] = weight
            target.f4[row, self.counters + self.k + j] = error
        target.i8[row, self.landmark] = common

    def convert(self, target: RowViews, old: Feature, source: RowViews) -> None:
        """Of fewer counters the heaviest stay. To more of them is added what a value may have had that had none."""
        assert isinstance(old, TopKFeature)
        target.f8[:, self.total] = source.f8[:, old.total]
        target.i8[:, self.landmark] = source.i8[:, old.landmark]
        ids = source.u4[:, old.ids : old.ids + old.k]
        weights: NDArray[Any] = source.f4[:, old.counters : old.counters + old.k]
        errors: NDArray[Any] = source.f4[:, old.counters + old.k : old.counters + 2 * old.k]
        if self.k < old.k:
            # The heaviest first, equals as they stood: so free counters stay last, which are as light as any.
            order = np.argsort(-weights, axis=1, kind="stable")[:, : self.k]
            ids = np.take_along_axis(ids, order, axis=1)
            weights = np.take_along_axis(weights, order, axis=1)
            errors = np.take_along_axis(errors, order, axis=1)
        count = min(self.k, old.k)
        target.u4[:, self.ids : self.ids + count] = ids
        target.f4[:, self.counters : self.counters + count] = weights
        target.f4[:, self.counters + self.k : self.counters + self.k + count] = errors
        if count < self.k:
            unlisted = _unlisted(weights, errors, source.f8[:, old.total])[:, None]
            target.f4[:, self.counters + count : self.counters + self.k] = unlisted
            target.f4[:, self.counters + self.k + count : self.counters + 2 * self.k] = unlisted

    def answer_bytes(self) -> int:
        return HEAD_BYTES + NUMBER_BYTES + self.listed * (2 * HEAD_BYTES + 3 * NUMBER_BYTES)


def _unlisted(weights: Weights, errors: Weights, total: NDArray[np.float64]) -> NDArray[np.float64]:
    """The most that a value can have had which has none of each row's counters, (rows,).

    That is the lightest counter's weight. But a value that was driven out, or lost in a merge, left an error behind or
    is missing in the sum: where neither is so, there was none.
    """
    complete = ~errors.any(axis=1) & (weights.sum(axis=1, dtype=np.float64) >= total * (1 - _DRIFT))
    return np.where(complete, 0.0, weights.min(axis=1))


class TopK(FeatureKind):
    """The heaviest values of an open vocabulary."""

    name = "top_k"
    Options = TopKOptions
    reads = "text"
    decays = True

    def bind(self, given: FeatureInput, slots: SlotAllocator) -> Feature:
        return TopKFeature(given, slots)
