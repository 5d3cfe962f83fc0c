"""Arrow columns to texts, numbers and times, by the rules of `values.py`, a whole column at a time.

Where a column holds values that do not fit, they are looked at one by one; the rows they refuse go into `Refused`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from profile_service.files.encode import Times
from profile_service.files.errors import CellError, FileError
from profile_service.files.values import BILLION, EPOCH_UNITS, UTC_SUFFIX, number_of, time_of

_TICKS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": BILLION}
_MOST_EXACT = 2.0**53
_EPOCH_DIGITS = r"^[+-]?\d{1,18}$"


class Refused:
    """Rows of a chunk that are refused before they are sent; of several reasons a row keeps the first."""

    def __init__(self, count: int) -> None:
        self.keep: NDArray[np.bool_] = np.ones(count, dtype=np.bool_)
        self.reasons: dict[int, tuple[str, str]] = {}
        """(field, reason) by row."""

    def add(self, row: int, field: str, reason: str) -> None:
        """Refuses `row`."""
        self.keep[row] = False
        self.reasons.setdefault(row, (field, reason))

    def add_where(self, mask: NDArray[np.bool_], field: str, reason: str) -> None:
        """Refuses every row where `mask` is set."""
        for row in np.flatnonzero(mask).tolist():
            self.add(row, field, reason)


def to_text(column: pa.Array, name: str) -> pa.Array:
    """The column as texts, `large_binary`. Text that is not UTF-8 passes: the service refuses it, event by event."""
    column = _plain(column)
    kind = column.type
    if _is_text(kind):
        return column.cast(pa.large_binary())
    if pa.types.is_floating(kind):
        numbers = column.cast(pa.float64())
        whole = pc.and_(pc.equal(pc.floor(numbers), numbers), pc.less(pc.abs(numbers), _MOST_EXACT))
        digits = pc.if_else(whole, numbers, None).cast(pa.int64()).cast(pa.large_string())
        return pc.coalesce(digits, numbers.cast(pa.large_string())).cast(pa.large_binary())
    if _is_scalar(kind):
        return column.cast(pa.large_string()).cast(pa.large_binary())
    raise FileError(f"column {name}: holds {kind}, which cannot be made a text; leave it out")


def to_number(column: pa.Array, name: str, field: str, refused: Refused) -> pa.Array:
    """The column as `double`; a text that is no number refuses its row."""
    column = _plain(column)
    kind = column.type
    if _is_text(kind):
        try:
            return pc.utf8_trim_whitespace(column.cast(pa.large_string())).cast(pa.float64())
        except pa.ArrowInvalid:
            return pa.array(_each(column, number_of, field, refused), pa.float64())
    if (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_boolean(kind)
    ):
        return column.cast(pa.float64(), safe=False)
    raise FileError(f"column {name}: holds {kind}, which cannot be made a number; leave it out")


def to_time(column: pa.Array, name: str, refused: Refused) -> Times:
    """The column as times; null is not present, a text that is no time refuses its row."""
    column = _plain(column)
    kind = column.type
    present = column.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_timestamp(kind):
        return _times(_integers(column.cast(pa.int64())), _TICKS[kind.unit], present)
    if pa.types.is_date(kind):
        return _times(_integers(column.cast(pa.timestamp("s")).cast(pa.int64())), 1, present)
    if pa.types.is_integer(kind):
        return _epoch_times(_integers(column.cast(pa.int64(), safe=False)), present)
    if _is_text(kind):
        parsed = _parse_times(column)
        if parsed is not None:
            return parsed
    elif not (pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise FileError(f"column {name}: holds {kind}, which cannot be made a time; name another with --time-column")
    each = _each(column if _is_text(kind) else column.cast(pa.float64()), time_of, "time", refused)
    seconds = np.array([0 if time is None else time[0] for time in each], dtype=np.int64)
    nanos = np.array([0 if time is None else time[1] for time in each], dtype=np.int64)
    return Times(seconds, nanos, present)


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _is_scalar(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_integer(kind)
        or types.is_boolean(kind)
        or types.is_decimal(kind)
        or types.is_temporal(kind)
        or types.is_null(kind)
    )


def _each(column: pa.Array, convert: Callable[[object], Any], field: str, refused: Refused) -> list[Any]:
    """Every value of the column by `convert`; None where it is null or refuses its row."""
    converted = []
    for row, value in enumerate(column.to_pylist()):
        text = value.decode(errors="replace") if isinstance(value, bytes) else value
        try:
            converted.append(None if text is None else convert(text))
        except CellError as error:
            refused.add(row, field, str(error))
            converted.append(None)
    return converted


def _integers(column: pa.Array) -> NDArray[np.int64]:
    filled: NDArray[np.int64] = column.fill_null(0).to_numpy(zero_copy_only=False)
    return filled


def _times(ticks: NDArray[np.int64], per_second: int, present: NDArray[np.bool_]) -> Times:
    seconds = ticks // per_second
    return Times(seconds, (ticks - seconds * per_second) * (BILLION // per_second), present)


def _epoch_times(values: NDArray[np.int64], present: NDArray[np.bool_]) -> Times:
    per_second = np.full(len(values), BILLION, dtype=np.int64)
    for bound, ticks in reversed(EPOCH_UNITS[:-1]):
        per_second[np.abs(values) < bound] = ticks
    seconds = values // per_second
    return Times(seconds, (values - seconds * per_second) * (BILLION // per_second), present)


def _parse_times(column: pa.Array) -> Times | None:
    """Times of a column of texts that all have one form, None where they do not."""
    present = column.is_valid().to_numpy(zero_copy_only=False)
    try:
        texts = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
        texts = pc.replace_substring_regex(texts, UTC_SUFFIX, "Z")
        if pc.all(pc.match_substring_regex(texts, _EPOCH_DIGITS)).as_py():
            return _epoch_times(_integers(texts.cast(pa.int64())), present)
        zoned = pc.any(pc.match_substring_regex(texts, r"(Z|[+-]\d\d:?\d\d)$")).as_py()
        times = texts.cast(pa.timestamp("us", tz="UTC" if zoned else None))
    except pa.ArrowInvalid:
        return None
    return _times(_integers(times.cast(pa.int64())), 1_000_000, present)
