"""What is said of an event that was refused: the field at fault, what is wrong with it and what would be right."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from profile_service.wire import event as e
from profile_service.wire import work as w
from profile_service.wire.plan import WirePlan
from profile_service.wire.protobuf import fault_offset
from profile_service.wire.value import KIND_NAMES

REASON_NAMES = (
    "valid",
    "malformed",
    "user_id",
    "type",
    "time",
    "time",
    "time",
    "event_id",
    "attribute_count",
    "attribute_size",
    "attribute_size",
    "attribute_type",
)
"""Short names by status, for metrics."""

_SHOWN_CHARACTERS = 64
_SHOWN_TYPES = 10
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIELD_NAMES = {1: "user_id", 2: "type", 3: "time", 4: "event_id", 5: "attributes"}


def reason_name(status: int) -> str:
    """Short name of a status for metrics: "user_id", "type", "time", "attribute_type", "malformed" …"""
    return REASON_NAMES[status]


def describe(buffer: NDArray[np.uint8], event: NDArray[np.int64], plan: WirePlan, now_ns: int) -> tuple[str, str]:
    """(field, reason) of a refused event; `event` is the work slots up to STACKS as `explain_event` left them."""
    status = int(event[w.STATUS])
    if status == e.MALFORMED:
        return _malformed(event)
    if status == e.BAD_USER_ID:
        size = int(event[w.USER_LENGTH])
        most = int(event[w.LIMIT_USER_ID])
        right = "must not be empty" if most == w.UNLIMITED else f"must be 1 to {most} bytes, is {size}"
        return "user_id", right
    if status == e.BAD_TYPE:
        return "type", _undeclared(_text(buffer, event[w.TYPE_OFFSET], event[w.TYPE_LENGTH]), plan)
    if status in (e.BAD_TIME, e.FAR_TIME, e.FUTURE_TIME):
        return "time", _wrong_time(status, int(event[w.SECONDS]), int(event[w.NANOS]), int(event[w.LIMIT_TIME]), now_ns)
    if status == e.BAD_EVENT_ID:
        return "event_id", f"must be at most {event[w.LIMIT_EVENT_ID]} bytes, is {event[w.ID_LENGTH]}"
    if status == e.TOO_MANY_ATTRIBUTES:
        return "attributes", f"must be at most {event[w.LIMIT_ATTRIBUTES]}, are {event[w.ATTRIBUTES]}"
    if status in (e.LARGE_NAME, e.LARGE_VALUE):
        field = "attributes." + _text(buffer, event[w.LARGE_OFFSET], event[w.LARGE_LENGTH])
        subject = "name" if status == e.LARGE_NAME else "value"
        return field, f"{subject} must be at most {event[w.LIMIT_ATTRIBUTE]} bytes, is {event[w.LARGE_SIZE]}"
    assert status == e.WRONG_TYPE, status
    attribute = int(event[w.WRONG_ATTRIBUTE])
    wanted = "text" if attribute < plan.text_count else "a finite number"
    return f"attributes.{plan.attribute(attribute)}", f"must be {wanted}, is {KIND_NAMES[event[w.WRONG_KIND]]}"


def _malformed(event: NDArray[np.int64]) -> tuple[str, str]:
    position, is_text = fault_offset(int(event[w.POSITION]))
    field = _FIELD_NAMES.get(int(event[w.FIELD]), "")
    wrong = "text that is not UTF-8" if is_text else "bytes that are not protobuf"
    return field, f"must be a well-formed userprofile.v1.Event, has {wrong} at byte {position - int(event[w.BEGIN])}"


def _undeclared(name: str, plan: WirePlan) -> str:
    declared = ", ".join(plan.event_types[:_SHOWN_TYPES]) + (", …" if len(plan.event_types) > _SHOWN_TYPES else "")
    wrong = f'"{name}"' if name else "empty"
    return f"must be an event type that the schema declares ({declared}), is {wrong}"


def _wrong_time(status: int, seconds: int, nanos: int, latest_ns: int, now_ns: int) -> str:
    if status == e.BAD_TIME:
        if not 0 <= nanos <= 999_999_999:
            return f"nanos must be 0 to 999999999, is {nanos}"
        return f"must be from year 1 to year 9999, is {seconds} s from 1970"
    shown = (_EPOCH + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")
    if status == e.FAR_TIME:
        return f"must be between the years 1678 and 2261, is {shown}"
    allowed_s = (latest_ns - now_ns) / 1e9
    ahead_s = (seconds * 1_000_000_000 + nanos - now_ns) / 1e9
    return f"must be at most {allowed_s:g} s in the future, is {ahead_s:.6g} s ahead ({shown})"


def _text(buffer: NDArray[np.uint8], offset: int, length: int) -> str:
    """Text of the event, shortened; every slice of a well-formed event is UTF-8, but a cut may split a character."""
    cut = bytes(buffer[offset : offset + min(length, 4 * _SHOWN_CHARACTERS)]).decode(errors="ignore")
    return cut if len(cut) <= _SHOWN_CHARACTERS else cut[:_SHOWN_CHARACTERS] + "…"
