"""Rows as an external store holds them: each by itself, with its texts, so that whoever has the schema can read it.

    | u1 format | u1 0 | u2 texts | u4 row bytes | row | u2 length of each text | texts | u8 XXH64 of all before |

The row is laid out by `Layout`. A slot of it that holds an interned text holds 1 + the text's place among those that
follow, 0 for none: the numbers of one table mean nothing to another. All numbers are little-endian.

    table's rows ─▶ pack_rows ─▶ bytes, by row          bytes, joined ─▶ unpack_rows ─▶ rows with numbers of a table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.features.base import VIEW_DTYPES
from profile_service.domain.hashing import xxh64
from profile_service.domain.index import MOST_BYTES, ByteIndex
from profile_service.domain.kernel import copy_bytes, leaf_kernel, load_u8, load_u32, load_u64, store_u64, to_i64
from profile_service.domain.layout import Layout
from profile_service.errors import DataLoss

FORMAT = 1
HEAD_BYTES = 8
CHECKSUM_BYTES = 8

_LENGTH_BITS = 16
_USUAL_TEXT_BYTES = 512


@dataclass(frozen=True)
class Packing:
    """Where a row of a layout holds texts."""

    row_bytes: int
    text_bytes_at: NDArray[np.int64]
    """(slots,) bytes of a row at which an interned id stands."""

    @classmethod
    def of(cls, layout: Layout) -> Packing:
        """For users' rows of this layout."""
        return cls._of(layout, layout.row_bytes, weight_bytes=4)

    @classmethod
    def of_population(cls, layout: Layout) -> Packing:
        """For the population's row of this layout, as `PopulationRow.copy` gives it: wide, and without padding."""
        widths = {name: 8 if name == "f4" else dtype.itemsize for name, dtype in VIEW_DTYPES.items()}
        return cls._of(layout, sum(layout.counts[name] * width for name, width in widths.items()), weight_bytes=8)

    @classmethod
    def _of(cls, layout: Layout, row_bytes: int, *, weight_bytes: int) -> Packing:
        section = sum(layout.counts[view] * size for view, size in (("f8", 8), ("i8", 8), ("f4", weight_bytes)))
        slots = [first + n for feature in layout.features for first, count in feature.strings() for n in range(count)]
        return cls(row_bytes, np.array([section + 4 * slot for slot in slots], np.int64))


def pack_rows(packing: Packing, rows: NDArray[np.uint8], chosen: NDArray[np.int64], texts: ByteIndex) -> list[bytes]:
    """The packed rows with the numbers `chosen` of `rows`, whose interned ids are those of `texts`."""
    packed: list[bytes] = []
    row_space = packing.row_bytes + HEAD_BYTES + CHECKSUM_BYTES + 2 * len(packing.text_bytes_at)
    out = np.empty(len(chosen) * row_space + max(len(chosen) * _USUAL_TEXT_BYTES, MOST_BYTES), np.uint8)
    ends = np.empty(len(chosen), np.int64)
    while len(packed) < len(chosen):
        first = len(packed)
        done = int(
            _pack(rows, chosen, first, packing.text_bytes_at, texts.arrays.entries, texts.arrays.arena, out, ends)
        )
        start, written = 0, out.data
        for end in ends[first:done].tolist():
            packed.append(bytes(written[start:end]))
            start = end
        if done == first:
            out = np.empty(2 * len(out), np.uint8)
    return packed


def unpack_rows(packing: Packing, packed: Sequence[bytes], texts: ByteIndex) -> NDArray[np.uint8]:
    """(rows, row_bytes) the rows, their texts interned in `texts`.

    Raises:
        DataLoss: one is not what `pack_rows` writes for this layout.
        OverflowError: `texts` has no room for what is new.
    """
    count = len(packed)
    rows = np.empty((count, packing.row_bytes), np.uint8)
    if not count:
        return rows
    buffer = np.frombuffer(b"".join(packed), np.uint8)
    ends = np.cumsum([len(one) for one in packed], dtype=np.int64)
    most = count * len(packing.text_bytes_at)
    offset, length, key = np.empty(most, np.int64), np.empty(most, np.int32), np.empty(most, np.uint64)
    slots = np.empty(most, np.int64)
    found = int(_unpack(buffer, ends, packing.text_bytes_at, rows, offset, length, key, slots))
    if found < 0:
        raise DataLoss(f"row {-1 - found} of {count} from the store is damaged, or of another layout")
    if found:
        if not texts.make_room(found, int(length[:found].sum(dtype=np.int64))):
            raise OverflowError(f"the table holds {len(texts)} texts and has no room for more")
        numbers = np.empty(found, np.int64)
        texts.find(buffer, offset[:found], length[:found], key[:found], numbers, insert=True)
        _put_numbers(rows.reshape(-1), slots[:found], numbers)
    return rows


