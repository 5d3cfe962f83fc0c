"""Forward decay's arithmetic: exact where it can be, unbiased where it must round."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profile_service.domain.decay import NO_LANDMARK, ROUNDED_BITS, add_rounded, align, decompose, read_scale

TIMES = st.integers(-(2**62), 2**62)
HALF_LIVES = st.integers(1_000_000, 10**18)


@given(TIMES, HALF_LIVES, st.integers(0, 10**18))
def test_a_weight_halves_each_half_life(time_ns: int, half_life_ns: int, age_ns: int) -> None:
    grid, mantissa = np.empty(1, np.int64), np.empty(1, np.float64)
    decompose(np.array([time_ns]), half_life_ns, grid, mantissa)
    # A rest just below a whole half-life rounds up to it.
    assert 1 <= mantissa[0] <= 2
    weight = mantissa[0] * read_scale(int(grid[0]), time_ns + age_ns, half_life_ns)
    expected = 2.0 ** -(age_ns / half_life_ns) if age_ns / half_life_ns < 1074 else 0.0
    assert weight == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("weight", [1.0, 1.7431234, 1.23456789, math.sqrt(2), 8 / 3])
def test_ten_thousand_equal_additions_stay_right(weight: float) -> None:
    total = np.zeros(1, dtype=np.float32)
    for count in range(1, 10_001):
        total[0] = add_rounded(float(total[0]), weight, ROUNDED_BITS)
        assert total[0] == pytest.approx(weight * count, rel=2e-5)


@given(st.integers(0, 2**23), st.integers(0, 2**23))
def test_whole_numbers_add_exactly(total: int, weight: int) -> None:
    assert np.float32(add_rounded(float(total), float(weight), ROUNDED_BITS)) == total + weight


@given(st.floats(0, 1e30), st.floats(0, 1e30))
def test_without_bits_to_leave_out_it_is_a_plain_addition(total: float, weight: float) -> None:
    assert add_rounded(total, weight, 0) == total + weight


@given(st.integers(-10_000, 10_000), st.integers(-10_000, 10_000))
def test_aligned_landmarks_keep_the_newer(one: int, other: int) -> None:
    common, mine, theirs = align(one, other)
    assert common == max(one, other)
    assert max(mine, theirs) == 1.0
    assert min(mine, theirs) == (2.0 ** -abs(one - other) if abs(one - other) <= 1074 else 0.0)
    assert align(NO_LANDMARK, other) == (other, 1.0, 1.0)
    assert align(one, NO_LANDMARK) == (one, 1.0, 1.0)
