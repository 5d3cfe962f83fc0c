"""`distribution`: decayed weight, mean, variance and histogram of a number, and its lifetime minimum and maximum.

Mean and variance follow West's weighted update (CACM 22(9), 1979) and Chan, Golub and LeVeque's merge (1979).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from profile_service.domain.decay import (
    RESCALE_STEPS,
    add_rounded,
    align,
    power_of_two,
    read_scale,
    steps_from_landmark,
)
from profile_service.domain.encoding import HEAD_BYTES, NUMBER_BYTES, Reading, put_bytes, put_double, put_head
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
from profile_service.domain.kernel import inlined_kernel, store_u64, to_i64
from userprofile.v1 import profile_pb2

MOST_GUESSES = 512
"""Entries by which a value's bin is looked up: 8 bytes each."""

PROBABILITIES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Bins(KindOptions):
    """The histogram's edges: `count` bins from `min` to `max` on a scale, or `edges` themselves."""

    scale: Literal["log", "linear", "explicit"]
    min: float | None = None
    max: float | None = None
    count: int | None = Field(default=None, ge=1, le=1000)
    edges: list[float] | None = Field(default=None, min_length=2, max_length=1001)

    @model_validator(mode="after")
    def _check(self) -> Bins:
        if self.scale == "explicit":
            if self.edges is None:
                raise ValueError("scale explicit needs edges")
            if self.min is not None or self.max is not None or self.count is not None:
                raise ValueError("scale explicit takes edges alone: leave out min, max and count")
            if any(low >= high for low, high in zip(self.edges, self.edges[1:], strict=False)):
                raise ValueError("edges must rise")
            return self
        if self.edges is not None:
            raise ValueError(f"scale {self.scale} takes min, max and count: leave out edges")
        missing = [name for name in ("min", "max", "count") if getattr(self, name) is None]
        if missing:
            raise ValueError(f"scale {self.scale} needs {', '.join(missing)}")
        assert self.min is not None
        assert self.max is not None
        if self.min >= self.max:
            raise ValueError("min must be below max")
        if self.scale == "log" and self.min <= 0:
            raise ValueError("scale log needs min above 0")
        return self

    @model_validator(mode="after")
    def _check_edges(self) -> Bins:
        with np.errstate(all="ignore"):
            edges = self.to_array()
        if not np.isfinite(edges).all() or np.abs(edges).max() > 1e100:
            raise ValueError("edges must lie within 1e100 of 0")
        if not (np.diff(edges) > 0).all():
            raise ValueError("min and max are too near for so many bins")
        return self

    def to_array(self) -> NDArray[np.float64]:
        """The edges, ascending, (count + 1,)."""
        if self.edges is not None:
            return np.array(self.edges, dtype=np.float64)
        assert self.min is not None
        assert self.max is not None
        assert self.count is not None
        steps = np.arange(self.count + 1) / self.count
        if self.scale == "log":
            edges = self.min * (self.max / self.min) ** steps
        else:
            edges = self.min + (self.max - self.min) * steps
        edges[0], edges[-1] = self.min, self.max
        return edges


class DistributionOptions(KindOptions):
    """Which attribute, its unit, and the bins of its histogram."""

    attribute: str = Field(min_length=1)
    unit: str = ""
    bins: Bins

    only_read: ClassVar[frozenset[str]] = frozenset({"unit"})


MOMENTS, BINS, LANDMARK, EDGES, EDGE_COUNT, GUESSES, GUESS_COUNT, GUESS_SHIFT, LOWEST_KEY, EDGE_BYTES = range(
    OWN, OWN + 10
)
"""`EDGE_BYTES` is where the edges begin in the labels, as an answer holds them."""

_FIELD = profile_pb2.Feature.DISTRIBUTION_FIELD_NUMBER
_WEIGHT = profile_pb2.Distribution.WEIGHT_FIELD_NUMBER
_MEAN = profile_pb2.Distribution.MEAN_FIELD_NUMBER
_STDDEV = profile_pb2.Distribution.STDDEV_FIELD_NUMBER
_MIN = profile_pb2.Distribution.MIN_FIELD_NUMBER
_MAX = profile_pb2.Distribution.MAX_FIELD_NUMBER
_QUANTILES = profile_pb2.Distribution.QUANTILES_FIELD_NUMBER
_PROBABILITY = profile_pb2.Distribution.Quantile.PROBABILITY_FIELD_NUMBER
_QUANTILE_VALUE = profile_pb2.Distribution.Quantile.VALUE_FIELD_NUMBER
_HISTOGRAM = profile_pb2.Distribution.HISTOGRAM_FIELD_NUMBER
_EDGES = profile_pb2.Distribution.Histogram.EDGES_FIELD_NUMBER
_WEIGHTS = profile_pb2.Distribution.Histogram.WEIGHTS_FIELD_NUMBER


