"""The simulated disk does what a real one may do: each promise kept, each liberty taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from profile_service.storage.crashing_fs import SECTOR_BYTES, Crashed, CrashingFileSystem
from profile_service.storage.fs import DiskFull

D = Path("/d")
SEEDS = range(300)


def a_disk(seed: int) -> CrashingFileSystem:
    fs = CrashingFileSystem(seed)
    fs.make_directory(D)
    return fs


def bytes_after(fs: CrashingFileSystem) -> bytes:
    return bytes(fs.crash().map(D / "a"))


def test_what_is_synced_survives() -> None:
    for seed in SEEDS:
        fs = a_disk(seed)
        file = fs.create(D / "a", 4096)
        file.write(100, [b"one" * 300])
        file.sync()
        fs.sync_directory(D)
        expected = file.read(0, 5000)
        fs = fs.crash()
        assert fs.map(D / "a") == expected
        assert fs.crash().map(D / "a") == expected


def test_what_is_not_synced_is_kept_or_lost_sector_by_sector() -> None:
    seen = set()
    for seed in SEEDS:
        fs = a_disk(seed)
        file = fs.create(D / "a", 2048)
        file.sync()
        fs.sync_directory(D)
        file.write(256, [b"x" * 1024])  # a half, a whole, a half
        found = bytes_after(fs)
        assert len(found) == 2048
        state = []
        for start, end in ((256, 512), (512, 1024), (1024, 1280)):
            assert found[start:end] in (bytes(end - start), b"x" * (end - start))
            state.append(found[start] == ord("x"))
        assert found[:256] + found[1280:] == bytes(1024)
        seen.add(tuple(state))
    assert len(seen) == 8


def test_any_version_of_a_sector_may_be_there() -> None:
    seen = set()
    for seed in SEEDS:
        fs = a_disk(seed)
        file = fs.create(D / "a", SECTOR_BYTES)
        file.sync()
        fs.sync_directory(D)
        for byte in b"abc":
            file.write(0, [bytes([byte]) * 10])
        seen.add(bytes_after(fs)[:1])
    assert seen == {b"\0", b"a", b"b", b"c"}


def test_a_file_may_have_any_length_up_to_its_own() -> None:
    lengths = set()
    for seed in SEEDS:
        fs = a_disk(seed)
        file = fs.create(D / "a")
        fs.sync_directory(D)
        file.write(0, [b"x" * 1300])
        lengths.add(len(bytes_after(fs)))
    assert lengths >= {0, 512, 1024, 1300}
    assert max(lengths) == 1300


def test_changes_of_a_directory_are_undone_latest_first() -> None:
    seen = set()
    for seed in SEEDS:
        fs = a_disk(seed)
        fs.create(D / "a").close()
        fs.sync_directory(D)
        fs.create(D / "b").close()
        fs.rename(D / "b", D / "c")
        fs.remove(D / "a")
        seen.add(tuple(fs.crash().names(D)))
    assert seen == {("a",), ("a", "b"), ("a", "c"), ("c",)}


def test_a_rename_is_whole_or_not() -> None:
    seen = set()
    for seed in SEEDS:
        fs = a_disk(seed)
        for name in ("old", "new"):
            file = fs.create(D / name)
            file.write(0, [name.encode()])
            file.sync()
        fs.sync_directory(D)
        fs.rename(D / "new", D / "old")
        fs = fs.crash()
        seen.add((*fs.names(D), bytes(fs.map(D / "old"))))
    assert seen == {("old", b"new"), ("new", "old", b"old")}


def test_the_end_of_the_process_loses_locks_only() -> None:
    fs = a_disk(1)
    file = fs.create(D / "a")
    file.write(0, [b"unsynced"])
    fs.lock(D / "LOCK", "me")
    fs = fs.kill()
    fs.lock(D / "LOCK", "me again")
    assert bytes(fs.map(D / "a")) == b"unsynced"
    with pytest.raises(Crashed):
        file.read(0, 1)
    lost = 0
    for seed in SEEDS:
        fs = a_disk(seed)
        file = fs.create(D / "a")
        file.write(0, [b"unsynced"])
        lost += "a" not in fs.kill().crash().names(D)
    assert lost


def test_the_machine_goes_down_in_a_chosen_operation() -> None:
    kept = set()
    for seed in SEEDS:
        fs = a_disk(seed)
        fs.fail_after(3)
        file = fs.create(D / "a")
        file.write(0, [b"x"])
        with pytest.raises(Crashed):
            fs.sync_directory(D)
        for action in (lambda file=file: file.write(0, [b"y"]), file.sync, lambda fs=fs: fs.names(D)):
            with pytest.raises(Crashed):
                action()
        file.close()
        kept.add(tuple(fs.crash().names(D)))
    assert kept == {(), ("a",)}


def test_what_a_failed_sync_drops_stays_readable_and_the_next_sync_succeeds() -> None:
    lost = 0
    for seed in SEEDS:
        fs = a_disk(seed)
        file = fs.create(D / "a", 4096)
        file.sync()
        fs.sync_directory(D)
        file.write(0, [b"x" * 512])
        fs.fail_once("sync")
        with pytest.raises(OSError, match="injected error of sync"):
            file.sync()
        assert file.read(0, 512) == b"x" * 512
        file.sync()
        if seed % 2:
            file.write(0, [b"x" * 512])  # written again it is dirty again
            file.sync()
            assert bytes_after(fs)[:512] == b"x" * 512
        else:
            lost += bytes_after(fs)[:1] == b"\0"
    assert 0 < lost < len(SEEDS) / 2


def test_errors_come_when_they_are_asked_for() -> None:
    fs = a_disk(1)
    file = fs.create(D / "a")
    fs.fail_once("write", after=1)
    file.write(0, [b"fine"])
    with pytest.raises(OSError, match="injected error of write"):
        file.write(0, [b"lost"])
    assert file.read(0, 4) == b"fine"
    file.write(0, [b"good"])


def test_a_full_disk_takes_nothing_more_until_there_is_room() -> None:
    fs = a_disk(1)
    fs.capacity_bytes = 1000
    file = fs.create(D / "a", 600)
    assert fs.free_bytes(D) == 400
    with pytest.raises(DiskFull):
        fs.create(D / "b", 401)
    assert fs.names(D) == ["a"]
    with pytest.raises(DiskFull):
        file.write(600, [b"x" * 401])
    file.write(0, [b"x" * 1000])
    fs.remove(D / "a")
    assert fs.free_bytes(D) == 1000


def test_the_same_seed_takes_the_same_choices() -> None:
    def story(seed: int) -> dict[str, bytes]:
        fs = a_disk(seed)
        for number in range(10):
            file = fs.create(D / f"{number}", 2000)
            file.write(number * 100, [b"x" * 900])
            if number % 3 == 0:
                file.sync()
        fs = fs.crash()
        return {name: bytes(fs.map(D / name)) for name in fs.names(D)}

    assert all(story(seed) == story(seed) for seed in range(50))
    assert len({str(story(seed)) for seed in range(50)}) > 20
