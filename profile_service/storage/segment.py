"""A file of the log: what it looks like, and how whatever may stand in it is judged.

A segment is named by the log position of its first record, in 20 digits: `00000000000000000000.log`. It has its full
size from its birth: it is written under a temporary name, synced, and only then renamed. So a segment of another size
than its header says was damaged; no crash leaves one.

     0         8       12      16               32       40       48     60     64
    ┌─────────┬───────┬───────┬────────────────┬────────┬────────┬──────┬──────┬────────┬────────┬─────────────────────┐
    │ magic   │version│ 0     │ identity of the│ first  │ size of│ 0    │ CRC  │ record │ record │ zeros up to the     │
    │         │       │       │ log's directory│position│ segment│      │      │        │        │ segment's size      │
    └─────────┴───────┴───────┴────────────────┴────────┴────────┴──────┴──────┴────────┴────────┴─────────────────────┘
               u32             16 bytes         u64      u64             u32: CRC32C of bytes 0 to 60

Later versions keep the places of magic, version and CRC, so that this one can tell a newer segment from a damaged one.

What may stand at an offset where a record could start (`judge`):

    found there                                                    | it is
    ---------------------------------------------------------------+-----------------------------------------------------
    zeros to the segment's end                                     | END: the log ends here, or goes on in the next
                                                                   | segment, which then must start at this position
    header and payload whole, and it says it stands here           | RECORD
    not whole, in the last segment, a sector of it is all zeros,   | TORN: a crash cut the write short; nobody was told
    and no later whole header says that this position was synced   | that it is durable
    anything else                                                  | DAMAGED

    "A sector of it is all zeros": the header's part of a 512-byte sector when the header is not whole, otherwise the
    whole record's. `storage.record` sees to it that no single byte, changed, makes a sector of a record all zeros.
"""

from __future__ import annotations

import re
import struct
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import numpy as np
from crc32c import crc32c

from profile_service.errors import DataLoss, StartupError
from profile_service.storage.record import (
    ALIGNMENT,
    Header,
    decode_header,
    find_headers,
    is_torn,
    is_torn_header,
    is_whole,
)

SEGMENT_HEADER_BYTES = 64
IDENTITY_BYTES = 16
FORMAT_VERSION = 1

_MAGIC = b"\x89PSLOG\r\n"
_HEADER = struct.Struct("<8sII16sQQ12sI")
_CHECKED_BYTES = 60
_NAME = re.compile(r"(\d{20})\.log")
_TEMPORARY_SUFFIX = ".log.new"
_CHUNK_BYTES = 1 << 20
_MIN_RECORD_BYTES = 40


class SegmentHeader(NamedTuple):
    """What a segment says of itself."""

    identity: bytes
    first: int
    """Position of its first record."""
    size_bytes: int


class Found(Enum):
    """What stands where a record could start."""

    END = "end"
    RECORD = "record"
    TORN = "torn"
    DAMAGED = "damaged"


class Judgement(NamedTuple):
    """What stands at an offset, and why it is taken for that."""

    found: Found
    header: Header | None = None
    """Of a RECORD, and of what is not whole but for its header."""
    reason: str = ""
    """For people; empty for END and RECORD."""


def encode_segment_header(identity: bytes, first: int, size_bytes: int) -> bytes:
    """The first 64 bytes of a segment."""
    checked = _HEADER.pack(_MAGIC, FORMAT_VERSION, 0, identity, first, size_bytes, b"", 0)[:_CHECKED_BYTES]
    return checked + int(crc32c(checked)).to_bytes(4, "little")


def decode_segment_header(data: bytes | memoryview) -> SegmentHeader | str:
    """What a segment says of itself, or what is wrong with its header.

    Raises:
        StartupError: a newer version wrote it.
    """
    if len(data) < SEGMENT_HEADER_BYTES:
        return "the file ends within its header"
    magic, version, _, identity, first, size_bytes, _, crc = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        return "the file does not begin like a segment of a log"
    if crc32c(data[:_CHECKED_BYTES]) != crc:
        return "the checksum of the segment's header is wrong"
    if version != FORMAT_VERSION:
        raise StartupError(
            f"the log is of format version {version}, this version of profile-service reads up to {FORMAT_VERSION}: "
            "start the version that wrote it"
        )
    return SegmentHeader(identity, first, size_bytes)


def segment_name(first: int) -> str:
    """The name of the segment whose first record is at `first`.

    >>> segment_name(4096)
    '00000000000000004096.log'
    """
    return f"{first:020}.log"


def temporary_name(number: int) -> str:
    """A name for a segment that is not part of the log yet."""
    return f"{number:06}{_TEMPORARY_SUFFIX}"


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a left-over that may go."""
    return name.endswith(_TEMPORARY_SUFFIX)


def first_of_name(name: str) -> int | None:
    """The position that a segment's name says, None where it is no segment's name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def data_loss(path: Path, offset: int, position: int, reason: str) -> DataLoss:
    """The error that says what is damaged, where, and what to do about it."""
    return DataLoss(
        f"{path} is damaged at byte {offset} (log position {position}): {reason}. "
        "`profile-service inspect DATA_DIR` shows what is readable; with --salvage it keeps that and gives up the rest"
    )


def judge(view: memoryview, first: int, offset: int, seed: int, *, last: bool) -> Judgement:
    """What stands at `offset` of a segment, by the table in the module's text.

    Args:
        view: the whole file.
        first: position of its first record.
        offset: a multiple of 8, where a record could start.
        seed: see `record.identity_seed`.
        last: whether it is the last segment of the log.
    """
    position = first + offset - SEGMENT_HEADER_BYTES
    header = decode_header(view, offset, seed)
    if header is None:
        if is_zero(view, offset):
            return Judgement(Found.END)
        reason = "the header of a record is not whole"
        could_be_torn = len(view) - offset >= _MIN_RECORD_BYTES and is_torn_header(view, offset)
    elif header.position != position:
        return Judgement(Found.DAMAGED, None, f"a record of position {header.position} stands here")
    elif offset + header.size_bytes > len(view):
        return Judgement(Found.DAMAGED, None, "a record reaches beyond the end of its segment")
    elif is_whole(view, offset, header):
        return Judgement(Found.RECORD, header)
    else:
        reason = "the payload of a record is not whole"
        could_be_torn = is_torn(view, offset, header)
    if not last or not could_be_torn:
        return Judgement(Found.DAMAGED, header, reason)
    for _, later in find_headers(view, offset + ALIGNMENT, position + ALIGNMENT, seed):
        if later.durable > position:
            reason += f", although it was synced when position {later.position} was written"
            return Judgement(Found.DAMAGED, header, reason)
    return Judgement(Found.TORN, header, reason)


def is_zero(view: memoryview, start: int, end: int | None = None) -> bool:
    """Whether there is nothing but zeros between two offsets."""
    return last_nonzero(view, start, len(view) if end is None else end) < 0


def last_nonzero(view: memoryview, start: int, end: int) -> int:
    """Offset of the last byte between two offsets that is not zero, or -1."""
    for chunk_end in range(end, start, -_CHUNK_BYTES):
        chunk_start = max(start, chunk_end - _CHUNK_BYTES)
        chunk = np.frombuffer(view[chunk_start:chunk_end], np.uint8)
        if chunk.any():
            return chunk_start + int(np.flatnonzero(chunk)[-1])
    return -1
