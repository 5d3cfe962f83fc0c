"""The codec: what is encoded is decoded, what is changed is noticed, and no sector of a record is thin."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profile_service.storage import record
from profile_service.storage.record import SECTOR_BYTES

SEED = record.identity_seed(bytes(16))


def encoded(payload: list[bytes], *, position: int = 4096, offset: int = 64, record_type: int = 7) -> bytes:
    buffers = record.encode(record_type, payload, position=position, durable=position - 8, offset=offset, seed=SEED)
    return b"".join(buffers)


def sparse_payloads() -> st.SearchStrategy[list[bytes]]:
    """Buffers in which sectors of zeros, or nearly so, are likely."""
    piece = st.one_of(
        st.binary(max_size=40),
        st.integers(0, 3000).map(bytes),
        st.integers(0, 255).flatmap(lambda byte: st.integers(0, 1500).map(lambda size: bytes([byte]) * size)),
        st.integers(0, 2000).map(lambda size: random.Random(size).randbytes(size)),
    )
    return st.lists(piece, max_size=12)


@given(sparse_payloads(), st.integers(0, 200))
def test_a_record_is_read_back_as_it_was_written(payload: list[bytes], place: int) -> None:
    offset = 64 + 8 * place
    data = encoded(payload, offset=offset)
    view = memoryview(bytes(offset) + data)
    header = record.decode_header(view, offset, SEED)
    assert header is not None
    assert (header.type, header.position, header.durable) == (7, 4096, 4088)
    assert record.is_whole(view, offset, header)
    assert bytes(record.payload_of(view, offset, header)) == b"".join(payload)
    assert header.size_bytes == len(data) == record.record_bytes(len(b"".join(payload)))
    assert len(data) % record.ALIGNMENT == 0


@given(sparse_payloads(), st.integers(0, 200))
def test_no_sector_of_a_record_becomes_zeros_when_one_byte_of_it_does(payload: list[bytes], place: int) -> None:
    offset = 64 + 8 * place
    view = memoryview(bytes(offset) + encoded(payload, offset=offset))
    for start in range(offset // SECTOR_BYTES * SECTOR_BYTES, len(view), SECTOR_BYTES):
        part = view[max(start, offset) : start + SECTOR_BYTES]
        assert len(part) - bytes(part).count(0) >= 2, f"the sector at {start}"


@given(sparse_payloads(), st.integers(0, SECTOR_BYTES))
def test_thin_sectors_are_found_wherever_buffers_begin_and_end(payload: list[bytes], offset: int) -> None:
    whole = bytes(offset % SECTOR_BYTES) + b"".join(payload)
    first = SECTOR_BYTES if offset % SECTOR_BYTES else 0
    sectors = [whole[start : start + SECTOR_BYTES] for start in range(first, len(whole), SECTOR_BYTES)]
    thin = any(len(sector) == SECTOR_BYTES and sector.count(0) >= SECTOR_BYTES - 1 for sector in sectors)
    assert record.has_thin_sector(offset, payload) == thin


def test_a_payload_that_is_thin_under_many_masks_still_gets_one() -> None:
    payload = b"".join(bytes([byte]) * 2 * SECTOR_BYTES for byte in range(256))
    view = memoryview(bytes(64) + encoded([payload]))
    header = record.decode_header(view, 64, SEED)
    assert header is not None
    assert header.mask
    assert bytes(record.payload_of(view, 64, header)) == payload


@pytest.mark.parametrize("payload", [b"", b"x", bytes(7), b"12345678", bytes(range(200))])
def test_a_change_of_any_bit_is_noticed(payload: bytes) -> None:
    data = bytearray(bytes(64) + encoded([payload]))
    for bit in range(64 * 8, len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        view = memoryview(data)
        header = record.decode_header(view, 64, SEED)
        assert header is None or not record.is_whole(view, 64, header), bit
        data[bit // 8] ^= 1 << bit % 8


def test_a_record_of_another_log_is_none_of_this_one() -> None:
    view = memoryview(encoded([b"payload"], offset=0))
    assert record.decode_header(view, 0, SEED) is not None
    assert record.decode_header(view, 0, record.identity_seed(bytes(15) + b"1")) is None


def test_headers_are_found_anywhere_at_their_own_place_only() -> None:
    at = [64, 64 + 8 * 200, (1 << 20) - 8, (1 << 20) + 64]
    data = bytearray((1 << 20) + 4096)
    for offset in at:
        one = encoded([b"x"], position=1000 + offset, offset=offset)
        data[offset : offset + 32] = one[:32]
    data[512:544] = encoded([b"x"], position=8)[:32]  # a whole header that says another place
    found = record.find_headers(memoryview(data), 64, 1064, SEED)
    assert [offset for offset, _ in found] == at
    assert [offset for offset, _ in record.find_headers(memoryview(data), 72, 1072, SEED)] == at[1:]


def test_encoding_copies_no_payload() -> None:
    payload = [memoryview(random.Random(1).randbytes(5000)), memoryview(b"tail")]
    buffers = record.encode(1, payload, position=0, durable=0, offset=64, seed=SEED)
    assert buffers[1] is payload[0]
    assert buffers[2] is payload[1]
