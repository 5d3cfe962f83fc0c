"""NDJSON files: an event a line.

A line is an event in the API's own form when all its keys are fields of `userprofile.v1.Event`:

    {"userId": "u1", "type": "view", "time": "2026-11-22T10:00:00Z", "attributes": {"color": "red", "price": 12900}}

and is sent as it stands. Any other line, and every line once columns are named by flags, is a flat row whose keys are
columns:

    {"user_id": "u1", "event_type": "view", "event_time": 1795341600, "color": "red", "price": "12900"}

A line that is not valid refuses itself; the lines after it are read on.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from profile_service.files.chunk import MOST_EVENT_BYTES, NO_TIME, Chunk, RefusedRow
from profile_service.files.encode import EncodedEvents
from profile_service.files.errors import CellError, FileError
from profile_service.files.mapping import Attributes, Mapping, Wanted, resolve
from profile_service.files.tables import open_stream
from profile_service.files.values import number_of, text_of, time_of
from profile_service.wire.framing import varint
from userprofile.v1 import event_pb2

EVENT_KEYS = frozenset({"userId", "user_id", "type", "time", "eventId", "event_id", "attributes"})

_LINES_AT_ONCE = 8_192
_LOOKED_AT = 1_000
"""Lines whose keys are the file's columns for resolving the mapping."""
_BUFFER_BYTES = 1 << 20


class _LineError(Exception):
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


class NdjsonFile:
    """Lines of an NDJSON file; `row` is the line's number, from 1."""

    row_word = "line"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = max(path.stat().st_size, 1)
        self._own_form = True

    def mapping(self, wanted: Wanted, attributes: Attributes) -> Mapping:
        """Which key is what in flat lines; an attribute may be missing from any of them."""
        self._own_form = not wanted.says_columns
        own = 0
        flat: list[str] = []
        with open_stream(self.path) as (stream, _):
            for place, (number, line) in enumerate(islice(self._lines(stream), _LOOKED_AT)):
                if place == 0 and line.lstrip().startswith(b"["):
                    hint = "one event a line is needed (jq -c '.[]' makes that of an array)"
                    raise FileError(f"{self.path}: line {number}: is a JSON array; {hint}")
                with suppress(_LineError):
                    value = _parse(line)
                    if self._is_own(value):
                        own += 1
                    else:
                        flat.extend(value)
        if own or not flat:  # a stray flat line then refuses itself, not the file
            flat.extend(("user_id", "type", "time"))
        named = [column for column in wanted.attributes.values() if column is not None]
        keys = [*flat, *named, *attributes.texts, *attributes.numbers]
        return resolve(str(self.path), list(dict.fromkeys(keys)), wanted, attributes)

    def chunks(self, mapping: Mapping) -> Iterator[Chunk]:
        """The lines in order."""
        with open_stream(self.path) as (stream, raw):
            lines = self._lines(stream)
            while some := list(islice(lines, _LINES_AT_ONCE)):
                yield self._chunk(some, mapping, min(raw.tell() / self._size, 1.0))

    def _lines(self, stream: Any) -> Iterator[tuple[int, bytes]]:
        """(number, line) of every line that is not blank; of one that is too long only the beginning."""
        reader = io.BufferedReader(stream, _BUFFER_BYTES)
        number, most = 0, 4 * MOST_EVENT_BYTES
        try:
            while line := reader.readline(most):
                number += 1
                whole = line
                while len(whole) == most and not whole.endswith(b"\n"):
                    whole = reader.readline(most)
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
        except (OSError, EOFError) as error:
            raise FileError(f"{self.path}: cannot be read after line {number}: {error}") from error
        finally:
            reader.detach()

    def _is_own(self, value: dict[str, Any]) -> bool:
        return self._own_form and value.keys() <= EVENT_KEYS

    def _chunk(self, lines: list[tuple[int, bytes]], mapping: Mapping, done: float) -> Chunk:
        encoded, rows, refused = [], [], []
        for number, line in lines:
            try:
                event = self._event(_parse(line), mapping).SerializeToString()
                if len(event) > MOST_EVENT_BYTES:
                    raise _LineError("", f"must be at most {MOST_EVENT_BYTES} bytes in all")
            except _LineError as error:
                refused.append(RefusedRow(number, error.field, error.reason))
                continue
            encoded.append(b"\x0a" + varint(len(event)) + event)
            rows.append(number)
        offsets = np.concatenate(([0], np.cumsum([len(event) for event in encoded], dtype=np.int64)))
        events = EncodedEvents(memoryview(b"".join(encoded)), offsets.astype(np.int64))
        return Chunk(events, np.array(rows, dtype=np.int64), len(lines), done, refused)

    def _event(self, value: dict[str, Any], mapping: Mapping) -> event_pb2.Event:
        if self._is_own(value):
            return _own_event(value)
        return _flat_event(value, mapping)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        raise _LineError("", "must be a JSON object, is not UTF-8") from None
    except RecursionError:
        raise _LineError("", "must be a JSON object, is nested too deeply") from None
    except ValueError as error:
        raise _LineError("", f"must be a JSON object, is not valid JSON ({str(error).split(':')[0]})") from None
    if not isinstance(value, dict):
        raise _LineError("", "must be a JSON object, is another value")
    return value


