"""The parser of plain events takes what libraries write, and nothing that the general parser would not read alike."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from numpy.typing import NDArray

from profile_service.config import Limits
from profile_service.wire.event import VALID, read_any_event
from profile_service.wire.frame import as_buffer
from profile_service.wire.plain import parse_plain
from profile_service.wire.plan import WirePlan
from profile_service.wire.work import (
    HAS_TIME,
    ID_LENGTH,
    ID_OFFSET,
    IGNORED,
    NANOS,
    SECONDS,
    TYPE_INDEX,
    USER_LENGTH,
    USER_OFFSET,
    limit_slots,
    make_work,
)
from tests.wire import encoding as enc
from userprofile.v1 import event_pb2

NOW_S = 1_790_000_000
PLAN = WirePlan.compile(["view", "contact"], ["color", "größe"], ["price", "mileage"])
LIMITS = Limits(user_id_bytes=16, event_id_bytes=24, attributes_per_event=5, attribute_bytes=40)
SLOTS = [HAS_TIME, ID_LENGTH, IGNORED, NANOS, SECONDS, TYPE_INDEX, USER_LENGTH, USER_OFFSET]


class Read:
    """What a parser leaves behind of one event."""

    def __init__(self, event: bytes, trailing: int) -> None:
        self.buffer = as_buffer(event + b"\xff" * trailing)
        self.end = len(event)
        self.work = make_work(limit_slots(LIMITS, NOW_S * 10**9), 4)
        self.text_offset = np.full((2, 1), 7, np.int64)
        self.text_length = np.full((2, 1), 7, np.int32)
        self.number = np.full((2, 1), 7.0)

    def _arguments(self) -> tuple[NDArray[np.uint8], int, int]:
        return self.buffer, 0, self.end

    def plain(self) -> bool:
        tables = (PLAN.types_table, PLAN.attributes_table, PLAN.names)
        columns = (self.text_offset, self.text_length, self.number)
        return parse_plain(*self._arguments(), *tables, self.work, *columns, 0)

    def any(self) -> int:
        tables = (PLAN.types_table, PLAN.attributes_table, PLAN.names)
        columns = (self.text_offset, self.text_length, self.number)
        return read_any_event(*self._arguments(), *tables, self.work, *columns, 0)

    def found(self) -> list[object]:
        texts = [
            bytes(self.buffer[offset : offset + length]) if length >= 0 else None
            for offset, length in zip(self.text_offset[:, 0], self.text_length[:, 0], strict=True)
        ]
        numbers = [None if math.isnan(number) else number for number in self.number[:, 0].tolist()]
        event_id = self.work[ID_OFFSET] if self.work[ID_LENGTH] else 0
        return [*self.work[SLOTS].tolist(), event_id, texts, numbers]


def an_event(*, nanos: int = 0, **attributes: float | str) -> bytes:
    event = event_pb2.Event(user_id="u1234567", type="view", event_id="0123456789abcdef01234567")
    event.time.seconds = NOW_S - 5
    event.time.nanos = nanos
    event.attributes.update(attributes)
    return event.SerializeToString(deterministic=True)


def check(event: bytes, trailing: int) -> bool:
    """Whether the event is taken for a plain one; then the general parser has to agree about it."""
    plain = Read(event, trailing)
    if not plain.plain():
        return False
    general = Read(event, trailing)
    assert general.any() == VALID, event.hex()
    assert plain.found() == general.found(), event.hex()
    return True


@pytest.mark.parametrize(
    "event",
    [
        an_event(),
        an_event(nanos=999_000_000, color="red", price=12_900.0, mileage=50_000.0),
        an_event(color="a colour of more than eight bytes", größe="größer", undeclared="✓", more=1.5),
        an_event(nanos=1, color="", größe="x" * 40, price=-0.0, mileage=1e100, undeclared=5e-324),
        enc.delimited(1, b"u") + enc.delimited(2, b"contact") + enc.delimited(5, enc.entry(b"price", enc.double(2, 1))),
        enc.delimited(1, b"u") + enc.delimited(2, b"view"),
    ],
)
def test_what_libraries_write_is_plain(event: bytes) -> None:
    assert check(event, 8)


@pytest.mark.parametrize(
    "event",
    [
        an_event(price=math.nan),
        an_event(price=math.inf),
        an_event(price=1.1e100),
        an_event(price="text"),
        an_event(color=1.0),
        an_event(color="x" * 41),
        an_event(xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx="a name of 41 bytes"),
        an_event(a="", b="", c="", d="", e="", f=""),
        an_event() + enc.delimited(1, b"again"),
        an_event() + enc.delimited(5, enc.entry(b"color", enc.text_value(b"red")) * 2),
        an_event() + enc.integer(9, 1),
        enc.delimited(1, b"u" * 17) + enc.delimited(2, b"view"),
        enc.delimited(1, b"") + enc.delimited(2, b"view"),
        enc.delimited(1, b"u") + enc.delimited(2, b"other"),
        enc.delimited(2, b"view") + enc.delimited(1, b"u"),
        enc.delimited(1, b"u") + enc.delimited(2, b"view") + enc.delimited(3, enc.integer(1, NOW_S + 10**6)),
        enc.delimited(1, b"u") + enc.delimited(2, b"view") + enc.delimited(3, enc.integer(1, -1)),
        enc.delimited(1, b"u") + enc.delimited(2, b"view") + enc.delimited(4, b"i" * 25),
        b"",
    ],
)
def test_what_is_odd_or_wrong_is_left_to_the_general_parser(event: bytes) -> None:
    assert not Read(event, 8).plain()


def test_no_damage_of_a_byte_is_read_otherwise_than_the_general_parser_reads_it() -> None:
    event = an_event(nanos=5_000_000, color="red", größe="größer", price=12_900.0, undeclared="x")
    taken = 0
    for place in range(len(event)):
        for value in range(256):
            taken += check(event[:place] + bytes([value]) + event[place + 1 :], 0 if value & 1 else 8)
    assert 0.2 < taken / (256 * len(event)) < 0.9


def test_an_event_cut_anywhere_is_read_within_its_end() -> None:
    event = an_event(color="red", price=struct.unpack("<d", b"\x12\x0b\x1a\x09abcd")[0])
    for length in range(len(event)):
        check(event[:length], 0)
        check(event[:length], 8)
