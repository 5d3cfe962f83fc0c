from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profile_service.domain.duration import LONGEST_S, format_duration, parse_duration


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("30d", 2_592_000.0),
        ("24h", 86_400.0),
        ("15m", 900.0),
        ("10s", 10.0),
        ("500ms", 0.5),
        ("1.5h", 5400.0),
        ("2 h", 7200.0),
        (" 10s ", 10.0),
        ("90", 90.0),
        (90, 90.0),
        (0.25, 0.25),
        ("none", None),
    ],
)
def test_a_duration_is_seconds(written: object, seconds: float | None) -> None:
    assert parse_duration(written) == seconds


@pytest.mark.parametrize(
    "written",
    [
        "",
        "d",
        "3x",
        "-3d",
        "1e3s",
        "1_0s",
        "٣d",
        "inf",
        "nan",
        "None",
        "1h30m",
        "3 weeks",
        True,
        None,
        [],
        "9" * 400 + "x",
    ],
)
def test_what_is_no_duration_is_refused_with_how_to_write_one(written: object) -> None:
    with pytest.raises(ValueError) as caught:
        parse_duration(written)
    assert "30d, 12h, 15m, 10s or 500ms" in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("written", ["0s", "0", "0.5ms", "36526d", 0, -1, float("nan"), float("inf"), "9" * 400 + "d"])
def test_a_duration_is_at_least_a_millisecond_and_at_most_a_century(written: Any) -> None:
    with pytest.raises(ValueError, match=r"must be at (least 1ms|most 100 years)"):
        parse_duration(written)


@given(
    st.floats(0.001, LONGEST_S)
    | st.integers(1, int(LONGEST_S)).map(float)
    | st.integers(1, 10**6).map(lambda n: n / 1000)
)
def test_a_formatted_duration_is_exact(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds
