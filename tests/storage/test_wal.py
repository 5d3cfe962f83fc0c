"""The log as a shard uses it: groups, segments, room, modes, trimming, failures."""

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from profile_service.errors import DataLoss
from profile_service.storage.crashing_fs import CrashingFileSystem
from profile_service.storage.fs import DiskFull, RealFileSystem
from profile_service.storage.record import MAX_PAYLOAD_BYTES, RECORD_MARK, record_bytes
from profile_service.storage.salvage import inspect_log
from profile_service.storage.segment import segment_name
from profile_service.storage.wal import LogOptions, Record, SyncMode, WriteAheadLog
from tests.storage.logs import (
    DIRECTORY,
    IDENTITY,
    SMALL,
    Entry,
    contents,
    disk_of,
    inline,
    make_log,
    open_log,
    read,
    some_entries,
    write,
)

T = TypeVar("T")
MODES: list[SyncMode] = ["always", "interval", "never"]


@pytest.fixture
def fs() -> CrashingFileSystem:
    return CrashingFileSystem(seed=1)


def segments(fs: CrashingFileSystem) -> list[str]:
    return [name for name in fs.names(DIRECTORY) if name.endswith(".log")]


async def test_a_new_log_is_empty_and_begins_at_zero(fs: CrashingFileSystem) -> None:
    log = open_log(fs)
    assert (log.start, log.position, log.durable_position, log.torn_bytes) == (0, 0, 0, 0)
    assert log.size_bytes == 4096
    assert read(log) == []
    assert fs.names(DIRECTORY) == [segment_name(0)]


async def test_what_is_written_is_replayed_over_many_segments(fs: CrashingFileSystem) -> None:
    rng = random.Random(1)
    log = open_log(fs)
    entries = []
    positions = []
    for _ in range(50):
        group = some_entries(rng, rng.randint(1, 5))
        positions += await write(log, group)
        entries += group
        assert log.durable_position == log.position
    position = log.position
    await log.close()
    assert len(segments(fs)) > 5

    log = open_log(fs)
    assert log.position >= position
    records = list(log.records(0))
    assert [(record.type, bytes(record.payload)) for record in records] == entries
    assert [record.position for record in records] == positions
    for index in (1, 17, len(entries) - 1):
        assert read(log, positions[index]) == entries[index:]
    assert read(log, log.position) == []


async def test_nothing_is_written_before_sync(fs: CrashingFileSystem) -> None:
    log = open_log(fs)
    before = fs.operations
    assert log.append(1, [b"one"]) == 0
    assert log.append(2, [b"two"]) == record_bytes(3)
    assert fs.operations == before
    await log.sync()
    assert fs.operations == before + 2  # a write and a sync
    await log.sync()
    assert fs.operations == before + 2


async def test_positions_count_records_and_not_the_headers_of_segments(fs: CrashingFileSystem) -> None:
    log = open_log(fs)
    for index in range(20):
        (position,) = await write(log, [(1, bytes([index]) * 1000)])
        assert position == index * record_bytes(1000)


async def test_payloads_may_come_in_pieces(fs: CrashingFileSystem) -> None:
    log = open_log(fs)
    log.append(1, [b"ab", memoryview(b"cd"), b"", bytearray(b"e")])
    log.append(2, [])
    await log.sync()
    assert read(open_log(fs.kill())) == [(1, b"abcde"), (2, b"")]


async def test_a_record_larger_than_a_segment_gets_a_larger_one(fs: CrashingFileSystem) -> None:
    log = open_log(fs)
    large = random.Random(2).randbytes(50_000)
    await write(log, [(1, b"small")])
    await write(log, [(2, large)])
    await write(log, [(3, b"small again"), (4, b"x" * 5000)])
    assert read(open_log(fs.kill())) == [(1, b"small"), (2, large), (3, b"small again"), (4, b"x" * 5000)]


async def test_a_record_has_a_bound(fs: CrashingFileSystem) -> None:
    log = open_log(fs)
    with pytest.raises(ValueError, match=f"at most {MAX_PAYLOAD_BYTES} bytes"):
        log.append(1, [bytes(MAX_PAYLOAD_BYTES), b"x"])


