"""Doubles as text: byte for byte what orjson writes, and what reads back as the same double."""

from __future__ import annotations

import math

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from profile_service.wire.decimal_text import put_double_text

ROOM_BYTES = 25


def text_of(value: float) -> bytes:
    out = np.full(ROOM_BYTES + 8, 0xEE, np.uint8)
    end = put_double_text(out, 0, np.float64(value).view(np.uint64))
    assert end <= ROOM_BYTES
    assert (out[ROOM_BYTES:] == 0xEE).all()
    return out[:end].tobytes()


@given(
    st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(0, 2**64 - 1).map(lambda bits: float(np.uint64(bits).view(np.float64))).filter(math.isfinite)
    | st.builds(round, st.floats(-1e9, 1e9), st.integers(0, 9))
    | st.builds(math.ldexp, st.sampled_from([1.0, -1.0, 3.0]), st.integers(-1074, 1020))
    | st.integers(-(10**20), 10**20).map(float)
)
@example(5e-324)
@example(2.2250738585072014e-308)
@example(1.7976931348623157e308)
@example(9.5e22)
@example(9007199254740993e3)
def test_a_double_is_written_as_orjson_writes_it(value: float) -> None:
    text = text_of(value)
    assert text == orjson.dumps(value)
    assert float(text) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, b"0.0"),
        (-0.0, b"-0.0"),
        (1e15, b"1000000000000000.0"),
        (1e16, b"1e+16"),
        (1.25e-4, b"0.000125"),
        (1.25e-5, b"0.0000125"),
        (1.25e-6, b"1.25e-6"),
        (math.nan, b'"NaN"'),
        (-math.nan, b'"NaN"'),
        (math.inf, b'"Infinity"'),
        (-math.inf, b'"-Infinity"'),
    ],
)
def test_each_form_is_the_one_that_json_has(value: float, text: bytes) -> None:
    assert text_of(value) == text