def _own_event(value: dict[str, Any]) -> event_pb2.Event:
    event = event_pb2.Event()
    for key, field in (("userId", "user_id"), ("user_id", "user_id"), ("type", "type"), ("eventId", "event_id"),
                       ("event_id", "event_id")):  # fmt: skip
        text = value.get(key)
        if text is not None:
            if not isinstance(text, str):
                raise _LineError(field, f"must be text, is {_kind(text)}")
            _set(event, field, text)
    if value.get("time") is not None:
        _set_time(event, value["time"])
    attributes = value.get("attributes")
    if attributes is not None and not isinstance(attributes, dict):
        raise _LineError("attributes", f"must be an object, is {_kind(attributes)}")
    for name, attribute in (attributes or {}).items():
        _set_attribute(event, name, attribute)
    return event


def _flat_event(value: dict[str, Any], mapping: Mapping) -> event_pb2.Event:
    event = event_pb2.Event()
    kind = mapping.type_value if mapping.type is None else value.get(mapping.type)
    for field, cell in (
        ("user_id", value.get(mapping.user)),
        ("type", kind),
        ("event_id", None if mapping.event_id is None else value.get(mapping.event_id)),
    ):
        if cell is not None:
            _set(event, field, _converted(text_of, cell, field))
    time = None if mapping.time is None else value.get(mapping.time)
    if time is not None:
        _set_time(event, time)
    elif not mapping.untimed:
        raise _LineError("time", NO_TIME)
    for name, column in mapping.texts.items():
        if (cell := value.get(column)) is not None:
            _set_attribute(event, name, _converted(text_of, cell, f"attributes.{name}"))
    for name, column in mapping.numbers.items():
        if (cell := value.get(column)) is not None:
            _set_attribute(event, name, _converted(number_of, cell, f"attributes.{name}"))
    return event


def _converted(convert: Callable[[object], Any], value: object, field: str) -> Any:
    try:
        return convert(value)
    except CellError as error:
        raise _LineError(field, str(error)) from None


def _set(event: event_pb2.Event, field: str, text: str) -> None:
    try:
        setattr(event, field, text)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON's \u can write
        raise _LineError(field, "must be text that UTF-8 can hold") from None


def _set_time(event: event_pb2.Event, value: object) -> None:
    seconds, nanos = _converted(time_of, value, "time")
    try:
        event.time.seconds, event.time.nanos = seconds, nanos
    except ValueError:
        raise _LineError("time", "must be from year 1 to year 9999, is far outside") from None


def _set_attribute(event: event_pb2.Event, name: str, value: object) -> None:
    try:
        match value:
            case str():
                event.attributes.fields[name].string_value = value
            case bool():
                event.attributes.fields[name].bool_value = value
            case int() | float():
                event.attributes.fields[name].number_value = value
            case None:
                pass
            case _:
                event.attributes.update({name: cast(Any, value)})
    except UnicodeEncodeError:
        raise _LineError("attributes", "must be text that UTF-8 can hold") from None
    except (OverflowError, ValueError, RecursionError) as error:
        raise _LineError(f"attributes.{name}", f"cannot be sent: {error}") from None


def _kind(value: object) -> str:
    return {bool: "a bool", int: "a number", float: "a number", list: "an array", dict: "an object"}.get(
        type(value), "text"
    )