async def test_a_group_may_span_segments(fs: CrashingFileSystem) -> None:
    rng = random.Random(3)
    log = open_log(fs)
    entries = [(1, rng.randbytes(900)) for _ in range(30)]
    await write(log, entries[:3])
    await write(log, entries[3:])
    assert read(open_log(fs.kill())) == entries


async def test_the_next_group_gathers_while_one_is_synced(fs: CrashingFileSystem) -> None:
    """With a Runner that does not answer at once, as a thread does."""
    waiting: list[asyncio.Event] = []

    async def slow(work: Callable[[], T]) -> T:
        event = asyncio.Event()
        waiting.append(event)
        if len(waiting) > 1:
            await waiting[-2].wait()
        await asyncio.sleep(0)
        result = work()
        event.set()
        return result

    log = WriteAheadLog.open(fs, DIRECTORY, IDENTITY, SMALL, slow)
    log.append(1, [b"first"])
    first = asyncio.ensure_future(log.sync())
    await asyncio.sleep(0)
    log.append(2, [b"second"])
    second = asyncio.ensure_future(log.sync())
    await asyncio.gather(first, second)
    assert log.durable_position == log.position
    assert read(open_log(fs.crash())) == [(1, b"first"), (2, b"second")]


async def test_a_sync_that_is_given_up_loses_nothing(fs: CrashingFileSystem) -> None:
    with ThreadPoolExecutor(1) as pool:
        loop = asyncio.get_running_loop()
        log = WriteAheadLog.open(fs, DIRECTORY, IDENTITY, SMALL, lambda work: loop.run_in_executor(pool, work))
        entries = []
        for number in range(30):
            entries.append((1, b"%d" % number * 20))
            await log.reserve(100, 1)
            log.append(*entries[-1][:1], [entries[-1][1]])
            task = asyncio.ensure_future(log.sync())
            if number % 3:
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait([task])
        await log.sync()
        assert read(open_log(fs.crash())) == entries


# --- closing and opening again ---


async def test_a_closed_log_knows_that_all_of_it_is_durable(fs: CrashingFileSystem) -> None:
    log = open_log(fs)
    await write(log, [(1, b"last words")])
    end = log.position
    await log.close()
    await log.close()
    (finding,) = inspect_log(fs, DIRECTORY)
    assert finding.durable_position == end

    log = open_log(fs)
    assert read(log) == [(1, b"last words")]
    marked = log.position
    assert marked == end + record_bytes(0)
    await log.close()  # nothing new: no second mark
    assert open_log(fs).position == marked


async def test_types_of_the_log_itself_are_refused(fs: CrashingFileSystem) -> None:
    for record_type in (0, RECORD_MARK, 255, 256):
        with pytest.raises(AssertionError):
            open_log(fs).append(record_type, [b""])


@pytest.mark.parametrize("mode", MODES)
async def test_closing_makes_everything_durable(fs: CrashingFileSystem, mode: SyncMode) -> None:
    log = open_log(fs, LogOptions(segment_bytes=4096, sync_mode=mode))
    entries = some_entries(random.Random(4), 30)
    for entry in entries[:-1]:
        await write(log, [entry])
    log.append(entries[-1][0], [entries[-1][1]])  # not even synced
    await log.close()
    assert read(open_log(fs.crash())) == entries


async def test_an_unsynced_tail_is_synced_before_it_is_served(fs: CrashingFileSystem) -> None:
    log = open_log(fs, LogOptions(segment_bytes=65536, sync_mode="never"))
    entries = some_entries(random.Random(5), 20)
    await write(log, entries)
    log = open_log(fs.kill())
    assert read(log) == entries
    assert log.durable_position == log.position
    assert read(open_log(log._fs.crash())) == entries  # type: ignore[attr-defined]


async def test_left_overs_are_removed(fs: CrashingFileSystem) -> None:
    log = open_log(fs)
    await write(log, [(1, b"x" * 3000)])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(fs.names(DIRECTORY)) == 2
    fs = fs.kill()
    open_log(fs)
    assert fs.names(DIRECTORY) == [segment_name(0)]


async def test_a_position_that_is_not_held_is_a_loss(fs: CrashingFileSystem) -> None:
    log = open_log(fs)
    await write(log, [(1, b"x")])
    log = open_log(fs.kill())
    with pytest.raises(DataLoss, match="holds positions 0 to 48"):
        list(log.records(56))
    with pytest.raises(DataLoss, match="header of a record is not whole"):
        list(log.records(8))


