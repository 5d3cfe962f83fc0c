"""The search for a value's counter, and for the lightest: in whole vectors, wherever a row's counters begin and end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from profile_service.domain.features.top_k import _lightest, _place_of

ROWS, BEFORE, BEHIND = 3, 5, 4


def slots(dtype: type[Any], row: int, values: NDArray[Any], around: Any) -> NDArray[Any]:
    """Rows full of `around`, which a search must not find, with `values` in one of them."""
    views = np.full((ROWS, BEFORE + len(values) + BEHIND), around, dtype)
    views[row, BEFORE : BEFORE + len(values)] = values
    return views


@pytest.mark.parametrize("k", [*range(1, 36), 64, 100])
def test_a_value_is_found_or_else_the_first_free_counter(k: int) -> None:
    for row in range(ROWS):
        for used in {0, 1, k // 2, k - 1, k}:
            ids = np.where(np.arange(k) < used, np.arange(k) + 7, 0).astype(np.uint32)
            for place in range(used):
                assert _place_of(slots(np.uint32, row, ids, place + 7), row, BEFORE, k, np.uint32(place + 7)) == place
            assert _place_of(slots(np.uint32, row, ids, 3), row, BEFORE, k, np.uint32(3)) == used
            assert _place_of(slots(np.uint32, row, ids, 0), row, BEFORE, k, np.uint32(3)) == used


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [*range(1, 36), 64, 100])
def test_of_equally_light_counters_it_is_the_first(k: int, dtype: type[Any]) -> None:
    for row in range(ROWS):
        for place in range(k):
            weights = np.where(np.arange(k) < place, 2.0, 1.5)
            weights[place] = 1.0
            weights[place + 1 :: 2] = 1.0
            assert _lightest(slots(dtype, row, weights, 0.5), row, BEFORE, k) == place
