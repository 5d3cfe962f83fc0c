"""Doubles as text: the shortest decimal that reads back as the same number, the nearest one where there are several.

The digits are found as in R. Giulietti, "The Schubfach way to render doubles" (2021), with powers of ten of 128 bits.
They are written as orjson writes them:

    0.0   -12.5   0.00001   1e-6   1234000000000000.0   1.234e+16   "NaN"   "Infinity"   "-Infinity"

JSON has no numbers for the last three; proto3's JSON mapping writes them as strings.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.kernel import leading_zeros, leaf_kernel, multiply_high, to_i64

_FIRST_POWER, _LAST_POWER = -292, 324
_SIGNIFICAND_BITS = 52
_FIXED_DIGITS = 16
"""A number of more digits before its point is written with an exponent,"""
_FIXED_ZEROS = 5
"""and one of so many zeros behind it, the one before it counted."""

_U0, _U1, _U2, _U4, _U10, _U40, _U100 = (np.uint64(number) for number in (0, 1, 2, 4, 10, 40, 100))


def _power_of_ten(exponent: int) -> tuple[int, int]:
    """The leading 128 bits of 10**exponent, rounded up, as two u8: the upper half first."""
    if exponent >= 0:
        shift = (10**exponent).bit_length() - 128
        power = 10**exponent << -shift if shift <= 0 else -(-(10**exponent) >> shift)
    else:
        divisor = 10**-exponent
        power = -(-(1 << (127 + divisor.bit_length())) // divisor)
    assert power.bit_length() == 128
    return power >> 64, power & (1 << 64) - 1


_POWERS = np.array([_power_of_ten(exponent) for exponent in range(_FIRST_POWER, _LAST_POWER + 1)], np.uint64)
_WHOLE_POWERS = np.array([10**exponent for exponent in range(20)], np.uint64)
_PAIRS = np.frombuffer(b"".join(b"%02d" % number for number in range(100)), np.uint8)
"""The digits of every number below 100."""


@leaf_kernel
def _round_to_odd(exponent: int, number: np.uint64) -> np.uint64:
    """The upper half of the product of a number and 10**exponent's leading bits; its last bit is set, too, where
    something was cut off."""
    high, low = _POWERS[exponent - _FIRST_POWER, 0], _POWERS[exponent - _FIRST_POWER, 1]
    carried = multiply_high(low, number)
    middle = high * number + carried
    upper = multiply_high(high, number) + (_U1 if middle < carried else _U0)
    return upper | (_U1 if middle > _U1 else _U0)


@leaf_kernel
def shortest_decimal(bits: np.uint64) -> tuple[np.uint64, int]:
    """(digits, exponent) of a positive finite double: the value is digits * 10**exponent."""
    fraction = bits & np.uint64((1 << _SIGNIFICAND_BITS) - 1)
    biased = to_i64(bits >> np.uint64(_SIGNIFICAND_BITS)) & 0x7FF
    if biased != 0:
        significand = fraction | np.uint64(1 << _SIGNIFICAND_BITS)
        exponent = biased - 1075
        if -_SIGNIFICAND_BITS <= exponent <= 0:
            whole = significand >> np.uint64(-exponent)
            if whole << np.uint64(-exponent) == significand:
                return whole, to_i64(0)
    else:
        significand = fraction
        exponent = to_i64(-1074)
    # The one below a power of two is nearer than the one above.
    closer = fraction == _U0 and biased > 1
    power = (exponent * 1262611 - (524031 if closer else 0)) >> 22
    shift = np.uint64(exponent + ((-power * 1741647) >> 19) + 1)
    middle = _U4 * significand
    below = _round_to_odd(-power, (middle - (_U1 if closer else _U2)) << shift)
    value = _round_to_odd(-power, middle << shift)
    above = _round_to_odd(-power, (middle + _U2) << shift)
    if significand & _U1 == _U1:
        # What lies on a boundary reads back as the even neighbour.
        below += _U1
        above -= _U1
    quarter = value >> _U2
    if quarter >= _U10:
        tenth = quarter // _U10
        under = below <= _U40 * tenth
        over = _U40 * tenth + _U40 <= above
        if under != over:
            return tenth + (_U1 if over else _U0), power + 1
    under = below <= _U4 * quarter
    over = _U4 * quarter + _U4 <= above
    if under != over:
        return quarter + (_U1 if over else _U0), power
    half = _U4 * quarter + _U2
    up = value > half or (value == half and quarter & _U1 == _U1)
    return quarter + (_U1 if up else _U0), power


@leaf_kernel
def put_digits(out: NDArray[np.uint8], at: int, number: np.uint64) -> int:
    """Writes a number from `at` on; returns where it ends."""
    size = to_i64(1)
    if number != _U0:
        # 1233 / 4096 is a little more than the logarithm of 2 to the base 10.
        size = (64 - leading_zeros(number)) * 1233 >> 12
        if number >= _WHOLE_POWERS[size]:
            size += 1
    end = at + size
    while number >= _U100:
        rest = number // _U100
        pair = to_i64(number - rest * _U100) * 2
        end -= 2
        out[end] = _PAIRS[pair]
        out[end + 1] = _PAIRS[pair + 1]
        number = rest
    if number >= _U10:
        pair = to_i64(number) * 2
        out[end - 2] = _PAIRS[pair]
        out[end - 1] = _PAIRS[pair + 1]
    else:
        out[end - 1] = to_i64(number) + 48
    return at + size


@leaf_kernel
def put_double_text(out: NDArray[np.uint8], at: int, bits: np.uint64) -> int:
    """Writes a double, given by its bits, from `at` on; returns where it ends. There is room for 25 bytes."""
    magnitude = bits & np.uint64(0x7FFF_FFFF_FFFF_FFFF)
    infinite = np.uint64(0x7FF0_0000_0000_0000)
    if magnitude > infinite:
        return _put(out, at, b'"NaN"')
    if magnitude == infinite:
        return _put(out, at, b'"Infinity"' if bits == magnitude else b'"-Infinity"')
    if bits != magnitude:
        out[at] = 45
        at += 1
    if magnitude == _U0:
        return _put(out, at, b"0.0")
    digits, exponent = shortest_decimal(magnitude)
    while exponent < 0 and digits % _U10 == _U0:
        digits //= _U10
        exponent += 1
    end = put_digits(out, at, digits)
    # Where the point stands, counted from the first digit.
    point = end - at + exponent
    if exponent >= 0 and point <= _FIXED_DIGITS:
        for k in range(exponent):
            out[end + k] = 48
        return _put(out, end + exponent, b".0")
    if 0 < point <= _FIXED_DIGITS:
        for k in range(end, at + point, -1):
            out[k] = out[k - 1]
        out[at + point] = 46
        return end + 1
    if -_FIXED_ZEROS < point <= 0:
        gap = 2 - point
        for k in range(end - 1, at - 1, -1):
            out[k + gap] = out[k]
        out[at] = 48
        out[at + 1] = 46
        for k in range(at + 2, at + gap):
            out[k] = 48
        return end + gap
    while digits % _U10 == _U0:
        digits //= _U10
        end -= 1
    if end - at > 1:
        for k in range(end, at + 1, -1):
            out[k] = out[k - 1]
        out[at + 1] = 46
        end += 1
    out[end] = 101
    out[end + 1] = 45 if point < 1 else 43
    return put_digits(out, end + 2, np.uint64(abs(point - 1)))


@leaf_kernel
def _put(out: NDArray[np.uint8], at: int, text: bytes) -> int:
    for k in range(len(text)):
        out[at + k] = text[k]
    return at + len(text)