def test_a_missing_segment_is_a_loss() -> None:
    log = make_log([[(1, bytes([index + 1]) * 1500)] for index in range(9)])
    names = sorted(log)
    assert len(names) >= 4
    gone = dict(log)
    del gone[names[1]]
    with pytest.raises(DataLoss, match=rf"{names[0]} is damaged .* goes on at position {int(names[2][:20])}"):
        read(open_log(disk_of(gone)))
    # From behind the gap it can be read; nobody is told that there was more.
    later = open_log(disk_of(gone))
    assert len(read(later, int(names[2][:20]))) == 9 - 4


def test_a_segment_of_another_log_is_a_loss() -> None:
    mine = make_log([[(1, b"mine")]])
    with pytest.raises(DataLoss, match="belongs to another log"):
        WriteAheadLog.open(disk_of(mine), DIRECTORY, bytes(16), SMALL, inline)


def test_a_renamed_segment_is_a_loss() -> None:
    (data,) = make_log([[(1, b"mine")]]).values()
    with pytest.raises(DataLoss, match="by its name its first record is at position 8, by its header at 0"):
        open_log(disk_of({segment_name(8): data}))


# --- room ---


async def test_a_full_disk_refuses_and_resumes(fs: CrashingFileSystem) -> None:
    fs.capacity_bytes = 3 * 4096
    log = open_log(fs)
    entries: list[tuple[int, bytes]] = []
    full = False
    while not full:
        entry = (1, bytes([len(entries) % 250 + 1]) * 700)
        try:
            await write(log, [entry])
            entries.append(entry)
        except DiskFull:
            full = True
    assert len(entries) >= 10
    for _ in range(3):
        with pytest.raises(DiskFull):
            await log.reserve(700, 1)
    # What fits into the segment in use still goes.
    await write(log, [(2, b"small")])
    entries.append((2, b"small"))
    assert fs.names(DIRECTORY) == segments(fs), "nothing is left of what did not fit"

    fs.capacity_bytes = 10 * 4096
    await write(log, [(3, b"x" * 3000)])
    entries.append((3, b"x" * 3000))
    assert read(open_log(fs.crash())) == entries


async def test_trimming_gives_room_back(fs: CrashingFileSystem) -> None:
    fs.capacity_bytes = 3 * 4096
    log = open_log(fs)
    for _ in range(30):
        await write(log, [(1, bytes(range(1, 251)) * 4)])
        await log.trim(log.position)
    assert len(segments(fs)) <= 2


async def test_what_is_reserved_has_room_though_the_disk_fills(fs: CrashingFileSystem) -> None:
    rng = random.Random(6)
    log = open_log(fs)
    for _ in range(100):
        sizes = [rng.randint(0, 1500) for _ in range(rng.randint(1, 12))]
        fs.capacity_bytes = None
        await log.reserve(sum(sizes), len(sizes))
        fs.capacity_bytes = 0
        for size in sizes:
            log.append(1, [rng.randbytes(size)])
        await log.sync()


async def test_appending_without_room_is_a_mistake(fs: CrashingFileSystem) -> None:
    log = open_log(fs)
    with pytest.raises(AssertionError, match="append without reserve"):
        log.append(1, [bytes(5000)])


async def test_the_next_segment_is_ready_before_it_is_needed(fs: CrashingFileSystem) -> None:
    options = LogOptions(segment_bytes=4 << 20)
    log = open_log(fs, options)
    while log.position < (2 << 20) + 200_000:
        await write(log, [(1, bytes(range(250)) * 400)])
        await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    assert log.size_bytes == 8 << 20
    while len(segments(fs)) == 1:
        before = fs.operations
        await write(log, [(1, bytes(range(250)) * 400)])
    # Write and sync what still fits the old one; write, sync and rename the new one; sync the directory.
    assert fs.operations - before <= 6


# --- trimming ---


