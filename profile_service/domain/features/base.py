"""What every feature kind offers. A kind is one file of this package and one line of its registry.

A kind (`FeatureKind`) reads its options from the schema file and makes a `Feature`: the kind bound to the slots of a
row that it owns. A feature has five verbs over rows. Two are compiled, and stand in its kind's file; the feature's
`operation` tells them which slots are meant:

    update     adds a block of events to their rows
    encode     writes one row's values, as of a moment, as the answer's bytes

The others are methods:

    merge      adds one row's values to another's
    strings    says which slots hold interned texts
    convert    brings rows along when the schema changes in a way that their values can follow

Rows are bytes seen through typed views, one row a line:

    RowViews.f8[row, slot]   i8[row, slot]   f4[row, slot]   u4[row, slot]   u1[row, slot]

The same kernels run over the population's single row, whose `f4` view is 64 bits wide, because it sums over all users.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from profile_service.domain.decay import NO_LANDMARK, half_life_to_ns
from profile_service.domain.kernel import inlined_kernel, to_i64

VIEW_DTYPES: dict[str, np.dtype[Any]] = {
    "f8": np.dtype(np.float64),
    "i8": np.dtype(np.int64),
    "f4": np.dtype(np.float32),
    "u4": np.dtype(np.uint32),
    "u1": np.dtype(np.uint8),
}
"""Views of a row, widest first, so that every section of the row is aligned."""


Weights = NDArray[np.float32] | NDArray[np.float64]
"""The `f4` view: 32 bits wide in users' rows, 64 in the population's."""


class RowViews(NamedTuple):
    """Rows as typed matrices, (rows, slots) each."""

    f8: NDArray[np.float64]
    i8: NDArray[np.int64]
    f4: Weights
    u4: NDArray[np.uint32]
    u1: NDArray[np.uint8]


KIND, ROUNDED_BITS, WEIGHTS, HALF_LIFE, ATTRIBUTE, HALF_LIFE_NS, NAME, NAME_BYTES, OWN = range(9)
"""Entries of an operation that every kind has: the kind's number, what `add_rounded` is to leave out, where the weights
of the event types begin in `Tables.reals`, the half-life index, the attribute, the half-life, where the feature's name
begins in the labels, and its length. From `OWN` on they are the kind's."""

OPERATION_ENTRIES = OWN + 10

ABSENT = -2
UNLISTED = -1
"""`Events.value_numbers` of an event without the attribute, and of one whose value no feature lists."""


@inlined_kernel
def entry(operation: NDArray[np.int64], place: int) -> int:
    """An entry that is a slot or a count. As the compiler sees that it has no sign, it spares each index made of it the
    look whether it counts from the end."""
    return to_i64(operation[place] & 0x7FFFFFFF)


class Tables(NamedTuple):
    """Constants that operations refer to by where theirs begin."""

    reals: NDArray[np.float64]
    codes: NDArray[np.int64]


class Events(NamedTuple):
    """A block of events, resolved: every text is a number, every user a row. Attributes go by their place in the
    schema."""

    types: NDArray[np.int16]
    """Index into the schema's event types."""
    time_ns: NDArray[np.int64]
    grids: NDArray[np.int64]
    """(half-lives, events): whole half-lives since 1970 of each event's time."""
    mantissas: NDArray[np.float64]
    """(half-lives, events): 2 ** the rest."""
    text_ids: NDArray[np.uint32]
    """(text attributes, events): interned id, 0 where absent; filled for the attributes that some feature keeps as
    text."""
    value_numbers: NDArray[np.int64]
    """(text attributes, events): place in the list of all values that features list; filled for the attributes of
    these."""
    first: int
    """Where the block begins in the three that follow: they are those of all events that were decoded together."""
    text_lengths: NDArray[np.int32]
    """(text attributes, …): length in bytes, -1 where absent."""
    text_hashes: NDArray[np.uint64]
    """(text attributes, …): XXH64 of the value."""
    numbers: NDArray[np.float64]
    """(number attributes, …): NaN where absent."""


class SlotStarts(NamedTuple):
    """By view: where a row's slots begin in it, for views that show whole rows."""

    f8: int
    i8: int
    f4: int
    u4: int
    u1: int


class Constants:
    """What `Tables` is made of, and the list of all values that features list."""

    def __init__(self, values: Sequence[str]) -> None:
        self.values = values
        self._reals: list[float] = []
        self._codes: list[int] = []
        self._labels = bytearray()
        self.prior_sizes: list[int] = []
        """By categorical: how many values have a prior."""

    def add_reals(self, reals: Sequence[float] | NDArray[np.float64]) -> int:
        """Where they begin in `Tables.reals`."""
        self._reals.extend(reals)
        return len(self._reals) - len(reals)

    def add_codes(self, codes: Sequence[int]) -> int:
        """Where they begin in `Tables.codes`."""
        self._codes.extend(codes)
        return len(self._codes) - len(codes)

    def add_label(self, label: bytes) -> int:
        """Where it begins in the labels."""
        self._labels += label
        return len(self._labels) - len(label)

    def add_prior(self, values: int) -> tuple[int, int]:
        """The feature's number among those with a prior, and where its values begin in all of theirs."""
        self.prior_sizes.append(values)
        return len(self.prior_sizes) - 1, sum(self.prior_sizes[:-1])

    def labels(self) -> NDArray[np.uint8]:
        """(bytes,) all of them."""
        return np.frombuffer(bytes(self._labels) or b"\0", dtype=np.uint8)

    def tables(self) -> Tables:
        return Tables(np.array(self._reals, dtype=np.float64), np.array(self._codes, dtype=np.int64))


