"""`categorical`: how likely each value of a closed list is, by the decayed weight of the events that had it and a
prior.

The likelihood is the mean of a Dirichlet posterior: `p_v = (W_v + a * prior_v) / (W + a)`.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

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
    NUMBER_BYTES,
    Reading,
    put_bytes,
    put_double,
    put_head,
    sort_descending,
)
from profile_service.domain.features.base import (
    ABSENT,
    ATTRIBUTE,
    HALF_LIFE,
    HALF_LIFE_NS,
    OWN,
    ROUNDED_BITS,
    UNLISTED,
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

OTHER = "other"


def _check_values(values: list[str]) -> list[str]:
    repeated = sorted(value for value, count in Counter(values).items() if count > 1)
    faults = [
        f"each value once; repeated: {', '.join(repeated)}" if repeated else "",
        f"{OTHER!r} is always there: leave it out" if OTHER in values else "",
        "a value must not be empty" if "" in values else "",
    ]
    if any(faults):
        raise ValueError("; ".join(filter(None, faults)))
    return values


class CategoricalOptions(KindOptions):
    """Which attribute, which values, and what is believed before anything is seen."""

    attribute: str = Field(min_length=1)
    values: Annotated[list[str], Field(min_length=1, max_length=1000), AfterValidator(_check_values)]
    prior: Literal["uniform", "population"] = "uniform"
    prior_strength: float = Field(default=5.0, gt=0)
    """How many events of weight 1 the prior is worth."""

    only_read: ClassVar[frozenset[str]] = frozenset({"prior", "prior_strength"})
    convertible: ClassVar[frozenset[str]] = frozenset({"values"})


SLOT, COUNT, LANDMARK, CODES, LABELS, STRENGTH, PRIOR_NUMBER, PRIOR = range(OWN, OWN + 8)
"""`LABELS` is where pairs of place and length begin in the codes; `PRIOR` is -1 where the prior is uniform."""

_FIELD = profile_pb2.Feature.CATEGORICAL_FIELD_NUMBER
_WEIGHT = profile_pb2.Categorical.WEIGHT_FIELD_NUMBER
_CONFIDENCE = profile_pb2.Categorical.CONFIDENCE_FIELD_NUMBER
_VALUES = profile_pb2.Categorical.VALUES_FIELD_NUMBER
_VALUE = profile_pb2.Categorical.Value.VALUE_FIELD_NUMBER
_VALUE_WEIGHT = profile_pb2.Categorical.Value.WEIGHT_FIELD_NUMBER
_LIKELIHOOD = profile_pb2.Categorical.Value.LIKELIHOOD_FIELD_NUMBER
_LIFT = profile_pb2.Categorical.Value.LIFT_FIELD_NUMBER


@inlined_kernel
def update(
    views: RowViews, operation: NDArray[np.int64], tables: Tables, events: Events, rows: NDArray[np.int64]
) -> None:
    """Adds the events' weights to their values' slots."""
    f4, i8 = views.f4, views.i8
    slot, count, landmark = entry(operation, SLOT), entry(operation, COUNT), entry(operation, LANDMARK)
    codes = tables.codes[operation[CODES] :]
    weight = tables.reals[operation[WEIGHTS] :]
    grid, mantissa = events.grids[operation[HALF_LIFE]], events.mantissas[operation[HALF_LIFE]]
    numbers = events.value_numbers[operation[ATTRIBUTE]]
    for i in range(len(rows)):
        row, number = rows[i], numbers[i]
        w = weight[events.types[i]]
        if row < 0 or number == ABSENT or w == 0.0:
            continue
        w *= mantissa[i]
        steps = steps_from_landmark(i8, row, landmark, grid[i])
        if steps > RESCALE_STEPS:
            scale = power_of_two(-steps)
            for k in range(slot, slot + count):
                f4[row, k] *= scale
            i8[row, landmark] = grid[i]
        elif steps != 0:
            w *= power_of_two(steps)
        place = slot + (count - 1 if number == UNLISTED else codes[number])
        f4[row, place] = add_rounded(f4[row, place], w, operation[ROUNDED_BITS])


@inlined_kernel
def encode(
    views: RowViews, row: int, operation: NDArray[np.int64], reading: Reading, out: NDArray[np.uint8], at: int
) -> int:
    """Writes a Categorical before `at`; returns where it begins."""
    slot, count, landmark = entry(operation, SLOT), entry(operation, COUNT), entry(operation, LANDMARK)
    half_life_ns, strength = operation[HALF_LIFE_NS], reading.reals[operation[STRENGTH]]
    scale = read_scale(views.i8[row, landmark], reading.read_ns, half_life_ns)
    # The prior of a value is `(weight + 1) / everyones`, with the population's decayed weights; without them 1 / count.
    number, prior = operation[PRIOR_NUMBER], operation[PRIOR]
    is_uniform = prior < 0 or len(reading.prior_weights) == 0
    prior_scale, everyones = 0.0, float(count)
    if not is_uniform:
        prior_scale = read_scale(reading.prior_landmarks[number], reading.read_ns, half_life_ns)
        for k in range(count):
            everyones += reading.prior_weights[prior + k] * prior_scale
    total = 0.0
    for k in range(count):
        total += views.f4[row, slot + k] * scale
    keys = reading.keys
    for k in range(count):
        share = 1.0 / everyones if is_uniform else (reading.prior_weights[prior + k] * prior_scale + 1.0) / everyones
        keys[k] = (views.f4[row, slot + k] * scale + strength * share) / (total + strength)
    # Equals keep the schema's order.
    sort_descending(keys, count, reading.order, reading.beside)
    end = at
    for k in range(count - 1, -1, -1):
        code = reading.order[k]
        share = 1.0 / everyones if is_uniform else (reading.prior_weights[prior + code] * prior_scale + 1.0) / everyones
        label = operation[LABELS] + 2 * code
        last = at
        at = put_double(out, at, _LIFT, keys[code] / share)
        at = put_double(out, at, _LIKELIHOOD, keys[code])
        at = put_double(out, at, _VALUE_WEIGHT, views.f4[row, slot + code] * scale)
        at = put_bytes(out, at, _VALUE, reading.labels, reading.codes[label], reading.codes[label + 1])
        at = put_head(out, at, _VALUES, last)
    at = put_double(out, at, _CONFIDENCE, total / (total + strength))
    at = put_double(out, at, _WEIGHT, total)
    return put_head(out, at, _FIELD, end)


class CategoricalFeature(Feature):
    """A weight for each value, then one for `other`."""

    def __init__(self, given: FeatureInput, slots: SlotAllocator) -> None:
        super().__init__(given)
        options: CategoricalOptions = given.options
        self.labels = [*options.values, OTHER]
        self.prior = options.prior
        self.prior_strength = options.prior_strength
        self.slot = slots.take("f4", len(self.labels))
        self.landmark = slots.landmark()

    def vocabulary(self) -> list[str]:
        return self.labels[:-1]

    def operation(self, starts: SlotStarts, constants: Constants) -> list[int]:
        codes = {value: code for code, value in enumerate(self.vocabulary())}
        other = len(codes)
        first = constants.add_codes([codes.get(value, other) for value in constants.values])
        places = []
        for label in self.labels:
            encoded = label.encode()
            places += [constants.add_label(encoded), len(encoded)]
        number, prior = constants.add_prior(len(self.labels))
        return [
            starts.f4 + self.slot,
            len(self.labels),
            starts.i8 + self.landmark,
            first,
            constants.add_codes(places),
            constants.add_reals([self.prior_strength]),
            number,
            prior if self.prior == "population" else -1,
        ]

    def merge(self, target: RowViews, row: int, source: RowViews, source_row: int) -> None:
        common, mine, theirs = align(int(target.i8[row, self.landmark]), int(source.i8[source_row, self.landmark]))
        own = slice(self.slot, self.slot + len(self.labels))
        target.f4[row, own] = target.f4[row, own] * mine + source.f4[source_row, own] * theirs
        target.i8[row, self.landmark] = common

    def convert(self, target: RowViews, old: Feature, source: RowViews) -> None:
        """By the values' names. Values that are no longer listed join `other`, where new ones have been counted."""
        assert isinstance(old, CategoricalFeature)
        places = {label: place for place, label in enumerate(self.labels)}
        other = np.zeros(len(source.f4), dtype=np.float64)
        for place, label in enumerate(old.labels):
            weights = source.f4[:, old.slot + place]
            if label in places and label != OTHER:
                target.f4[:, self.slot + places[label]] = weights
            else:
                other += weights
        target.f4[:, self.slot + places[OTHER]] = other
        target.i8[:, self.landmark] = source.i8[:, old.landmark]

    def answer_bytes(self) -> int:
        values = sum(len(label.encode()) + 2 * HEAD_BYTES + 3 * NUMBER_BYTES for label in self.labels)
        return HEAD_BYTES + 2 * NUMBER_BYTES + values


class Categorical(FeatureKind):
    """Likelihoods over a closed list of values."""

    name = "categorical"
    Options = CategoricalOptions
    reads = "text"
    decays = True

    def bind(self, given: FeatureInput, slots: SlotAllocator) -> Feature:
        return CategoricalFeature(given, slots)