async def test_trimming_removes_what_is_wholly_before(fs: CrashingFileSystem) -> None:
    log = open_log(fs)
    positions = []
    for index in range(40):
        positions += await write(log, [(1, bytes([index + 1]) * 500)])
    names = segments(fs)
    second = int(names[1][:20])
    await log.trim(second - 8)
    assert segments(fs) == names
    await log.trim(second)
    assert segments(fs) == names[1:]
    assert log.start == second
    await log.trim(log.position)
    assert segments(fs) == names[-1:]
    fs = fs.crash()
    log = open_log(fs)
    assert log.start == int(names[-1][:20])
    kept = [position for position in positions if position >= log.start]
    assert [record.position for record in log.records(log.start)] == kept


async def test_a_crash_while_trimming_leaves_no_gap() -> None:
    for seed in range(60):
        fs = CrashingFileSystem(seed)
        log = open_log(fs)
        for index in range(40):
            await write(log, [(1, bytes([index + 1]) * 500)])
        fs.fail_after(1 + seed % 10)
        try:
            await log.trim(log.position)
        except Exception:  # noqa: BLE001 - a crash
            fs = fs.crash()
        log = open_log(fs)
        found = read(log)
        assert found == [(1, bytes([index + 1]) * 500) for index in range(40 - len(found), 40)]


# --- modes ---


async def test_always_survives_a_crash_at_once(fs: CrashingFileSystem) -> None:
    log = open_log(fs)
    entries = some_entries(random.Random(7), 30)
    await write(log, entries)
    assert read(open_log(fs.crash())) == entries


@pytest.mark.parametrize("mode", ["interval", "never"])
async def test_the_other_modes_survive_the_death_of_the_process(mode: SyncMode) -> None:
    for seed in range(30):
        fs = CrashingFileSystem(seed)
        log = open_log(fs, LogOptions(segment_bytes=4096, sync_mode=mode, sync_interval_s=3600))
        entries = some_entries(random.Random(seed), 30)
        for start in range(0, 30, 3):
            await write(log, entries[start : start + 3])
        await log.trim(0)
        assert read(open_log(fs.kill())) == entries


@pytest.mark.parametrize("mode", ["interval", "never"])
async def test_after_a_crash_of_the_machine_the_other_modes_have_a_prefix(mode: SyncMode) -> None:
    lost = 0
    for seed in range(200):
        fs = CrashingFileSystem(seed)
        log = open_log(fs, LogOptions(segment_bytes=4096, sync_mode=mode, sync_interval_s=3600))
        entries = some_entries(random.Random(seed), 30)
        for start in range(0, 30, 3):
            await write(log, entries[start : start + 3])
        durable = log.durable_position
        log = open_log(fs.crash())
        found = read(log)
        assert found == entries[: len(found)]
        assert log.position >= durable
        lost += len(found) < 30
    assert lost > 10, "the simulation is too kind"


async def test_interval_syncs_in_time_though_nothing_more_comes(fs: CrashingFileSystem) -> None:
    log = open_log(fs, LogOptions(segment_bytes=65536, sync_mode="interval", sync_interval_s=0.01))
    entries = some_entries(random.Random(8), 5)
    await write(log, entries)
    assert log.durable_position == 0
    deadline = asyncio.get_running_loop().time() + 10
    while log.durable_position < log.position:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.005)
    assert read(open_log(fs.crash())) == entries


@pytest.mark.parametrize("mode", MODES)
async def test_a_snapshot_can_have_it_durable_in_every_mode(fs: CrashingFileSystem, mode: SyncMode) -> None:
    log = open_log(fs, LogOptions(segment_bytes=65536, sync_mode=mode, sync_interval_s=3600))
    entries = some_entries(random.Random(10), 9)
    await write(log, entries[:8])
    log.append(entries[8][0], [entries[8][1]])
    await log.make_durable()
    assert log.durable_position == log.position
    assert read(open_log(fs.crash())) == entries


async def test_never_does_not_sync_but_between_segments(fs: CrashingFileSystem) -> None:
    log = open_log(fs, LogOptions(segment_bytes=65536, sync_mode="never"))
    before = fs.operations
    for _ in range(10):
        await write(log, [(1, b"x" * 1000)])
    assert fs.operations - before == 10
    assert log.durable_position == 0


# --- failures ---


