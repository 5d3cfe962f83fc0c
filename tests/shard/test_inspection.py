"""Whatever is damaged: the inspection foresees what a start says, and a salvage makes the shard start again, keeps what
is readable, and says what is lost."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from profile_service.domain.schema import parse_schema
from profile_service.errors import ProfileServiceError, StartupError
from profile_service.shard.inspection import ShardFinding, inspect_shard, salvage_shard
from profile_service.shard.recovery import Recovered
from profile_service.storage.crashing_fs import CrashingFileSystem
from profile_service.wire.apply_request import ApplyPart
from tests.shard import shards
from tests.shard.shards import DIRECTORY, IDENTITY, NOW_NS
from userprofile.v1 import event_service_pb2

SCHEMA = parse_schema(
    """
name: test
events: {view: {weight: 1}}
half_life: none
features:
  views: {kind: counter}
  items: {kind: recent, attribute: item, size: 3}
"""
)
USERS = [f"user-{number}" for number in range(40)]
BATCHES = 100
SNAPSHOTS_AFTER = (25, 60)
BACKUP = Path("/data/salvaged")
PARTITIONS = 256

Files = dict[str, bytes]
LOG, SNAPSHOTS = "log", "snapshots"


def batch(number: int) -> ApplyPart:
    request = event_service_pb2.IngestEventsRequest()
    for user in USERS:
        request.events.add(user_id=user, type="view").attributes.update({"item": f"item {number}", "ignored": "x" * 40})
    return ApplyPart(
        producer_id="p",
        sequence=number,
        arrival_time_ns=NOW_NS,
        events=request.SerializeToString(),
        event_count=len(USERS),
    )


@functools.cache
def filled() -> Mapping[str, bytes]:
    """The files of a shard that counted BATCHES events of each user, and wrote two snapshots on the way."""

    async def fill(fs: CrashingFileSystem) -> None:
        async with shards.running(SCHEMA, fs) as shard:
            for number in range(1, BATCHES + 1):
                await shard.submit([batch(number)], 100, 7)
                if number in SNAPSHOTS_AFTER:
                    await shard.create_snapshot()

    fs = CrashingFileSystem()
    asyncio.run(fill(fs))
    return {f"{part}/{name}": content(fs, DIRECTORY / part / name) for part in (LOG, SNAPSHOTS)
            for name in fs.names(DIRECTORY / part) if not name.endswith(".new")}  # fmt: skip


def content(fs: CrashingFileSystem, path: Path) -> bytes:
    file = fs.open(path)
    try:
        return file.read(0, file.size)
    finally:
        file.close()


def content_or_none(fs: CrashingFileSystem, path: Path) -> bytes | None:
    return content(fs, path) if path.name in fs.names(path.parent) else None


def disk(files: Mapping[str, bytes]) -> CrashingFileSystem:
    fs = CrashingFileSystem()
    for part in (LOG, SNAPSHOTS):
        fs.make_directory(DIRECTORY / part)
    for name, data in files.items():
        file = fs.create(DIRECTORY / name)
        file.write(0, [data])
        file.sync()
        file.close()
    return fs


def names(part: str) -> list[str]:
    return sorted(name for name in filled() if name.startswith(part))


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :]


def inspect(fs: CrashingFileSystem) -> ShardFinding:
    return inspect_shard(fs, 3, DIRECTORY, IDENTITY)


def salvage(fs: CrashingFileSystem) -> ShardFinding:
    return salvage_shard(fs, 3, DIRECTORY, IDENTITY, backup=BACKUP, schema=SCHEMA, partitions=PARTITIONS)


def start(fs: CrashingFileSystem) -> Recovered:
    """As a service does; raises what keeps it from starting."""

    async def recover() -> Recovered:
        found = await shards.recovered(fs, SCHEMA)
        found.lock.release()
        await found.log.close()
        return found

    return asyncio.run(recover())


def events(found: Recovered) -> int:
    found.state.check_invariants()
    return found.state.event_count


ALL = BATCHES * len(USERS)


def test_a_whole_directory_starts_and_is_left_alone() -> None:
    fs = disk(filled())
    found = inspect(fs)
    assert (found.damages, found.refusals, found.losses) == ((), (), ())
    assert len(found.segments) > 3
    assert found.log_start > 0
    assert [snapshot.info.generation for snapshot in found.snapshots] == [2, 1]
    assert sum(segment.record_count for segment in found.segments) >= BATCHES - SNAPSHOTS_AFTER[0]
    before = fs.operations
    assert salvage(fs) == found
    assert fs.operations == before
    assert events(start(fs)) == ALL


def test_a_directory_without_anything_is_a_new_shard() -> None:
    fs = CrashingFileSystem()
    fs.make_directory(DIRECTORY)
    assert (inspect(fs).damages, inspect(fs).refusals) == ((), ())
    assert events(start(fs)) == 0


def test_a_directory_that_is_gone_is_damage() -> None:
    fs = CrashingFileSystem()
    fs.make_directory(DIRECTORY.parent)
    assert inspect(fs).refusals
    assert salvage(fs).losses == ("everything that the shard held",)
    assert not inspect(fs).refusals
    assert events(start(fs)) == 0


@pytest.mark.parametrize("kept", ["newer", "older"])
def test_a_damaged_snapshot_beside_a_whole_one_loses_nothing(kept: str) -> None:
    damaged = names(SNAPSHOTS)[0 if kept == "newer" else 1]
    fs = disk({**filled(), damaged: flipped(filled()[damaged], 200)})
    found = inspect(fs)
    assert len(found.damages) == 1
    assert damaged in found.damages[0]
    assert (found.refusals, found.losses) == ((), ())
    assert events(start(fs)) == ALL
    salvage(fs)
    assert inspect(fs).damages == ()
    assert content(fs, BACKUP / damaged) != filled()[damaged]
    assert events(start(fs)) == ALL


@pytest.mark.parametrize("offset", [20, 300])
def test_damage_behind_which_a_snapshot_was_begun_loses_nothing(offset: int) -> None:
    first = names(LOG)[0]
    fs = disk({**filled(), first: flipped(filled()[first], offset)})
    found = inspect(fs)
    assert len(found.damages) == 1
    assert found.losses == ()
    if offset < 64:
        # The segment's own header is looked at in any case.
        assert found.refusals
        with pytest.raises(ProfileServiceError, match="--salvage"):
            start(fs)
    else:
        assert events(start(fs)) == ALL
    salvage(fs)
    assert inspect(fs).refusals == ()
    assert content(fs, BACKUP / first) == flipped(filled()[first], offset)
    assert events(start(fs)) == ALL


def test_a_damaged_record_behind_the_snapshot_is_lost_and_nothing_else() -> None:
    last = names(LOG)[-1]
    fs = disk({**filled(), last: flipped(filled()[last], 300)})
    found = inspect(fs)
    assert len(found.losses) == 1
    assert found.losses[0].startswith("events logged from position ")
    salvage(fs)
    assert events(start(fs)) == ALL - len(USERS)


@pytest.mark.parametrize("which", [0, 1, -2, -1])
def test_a_lost_segment_costs_what_only_it_held(which: int) -> None:
    gone = names(LOG)[which]
    fs = disk({name: data for name, data in filled().items() if name != gone})
    salvage(fs)
    assert inspect(fs).refusals == ()
    newest = inspect(disk(filled())).snapshots[0].info.replay_position
    counted = events(start(fs))
    if int(Path(gone).stem) < newest and which != -1:
        assert counted >= SNAPSHOTS_AFTER[1] * len(USERS)
    else:
        assert ALL - 20 * len(USERS) <= counted < ALL


def test_without_its_log_the_newest_snapshot_is_what_remains() -> None:
    fs = disk({name: data for name, data in filled().items() if name.startswith(SNAPSHOTS)})
    found = inspect(fs)
    assert found.refusals
    assert any("what was logged from position 0 on" in loss for loss in found.losses)
    salvage(fs)
    assert events(start(fs)) == SNAPSHOTS_AFTER[1] * len(USERS)


def test_without_snapshots_what_the_log_still_holds_is_what_remains() -> None:
    fs = disk({name: data for name, data in filled().items() if name.startswith(LOG)})
    found = inspect(fs)
    assert any("no whole snapshot" in refusal for refusal in found.refusals)
    assert found.losses == (f"everything that was counted before position {found.log_start}, where the log begins",)
    salvage(fs)
    assert 0 < events(start(fs)) < ALL


def test_of_two_damaged_snapshots_the_blocks_that_are_whole_are_kept() -> None:
    # The last byte but some is of a block far behind the rows.
    files = {name: flipped(data, len(data) - 120) if name.startswith(SNAPSHOTS) else data
             for name, data in filled().items()}  # fmt: skip
    fs = disk(files)
    found = inspect(fs)
    assert len(found.damages) == 2
    assert found.losses[0].startswith("the damaged blocks of 0000000002.snapshot")
    salvage(fs)
    after = inspect(fs)
    assert (after.damages, after.refusals) == ((), ())
    assert [snapshot.info.generation for snapshot in after.snapshots] == [3]
    assert events(start(fs)) == ALL
    for name in names(SNAPSHOTS):
        assert content(fs, BACKUP / name) == files[name]


def test_snapshots_of_nothing_but_damage_are_given_up() -> None:
    files = {name: b"\x5a" * len(data) if name.startswith(SNAPSHOTS) else data for name, data in filled().items()}
    fs = disk(files)
    found = salvage(fs)
    assert found.losses[0].startswith("everything that was counted before position")
    assert inspect(fs).refusals == ()
    assert 0 < events(start(fs)) < ALL


def test_another_directorys_files_are_told_and_taken_away() -> None:
    fs = disk(filled())
    other = bytes(16)
    found = inspect_shard(fs, 3, DIRECTORY, other)
    assert all("belongs to" in damage for damage in found.damages)
    salvage_shard(fs, 3, DIRECTORY, other, backup=BACKUP, schema=SCHEMA, partitions=PARTITIONS)
    assert inspect_shard(fs, 3, DIRECTORY, other).refusals == ()
    assert {f"{part}/{name}" for part in (LOG, SNAPSHOTS) for name in fs.names(BACKUP / part)} == set(filled())


def cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def flip(data: bytes, dice: random.Random) -> bytes:
    return flipped(data, dice.randrange(len(data)))


def blank(data: bytes, dice: random.Random) -> bytes:
    size = dice.choice([1, 8, 512, 4096, 60_000])
    start = dice.randrange(len(data)) // size * size
    return data[:start] + bytes(min(size, len(data) - start)) + data[start + size :]


def scribble(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data))
    size = min(dice.choice([1, 100, 5000]), len(data) - start)
    return data[:start] + dice.randbytes(size) + data[start + size :]


def grow(data: bytes, dice: random.Random) -> bytes:
    return data + dice.randbytes(dice.choice([1, 512, 5000]))


def drop(data: bytes, dice: random.Random) -> None:
    return None


HARM: tuple[Callable[[bytes, random.Random], bytes | None], ...] = (cut, flip, flip, blank, scribble, grow, drop)


@pytest.mark.parametrize("number", range(60))
def test_whatever_is_damaged_a_start_is_foreseen_and_a_salvage_makes_it_start(seed: int, number: int) -> None:
    dice = random.Random(seed * 1000 + number)
    files: Files = dict(filled())
    done: dict[str, str] = {}
    for name in dice.sample(sorted(files), dice.choice([1, 1, 1, 2, 3, len(files)])):
        harm = dice.choice(HARM)
        harmed = harm(files[name], dice)
        done[name] = harm.__name__
        if harmed is None:
            del files[name]
        else:
            files[name] = harmed
    print(done)
    foreseen = inspect(disk(files))
    try:
        before = events(start(disk(files)))
    except ProfileServiceError as error:
        print(error)
        before = None
    assert (before is None) == bool(foreseen.refusals), foreseen
    fs = disk(files)
    found = salvage(fs)
    after = inspect(fs)
    assert (after.damages, after.refusals) == ((), ())
    for name, data in files.items():
        # What was changed is there as it was.
        if content_or_none(fs, DIRECTORY / name) != data:
            assert content(fs, BACKUP / name) == data
    counted = events(start(fs))
    assert counted <= ALL
    if before is not None:
        assert counted == before
    if counted < ALL and before is None and names(LOG)[-1] in files:
        # That the last segment is gone shows only where a snapshot reaches beyond the others.
        assert found.losses


def test_a_newer_versions_snapshot_is_left_for_it() -> None:
    newest = names(SNAPSHOTS)[1]
    data = bytearray(filled()[newest])
    data[12] = 9
    # With a checksum that fits, as the newer version writes it.
    from profile_service.storage.snapshot import _header_checksum

    data[8:12] = _header_checksum(bytes(data[:64])).to_bytes(4, "little")
    fs = disk({**filled(), newest: bytes(data)})
    assert any("format version 9" in refusal for refusal in inspect(fs).refusals)
    with pytest.raises(StartupError, match="format version 9"):
        salvage(fs)
    with pytest.raises(StartupError, match="format version 9"):
        start(fs)
