"""No kernel reads before or after the message: it is put against memory that may not be touched, and then damaged."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from random import Random

import pytest

from profile_service.config import Limits
from profile_service.errors import InvalidArgument
from profile_service.wire.decode import decode_events
from profile_service.wire.gather import gather
from profile_service.wire.plan import WirePlan
from profile_service.wire.scan import scan_batch
from tests.wire import encoding as enc
from tests.wire.oracle import frame

PAGE = mmap.PAGESIZE
PLAN = WirePlan.compile(["view"], ["color", "a_name_of_many_more_than_sixteen_bytes"], ["price"])


@pytest.fixture(scope="module")
def page() -> Iterator[memoryview]:
    """One page of memory between two that end the process when touched."""
    region = mmap.mmap(-1, 3 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for guard in (address, address + 2 * PAGE):
        assert protect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0
    yield memoryview(region)[PAGE : 2 * PAGE]
    for guard in (address, address + 2 * PAGE):
        protect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), mmap.PROT_READ | mmap.PROT_WRITE)


def test_damaged_messages_are_read_within_their_bounds(page: memoryview, seed: int) -> None:
    random = Random(seed)
    event = (
        enc.delimited(1, b"u1")
        + enc.delimited(2, b"view")
        + enc.delimited(4, "ä".encode() * 9)
        + enc.delimited(
            5,
            enc.entry(b"color", enc.text_value("✓".encode() * 12))
            + enc.entry(b"x", enc.list_value([enc.text_value(b"abc"), enc.struct_value([(b"k", enc.double(2, 1))])]))
            + enc.entry(b"price", enc.double(2, 5))
            + enc.entry(b"a_name_of_many_more_than_sixteen_bytes", enc.text_value(b"x")),
        )
        + enc.group(8, enc.integer(1, 2**60))
    )
    reached = 0
    for _ in range(4000):
        batch = [event if random.random() < 0.3 else enc.mutate(event, random)]
        message = frame(batch) if random.random() < 0.5 else enc.mutate(frame(batch), random)
        for place in (0, PAGE - len(message)):
            held = page[place : place + len(message)]
            held[:] = message
            with contextlib.suppress(InvalidArgument):
                decode_events(held, PLAN, 0, count=1)
            try:
                scanned = scan_batch(held, PLAN, Limits(), 0)
            except InvalidArgument:
                continue
            assert len(scanned.rejected()) == scanned.rejected_count
            joined = gather(scanned.buffer, scanned.offset, scanned.length, (scanned.status == 0).nonzero()[0])
            at_end = page[PAGE - len(joined) :]
            at_end[:] = joined
            decode_events(at_end, PLAN, 0)
            reached += scanned.rejected_count + scanned.count
    assert reached > 1000
