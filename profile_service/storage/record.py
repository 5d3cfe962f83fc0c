"""A record of the log as bytes: the codec, apart from files.

A record begins at a multiple of 8, in the file as in the log (numbers are little-endian):

     0        4        8                16               24       28   29   30    32
    ┌────────┬────────┬────────────────┬────────────────┬────────┬────┬────┬─────┬─────────────┬─────────────┐
    │ header │ payload│ position       │ durable        │ length │type│ A5 │mask │ payload …   │ A5 … A5     │
    │ CRC    │ CRC    │ of this record │                │        │    │    │     │ length bytes│ 8 to 15     │
    └────────┴────────┴────────────────┴────────────────┴────────┴────┴────┴─────┴─────────────┴─────────────┘
     u32      u32      u64              u64              u32      u8   u8   u16

    header CRC    CRC32C of the identity of the log's directory, then of bytes 4 to 32. With the identity in it neither
                  a payload that quotes a log nor a segment of another directory can pass for a record of this one.
    payload CRC   CRC32C of everything behind the header, as it stands there
    durable       everything before this position was synced when this record was made
    mask          see below; 0 for nearly all records

What a crash tears is told from what is damaged by sectors: of a write that a crash cut short, each 512-byte sector is
on the disk or is still zeros. So no sector may hold so little of a record that a single damaged byte makes zeros of it.
Every part of a header has at least two bytes that are never zero, and the padding fills whatever is in a record's last
sector. In between, a payload might hold 512 bytes with one at most that is not zero. Such a payload is stored XORed
with the two bytes of `mask`, again and again; they are chosen so that no sector of it stays thin.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from profile_service.storage.fs import Buffer

SECTOR_BYTES = 512
ALIGNMENT = 8
HEADER_BYTES = 32
MIN_PADDING_BYTES = 8

MAX_OVERHEAD_BYTES = HEADER_BYTES + MIN_PADDING_BYTES + ALIGNMENT - 1
"""What a record takes at most beside its payload."""

MAX_PAYLOAD_BYTES = 24 << 20
"""Each of its 49,152 sectors rules out one mask of 65,025: beyond twice as many there might be none left."""

FIRST_RESERVED_TYPE = 253
RECORD_MARK = 253
"""Says by its `durable` that what is before it was synced; the last record of a log that was closed."""
RECORD_GAP = 254
"""Salvaged: the positions from the end of this record up to the one in the payload (u64) are lost."""
RECORD_HOLE = 255
"""Salvaged: covers positions whose records are lost; the payload is zeros."""

_HEADER = struct.Struct("<IIQQIBBH")
_CHECKED = struct.Struct("<IQQIBBH")
_CRC = struct.Struct("<I")
_MARK = 0xA5
_PADDING = [bytes([_MARK]) * (MIN_PADDING_BYTES + -size % ALIGNMENT) for size in range(ALIGNMENT)]
_FIRST_MASK = 0xA5A5
_SEARCH_BYTES = 1 << 20
# Larger than a sector, so that no sector spans a large buffer.
_SMALL_BYTES = 1024
_WORD_BYTES = 8


class Header(NamedTuple):
    """A record's header whose CRC is right."""

    payload_crc: int
    position: int
    durable: int
    length: int
    type: int
    mask: int

    @property
    def size_bytes(self) -> int:
        """Of the whole record."""
        return record_bytes(self.length)


def identity_seed(identity: bytes) -> int:
    """What the CRC of every header starts from."""
    return int(crc32c(identity))


def record_bytes(length: int) -> int:
    """What a record with a payload of so many bytes takes.

    >>> record_bytes(0), record_bytes(1), record_bytes(8)
    (40, 48, 48)
    """
    return HEADER_BYTES + length + MIN_PADDING_BYTES + -length % ALIGNMENT


def encode(
    record_type: int, payload: Sequence[Buffer], *, position: int, durable: int, offset: int, seed: int
) -> list[Buffer]:
    """A record as buffers to be written one after the other; `payload` is not copied.

    Args:
        record_type: 1 to 255.
        payload: at most MAX_PAYLOAD_BYTES together.
        position: of the record in the log.
        durable: the position up to which the log is synced.
        offset: of the record in its file; only where sectors begin depends on it.
        seed: see `identity_seed`.
    """
    length = sum(map(len, payload))
    mask = 0
    if length >= SECTOR_BYTES and has_thin_sector(offset + HEADER_BYTES, payload):
        mask, payload = _thicken(offset + HEADER_BYTES, payload)
    padding = _PADDING[length % ALIGNMENT]
    payload_crc = 0
    for buffer in payload:
        payload_crc = crc32c(buffer, payload_crc)
    payload_crc = crc32c(padding, payload_crc)
    checked = _CHECKED.pack(payload_crc, position, durable, length, record_type, _MARK, mask)
    return [_CRC.pack(crc32c(checked, seed)) + checked, *payload, padding]