class SlotAllocator:
    """Hands out the slots of a row, view by view, and notes what a fresh row holds in them."""

    def __init__(self, *, population: bool = False) -> None:
        self.population = population
        self.used: dict[str, int] = dict.fromkeys(VIEW_DTYPES, 0)
        self.initial: list[tuple[str, int, float]] = []

    def take(self, view: str, count: int = 1, initial: float = 0) -> int:
        """The first of `count` neighbouring slots of `view`, which hold `initial` in a fresh row."""
        first = self.used[view]
        self.used[view] += count
        if initial != 0:
            self.initial.extend((view, first + i, initial) for i in range(count))
        return first

    def landmark(self) -> int:
        """A slot of `i8` for a landmark."""
        return self.take("i8", initial=NO_LANDMARK)

    def bytes_used(self) -> int:
        """Bytes of all slots handed out so far."""
        return sum(count * VIEW_DTYPES[view].itemsize for view, count in self.used.items())


@dataclass(frozen=True)
class FeatureInput:
    """What a kind needs to bind a feature: its place in the schema, compiled."""

    name: str
    options: Any
    event_weight: NDArray[np.float64]
    """By event type: its weight, 0 for the types that the feature does not take."""
    half_life_s: float | None
    half_life_index: int
    """Index into `Events.grids` and `Events.mantissas`."""
    attribute: int
    """Row of `Events.text_*` or `Events.numbers` that the feature reads; -1 for none."""


class KindOptions(BaseModel):
    """A feature's own keys in the schema file, beside `kind`, `events` and `half_life`; each kind derives its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    only_read: ClassVar[frozenset[str]] = frozenset()
    """Keys that say how a row is read, and nothing about what it holds."""
    convertible: ClassVar[frozenset[str]] = frozenset()
    """Keys whose change a row can follow, by `Feature.convert`."""

    def shape(self) -> dict[str, Any]:
        """What the numbers of a row mean, as far as the kind's own keys say it: values as in JSON, by key."""
        return self.model_dump(mode="json", exclude=set(self.only_read))


class Feature(ABC):
    """A kind bound to slots of a row."""

    interns: ClassVar[bool] = False
    """Whether the feature keeps interned texts, so that its attribute must be interned before `update`."""

    def __init__(self, given: FeatureInput) -> None:
        self.name = given.name
        self.event_weight = given.event_weight
        self.half_life_index = given.half_life_index
        self.half_life_ns = half_life_to_ns(given.half_life_s)
        self.attribute = given.attribute

    @abstractmethod
    def operation(self, starts: SlotStarts, constants: Constants) -> list[int]:
        """The entries, from `OWN` on, by which the kind's `update` knows this feature. Slots are those of whole rows,
        which are `starts` further on."""

    @abstractmethod
    def merge(self, target: RowViews, row: int, source: RowViews, source_row: int) -> None:
        """Adds the source row's values to the target row, as if the events of both had been the target's.

        Interned ids of both rows must come from one table.
        """

    @abstractmethod
    def answer_bytes(self) -> int:
        """The most that `encode` writes, but for interned texts."""

    def convert(self, target: RowViews, old: Feature, source: RowViews) -> None:
        """Fills this feature's slots of fresh rows with what `old` holds in the same rows of `source`.

        Both are of one name and kind, and differ in no key but the kind's `convertible` ones. All rows are converted at
        once; a fresh one stays fresh.
        """
        raise NotImplementedError(f"a {type(self).__name__} has nothing that rows could follow")

    def strings(self) -> Sequence[tuple[int, int]]:
        """Runs of `u4` slots, as (first, count), that hold interned ids."""
        return ()

    def vocabulary(self) -> Sequence[str]:
        """The closed list of values of which `Events.value_numbers` tells; empty for kinds without one."""
        return ()

    def standard_error(self) -> float | None:
        """Relative standard error of the answer, for kinds that estimate."""
        return None


class FeatureKind(ABC):
    """One kind of feature."""

    name: ClassVar[str]
    """As written in the schema file after `kind:`."""
    Options: ClassVar[type[KindOptions]]
    reads: ClassVar[Literal["text", "number"] | None]
    """What the attribute of the feature must be; None for kinds that read no attribute."""
    decays: ClassVar[bool]
    """Whether `half_life` means something for it."""

    @abstractmethod
    def bind(self, given: FeatureInput, slots: SlotAllocator) -> Feature:
        """The feature, with the slots that it needs taken from `slots`."""