@leaf_kernel
def _pack(
    rows: NDArray[np.uint8],
    chosen: NDArray[np.int64],
    first: int,
    text_bytes_at: NDArray[np.int64],
    entries: NDArray[np.uint64],
    arena: NDArray[np.uint8],
    out: NDArray[np.uint8],
    ends: NDArray[np.int64],
) -> int:
    """Writes rows from `chosen[first]` on into `out` as far as they fit; returns where to go on."""
    row_bytes = rows.shape[1]
    flat = rows.reshape(-1)
    at = 0
    for n in range(first, len(chosen)):
        row = chosen[n] * row_bytes
        size = HEAD_BYTES + row_bytes + CHECKSUM_BYTES
        count = 0
        for k in range(len(text_bytes_at)):
            held = to_i64(load_u32(flat, row + text_bytes_at[k]))
            if held != 0:
                count += 1
                size += 2 + (to_i64(entries[held - 1]) & MOST_BYTES)
        if at + size > len(out):
            return n
        begin = at
        # Format, texts, row bytes.
        store_u64(out, at, np.uint64(FORMAT | count << 16 | row_bytes << 32))
        at += HEAD_BYTES
        copy_bytes(out, at, flat, row, row_bytes)
        lengths_at = at + row_bytes
        text_at = lengths_at + 2 * count
        count = 0
        for k in range(len(text_bytes_at)):
            held = to_i64(load_u32(flat, row + text_bytes_at[k]))
            if held != 0:
                extent = to_i64(entries[held - 1])
                length = extent & MOST_BYTES
                out[lengths_at + 2 * count] = length & 0xFF
                out[lengths_at + 2 * count + 1] = length >> 8
                copy_bytes(out, text_at, arena, extent >> _LENGTH_BITS, length)
                text_at += length
                count += 1
                _put_u32(out, at + text_bytes_at[k], count)
        store_u64(out, text_at, xxh64(out, begin, text_at - begin, 0))
        at = text_at + CHECKSUM_BYTES
        ends[n] = at
    return len(chosen)


@leaf_kernel
def _unpack(
    buffer: NDArray[np.uint8],
    ends: NDArray[np.int64],
    text_bytes_at: NDArray[np.int64],
    rows: NDArray[np.uint8],
    offset: NDArray[np.int64],
    length: NDArray[np.int32],
    key: NDArray[np.uint64],
    slots: NDArray[np.int64],
) -> int:
    """Fills the rows, and lists their texts and the bytes of `rows` where the number of each belongs. Returns how many
    texts there are, or -1 - the number of a row that is not whole."""
    row_bytes = rows.shape[1]
    flat = rows.reshape(-1)
    found = 0
    begin = 0
    for n in range(len(ends)):
        end = ends[n]
        size = end - begin
        if size < HEAD_BYTES + row_bytes + CHECKSUM_BYTES:
            return -1 - n
        head = to_i64(load_u64(buffer, begin))
        count = (head >> 16) & 0xFFFF
        body = end - CHECKSUM_BYTES
        if (
            head & 0xFFFF != FORMAT
            or head >> 32 != row_bytes
            or load_u64(buffer, body) != xxh64(buffer, begin, body - begin, 0)
        ):
            return -1 - n
        copy_bytes(flat, n * row_bytes, buffer, begin + HEAD_BYTES, row_bytes)
        lengths_at = begin + HEAD_BYTES + row_bytes
        text_at = lengths_at + 2 * count
        seen = 0
        for k in range(len(text_bytes_at)):
            held = to_i64(load_u32(flat, n * row_bytes + text_bytes_at[k]))
            if held == 0:
                continue
            if held != seen + 1 or seen >= count or lengths_at + 2 * seen + 2 > body:
                return -1 - n
            size = load_u8(buffer, lengths_at + 2 * seen) | load_u8(buffer, lengths_at + 2 * seen + 1) << 8
            if text_at + size > body:
                return -1 - n
            offset[found] = text_at
            length[found] = size
            key[found] = xxh64(buffer, text_at, size, 0)
            slots[found] = n * row_bytes + text_bytes_at[k]
            text_at += size
            found += 1
            seen += 1
        if seen != count or text_at != body:
            return -1 - n
        begin = end
    return found


@leaf_kernel
def _put_numbers(rows: NDArray[np.uint8], slots: NDArray[np.int64], numbers: NDArray[np.int64]) -> None:
    for n in range(len(slots)):
        _put_u32(rows, slots[n], numbers[n] + 1)


@leaf_kernel
def _put_u32(target: NDArray[np.uint8], at: int, value: int) -> None:
    for n in range(4):
        target[at + n] = (value >> (8 * n)) & 0xFF