@pytest.mark.parametrize("operation", ["write", "sync"])
async def test_a_failed_write_or_sync_ends_the_log(fs: CrashingFileSystem, operation: str) -> None:
    log = open_log(fs)
    await write(log, [(1, b"before")])
    fs.fail_once(operation)  # type: ignore[arg-type]
    log.append(1, [b"failed"])
    with pytest.raises(OSError, match="injected"):
        await log.sync()
    for attempt in (log.sync(), log.reserve(1, 1), log.trim(0)):
        with pytest.raises(OSError, match="failed before"):
            await attempt
    with pytest.raises(OSError, match="failed before"):
        log.append(1, [b"x"])
    await log.close()
    found = read(open_log(fs.crash()))
    assert found in ([(1, b"before")], [(1, b"before"), (1, b"failed")])


async def test_what_a_failed_sync_dropped_is_never_served_without_being_durable() -> None:
    """The page cache shows it, calls it clean, and the next fdatasync succeeds: so it is written again when opened."""
    for seed in range(200):
        fs = CrashingFileSystem(seed)
        log = open_log(fs, LogOptions(segment_bytes=65536, sync_mode="always"))
        await write(log, [(1, random.Random(seed).randbytes(900))])
        fs.fail_once("sync")
        log.append(1, [random.Random(-seed).randbytes(3000)])
        with pytest.raises(OSError, match="injected"):
            await log.sync()
        fs = fs.kill()
        served = read(open_log(fs))
        assert read(open_log(fs.crash())) == served


async def test_a_failure_in_the_background_is_told_by_the_next_call(fs: CrashingFileSystem) -> None:
    log = open_log(fs, LogOptions(segment_bytes=65536, sync_mode="interval", sync_interval_s=0.001))
    fs.fail_once("sync")
    await write(log, [(1, b"x")])
    await asyncio.sleep(0.05)
    with pytest.raises(OSError, match="failed before"):
        await log.sync()


async def test_closing_tells_of_a_failure_that_nobody_was_told_of(fs: CrashingFileSystem) -> None:
    log = open_log(fs, LogOptions(segment_bytes=65536, sync_mode="interval", sync_interval_s=0.001))
    fs.fail_once("sync")
    await write(log, [(1, b"x")])
    await asyncio.sleep(0.05)
    with pytest.raises(OSError, match="failed before"):
        await log.close()
    await log.close()


async def test_what_is_made_ready_ahead_may_fail_too(fs: CrashingFileSystem) -> None:
    log = open_log(fs)
    fs.fail_once("create")
    with pytest.raises(OSError, match="injected"):
        await log.reserve(5000, 1)
    with pytest.raises(OSError, match="failed before"):
        await log.reserve(1, 1)


def test_options_name_every_fault() -> None:
    with pytest.raises(ValueError, match=r"segment_bytes.*sync_mode.*sync_interval_s"):
        LogOptions(5000, "sometimes", 0).validate()  # type: ignore[arg-type]


# --- the real file system, with a thread ---


@pytest.mark.parametrize("mode", MODES)
async def test_on_the_real_file_system(tmp_path: Path, mode: SyncMode) -> None:
    rng = random.Random(9)
    options = LogOptions(segment_bytes=1 << 16, sync_mode=mode, sync_interval_s=0.01)
    entries: list[Entry] = []
    directory = tmp_path / "a" / "log"
    with ThreadPoolExecutor(1) as pool:
        loop = asyncio.get_running_loop()

        def reopened() -> WriteAheadLog:
            return WriteAheadLog.open(
                RealFileSystem(), directory, IDENTITY, options, lambda work: loop.run_in_executor(pool, work)
            )

        for life in range(3):
            log = reopened()
            assert [(record.type, bytes(record.payload)) for record in log.records(0)] == entries
            for _ in range(20):
                group = some_entries(rng, 5, 5000)
                await write(log, group)
                entries += group
            if life != 1:
                await log.close()
        log = reopened()
        records: list[Record] = list(log.records(0))
        assert [(record.type, bytes(record.payload)) for record in records] == entries
        await log.trim(log.position)
        assert len([name for name in RealFileSystem().names(directory) if name.endswith(".log")]) == 1
        await log.close()


def test_the_bytes_of_a_log_are_a_function_of_what_was_appended() -> None:
    groups = [some_entries(random.Random(seed), 5) for seed in range(10)]
    assert make_log(groups) == make_log(groups)
    assert contents(disk_of(make_log(groups))) == make_log(groups)
