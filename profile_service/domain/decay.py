"""Forward decay on a grid of half-lives (after Cormode, Shkapenyuk, Srivastava, Xu: Forward Decay, ICDE 2009).

An event of weight `w` at time `t` counts `w * 2**-((T - t) / h)` when read at `T`. Stored is `w * 2**(t / h - L)`,
where the landmark `L` is a whole number of half-lives since 1970; reading multiplies by `2**(L - T / h)`. Updates are
additions, so their order does not matter and a late event is exact.

    t / h = grid + log2(mantissa),   grid a whole number,   1 <= mantissa < 2

Because the landmark lies on the grid, moving it multiplies by a power of two, which floating point does without
rounding. Each feature of each row has a landmark of its own: a feature that was last seen years ago keeps its full
precision beside one seen now.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.kernel import inlined_kernel, leaf_kernel, to_i64

NO_LANDMARK = np.iinfo(np.int64).min
"""The landmark of a feature that has seen nothing."""

RESCALE_STEPS = 64
"""A landmark this many half-lives behind an event is moved up to it: float32 then still has 60 half-lives of room
above, and 190 below."""

NS = 1_000_000_000


@inlined_kernel
def power_of_two(exponent: int) -> float:
    """2.0 ** exponent; 0.0 below what float64 holds."""
    if exponent < -1022 or exponent > 1023:
        return 0.0 if exponent < -1074 else math.ldexp(1.0, exponent)
    # As the bits of a float64 say it.
    return np.uint64((exponent + 1023) << 52).view(np.float64)


@inlined_kernel
def steps_from_landmark(i8: NDArray[np.int64], row: int, landmark: int, grid: int) -> int:
    """By how many half-lives an event at `grid` is younger than the landmark; one that has none takes the event's."""
    held = to_i64(i8[row, landmark])
    if held == NO_LANDMARK:
        i8[row, landmark] = grid
        return 0
    return grid - held


ROUNDED_BITS = (1 << 29) - 1
"""The bits of a float64's fraction that a float32 has not."""


@inlined_kernel
def add_rounded(total: float, weight: float, rounded_bits: int) -> float:
    """`total + weight` without the bits of `rounded_bits`, rounded up as often as their share of a unit asks for.

    Rounding to the nearest errs the same way at each of many equal additions: ten thousand events would be wrong by one
    in ten thousand. Here the error has no direction. What looks like chance is a hash of the sum, so that a replay
    gives the same bits; sums that a float32 can hold exactly stay exact.
    """
    if rounded_bits == 0:
        return total + weight
    bits = np.float64(total + weight).view(np.uint64)
    noise = (bits ^ (bits >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    noise = (noise ^ (noise >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(35)
    mask = np.uint64(rounded_bits)
    return np.uint64((bits + (noise & mask)) & ~mask).view(np.float64)


@leaf_kernel
def decompose(
    time_ns: NDArray[np.int64], half_life_ns: int, grid: NDArray[np.int64], mantissa: NDArray[np.float64]
) -> None:
    """Splits each time into its whole half-lives since 1970 (`grid`) and `2 ** rest` (`mantissa`)."""
    whole = begin = 0
    for i in range(len(time_ns)):
        rest = time_ns[i] - begin
        # Neighbours in time spare each other the division.
        if rest < 0 or rest >= half_life_ns:
            whole = time_ns[i] // half_life_ns
            begin = whole * half_life_ns
            rest = time_ns[i] - begin
        grid[i] = whole
        mantissa[i] = np.exp2(rest / half_life_ns)


@inlined_kernel
def read_scale(landmark: int, read_ns: int, half_life_ns: int) -> float:
    """What a stored weight is multiplied by when it is read at `read_ns`; a `half_life_ns` of 0 is no decay."""
    if half_life_ns == 0 or landmark == NO_LANDMARK:
        return 1.0
    whole = read_ns // half_life_ns
    steps = landmark - whole
    if steps >= 1000:
        return math.inf
    return float(power_of_two(steps) * np.exp2(-((read_ns - whole * half_life_ns) / half_life_ns)))


def half_life_to_ns(half_life_s: float | None) -> int:
    """Nanoseconds of a half-life; 0 for none."""
    return 0 if half_life_s is None else max(1, round(half_life_s * NS))


def align(landmark: int, other: int) -> tuple[int, float, float]:
    """The common landmark of two stored features, and what the weights of each are multiplied by to refer to it."""
    if landmark == NO_LANDMARK:
        return other, 1.0, 1.0
    if other == NO_LANDMARK:
        return landmark, 1.0, 1.0
    common = max(landmark, other)
    return common, float(power_of_two(landmark - common)), float(power_of_two(other - common))