def decode_header(view: memoryview, offset: int, seed: int) -> Header | None:
    """The header at `offset`, or None where there is no whole one."""
    if offset + HEADER_BYTES > len(view):
        return None
    crc, payload_crc, position, durable, length, record_type, mark, mask = _HEADER.unpack_from(view, offset)
    if mark != _MARK or not record_type or crc32c(view[offset + _CRC.size : offset + HEADER_BYTES], seed) != crc:
        return None
    return Header(payload_crc, position, durable, length, record_type, mask)


def is_whole(view: memoryview, offset: int, header: Header) -> bool:
    """Whether the record at `offset`, whose header is `header`, has the payload it was written with."""
    end = offset + header.size_bytes
    return end <= len(view) and crc32c(view[offset + HEADER_BYTES : end]) == header.payload_crc


def payload_of(view: memoryview, offset: int, header: Header) -> memoryview:
    """The payload of a whole record: a slice of `view`, but for the rare one that is masked."""
    stored = view[offset + HEADER_BYTES : offset + HEADER_BYTES + header.length]
    return memoryview(_masked(stored, header.mask)) if header.mask else stored


def find_headers(view: memoryview, start: int, position: int, seed: int) -> Iterator[tuple[int, Header]]:
    """Every whole header from offset `start` on that says it stands where it does, wherever records begin and end.

    Args:
        view: of a file.
        start: an offset in it, a multiple of 8.
        position: of the log, at `start`.
        seed: see `identity_seed`.
    """
    words = np.frombuffer(view, "<u8", len(view) // _WORD_BYTES)
    step = _SEARCH_BYTES // _WORD_BYTES
    # A header's position stands one word behind its start.
    for first in range(start // _WORD_BYTES + 1, len(words), step):
        chunk = words[first : first + step]
        begin = position + _WORD_BYTES * (first - 1) - start
        expected = np.arange(begin, begin + _WORD_BYTES * len(chunk), _WORD_BYTES, dtype=np.uint64)
        for index in np.flatnonzero(chunk == expected):
            offset = _WORD_BYTES * (first - 1 + int(index))
            header = decode_header(view, offset, seed)
            if header is not None:
                yield offset, header


def is_torn_header(view: memoryview, offset: int) -> bool:
    """Whether a header at `offset` would lack a sector: its part of one is all zero."""
    return _lacks_sector(view, offset, offset + HEADER_BYTES)


def is_torn(view: memoryview, offset: int, header: Header) -> bool:
    """Whether the record at `offset` lacks a sector: its part of one is all zero."""
    return _lacks_sector(view, offset, offset + header.size_bytes)


def _lacks_sector(view: memoryview, start: int, end: int) -> bool:
    first = min(end, -(-start // SECTOR_BYTES) * SECTOR_BYTES)
    last = max(first, end // SECTOR_BYTES * SECTOR_BYTES)
    if any(a < b and not any(view[a:b]) for a, b in ((start, first), (last, end))):
        return True
    return not _sectors(view[first:last]).any(axis=1).all()


def has_thin_sector(offset: int, payload: Sequence[Buffer]) -> bool:
    """Whether a sector of only payload has one byte at most that is not zero.

    Args:
        offset: where in the file the payload begins.
        payload: what follows one after the other.
    """
    if not _may_be_thin(payload):
        return False
    whole = b"".join(payload)  # rare
    first = -offset % SECTOR_BYTES
    last = first + (len(whole) - first) // SECTOR_BYTES * SECTOR_BYTES
    if last <= first:
        return False
    return bool((np.count_nonzero(_sectors(memoryview(whole)[first:last]), axis=1) <= 1).any())


def _may_be_thin(payload: Sequence[Buffer]) -> bool:
    """A quick look, at each 16th word of large buffers.

    Where none of these is zero, a thin sector has 134 zeros at most in one large buffer and 268 in another, or else the
    same buffer has all of it; small buffers would have to hold more than a hundred.
    """
    zeros = 0
    for buffer in payload:
        if len(buffer) < _SMALL_BYTES:
            zeros += bytes(buffer).count(0)
        else:
            words = np.frombuffer(buffer, "<u8", len(buffer) // _WORD_BYTES)[::16]
            if np.count_nonzero(words) < len(words):
                return True
    return zeros > 100


def _thicken(offset: int, payload: Sequence[Buffer]) -> tuple[int, Sequence[Buffer]]:
    """A mask under which no sector of the payload is thin, and the masked payload.

    There is one: a sector that is thin under a mask is the mask itself but for a byte, so it rules out no second one.
    """
    whole = b"".join(payload)
    for number in range(_FIRST_MASK, _FIRST_MASK + 0xFFFF):
        mask = number % 0x10000 or _FIRST_MASK
        masked = _masked(whole, mask)
        if not has_thin_sector(offset, [masked]):
            return mask, [masked]
    raise AssertionError(f"no mask for {len(whole)} bytes: payloads are bounded so that there is one")


def _masked(payload: Buffer, mask: int) -> bytes:
    masked = np.frombuffer(payload, np.uint8).copy()
    for index, byte in enumerate(mask.to_bytes(2, "little")):
        masked[index::2] ^= byte
    return masked.tobytes()


def _sectors(view: memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(view, np.uint8).reshape(-1, SECTOR_BYTES)