@inlined_kernel
def update(
    views: RowViews, operation: NDArray[np.int64], tables: Tables, events: Events, rows: NDArray[np.int64]
) -> None:
    """Adds the events' values to moments and bins."""
    f8, f4, i8 = views.f8, views.f4, views.i8
    moments, bins, landmark = entry(operation, MOMENTS), entry(operation, BINS), entry(operation, LANDMARK)
    edges = tables.reals[operation[EDGES] : operation[EDGES] + operation[EDGE_COUNT]]
    guesses = tables.codes[operation[GUESSES] : operation[GUESSES] + operation[GUESS_COUNT]]
    shift, lowest = operation[GUESS_SHIFT], operation[LOWEST_KEY]
    weight = tables.reals[operation[WEIGHTS] :]
    grid, mantissa = events.grids[operation[HALF_LIFE]], events.mantissas[operation[HALF_LIFE]]
    values = events.numbers[operation[ATTRIBUTE]][events.first :]
    for i in range(len(rows)):
        row, value = rows[i], values[i]
        w = weight[events.types[i]]
        if row < 0 or value != value or w == 0.0:
            continue
        w *= mantissa[i]
        steps = steps_from_landmark(i8, row, landmark, grid[i])
        if steps > RESCALE_STEPS:
            scale = power_of_two(-steps)
            f8[row, moments] *= scale
            f8[row, moments + 2] *= scale
            for k in range(bins, bins + len(edges) + 1):
                f4[row, k] *= scale
            i8[row, landmark] = grid[i]
        elif steps != 0:
            w *= power_of_two(steps)
        f8[row, moments + 3] = min(f8[row, moments + 3], value)
        f8[row, moments + 4] = max(f8[row, moments + 4], value)
        if w == 0.0:
            continue
        total = f8[row, moments] + w
        difference = value - f8[row, moments + 1]
        share = w / total
        f8[row, moments + 1] += difference * share
        # Not `w * difference * (value - mean)`: beside a weight that all but is the total, the last factor rounds to 0.
        f8[row, moments + 2] += f8[row, moments] * share * difference * difference
        f8[row, moments] = total
        place = bins + _bin_of(edges, guesses, shift, lowest, value)
        f4[row, place] = add_rounded(f4[row, place], w, operation[ROUNDED_BITS])


@inlined_kernel
def _key(value: float) -> int:
    """A number that is in the order of the values: their bits, as they stand in memory, those of negative ones turned
    around."""
    # Without the sign of a zero, which compares as none.
    bits = to_i64(np.float64(value + 0.0).view(np.int64))
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


@inlined_kernel
def _bin_of(edges: NDArray[np.float64], guesses: NDArray[np.int64], shift: int, lowest: int, value: float) -> int:
    """How many edges are at or below `value`: 0 is under, len(edges) is over.

    `guesses` says between which two of them to look, by the upper bits of the value's key. They are so fine that there
    is mostly nothing left to look for: of what a search would take, a processor foresees nothing.
    """
    guess = min(max((_key(value) >> shift) - lowest, 0), len(guesses) - 2)
    low, high = to_i64(guesses[guess]), to_i64(guesses[guess + 1])
    while low < high:
        middle = (low + high) >> 1
        if edges[middle] <= value:
            low = middle + 1
        else:
            high = middle
    return low


def _guess(edges: NDArray[np.float64]) -> tuple[list[int], int, int]:
    """What `_bin_of` is given: `guesses`, `shift`, `lowest`.

    Guess `g` is how many edges have a key whose upper bits are below `lowest + g`. Finer than their number it may be;
    larger than a small part of a processor's nearest cache it must not.
    """
    keys = [int(_key(edge)) for edge in edges.tolist()]
    shift = 0
    while (keys[-1] >> shift) - (keys[0] >> shift) > MOST_GUESSES - 2:
        shift += 1
    lowest = keys[0] >> shift
    upper = np.array(keys) >> shift
    count = int(upper[-1]) - lowest + 2
    return np.searchsorted(upper, lowest + np.arange(count), side="left").tolist(), shift, lowest


