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
from profile_service.domain.features.base import (
    ABSENT,
    ATTRIBUTE,
    HALF_LIFE,
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
    ReadContext,
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


SLOT, COUNT, LANDMARK, CODES = range(OWN, OWN + 4)


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
        return [starts.f4 + self.slot, len(self.labels), starts.i8 + self.landmark, first]

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

    def weights(self, views: RowViews, row: int, read_ns: int) -> NDArray[np.float64]:
        """Decayed weight of each value, `other` last, as of `read_ns`."""
        scale = read_scale(int(views.i8[row, self.landmark]), read_ns, self.half_life_ns)
        return views.f4[row, self.slot : self.slot + len(self.labels)].astype(np.float64) * scale

    def finalize(self, views: RowViews, row: int, context: ReadContext, message: profile_pb2.Feature) -> None:
        weights = self.weights(views, row, context.read_ns)
        prior = np.full(len(weights), 1.0 / len(weights))
        if self.prior == "population":
            population = context.population_weights(self.name)
            if population is not None:
                prior = (population + 1.0) / (population.sum() + len(population))
        total = float(weights.sum())
        likelihoods = (weights + self.prior_strength * prior) / (total + self.prior_strength)
        lifts = likelihoods / prior
        answer = message.categorical
        answer.weight = total
        answer.confidence = total / (total + self.prior_strength)
        # A stable sort keeps the schema's order among equals.
        for code in np.argsort(-likelihoods, kind="stable").tolist():
            answer.values.add(
                value=self.labels[code], weight=weights[code], likelihood=likelihoods[code], lift=lifts[code]
            )


class Categorical(FeatureKind):
    """Likelihoods over a closed list of values."""

    name = "categorical"
    Options = CategoricalOptions
    reads = "text"
    decays = True

    def bind(self, given: FeatureInput, slots: SlotAllocator) -> Feature:
        return CategoricalFeature(given, slots)
