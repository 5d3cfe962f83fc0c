"""Durations as people write them: `30d`, `12h`, `15m`, `10s`, `500ms`, or `none`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_FORM = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(d|h|ms|m|s)?")
HOW_TO_WRITE = "write a duration as 30d, 12h, 15m, 10s or 500ms"
LONGEST_S = 100 * 365.25 * 86400.0


def parse_duration(value: object) -> float | None:
    """Seconds; None for `none`. A bare number is taken as seconds.

    Raises:
        ValueError: it is no duration, or below 1ms, or longer than 100 years.

    >>> parse_duration("30d"), parse_duration("1.5h"), parse_duration("none")
    (2592000.0, 5400.0, None)
    """
    if isinstance(value, str):
        text = value.strip()
        if text == "none":
            return None
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(f"{value!r:.64} is not a duration: {HOW_TO_WRITE}")
        seconds = float(match[1]) * _UNITS[match[2] or "s"]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        raise ValueError(f"{value!r:.64} is not a duration: {HOW_TO_WRITE}")
    if not seconds >= _UNITS["ms"]:  # nor NaN
        raise ValueError(f"must be at least 1ms, is {value!r:.64}")
    if seconds > LONGEST_S:
        raise ValueError(f"must be at most 100 years, is {value!r:.64}")
    return seconds


def _parse_set_duration(value: object) -> float:
    seconds = parse_duration(value)
    if seconds is None:
        raise ValueError(f"`none` is not possible here: {HOW_TO_WRITE}")
    return seconds


def format_duration(seconds: float | None) -> str:
    """The shortest way to write it exactly.

    >>> format_duration(5400.0), format_duration(86400.0), format_duration(None)
    ('90m', '1d', 'none')
    """
    if seconds is None:
        return "none"
    for unit, size in _UNITS.items():
        count = round(seconds / size)
        if count >= 1 and count * size == seconds:
            return f"{count}{unit}"
    return f"{seconds!r}s"


Duration = Annotated[float, BeforeValidator(_parse_set_duration), Field(gt=0)]
"""Seconds, above 0."""

OptionalDuration = Annotated[float | None, BeforeValidator(parse_duration)]
"""Seconds, above 0; None for `none`."""
