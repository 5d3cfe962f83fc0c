"""Columns to serialized events, a whole column at a time: no Python object is made per event.

Every event comes out as one element of `repeated Event events = 1`, the field that both ways in have first:

    0A len | 0A len user_id | 12 len type | 1A len time | 22 len event_id | 2A len attributes
                                          time:        08 seconds  10 nanos
                                          attributes:  per entry  0A len | 0A len name | 12 len value
                                                       value:     1A len text   or   11 number (8 bytes)

so a run of elements, joined, is the body of a batch. What is null in a column is left out of the event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from profile_service.wire.framing import varint

_EVENTS, _USER_ID, _TYPE, _TIME, _EVENT_ID, _ATTRIBUTES = 0x0A, 0x0A, 0x12, 0x1A, 0x22, 0x2A
_ENTRY, _NAME, _VALUE, _TEXT, _NUMBER = 0x0A, 0x0A, 0x12, 0x1A, 0x11
_NOTHING = pa.scalar(b"", pa.large_binary())


@dataclass(frozen=True)
class Times:
    """Event times as `google.protobuf.Timestamp` has them."""

    seconds: NDArray[np.int64]
    """Since 1970, UTC; rounded down."""
    nanos: NDArray[np.int64]
    """0 to 999,999,999."""
    present: NDArray[np.bool_]


@dataclass(frozen=True)
class Columns:
    """Events by column, all of one length. Texts are `large_binary` holding UTF-8."""

    user_id: pa.Array
    type: pa.Array
    time: Times
    event_id: pa.Array | None = None
    texts: dict[str, pa.Array] = field(default_factory=dict)
    """By attribute name."""
    numbers: dict[str, pa.Array] = field(default_factory=dict)
    """By attribute name: `double`."""

    def __len__(self) -> int:
        return len(self.user_id)

    def take(self, keep: NDArray[np.bool_]) -> Columns:
        """The events where `keep` is set."""
        mask = pa.array(keep)
        return Columns(
            self.user_id.filter(mask),
            self.type.filter(mask),
            Times(self.time.seconds[keep], self.time.nanos[keep], self.time.present[keep]),
            None if self.event_id is None else self.event_id.filter(mask),
            {name: column.filter(mask) for name, column in self.texts.items()},
            {name: column.filter(mask) for name, column in self.numbers.items()},
        )


@dataclass(frozen=True)
class EncodedEvents:
    """Serialized events, one after another; event `i` is `data[offsets[i]:offsets[i + 1]]`, with its tag and length."""

    data: memoryview
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def size_bytes(self) -> int:
        """Bytes of all of them."""
        return int(self.offsets[-1] - self.offsets[0])

    def part(self, start: int, stop: int) -> EncodedEvents:
        """Events `start` to `stop`, the last excluded; nothing is copied."""
        return EncodedEvents(self.data, self.offsets[start : stop + 1])

    def run(self, start: int, stop: int) -> bytes:
        """Events `start` to `stop`, the last excluded, as the body of a batch."""
        return bytes(self.view(start, stop))

    def view(self, start: int, stop: int) -> memoryview:
        """The same without a copy."""
        return self.data[int(self.offsets[start]) : int(self.offsets[stop])]

    def batches(self, events: int, size_bytes: int) -> list[tuple[int, int]]:
        """Runs (start, stop) of at most `events` events and, unless one event alone is larger, `size_bytes` bytes."""
        runs, start = [], 0
        while start < len(self):
            fits = int(np.searchsorted(self.offsets, self.offsets[start] + size_bytes, side="right")) - 1
            stop = min(max(fits, start + 1), start + events, len(self))
            runs.append((start, stop))
            start = stop
        return runs


def encode_events(columns: Columns) -> EncodedEvents:
    """Serializes `columns`, in order."""
    count = len(columns)
    if count == 0:
        return EncodedEvents(memoryview(b""), np.zeros(1, dtype=np.int64))
    entries = [_text_entries(name, column) for name, column in columns.texts.items()]
    entries += [_number_entries(name, column) for name, column in columns.numbers.items()]
    parts = [_text_fields(_USER_ID, columns.user_id), _text_fields(_TYPE, columns.type), _time_fields(columns.time)]
    if columns.event_id is not None:
        parts.append(_text_fields(_EVENT_ID, columns.event_id))
    if entries:
        parts.append(_with_prefix(_join(entries), lambda size: _prefix(_ATTRIBUTES, size) if size else b""))
    events = _with_prefix(_join(parts), lambda size: _prefix(_EVENTS, size))
    _, offsets, data = events.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[events.offset : events.offset + count + 1]
    return EncodedEvents(memoryview(data), ends)


def _prefix(tag: int, size: int) -> bytes:
    return bytes([tag]) + varint(size)


def _join(parts: list[pa.Array]) -> pa.Array:
    return pc.binary_join_element_wise(*parts, _NOTHING, null_handling="replace", null_replacement="")


def _with_prefix(values: pa.Array, prefix_of_size: Callable[[int], bytes]) -> pa.Array:
    """Each value with what goes before a value of its size; null stays null."""
    sizes = pc.binary_length(values)
    known = pc.drop_null(pc.unique(sizes))
    prefixes = pa.array([prefix_of_size(size) for size in known.to_pylist()], pa.large_binary())
    return pc.binary_join_element_wise(prefixes.take(pc.index_in(sizes, known)), values, _NOTHING)


def _text_fields(tag: int, values: pa.Array) -> pa.Array:
    return _with_prefix(values, lambda size: _prefix(tag, size))


def _text_entries(name: str, values: pa.Array) -> pa.Array:
    key = _key(name)

    def before(size: int) -> bytes:
        text = _prefix(_TEXT, size)
        value = _prefix(_VALUE, len(text) + size)
        return _prefix(_ENTRY, len(key) + len(value) + len(text) + size) + key + value + text

    return _with_prefix(values, before)


def _number_entries(name: str, values: pa.Array) -> pa.Array:
    key = _key(name)
    before = _prefix(_ENTRY, len(key) + 11) + key + _prefix(_VALUE, 9) + bytes([_NUMBER])
    count, width = len(values), len(before) + 8
    entries = np.empty((count, width), dtype=np.uint8)
    entries[:, : len(before)] = np.frombuffer(before, dtype=np.uint8)
    numbers = values.fill_null(0.0).to_numpy(zero_copy_only=False).astype("<f8")
    entries[:, len(before) :] = numbers.view(np.uint8).reshape(count, 8)
    present = values.is_valid().to_numpy(zero_copy_only=False)
    return _binary(entries.reshape(-1), np.arange(count + 1, dtype=np.int64) * width, present)


def _key(name: str) -> bytes:
    encoded = name.encode()
    return _prefix(_NAME, len(encoded)) + encoded


def _time_fields(times: Times) -> pa.Array:
    seconds, second_sizes = _varints(times.seconds)
    nanos, nano_sizes = _varints(times.nanos)
    nano_sizes = np.where(times.nanos > 0, nano_sizes, 0)
    count, wide, narrow = len(times.seconds), seconds.shape[1], nanos.shape[1]
    fields = np.empty((count, 4 + wide + narrow), dtype=np.uint8)
    used = np.ones(fields.shape, dtype=np.bool_)
    fields[:, 0] = _TIME
    fields[:, 1] = 1 + second_sizes + np.where(nano_sizes > 0, 1 + nano_sizes, 0)
    fields[:, 2] = 0x08
    fields[:, 3 : 3 + wide] = seconds
    used[:, 3 : 3 + wide] = np.arange(wide) < second_sizes[:, None]
    fields[:, 3 + wide] = 0x10
    used[:, 3 + wide] = nano_sizes > 0
    fields[:, 4 + wide :] = nanos
    used[:, 4 + wide :] = np.arange(narrow) < nano_sizes[:, None]
    offsets = np.concatenate(([0], np.cumsum(used.sum(axis=1))))
    return _binary(fields[used], offsets, times.present)


def _varints(values: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Varints of `values`, as (values, widest) bytes, and their sizes; negative ones take ten bytes, as in protobuf."""
    unsigned = values.view(np.uint64)
    groups = unsigned[:, None] >> (np.arange(10, dtype=np.uint64) * np.uint64(7))
    sizes = np.maximum((groups != 0).sum(axis=1), 1)
    widest = int(sizes.max())
    encoded = (groups[:, :widest] & np.uint64(0x7F)).astype(np.uint8)
    encoded[np.arange(widest) < sizes[:, None] - 1] |= 0x80
    return encoded, sizes


def _binary(data: NDArray[np.uint8], offsets: NDArray[np.int64], present: NDArray[np.bool_]) -> pa.Array:
    """A `large_binary` array over `data`, null where `present` is not set."""
    validity: Any = None
    if not present.all():
        validity = pa.py_buffer(np.packbits(present, bitorder="little"))
    return pa.Array.from_buffers(
        pa.large_binary(), len(present), [validity, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(data))]
    )
