"""A schema compiled: which slots of a row each feature owns.

    row    | f8 section | i8 section | f4 section | u4 section | u1 section | padding to 8 bytes |
    header   i8[0] event_count   i8[1] first seen   i8[2] last seen   i8[3] last received     (times in ns since 1970)

A fresh row is a copy of `template`, which holds what the features want to start from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.decay import ROUNDED_BITS as BITS_OF_32
from profile_service.domain.encoding import HEAD_BYTES, TIME_BYTES
from profile_service.domain.features import KIND_NUMBERS, KINDS
from profile_service.domain.features.base import (
    ATTRIBUTE,
    HALF_LIFE,
    HALF_LIFE_NS,
    KIND,
    NAME,
    NAME_BYTES,
    OPERATION_ENTRIES,
    OWN,
    ROUNDED_BITS,
    VIEW_DTYPES,
    WEIGHTS,
    Constants,
    Feature,
    FeatureInput,
    RowViews,
    SlotAllocator,
    SlotStarts,
    Tables,
)
from profile_service.domain.schema import FeatureSpec, Schema

EVENT_COUNT, FIRST_SEEN, LAST_SEEN, LAST_RECEIVED = range(4)
HEADER_SLOTS = 4
"""Slots of `i8` that every row has, before those of any feature."""

PROFILE_BYTES = 11 + 3 * TIME_BYTES
"""The most that the header takes in the answer to a read."""

_I8 = np.iinfo(np.int64)


@dataclass(frozen=True)
class Layout:
    """Where everything is in a row."""

    features: tuple[Feature, ...]
    half_lives_s: tuple[float | None, ...]
    """The different half-lives, by half-life index."""
    counts: dict[str, int]
    """Slots by view."""
    row_bytes: int
    feature_bytes: tuple[int, ...]
    """Bytes of a row by feature."""
    slots: tuple[dict[str, tuple[int, int]], ...]
    """By feature: the slots that it owns, as (first, count) by view."""
    template: NDArray[np.uint8]
    """(row_bytes,) a fresh row."""
    values: tuple[str, ...]
    """All values that some feature lists, each once."""
    header: int
    """The slot of `i8` with which the header begins, in views of whole rows."""
    operations: NDArray[np.int64]
    """(features, OPERATION_ENTRIES): what the kernels know of them, for views of whole rows."""
    tables: Tables
    """What the operations refer to."""
    labels: NDArray[np.uint8]
    """Names and values, as answers hold them; the operations refer to them, too."""
    prior_sizes: tuple[int, ...]
    """By categorical: how many values it has."""
    answer_bytes: int
    """The most that the answer to a read takes beside the user's id and interned texts."""

    @classmethod
    def compile(cls, schema: Schema, *, population: bool = False) -> Layout:
        """Lays the schema's features out; for the population's row where `population` is set."""
        slots = SlotAllocator(population=population)
        slots.take("i8")
        slots.take("i8", initial=_I8.max)
        slots.take("i8", initial=_I8.min)
        slots.take("i8")
        half_lives: list[float | None] = [None]
        features, sizes, owned = [], [], []
        for spec in schema.features:
            if spec.half_life_s not in half_lives:
                half_lives.append(spec.half_life_s)
            before, first = slots.bytes_used(), dict(slots.used)
            features.append(_bind(schema, spec, half_lives.index(spec.half_life_s), slots))
            sizes.append(slots.bytes_used() - before)
            owned.append({view: (at, slots.used[view] - at) for view, at in first.items() if slots.used[view] > at})
        row_bytes = -(-slots.bytes_used() // 8) * 8
        template = np.zeros(row_bytes, dtype=np.uint8)
        starts = SlotStarts(0, 0, 0, 0, 0) if population else _starts(slots.used)
        constants = Constants(list(dict.fromkeys(value for feature in features for value in feature.vocabulary())))
        operations = np.zeros((len(features), OPERATION_ENTRIES), dtype=np.int64)
        for operation, spec, feature in zip(operations, schema.features, features, strict=True):
            operation[KIND] = KIND_NUMBERS[spec.kind]
            operation[ROUNDED_BITS] = 0 if population else BITS_OF_32
            operation[WEIGHTS] = constants.add_reals(feature.event_weight)
            operation[HALF_LIFE] = feature.half_life_index
            operation[ATTRIBUTE] = feature.attribute
            operation[HALF_LIFE_NS] = feature.half_life_ns
            name = feature.name.encode()
            operation[NAME], operation[NAME_BYTES] = constants.add_label(name), len(name)
            own = feature.operation(starts, constants)
            operation[OWN : OWN + len(own)] = own
        layout = cls(
            features=tuple(features),
            half_lives_s=tuple(half_lives),
            counts=dict(slots.used),
            row_bytes=row_bytes,
            feature_bytes=tuple(sizes),
            slots=tuple(owned),
            template=template,
            values=tuple(constants.values),
            header=starts.i8,
            operations=operations,
            tables=constants.tables(),
            labels=constants.labels(),
            prior_sizes=tuple(constants.prior_sizes),
            answer_bytes=PROFILE_BYTES
            + sum(4 * HEAD_BYTES + len(feature.name.encode()) + feature.answer_bytes() for feature in features),
        )
        views = layout.views_of(template.reshape(1, row_bytes))
        for view, slot, value in slots.initial:
            getattr(views, view)[0, slot] = value
        return layout

    def views_of(self, rows: NDArray[np.uint8]) -> RowViews:
        """Typed views of (rows, row_bytes) bytes, without a copy."""
        views, start = {}, 0
        for name, dtype in VIEW_DTYPES.items():
            end = start + self.counts[name] * dtype.itemsize
            views[name] = rows[:, start:end].view(dtype) if end > start else np.zeros((len(rows), 0), dtype)
            start = end
        return RowViews(**views)

    def whole_views_of(self, rows: NDArray[np.uint8]) -> RowViews:
        """Views of (rows, row_bytes) bytes that show each row whole, as kernels like them: without gaps."""
        return RowViews(**{name: rows.view(dtype) for name, dtype in VIEW_DTYPES.items()})

    def wide_row(self) -> RowViews:
        """One fresh row whose `f4` view has 64 bits: for sums over all users."""
        narrow = self.views_of(self.template.reshape(1, self.row_bytes))
        copies = {name: getattr(narrow, name).copy() for name in VIEW_DTYPES}
        copies["f4"] = copies["f4"].astype(np.float64)
        return RowViews(**copies)


def _starts(used: dict[str, int]) -> SlotStarts:
    starts, end = {}, 0
    for name, dtype in VIEW_DTYPES.items():
        starts[name] = end // dtype.itemsize
        end += used[name] * dtype.itemsize
    return SlotStarts(**starts)


def _bind(schema: Schema, spec: FeatureSpec, half_life_index: int, slots: SlotAllocator) -> Feature:
    kind = KINDS[spec.kind]
    attribute = -1
    if kind.reads == "text":
        attribute = schema.text_attributes.index(spec.options.attribute)  # type: ignore[attr-defined]
    elif kind.reads == "number":
        attribute = schema.number_attributes.index(spec.options.attribute)  # type: ignore[attr-defined]
    weight = np.array([event.weight if event.name in spec.events else 0.0 for event in schema.event_types])
    given = FeatureInput(spec.name, spec.options, weight, spec.half_life_s, half_life_index, attribute)
    return kind.bind(given, slots)
