"""Salvage: whatever was damaged, the log opens afterwards, and every record that was readable is where it was."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
from crc32c import crc32c

from profile_service.errors import DataLoss
from profile_service.storage.crashing_fs import Crashed, CrashingFileSystem
from profile_service.storage.fs import DiskFull
from profile_service.storage.salvage import SegmentFinding, inspect_log, salvage_log
from profile_service.storage.segment import segment_name
from tests.storage.logs import (
    BACKUP,
    DIRECTORY,
    IDENTITY,
    Entry,
    contents,
    disk_of,
    make_log,
    open_log,
    run,
    some_entries,
    write,
)

SEGMENT = 4096
Placed = dict[int, Entry]
"""Entries by position."""


def a_log(seed: int = 6, groups: int = 12, *, close: bool = False) -> dict[str, bytes]:
    rng = random.Random(seed)
    return make_log([some_entries(rng, rng.randint(1, 4), 700) for _ in range(groups)], close=close)


def placed(fs: CrashingFileSystem) -> Placed:
    log = open_log(fs)
    return {record.position: (record.type, bytes(record.payload)) for record in log.records(log.start)}


def salvaged(segments: dict[str, bytes]) -> tuple[Placed, CrashingFileSystem, list[SegmentFinding]]:
    """What is there after a salvage; checks what is true after every one."""
    fs = disk_of(segments)
    findings = salvage_log(fs, DIRECTORY, BACKUP, IDENTITY)
    changed = {name for name, data in segments.items() if contents(fs).get(name) != data}
    if changed:
        kept = contents(fs, BACKUP)
        assert {name: kept[name] for name in changed} == {name: segments[name] for name in changed}
    fs = fs.crash()  # it was all synced
    assert all(finding.whole for finding in inspect_log(fs, DIRECTORY))
    found = placed(fs)
    written = max((position for position in found), default=0)
    # The log goes on.
    log = open_log(fs)
    assert log.position > written or not found
    run(write(log, [(9, b"more" * 300), (9, b"more" * 300)]))
    fs = fs.crash()
    after = placed(fs)
    assert {position: entry for position, entry in after.items() if position in found} == found
    assert len(after) == len(found) + 2
    # A second salvage finds nothing to do.
    assert all(finding.whole for finding in salvage_log(fs, DIRECTORY, BACKUP, IDENTITY))
    return found, fs, findings


LOG = a_log()
NAMES = sorted(LOG)
WHOLE = placed(disk_of(LOG))
STARTS = [int(name[:20]) for name in NAMES]


def place(position: int) -> tuple[int, int]:
    """Segment and offset."""
    segment = max(index for index, start in enumerate(STARTS) if start <= position)
    return segment, position - STARTS[segment] + 64


def spoilt(segment: int, at: int, data: bytes) -> dict[str, bytes]:
    image = bytearray(LOG[NAMES[segment]])
    image[at : at + len(data)] = data
    return {**LOG, NAMES[segment]: bytes(image)}


def test_nothing_is_done_to_what_is_whole() -> None:
    found, fs, findings = salvaged(LOG)
    assert found == WHOLE
    assert all(finding.whole for finding in findings)
    assert BACKUP not in fs._directories


def test_findings_say_what_is_there() -> None:
    findings = inspect_log(disk_of(LOG), DIRECTORY)
    assert [finding.path.name for finding in findings] == NAMES
    assert [finding.first for finding in findings] == STARTS
    assert [finding.end for finding in findings][:-1] == STARTS[1:]
    assert sum(finding.record_count for finding in findings) == len(WHOLE)
    assert [finding.size_bytes for finding in findings] == [SEGMENT] * len(NAMES)
    assert findings[-1].durable_position > STARTS[-1]


@pytest.mark.parametrize("part", ["checksum", "position", "payload", "padding"])
def test_a_damaged_record_is_given_up_alone(part: str) -> None:
    for position, (_, payload) in WHOLE.items():
        segment, offset = place(position)
        at = offset + {"checksum": 0, "position": 9, "payload": 33, "padding": 32 + len(payload)}[part]
        segments = spoilt(segment, at, bytes([LOG[NAMES[segment]][at] ^ 0xFF]))
        with pytest.raises(DataLoss):
            placed(disk_of(segments))
        found, _, findings = salvaged(segments)
        assert found == {other: entry for other, entry in WHOLE.items() if other != position}
        (damage,) = findings[segment].damages
        assert (damage.offset, damage.position) == (offset, position)
        assert damage.size_bytes <= 40 + len(payload) + -len(payload) % 8


def findings_end() -> int:
    return inspect_log(disk_of(LOG), DIRECTORY)[-1].end


def test_any_stretch_of_garbage_costs_what_it_covers() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        segment = rng.randrange(len(NAMES))
        at = rng.randrange(SEGMENT)
        size = min(SEGMENT - at, rng.choice([1, 8, 100, 1000, SEGMENT]))
        garbage = rng.randbytes(size) if rng.random() < 0.5 else bytes(size)
        segments = spoilt(segment, at, garbage)
        found, _, _ = salvaged(segments)
        assert found.items() <= WHOLE.items()
        for position, (_, payload) in WHOLE.items():
            where, offset = place(position)
            untouched = where != segment or offset + 40 + len(payload) + 8 <= at or offset >= at + len(garbage)
            # What is behind zeros in the last segment may be what a crash left: it goes with the torn tail.
            torn = not any(garbage) and where == segment == len(NAMES) - 1 and offset >= at
            if untouched and not torn:
                assert position in found, (seed, position)


def test_a_segment_that_is_cut_short_keeps_what_is_left() -> None:
    for segment, name in enumerate(NAMES):
        for size in [*range(130), *range(130, SEGMENT, 61)]:
            found, _, findings = salvaged({**LOG, name: LOG[name][:size]})
            for position, (_, payload) in WHOLE.items():
                where, offset = place(position)
                end = offset + 40 + len(payload) + -len(payload) % 8
                assert (position in found) == (where != segment or (end <= size and size >= 64)), (name, size, position)
            assert findings[segment].damages


def test_no_position_is_given_twice_after_a_cut() -> None:
    end = findings_end()
    for size in range(0, SEGMENT, 97):
        fs = disk_of({**LOG, NAMES[-1]: LOG[NAMES[-1]][:size]})
        salvage_log(fs, DIRECTORY, BACKUP, IDENTITY)
        assert open_log(fs).position >= end


def test_a_segment_that_has_grown_has_its_size_again() -> None:
    for name in NAMES:
        found, _, _ = salvaged({**LOG, name: LOG[name] + b"behind"})
        assert found == WHOLE


@pytest.mark.parametrize("at", [0, 8, 20, 40, 63])
def test_the_header_of_a_segment_is_written_anew(at: int) -> None:
    for segment in range(len(NAMES)):
        found, _, _ = salvaged(spoilt(segment, at, bytes([LOG[NAMES[segment]][at] ^ 0x10])))
        assert found == WHOLE


@pytest.mark.parametrize("missing", [(0,), (1,), (0, 1), (1, 2), (2,)])
def test_missing_segments_leave_a_gap(missing: tuple[int, ...]) -> None:
    assert len(NAMES) >= 4
    found, _, _ = salvaged({name: data for index, (name, data) in enumerate(LOG.items()) if index not in missing})
    assert found == {position: entry for position, entry in WHOLE.items() if place(position)[0] not in missing}


def test_a_replay_may_begin_within_what_was_given_up() -> None:
    first = [position for position in WHOLE if place(position)[0] == 0]
    _, offset = place(first[2])
    damaged = spoilt(0, offset, bytes([1]) * 100)
    del damaged[NAMES[2]]
    fs = disk_of(damaged)
    salvage_log(fs, DIRECTORY, BACKUP, IDENTITY)
    kept = placed(fs)
    assert kept.keys() < WHOLE.keys()
    for position in WHOLE:
        found = [record.position for record in open_log(fs).records(position)]
        assert found == [other for other in kept if other >= position]
    with pytest.raises(DataLoss, match="not whole"):
        list(open_log(fs).records(first[0] + 8))  # within a record that is readable


def test_what_follows_a_gap_may_get_lost_later() -> None:
    _, fs, _ = salvaged({NAMES[0]: LOG[NAMES[0]], NAMES[-1]: LOG[NAMES[-1]]})
    segments = {name: data for name, data in contents(fs).items() if name < NAMES[-1]}
    with pytest.raises(DataLoss, match="segment that should follow a gap is missing"):
        placed(disk_of(segments))
    fs = disk_of(segments)
    salvage_log(fs, DIRECTORY, BACKUP, IDENTITY)
    assert placed(fs) == {position: entry for position, entry in WHOLE.items() if place(position)[0] == 0}
    assert open_log(fs).position == STARTS[-1]


def test_zeroed_records_before_the_next_segment_are_a_hole() -> None:
    first = [position for position in WHOLE if place(position)[0] == 0]
    _, offset = place(first[-2])
    segments = spoilt(0, offset, bytes(SEGMENT - offset))
    with pytest.raises(DataLoss, match="the log ends here, but goes on"):
        placed(disk_of(segments))
    found, _, findings = salvaged(segments)
    assert found == {position: entry for position, entry in WHOLE.items() if position not in first[-2:]}
    assert "are missing" in findings[0].damages[0].reason


def test_a_renamed_segment_gets_its_name_back() -> None:
    segments = dict(LOG)
    segments[segment_name(STARTS[1] + 8)] = segments.pop(NAMES[1])
    found, fs, _ = salvaged(segments)
    assert found == WHOLE
    assert NAMES[1] in fs.names(DIRECTORY)


def test_a_segment_of_another_log_is_put_aside() -> None:
    rng = random.Random(99)
    stranger = bytearray(make_log([some_entries(rng, 3)])[segment_name(0)])
    stranger[16] ^= 1
    stranger[60:64] = crc32c(bytes(stranger[:60])).to_bytes(4, "little")
    end = STARTS[-1] + 5000 // 8 * 8
    found, fs, findings = salvaged({**LOG, segment_name(end): bytes(stranger)})
    assert found == WHOLE
    assert contents(fs, BACKUP) == {segment_name(end): bytes(stranger)}
    assert findings[-1].damages[0].reason == "the segment belongs to another log"


def test_a_torn_tail_is_left_to_opening() -> None:
    last = max(WHOLE)
    segment, offset = place(last)
    start = -(-(offset + 32) // 512) * 512
    segments = spoilt(segment, start, bytes(SEGMENT - start))
    (*_, finding) = inspect_log(disk_of(segments), DIRECTORY)
    assert finding.whole
    assert finding.torn_bytes == start - offset
    found, _, _ = salvaged(segments)
    assert found == {position: entry for position, entry in WHOLE.items() if position != last}


class BadSectors(CrashingFileSystem):
    """A disk that cannot read some blocks of a file."""

    name = ""
    blocks: tuple[int, ...] = ()

    def map(self, path: Path) -> memoryview:
        if path.name == self.name and path.parent == DIRECTORY:
            raise OSError(errno.EIO, "cannot read the file", str(path))
        return super().map(path)

    def open(self, path: Path, *, writable: bool = False):  # type: ignore[no-untyped-def]
        file = super().open(path, writable=writable)
        if path.name == self.name and path.parent == DIRECTORY:
            read = file.read

            def spoilt_read(offset: int, size: int) -> bytes:
                if offset in self.blocks:
                    raise OSError(errno.EIO, "injected")
                return read(offset, size)

            file.read = spoilt_read  # type: ignore[method-assign]
        return file


def test_what_the_disk_cannot_read_is_given_up_and_the_rest_kept() -> None:
    segments = make_log([some_entries(random.Random(seed), 5, 6000) for seed in range(8)])
    whole = placed(disk_of(segments))
    name = max(segments, key=lambda name: len(segments[name]))
    if len(segments[name]) < 3 * SEGMENT:
        pytest.fail("the log should have a larger segment")
    fs = BadSectors()
    fs._directories = disk_of(segments)._directories
    fs.name, fs.blocks = name, (SEGMENT,)
    findings = inspect_log(fs, DIRECTORY)
    assert any("cannot read it" in damage.reason for finding in findings for damage in finding.damages)
    salvage_log(fs, DIRECTORY, BACKUP, IDENTITY)
    fs.name = ""
    found = placed(fs)
    assert found.items() < whole.items()
    assert len(found) >= len(whole) - 4


def test_it_may_crash_at_any_point_and_be_run_again() -> None:
    first = [position for position in WHOLE if place(position)[0] == 0]
    _, offset = place(first[1])
    damaged = spoilt(0, offset + 3, b"\x00\x01\x02")
    del damaged[NAMES[2]]
    lost = {first[1]} | {position for position in WHOLE if place(position)[0] == 2}
    for operation in range(1, 40):
        fs = disk_of(damaged)
        fs.fail_after(operation)
        try:
            salvage_log(fs, DIRECTORY, BACKUP, IDENTITY)
        except Crashed:
            fs = fs.crash()
            salvage_log(fs, DIRECTORY, BACKUP, IDENTITY)
        assert placed(fs.crash()) == {position: entry for position, entry in WHOLE.items() if position not in lost}


def test_without_room_for_a_copy_nothing_is_changed() -> None:
    segments = spoilt(0, 100, b"damage")
    fs = disk_of(segments)
    fs.capacity_bytes = len(segments) * SEGMENT
    with pytest.raises(DiskFull):
        salvage_log(fs, DIRECTORY, BACKUP, IDENTITY)
    assert contents(fs) == segments
    fs.capacity_bytes = None
    salvage_log(fs, DIRECTORY, BACKUP, IDENTITY)
    assert placed(fs)


def test_looking_never_raises_whatever_is_there() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        segments = dict(LOG)
        for _ in range(rng.randint(1, 6)):
            name = rng.choice(NAMES)
            kind = rng.randrange(4)
            data = bytearray(segments.get(name, b""))
            if kind == 0 and data:
                at = rng.randrange(len(data))
                data[at : at + rng.choice([1, 500])] = rng.randbytes(rng.choice([1, 500]))
            elif kind == 1:
                del data[rng.randint(0, len(data)) :]
            elif kind == 2:
                data += rng.randbytes(rng.randint(0, 99))
            else:
                segments.pop(name, None)
                continue
            segments[name] = bytes(data)
        findings = inspect_log(disk_of(segments), DIRECTORY)
        assert len(findings) == len(segments)
        if segments:
            salvaged(segments)
