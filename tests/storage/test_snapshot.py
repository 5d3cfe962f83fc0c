"""Snapshots: published whole or not at all, and whatever happens to one later is noticed."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import crc32c
import pytest

from profile_service.errors import DataLoss, StartupError
from profile_service.storage.crashing_fs import Crashed, CrashingFileSystem
from profile_service.storage.fs import DiskFull, RealFileSystem
from profile_service.storage.snapshot import SALVAGED, SnapshotInfo, SnapshotStore

T = TypeVar("T")
DIRECTORY = Path("/data/snapshots")
BACKUP = Path("/data/backup")
IDENTITY = bytes(range(16))
BLOCKS = [(1, 100, b"first"), (2, 100, b""), (7, 164, bytes(range(64))), (7, 300, b"\0" * 9)]
HEADER_BYTES = 64
FOOTER_BYTES = 56


async def inline(work: Callable[[], T]) -> T:
    return work()


def store_of(fs: CrashingFileSystem, identity: bytes = IDENTITY) -> SnapshotStore:
    return SnapshotStore(fs, DIRECTORY, identity, inline)


async def publish(
    store: SnapshotStore, position: int = 100, blocks: list[tuple[int, int, bytes]] = BLOCKS
) -> SnapshotInfo:
    writer = await store.begin(position, 1_790_000_000_000)
    try:
        for kind, stamp, payload in blocks:
            await writer.write(kind, stamp, [payload[:3], memoryview(payload)[3:]])
        return await writer.publish()
    except DiskFull:
        await writer.abandon()
        raise


def contents(store: SnapshotStore, info: SnapshotInfo) -> list[tuple[int, int, bytes]]:
    return [(block.kind, block.stamp, bytes(block.payload)) for block in store.blocks(info)]


def file_bytes(fs: CrashingFileSystem, path: Path) -> bytes:
    return bytes(fs.map(path))


def used_bytes(fs: CrashingFileSystem) -> int:
    return sum(len(fs.map(DIRECTORY / name)) for name in fs.names(DIRECTORY))


def replace(fs: CrashingFileSystem, path: Path, data: bytes) -> None:
    fs.remove(path)
    fs.create(path).write(0, [data])


async def test_what_was_written_is_read() -> None:
    fs = CrashingFileSystem()
    store = store_of(fs)
    assert store.list() == []
    published = await publish(store)
    assert store.list() == [published]
    assert contents(store, published) == BLOCKS
    assert published.generation == 1
    assert published.size_bytes == len(file_bytes(fs, published.path))
    assert (published.replay_position, published.created_ns) == (100, 1_790_000_000_000)
    assert store.check(published).faults == ()


async def test_the_same_on_a_real_disk(tmp_path: Path) -> None:
    store = SnapshotStore(RealFileSystem(), tmp_path / "snapshots", IDENTITY, inline)
    published = await publish(store)
    assert store.list() == [published]
    assert contents(store, published) == BLOCKS
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["0000000001.snapshot"]


async def test_the_last_two_are_kept_and_say_where_the_log_is_needed_from() -> None:
    fs = CrashingFileSystem()
    store = store_of(fs)
    needed = []
    for position in (100, 200, 300):
        await publish(store, position)
        needed.append(await store.trim_position())
    assert [info.generation for info in store.list()] == [3, 2]
    assert needed == [None, 100, 200]


async def test_a_damaged_one_is_not_counted_among_the_last_two() -> None:
    fs = CrashingFileSystem()
    store = store_of(fs)
    for position in (100, 200):
        await publish(store, position)
    damaged = store.list()[0]
    replace(fs, damaged.path, file_bytes(fs, damaged.path)[:-1])
    await publish(store, 300)
    assert [info.generation for info in store.list()] == [3, 2, 1]
    assert await store.trim_position() == 100
    await publish(store, 400)
    assert [info.generation for info in store.list()] == [4, 3]


async def test_what_is_not_published_is_not_there_and_goes_with_the_next_one() -> None:
    fs = CrashingFileSystem()
    store = store_of(fs)
    await publish(store)
    writer = await store.begin(200, 0)
    await writer.write(1, 200, [b"x"])
    assert [info.generation for info in store.list()] == [1]
    abandoned = await store_of(fs).begin(200, 0)
    assert fs.names(DIRECTORY) == ["0000000001.snapshot", "0000000002.snapshot.new"]
    await abandoned.abandon()
    assert fs.names(DIRECTORY) == ["0000000001.snapshot"]


async def test_the_space_of_one_no_longer_kept_is_given_back_bit_by_bit() -> None:
    fs = CrashingFileSystem()
    store = store_of(fs)
    for position in (100, 200, 300):
        info = await publish(store, position)
    assert [kept.generation for kept in store.list()] == [3, 2]
    free = [used_bytes(fs)]
    while await store.discard(100):
        free.append(used_bytes(fs))
    free.append(used_bytes(fs))
    assert fs.names(DIRECTORY) == ["0000000002.snapshot", "0000000003.snapshot"]
    assert free[0] - free[-1] == info.size_bytes
    assert all(0 < before - after <= 100 for before, after in itertools.pairwise(free))
    assert not await store.discard(100)


async def test_nothing_that_is_cut_up_is_taken_for_a_snapshot_after_a_crash() -> None:
    crashes = 0
    for after, seed in itertools.product(range(1, 1000), range(8)):
        fs = CrashingFileSystem(seed)
        store = store_of(fs)
        for position in (100, 200):
            await publish(store, position)
        fs.fail_after(after)
        try:
            await publish(store, 300)
            while await store.discard(100):
                pass
        except Crashed:
            crashes += 1
            restarted = fs.crash()
            found = store_of(restarted)
            assert [info.generation for info in found.list()] in ([2, 1], [3, 2, 1], [3, 2])
            assert not any(info.damage for info in found.list())
            while await found.discard(100):
                pass
            assert all(name.endswith(".snapshot") for name in restarted.names(DIRECTORY))
        else:
            break
    assert crashes > 50


async def test_every_flipped_byte_is_noticed() -> None:
    """What can still be read of it is what was written."""
    fs = CrashingFileSystem()
    store = store_of(fs)
    path = (await publish(store)).path
    whole = file_bytes(fs, path)
    for offset in range(len(whole)):
        for flip in (0xFF, 1 << offset % 8):
            flipped = bytearray(whole)
            flipped[offset] ^= flip
            replace(fs, path, bytes(flipped))
            info = store.list()[0]
            read: list[tuple[int, int, bytes]] = []
            with pytest.raises(DataLoss, match=r"0000000001\.snapshot, offset \d+: "):
                read.extend((block.kind, block.stamp, bytes(block.payload)) for block in store.blocks(info))
            assert read == BLOCKS[: len(read)]
            assert store.check(info).faults
            if offset < HEADER_BYTES or offset >= len(whole) - FOOTER_BYTES:
                assert info.damage
                assert info.state == "damaged"


async def test_every_cut_and_whatever_is_appended_is_noticed() -> None:
    fs = CrashingFileSystem()
    store = store_of(fs)
    path = (await publish(store)).path
    whole = file_bytes(fs, path)
    changed = [whole[:size] for size in range(len(whole))] + [whole + b"\0" * 8, whole + whole, b"\0" * len(whole)]
    for data in changed:
        replace(fs, path, data)
        info = store.list()[0]
        assert info.state == "damaged"
        assert str(path) in info.damage
        with pytest.raises(DataLoss):
            list(store.blocks(info))
        assert store.check(info).faults


async def test_a_block_of_another_snapshot_is_none_of_this_one() -> None:
    """A disk that did not write what it was given still holds what stood there before."""
    fs = CrashingFileSystem()
    store = store_of(fs)
    first, second = await publish(store), await publish(store)
    other = file_bytes(fs, first.path)
    mixed = bytearray(file_bytes(fs, second.path))
    mixed[HEADER_BYTES:-FOOTER_BYTES] = other[HEADER_BYTES:-FOOTER_BYTES]
    replace(fs, second.path, bytes(mixed))
    info = store.list()[0]
    assert not info.damage
    with pytest.raises(DataLoss, match="offset 64"):
        list(store.blocks(info))


async def test_blocks_that_change_their_places_are_noticed() -> None:
    fs = CrashingFileSystem()
    store = store_of(fs)
    published = await publish(store, blocks=[(1, 5, b"one"), (1, 5, b"two")])
    data = file_bytes(fs, published.path)
    first, second = data[64:104], data[104:144]
    replace(fs, published.path, data[:64] + second + first + data[144:])
    with pytest.raises(DataLoss, match="block 1 stands where block 0 belongs"):
        list(store.blocks(store.list()[0]))


async def test_another_directorys_snapshot_is_refused() -> None:
    fs = CrashingFileSystem()
    await publish(store_of(fs, identity=b"x" * 16))
    store = store_of(fs)
    (info,) = store.list()
    assert info.state == "foreign"
    assert "belongs to the directory 7878" in info.damage
    with pytest.raises(DataLoss):
        list(store.blocks(info))
    with pytest.raises(StartupError):
        store.salvage(info, BACKUP)
    for _ in range(3):
        await publish(store)
    assert [found.generation for found in store.list()] == [4, 3, 1]


async def test_a_renamed_one_is_refused() -> None:
    fs = CrashingFileSystem()
    store = store_of(fs)
    fs.rename((await publish(store)).path, DIRECTORY / "0000000009.snapshot")
    (info,) = store.list()
    assert info.state == "foreign"
    assert "published as generation 1" in info.damage


async def test_a_newer_formats_snapshot_is_refused_clearly() -> None:
    fs = CrashingFileSystem()
    store = store_of(fs)
    path = (await publish(store)).path
    data = bytearray(file_bytes(fs, path))
    struct.pack_into("<I", data, 12, 2)
    struct.pack_into("<I", data, 8, crc32c.crc32c(bytes(data[12:64]), crc32c.crc32c(bytes(data[:8]))))
    replace(fs, path, bytes(data))
    (info,) = store.list()
    assert info.state == "newer"
    with pytest.raises(StartupError, match=r"format version 2, this version reads up to 1: start the version"):
        list(store.blocks(info))
    with pytest.raises(StartupError):
        store.salvage(info, BACKUP)


@pytest.mark.parametrize("attempt", range(6))
async def test_a_crash_at_any_moment_leaves_whole_snapshots(seed: int, attempt: int) -> None:
    operations = 1
    while True:
        fs = CrashingFileSystem(seed + 1000 * attempt + operations)
        store = store_of(fs)
        await publish(store, 100)
        await publish(store, 200)
        fs.fail_after(operations)
        try:
            await publish(store, 300)
        except Crashed:
            finished = False
        else:
            finished = True
        store = store_of(fs.crash())
        found = store.list()
        assert [info.damage for info in found] == [""] * len(found)
        positions = [info.replay_position for info in found]
        # Two at least, the newest ones of what was published, and never a hole between them.
        assert positions in ([300, 200, 100], [300, 200], [200, 100])
        if finished:
            assert positions[0] == 300
        for info in found:
            assert contents(store, info) == BLOCKS
        await publish(store, 400)
        assert store.list()[0].replay_position == 400
        if finished:
            return
        operations += 1


async def test_a_full_disk_leaves_what_was_there() -> None:
    fs = CrashingFileSystem()
    store = store_of(fs)
    published = await publish(store)
    for room in range(published.size_bytes):
        fs.capacity_bytes = published.size_bytes + room
        with pytest.raises(DiskFull):
            await publish(store)
        assert fs.names(DIRECTORY) == ["0000000001.snapshot"]
    fs.capacity_bytes = 2 * published.size_bytes
    await publish(store)
    assert len(store.list()) == 2


async def test_salvage_keeps_every_block_but_the_damaged_one() -> None:
    fs = CrashingFileSystem()
    store = store_of(fs)
    path = (await publish(store)).path
    whole = file_bytes(fs, path)
    starts = [HEADER_BYTES]
    for _, _, payload in BLOCKS:
        starts.append(starts[-1] + 32 + -(-len(payload) // 8) * 8)
    for offset in range(len(whole)):
        fs = CrashingFileSystem()
        fs.make_directory(DIRECTORY)
        data = bytearray(whole)
        data[offset] ^= 0x55
        fs.create(path).write(0, [bytes(data)])
        store = store_of(fs)
        damaged = store.list()[0]
        report = store.salvage(damaged, BACKUP)
        assert report.faults
        (info,) = store.list()
        assert info.generation == 2
        assert (info.replay_position, info.created_ns) == (100, 1_790_000_000_000)
        assert file_bytes(fs, BACKUP / path.name) == bytes(data)
        told, *kept = contents(store, info)
        assert told[0] == SALVAGED
        assert told[2].decode() == "\n".join(report.faults)
        lost = [i for i, start in enumerate(starts[:-1]) if start <= offset < starts[i + 1]]
        assert kept == [block for i, block in enumerate(BLOCKS) if i not in lost]
        assert store.check(info).faults == ()


async def test_salvage_of_a_cut_file_keeps_what_is_there() -> None:
    fs = CrashingFileSystem()
    store = store_of(fs)
    path = (await publish(store)).path
    whole = file_bytes(fs, path)
    replace(fs, path, whole[: HEADER_BYTES + 40 + 32 + 50])
    store.salvage(store.list()[0], BACKUP)
    assert contents(store, store.list()[0])[1:] == BLOCKS[:2]


async def test_salvage_needs_to_know_from_where_to_replay() -> None:
    fs = CrashingFileSystem()
    store = store_of(fs)
    path = (await publish(store)).path
    data = bytearray(file_bytes(fs, path))
    data[0] ^= 1
    data[-1] ^= 1
    replace(fs, path, bytes(data))
    with pytest.raises(DataLoss, match="where a replay would begin is not known"):
        store.salvage(store.list()[0], BACKUP)
    assert [info.generation for info in store.list()] == [1]


async def test_salvage_on_a_full_disk_changes_nothing() -> None:
    fs = CrashingFileSystem()
    store = store_of(fs)
    path = (await publish(store)).path
    data = bytearray(file_bytes(fs, path))
    data[HEADER_BYTES] ^= 1
    replace(fs, path, bytes(data))
    fs.capacity_bytes = 2 * len(data) + 10
    with pytest.raises(DiskFull):
        store.salvage(store.list()[0], BACKUP)
    assert fs.names(DIRECTORY) == ["0000000001.snapshot"]
    assert file_bytes(fs, path) == bytes(data)
    fs.capacity_bytes = None
    store.salvage(store.list()[0], BACKUP)
    assert [info.generation for info in store.list()] == [2]
