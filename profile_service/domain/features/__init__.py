"""The feature kinds: one file a kind, a line in each of the two lists here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.encoding import Reading
from profile_service.domain.features import (
    categorical,
    counter,
    distinct,
    distribution,
    latest,
    recent,
    top_k,
    window_count,
)
from profile_service.domain.features.base import KIND, Events, FeatureKind, RowViews, Tables
from profile_service.domain.kernel import leaf_kernel

_KINDS: tuple[FeatureKind, ...] = (
    counter.Counter(),
    categorical.Categorical(),
    distribution.Distribution(),
    top_k.TopK(),
    window_count.WindowCount(),
    latest.Latest(),
    recent.Recent(),
    distinct.Distinct(),
)

KINDS: dict[str, FeatureKind] = {kind.name: kind for kind in _KINDS}
"""Every kind by the name that a schema file gives it."""

KIND_NUMBERS = {kind.name: number for number, kind in enumerate(_KINDS)}
"""By name: how an operation says the kind."""

_COUNTER, _CATEGORICAL, _DISTRIBUTION, _TOP_K, _WINDOW_COUNT, _LATEST, _RECENT, _DISTINCT = range(len(_KINDS))


@leaf_kernel
def update(
    views: RowViews, operation: NDArray[np.int64], tables: Tables, events: Events, rows: NDArray[np.int64]
) -> None:
    """Adds a block of events to their rows, in order, as far as the operation's feature goes; those with a row below 0
    are left out."""
    kind = operation[KIND]
    if kind == _COUNTER:
        counter.update(views, operation, tables, events, rows)
    elif kind == _CATEGORICAL:
        categorical.update(views, operation, tables, events, rows)
    elif kind == _DISTRIBUTION:
        distribution.update(views, operation, tables, events, rows)
    elif kind == _TOP_K:
        top_k.update(views, operation, tables, events, rows)
    elif kind == _WINDOW_COUNT:
        window_count.update(views, operation, tables, events, rows)
    elif kind == _LATEST:
        latest.update(views, operation, tables, events, rows)
    elif kind == _RECENT:
        recent.update(views, operation, tables, events, rows)
    elif kind == _DISTINCT:
        distinct.update(views, operation, tables, events, rows)


@leaf_kernel
def encode(
    views: RowViews, row: int, operation: NDArray[np.int64], reading: Reading, out: NDArray[np.uint8], at: int
) -> int:
    """Writes the operation's feature of a row as a Feature before `at`; returns where it begins, or `NO_ROOM`."""
    kind = operation[KIND]
    if kind == _COUNTER:
        return counter.encode(views, row, operation, reading, out, at)
    if kind == _CATEGORICAL:
        return categorical.encode(views, row, operation, reading, out, at)
    if kind == _DISTRIBUTION:
        return distribution.encode(views, row, operation, reading, out, at)
    if kind == _TOP_K:
        return top_k.encode(views, row, operation, reading, out, at)
    if kind == _WINDOW_COUNT:
        return window_count.encode(views, row, operation, reading, out, at)
    if kind == _LATEST:
        return latest.encode(views, row, operation, reading, out, at)
    if kind == _RECENT:
        return recent.encode(views, row, operation, reading, out, at)
    return distinct.encode(views, row, operation, reading, out, at)
