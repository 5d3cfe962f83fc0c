"""A log that is cut at every byte, zeroed from every byte on, and changed in every byte: each ends as the table says.

The log has several groups in three small segments. What the table says is worked out here from where records stand,
apart from the code that reads them.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from profile_service.errors import DataLoss
from profile_service.storage.record import record_bytes
from tests.storage.logs import DIRECTORY, Entry, disk_of, make_log, open_log, read, some_entries

SECTOR = 512
SEGMENT = 4096


@dataclass(frozen=True)
class Written:
    """A log, and where each record stands.

    Attributes:
        places: of each entry: segment, offset, offset behind it; and the number of its group.
        ends: offset behind the last record (or mark) of each segment.
    """

    segments: dict[str, bytes]
    entries: list[Entry]
    places: list[tuple[int, int, int, int]]
    ends: list[int]
    closed: bool

    @property
    def names(self) -> list[str]:
        return sorted(self.segments)

    def damaged_ones(self) -> list[int]:
        """The segments to damage: a closed log differs from one that was not in its last one only."""
        return list(range(len(self.names)))[-1 if self.closed else 0 :]

    def index(self, segment: int, offset: int) -> int:
        """How many records stand wholly before this byte."""
        return bisect_right([(place[0], place[2]) for place in self.places], (segment, offset))

    def with_file(self, segment: int, data: bytes) -> dict[str, bytes]:
        return {**self.segments, self.names[segment]: data}


def written(seed: int, *, close: bool) -> Written:
    rng = random.Random(seed)
    groups = []
    for _ in range(9):
        group = some_entries(rng, rng.randint(1, 4), 700)
        if rng.random() < 0.3:  # sectors of zeros, as a payload
            group[0] = (group[0][0], bytes(rng.randint(600, 1100)))
        groups.append(group)
    segments = make_log(groups, close=close)
    assert len(segments) == 3
    starts = [int(name[:20]) for name in sorted(segments)]
    places = []
    ends = [64] * len(segments)
    position = 0
    for number, group in enumerate(groups):
        for _, payload in group:
            segment = bisect_right(starts, position) - 1
            offset = position - starts[segment] + 64
            position += record_bytes(len(payload))
            ends[segment] = position - starts[segment] + 64
            places.append((segment, offset, ends[segment], number))
    if close:
        ends[-1] += record_bytes(0)
    return Written(segments, [entry for group in groups for entry in group], places, ends, close)


@pytest.fixture(scope="module", params=[False, True], ids=["killed", "closed"])
def log(request: pytest.FixtureRequest) -> Written:
    # Its last group has four records, one of zeros, and one whose header stands in two sectors.
    return written(6, close=request.param)


def outcome(segments: dict[str, bytes]) -> tuple[list[Entry], int] | str:
    """What can be read and how much was cut, or the message of a DataLoss; whatever else is raised is a failure."""
    try:
        fs = disk_of(segments)
        log = open_log(fs)
        found = read(log)
    except DataLoss as error:
        return error.message
    # Deciding once is deciding for good: nothing is cut a second time, and nothing more or less is found.
    again = open_log(fs.crash())
    assert again.torn_bytes == 0
    assert read(again) == found
    return found, log.torn_bytes


def test_it_is_read_whole_when_nothing_is_done_to_it(log: Written) -> None:
    assert outcome(log.segments) == (log.entries, 0)


def test_a_loss_says_where_and_what_to_do(log: Written) -> None:
    _, begin, _, _ = log.places[2]
    data = bytearray(log.segments[log.names[0]])
    data[begin + 33] ^= 1
    assert outcome(log.with_file(0, bytes(data))) == (
        f"{DIRECTORY}/{log.names[0]} is damaged at byte {begin} (log position {begin - 64}): "
        "the payload of a record is not whole. "
        "`profile-service inspect DATA_DIR` shows what is readable; with --salvage it keeps that and gives up the rest"
    )


def test_cut_at_every_byte_it_is_a_loss(log: Written) -> None:
    for segment in log.damaged_ones():
        name = log.names[segment]
        data = log.segments[name]
        for size in range(len(data)):
            found = outcome(log.with_file(segment, data[:size]))
            assert isinstance(found, str), (segment, size)
            assert name in found


def test_longer_than_it_was_it_is_a_loss(log: Written) -> None:
    for segment, name in enumerate(log.names):
        assert isinstance(outcome(log.with_file(segment, log.segments[name] + bytes(8))), str)


def test_zeroed_from_every_byte_on_it_is_cut_or_a_loss(log: Written) -> None:
    """A crash does it at sectors only: then it is a torn tail or a clean end. No record before is ever lost."""
    last = len(log.names) - 1
    data = log.segments[log.names[last]]
    records = [(begin, end) for segment, begin, end, _ in log.places if segment == last]
    if log.ends[last] > records[-1][1]:
        records.append((records[-1][1], log.ends[last]))  # the mark
    for start in range(64, SEGMENT + 1):
        found = outcome(log.with_file(last, data[:start] + bytes(SEGMENT - start)))
        begin, end = next((record for record in records if record[1] > start), (start, start))
        # Of a record whose header is cut, nothing tells how long it was: only the header's sectors count.
        judged = begin + 32 if any(data[start : begin + 32]) else end
        sector = -(-start // SECTOR) * SECTOR
        left = data[begin:start].rstrip(b"\0")
        if not left or sector < judged:
            assert found == (log.entries[: log.index(last, start)], len(left)), start
        else:
            assert isinstance(found, str), start
            assert start % SECTOR, start


def test_zeroed_from_a_byte_on_the_header_of_a_segment_is_a_loss(log: Written) -> None:
    for segment, name in enumerate(log.names):
        data = log.segments[name]
        for start in range(64):
            assert isinstance(outcome(log.with_file(segment, data[:start] + bytes(SEGMENT - start))), str), start


def test_zeroed_from_a_byte_on_an_earlier_segment_is_a_loss(log: Written) -> None:
    for segment in log.damaged_ones()[:-1]:
        data = log.segments[log.names[segment]]
        for start in range(64, log.ends[segment]):
            assert isinstance(outcome(log.with_file(segment, data[:start] + bytes(SEGMENT - start))), str), start


def test_any_sector_zeroed_is_cut_only_where_no_later_record_knows_it_synced(log: Written) -> None:
    last = len(log.names) - 1
    cut = 0
    for segment, name in enumerate(log.names):
        data = log.segments[name]
        for start in range(0, SEGMENT, SECTOR):
            if not any(data[start : start + SECTOR]):
                continue
            found = outcome(log.with_file(segment, data[:start] + bytes(SECTOR) + data[start + SECTOR :]))
            if isinstance(found, str):
                continue
            cut += 1
            assert segment == last
            assert start >= SECTOR
            before = log.index(segment, start)
            assert found[0] == log.entries[:before]
            assert before == len(log.entries) or log.places[before][3] == log.places[-1][3], start
            # In a closed log only the sector that has the mark itself.
            assert not log.closed or start + SECTOR > log.ends[-1] - 40
    assert cut


CHANGES: dict[str, Callable[[int, random.Random], int]] = {
    "all bits": lambda byte, _: byte ^ 0xFF,
    "lowest bit": lambda byte, _: byte ^ 0x01,
    "to zero": lambda _, __: 0,
    "random": lambda byte, rng: byte ^ rng.randrange(1, 256),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_in_any_byte_it_is_a_loss_or_nothing_is_lost(log: Written, change: str) -> None:
    rng = random.Random(change)
    last = len(log.names) - 1
    for segment in log.damaged_ones():
        name = log.names[segment]
        data = bytearray(log.segments[name])
        for at in range(SEGMENT):
            before = data[at]
            data[at] = CHANGES[change](before, rng)
            if data[at] == before:
                continue
            found = outcome(log.with_file(segment, bytes(data)))
            data[at] = before
            if at < log.ends[segment] or segment < last:
                # A record, a header, or the zeros behind the last record of a segment that is not the last.
                assert isinstance(found, str), (segment, at)
                assert name in found
            elif not isinstance(found, str):
                # Behind the end: looks like a write that was cut short. Everything is there.
                assert found[0] == log.entries, at


def test_two_bytes_changed_never_make_a_record_that_was_not_written(log: Written) -> None:
    rng = random.Random(11)
    for _ in range(3000):
        segment = rng.randrange(len(log.names))
        data = bytearray(log.segments[log.names[segment]])
        first = rng.randrange(SEGMENT)
        for at in (first, min(SEGMENT - 1, first + rng.choice([1, 4, 8, rng.randrange(SEGMENT)]))):
            data[at] = rng.randrange(256)
        found = outcome(log.with_file(segment, bytes(data)))
        if not isinstance(found, str):
            assert found[0] == log.entries[: len(found[0])]
            assert len(found[0]) == len(log.entries)
