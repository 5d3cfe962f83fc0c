"""One value of a row to a text, a number or a time: the rules, which `columns.py` follows for whole columns.

    text     as it is; whole numbers in decimal digits (17200506.0 is "17200506"), others as short as reads back the
             same; true and false
    number   as it is; a text is parsed, and one that is no number refuses its row
    time     text: ISO 8601, in UTC where it has no offset, or a number in digits
             number: time since 1970, by its size: below 1e11 seconds, below 1e14 milliseconds, below 1e17 microseconds,
             else nanoseconds

null is the same as absent.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

from profile_service.files.errors import CellError

BILLION = 1_000_000_000
EPOCH_UNITS = ((1e11, 1), (1e14, 1_000), (1e17, 1_000_000), (math.inf, BILLION))
"""Ticks a second of an epoch time whose absolute value is below the bound."""

UTC_SUFFIX = r"\s*(UTC|GMT)$"
"""What some write instead of Z."""

NOT_A_NUMBER = "must be a number, is a text that is none"
NOT_A_TIME = "must be ISO 8601 or a number since 1970, is neither"

_MOST_EXACT = 2.0**53
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
_EPOCH = re.compile(r"[+-]?\d+(\.\d*)?")
_FRACTION = re.compile(r"\.(\d+)")


def text_of(value: object) -> str:
    """The text of a value that is not null.

    >>> text_of(17200506.0), text_of(12.5), text_of(True)
    ('17200506', '12.5', 'true')
    """
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            whole = value.is_integer() and abs(value) < _MOST_EXACT
            return str(int(value)) if whole else repr(value)
    raise CellError(f"must be text, is a {_kind(value)}")


def number_of(value: object) -> float:
    """The number of a value that is not null.

    >>> number_of(" 12900 "), number_of(3)
    (12900.0, 3.0)
    """
    match value:
        case bool() | int() | float():
            try:
                return float(value)
            except OverflowError:
                return math.copysign(math.inf, value)
        case str():
            if not _NUMBER.fullmatch(value.strip()):
                raise CellError(NOT_A_NUMBER)
            return float(value)
    raise CellError(f"must be a number, is a {_kind(value)}")


def time_of(value: object) -> tuple[int, int]:
    """Seconds since 1970 and nanoseconds of a value that is not null.

    >>> time_of("2026-11-22T10:00:00.25+01:00"), time_of(1795338000250)
    ((1795338000, 250000000), (1795338000, 250000000))
    """
    match value:
        case bool():
            raise CellError(NOT_A_TIME)
        case int() | float():
            return _epoch_time(value)
        case str():
            return _text_time(value.strip())
    raise CellError(f"must be a time, is a {_kind(value)}")


def _text_time(text: str) -> tuple[int, int]:
    if _EPOCH.fullmatch(text):
        return _epoch_time(float(text) if "." in text else int(text))
    try:
        when = datetime.fromisoformat(re.sub(UTC_SUFFIX, "Z", text))
    except ValueError:
        raise CellError(NOT_A_TIME) from None
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when
    since = when - datetime(1970, 1, 1, tzinfo=UTC)
    fraction = _FRACTION.search(text)
    nanos = int(fraction[1][:9].ljust(9, "0")) if fraction else 0
    return since.days * 86_400 + since.seconds, nanos


def _epoch_time(value: float) -> tuple[int, int]:
    if not math.isfinite(value):
        raise CellError(NOT_A_TIME)
    ticks = next(ticks for bound, ticks in EPOCH_UNITS if abs(value) < bound)
    if isinstance(value, int):
        seconds, rest = divmod(value, ticks)
        return seconds, rest * (BILLION // ticks)
    seconds = math.floor(value / ticks)
    return seconds, min(round((value / ticks - seconds) * BILLION), BILLION - 1)


def _kind(value: object) -> str:
    return {dict: "JSON object", list: "JSON array", type(None): "null"}.get(type(value), type(value).__name__)