@inlined_kernel
def encode(
    views: RowViews, row: int, operation: NDArray[np.int64], reading: Reading, out: NDArray[np.uint8], at: int
) -> int:
    """Writes a Distribution before `at`; returns where it begins."""
    f8, f4 = views.f8, views.f4
    moments, bins, landmark = entry(operation, MOMENTS), entry(operation, BINS), entry(operation, LANDMARK)
    edges = reading.reals[operation[EDGES] : operation[EDGES] + operation[EDGE_COUNT]]
    count = len(edges) + 1
    scale = read_scale(views.i8[row, landmark], reading.read_ns, operation[HALF_LIFE_NS])
    weight, low, high = f8[row, moments], f8[row, moments + 3], f8[row, moments + 4]
    end = at
    for k in range(count - 1, -1, -1):
        at -= 8
        store_u64(out, at, np.float64(f4[row, bins + k] * scale).view(np.uint64))
    at = put_head(out, at, _WEIGHTS, end)
    at = put_bytes(out, at, _EDGES, reading.labels, operation[EDGE_BYTES], 8 * len(edges))
    at = put_head(out, at, _HISTOGRAM, end)
    if weight > 0.0:
        # Quantiles come from the stored weights: the scale of reading cancels, and may have underflowed.
        cumulated = reading.keys
        total = 0.0
        for k in range(count):
            total += f4[row, bins + k]
            cumulated[k] = total
        for n in range(len(PROBABILITIES) - 1, -1, -1):
            last = at
            at = put_double(out, at, _QUANTILE_VALUE, _quantile(f4, row, bins, edges, cumulated, n, low, high))
            at = put_double(out, at, _PROBABILITY, PROBABILITIES[n])
            at = put_head(out, at, _QUANTILES, last)
        at = put_double(out, at, _MAX, high)
        at = put_double(out, at, _MIN, low)
        at = put_double(out, at, _STDDEV, math.sqrt(max(0.0, f8[row, moments + 2]) / weight))
        at = put_double(out, at, _MEAN, f8[row, moments + 1])
        at = put_double(out, at, _WEIGHT, weight * scale)
    return put_head(out, at, _FIELD, end)


@inlined_kernel
def _quantile(
    f4: Weights,
    row: int,
    bins: int,
    edges: NDArray[np.float64],
    cumulated: NDArray[np.float64],
    number: int,
    low: float,
    high: float,
) -> float:
    """Linear inside the bin that the probability falls into; under and over reach to the minimum and maximum."""
    over = len(edges)
    if cumulated[over] <= 0.0:
        return low
    target = PROBABILITIES[number] * cumulated[over]
    index = 0
    while index < over and cumulated[index] < target:
        index += 1
    before = cumulated[index - 1] if index > 0 else 0.0
    weight = np.float64(f4[row, bins + index])
    share = min(1.0, max(0.0, (target - before) / weight)) if weight > 0.0 else 0.0
    start = edges[index - 1] if index > 0 else min(low, edges[0])
    stop = edges[index] if index < over else max(high, edges[over - 1])
    return float(min(max(start + (stop - start) * share, low), high))


class DistributionFeature(Feature):
    """Weight, mean, M2, minimum and maximum, then the bins: under, each, over."""

    def __init__(self, given: FeatureInput, slots: SlotAllocator) -> None:
        super().__init__(given)
        options: DistributionOptions = given.options
        self.edges = options.bins.to_array()
        self.moments = slots.take("f8", 3)
        slots.take("f8", initial=math.inf)
        slots.take("f8", initial=-math.inf)
        self.bins = slots.take("f4", len(self.edges) + 1)
        self.landmark = slots.landmark()

    def operation(self, starts: SlotStarts, constants: Constants) -> list[int]:
        slots = [starts.f8 + self.moments, starts.f4 + self.bins, starts.i8 + self.landmark]
        guesses, shift, lowest = _guess(self.edges)
        reals, codes = constants.add_reals(self.edges), constants.add_codes(guesses)
        edges = constants.add_label(self.edges.astype("<f8").tobytes())
        return [*slots, reals, len(self.edges), codes, len(guesses), shift, lowest, edges]

    def merge(self, target: RowViews, row: int, source: RowViews, source_row: int) -> None:
        common, mine, theirs = align(int(target.i8[row, self.landmark]), int(source.i8[source_row, self.landmark]))
        a = target.f8[row, self.moments : self.moments + 5]
        b = source.f8[source_row, self.moments : self.moments + 5]
        weight_a, weight_b = float(a[0]) * mine, float(b[0]) * theirs
        total = weight_a + weight_b
        if total > 0:
            difference = float(b[1] - a[1])
            mean = float(a[1]) + difference * (weight_b / total) if weight_a else float(b[1])
            m2 = float(a[2]) * mine + float(b[2]) * theirs
            if weight_a and weight_b:
                m2 += difference * difference * (weight_a * (weight_b / total))
            a[0], a[1], a[2] = total, mean, m2
        a[3], a[4] = min(a[3], b[3]), max(a[4], b[4])
        own = slice(self.bins, self.bins + len(self.edges) + 1)
        target.f4[row, own] = target.f4[row, own] * mine + source.f4[source_row, own] * theirs
        target.i8[row, self.landmark] = common

    def answer_bytes(self) -> int:
        quantiles = len(PROBABILITIES) * (HEAD_BYTES + 2 * NUMBER_BYTES)
        return 4 * HEAD_BYTES + 5 * NUMBER_BYTES + quantiles + 8 * (2 * len(self.edges) + 1)


class Distribution(FeatureKind):
    """How a number is distributed."""

    name = "distribution"
    Options = DistributionOptions
    reads = "number"
    decays = True

    def bind(self, given: FeatureInput, slots: SlotAllocator) -> Feature:
        return DistributionFeature(given, slots)
