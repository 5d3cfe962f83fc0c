"""Each row of the table that judges what stands where a record could start."""

import random

import pytest
from crc32c import crc32c

from profile_service.errors import StartupError
from profile_service.storage.record import encode, identity_seed
from profile_service.storage.segment import (
    Found,
    Judgement,
    SegmentHeader,
    decode_segment_header,
    encode_segment_header,
    judge,
    last_nonzero,
)
from tests.storage.logs import IDENTITY

FIRST = 10_000
SEED = identity_seed(IDENTITY)
SIZE = 8192


class Image:
    """A segment to be spoilt."""

    def __init__(self) -> None:
        self.data = bytearray(SIZE)
        self.data[:64] = encode_segment_header(IDENTITY, FIRST, SIZE)
        self.offset = 64

    def append(self, size: int, *, durable: int = 0, position: int | None = None) -> int:
        """Adds a record; returns its offset."""
        offset = self.offset
        position = FIRST + offset - 64 if position is None else position
        payload = random.Random(offset).randbytes(size)
        record = b"".join(encode(1, [payload], position=position, durable=durable, offset=offset, seed=SEED))
        self.data[offset : offset + len(record)] = record
        self.offset += len(record)
        return offset

    def judge(self, offset: int, *, last: bool = True) -> Judgement:
        return judge(memoryview(bytes(self.data)), FIRST, offset, SEED, last=last)


@pytest.fixture
def image() -> Image:
    return Image()


@pytest.mark.parametrize("last", [True, False])
def test_zeros_to_the_end_are_the_end(image: Image, last: bool) -> None:
    image.append(100)
    assert image.judge(image.offset, last=last) == (Found.END, None, "")
    assert image.judge(SIZE, last=last) == (Found.END, None, "")


@pytest.mark.parametrize("last", [True, False])
def test_what_is_whole_and_at_its_place_is_a_record(image: Image, last: bool) -> None:
    offset = image.append(1000)
    found = image.judge(offset, last=last)
    assert found.found is Found.RECORD
    assert found.header is not None
    assert found.header.position == FIRST


def test_what_lacks_a_sector_in_the_last_segment_is_torn(image: Image) -> None:
    image.append(100)
    offset = image.append(2000)
    image.append(500)
    for sector in range(0, image.offset, 512):
        whole = bytes(image.data)
        image.data[max(sector, offset) : sector + 512] = bytes(sector + 512 - max(sector, offset))
        if sector + 512 > offset and sector < offset + 2000:
            assert image.judge(offset).found is Found.TORN, sector
            assert image.judge(offset, last=False).found is Found.DAMAGED, sector
        image.data[:] = whole


def test_nothing_is_torn_that_a_later_record_knows_to_be_synced(image: Image) -> None:
    offset = image.append(2000)
    image.append(100)
    image.data[offset + 512 : offset + 1536] = bytes(1024)
    assert image.judge(offset).found is Found.TORN
    image.append(100, durable=FIRST)  # it knows of everything before this record, no more
    assert image.judge(offset).found is Found.TORN
    image.append(100, durable=FIRST + 8)
    found = image.judge(offset)
    assert found.found is Found.DAMAGED
    assert "although it was synced" in found.reason


@pytest.mark.parametrize("lead", [8, 16, 24])
@pytest.mark.parametrize("lost", ["head", "rest"])
def test_half_a_header_is_torn_where_a_sector_cuts_it(image: Image, lead: int, lost: str) -> None:
    image.append(1024 - lead - 64 - 40)
    offset = image.append(700)
    assert offset == 1024 - lead
    start, end = (offset, 1024) if lost == "head" else (1024, 1536)
    image.data[start:end] = bytes(end - start)
    assert image.judge(offset).found is Found.TORN


def test_a_changed_byte_is_damage_and_never_torn(image: Image) -> None:
    image.append(300)
    offset = image.append(1500)
    for at in range(offset, image.offset):
        for change in (0xFF, 0x01, image.data[at]):
            if change:
                image.data[at] ^= change
                assert image.judge(offset).found is Found.DAMAGED, (at, change)
                image.data[at] ^= change


def test_a_record_of_another_place_is_damage(image: Image) -> None:
    offset = image.append(100, position=FIRST + 8)
    found = image.judge(offset)
    assert found.found is Found.DAMAGED
    assert f"position {FIRST + 8}" in found.reason


def test_a_record_that_reaches_beyond_the_segment_is_damage(image: Image) -> None:
    offset = image.append(2000)
    del image.data[offset + 1000 :]
    assert image.judge(offset).found is Found.DAMAGED


def test_bytes_where_no_record_fits_any_more_are_damage(image: Image) -> None:
    image.data[SIZE - 1] = 1
    assert image.judge(SIZE - 32).found is Found.DAMAGED
    assert image.judge(SIZE - 8).found is Found.DAMAGED


def test_a_later_byte_behind_zeros_is_torn(image: Image) -> None:
    image.append(100)
    image.data[5000] = 1
    assert image.judge(image.offset).found is Found.TORN


def test_a_segments_header_says_what_was_written() -> None:
    data = encode_segment_header(IDENTITY, FIRST, SIZE)
    assert decode_segment_header(data) == SegmentHeader(IDENTITY, FIRST, SIZE)
    assert isinstance(decode_segment_header(data[:63]), str)
    for at in range(64):
        for change in (0xFF, 0x01):
            changed = bytearray(data)
            changed[at] ^= change
            assert isinstance(decode_segment_header(bytes(changed)), str), at


def test_a_newer_segment_is_refused_with_the_version() -> None:
    data = bytearray(encode_segment_header(IDENTITY, FIRST, SIZE))
    data[8:12] = (2).to_bytes(4, "little")
    data[60:] = crc32c(bytes(data[:60])).to_bytes(4, "little")
    with pytest.raises(StartupError, match="format version 2, this version of profile-service reads up to 1"):
        decode_segment_header(bytes(data))


@pytest.mark.parametrize("at", [0, 1, 99, (1 << 20) - 1, 1 << 20, (1 << 20) + 5, (2 << 20) + 7])
def test_the_last_byte_that_is_not_zero_is_found(at: int) -> None:
    data = bytearray((2 << 20) + 8)
    data[at] = 3
    assert last_nonzero(memoryview(data), 0, len(data)) == at
    assert last_nonzero(memoryview(data), at + 1, len(data)) == -1
    assert last_nonzero(memoryview(data), 0, at) == -1
