"""A data directory is made once, used by one service at a time, and never taken for what it is not."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from profile_service.errors import DataLoss, StartupError
from profile_service.storage.data_directory import (
    EPOCH,
    LOCK,
    MANIFEST,
    SECTOR_BYTES,
    DataDirectory,
    EpochFile,
    Holder,
    Manifest,
    read_manifest,
)
from profile_service.storage.document import write_atomically
from profile_service.storage.fs import FileSystem, LockHeld, RealFileSystem


@pytest.fixture
def fs() -> FileSystem:
    return RealFileSystem()


@pytest.fixture
def made(fs: FileSystem, tmp_path: Path) -> Path:
    """A directory of two shards that nobody uses."""
    DataDirectory.open(fs, tmp_path / "data", Manifest.new(8, 2)).release()
    return tmp_path / "data"


def test_a_new_directory_is_found_again_as_it_was_made(fs: FileSystem, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "data"
    first = DataDirectory.open(fs, path, Manifest.new(8, 2))
    first.release()
    again = DataDirectory.open(fs, path, Manifest.new(8, 5))
    assert again.manifest == first.manifest
    assert again.manifest.shards == 2
    assert all(again.shard_directory(shard_id).is_dir() for shard_id in range(2))
    again.release()


def test_every_shard_of_every_directory_has_an_identity_of_its_own() -> None:
    manifests = [Manifest.new(8, 20) for _ in range(20)]
    identities = {manifest.identity(shard_id) for manifest in manifests for shard_id in range(manifest.shards)}
    assert len(identities) == 400
    assert {len(identity) for identity in identities} == {16}
    assert Manifest("0" * 32, 8, 1, "").identity(0).hex() == "d4c0e91eab8bfaf9c5de9cc19559a8ef"


def test_another_number_of_partitions_is_refused_and_the_right_one_said(fs: FileSystem, made: Path) -> None:
    with pytest.raises(StartupError, match="256 partitions, not 16"):
        DataDirectory.open(fs, made, Manifest.new(4, 2))


def test_the_second_to_open_is_told_who_has_it(fs: FileSystem, made: Path) -> None:
    first = DataDirectory.open(fs, made, Manifest.new(8, 2))
    with pytest.raises(LockHeld) as refused:
        DataDirectory.open(fs, made, Manifest.new(8, 2))
    assert f"process {os.getpid()} on " in Holder.describe(refused.value.holder)
    with pytest.raises(LockHeld):
        DataDirectory.open_existing(fs, made)
    first.release()
    DataDirectory.open_existing(fs, made).release()


def test_a_directory_tells_whether_it_was_given_back(fs: FileSystem, made: Path) -> None:
    first = DataDirectory.open(fs, made, Manifest.new(8, 2))
    assert not first.killed
    held = (made / LOCK).read_bytes()
    first.release()
    # As a process leaves it that is killed: the lock is gone, its name is not.
    (made / LOCK).write_bytes(held)
    second = DataDirectory.open_existing(fs, made)
    assert second.killed
    second.release()
    third = DataDirectory.open(fs, made, Manifest.new(8, 2))
    assert not third.killed
    third.release()


def test_a_shard_that_is_still_in_use_is_seen(fs: FileSystem, made: Path) -> None:
    directory = DataDirectory.open(fs, made, Manifest.new(8, 2))
    assert directory.shard_in_use(0) == ""
    lock = fs.lock(directory.shard_directory(0) / LOCK, Holder(7, "shop", "today").encode())
    assert directory.shard_in_use(0) == "process 7 on shop since today"
    lock.release()
    assert directory.shard_in_use(0) == ""
    directory.release()


def test_a_directory_of_somebody_else_is_refused_and_left_as_it_was(fs: FileSystem, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StartupError, match=r"thesis\.txt"):
        DataDirectory.open(fs, tmp_path, Manifest.new(8, 2))
    assert os.listdir(tmp_path) == ["thesis.txt"]
    with pytest.raises(StartupError, match="no data directory"):
        DataDirectory.open_existing(fs, tmp_path)
    with pytest.raises(StartupError, match="no data directory"):
        read_manifest(fs, tmp_path / "thesis.txt")


@pytest.mark.parametrize("left", [[], ["LOCK"], ["LOCK", "data.json.new"], ["LOCK", "lost+found", "shard-0/"]])
def test_a_making_that_was_interrupted_is_begun_again(fs: FileSystem, tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    DataDirectory.open(fs, tmp_path, Manifest.new(8, 2)).release()
    assert read_manifest(fs, tmp_path).shards == 2


def test_a_manifest_that_is_gone_is_not_made_anew(fs: FileSystem, made: Path) -> None:
    (made / MANIFEST).unlink()
    (made / "shard-1" / "something").touch()
    for _ in range(2):
        with pytest.raises(DataLoss, match=r"data\.json is missing"):
            DataDirectory.open(fs, made, Manifest.new(8, 2))
    with pytest.raises(DataLoss, match=r"data\.json is missing"):
        read_manifest(fs, made)


def test_a_shard_that_is_gone_is_not_made_anew(fs: FileSystem, made: Path) -> None:
    (made / "shard-1").rmdir()
    with pytest.raises(DataLoss, match="shard-1 is missing"):
        DataDirectory.open(fs, made, Manifest.new(8, 2))


def test_no_flipped_bit_of_a_manifest_goes_unseen(fs: FileSystem, made: Path) -> None:
    whole = (made / MANIFEST).read_bytes()
    expected = json.loads(whole)
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            (made / MANIFEST).write_bytes(damaged)
            with contextlib.suppress(DataLoss):
                # White space between two fields means nothing.
                assert json.loads(read_manifest(fs, made).encode()) == expected
    for length in range(len(whole) - 1):
        (made / MANIFEST).write_bytes(whole[:length])
        with pytest.raises(DataLoss, match=r"data\.json is damaged"):
            read_manifest(fs, made)


def test_a_later_format_is_refused_as_such(fs: FileSystem, made: Path) -> None:
    (made / MANIFEST).write_bytes(Manifest("0" * 32, 8, 2, "2031-01-01T00:00:00Z", format=2).encode())
    with pytest.raises(StartupError, match=r"format 2.*newer"):
        DataDirectory.open(fs, made, Manifest.new(8, 2))


def test_the_schema_last_served_with_is_remembered(fs: FileSystem, made: Path) -> None:
    directory = DataDirectory.open(fs, made, Manifest.new(8, 2))
    assert directory.schema_text() is None
    for text in ("name: größe\n", "name: other\n"):
        directory.write_schema(text)
        assert directory.schema_text() == text
    directory.release()


def test_an_epoch_is_kept_in_one_sector(fs: FileSystem, made: Path) -> None:
    epochs = EpochFile(fs, made)
    assert epochs.read() == 0
    for epoch in (1, 10**15, 7):
        epochs.write(epoch)
        assert (made / EPOCH).stat().st_size == SECTOR_BYTES
        assert EpochFile(fs, made).read() == epoch


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"epoch": "7"}', bytes(SECTOR_BYTES)])
def test_a_damaged_epoch_is_said_and_not_guessed(fs: FileSystem, made: Path, content: bytes) -> None:
    (made / EPOCH).write_bytes(content)
    with pytest.raises(DataLoss, match=r"epoch\.json is damaged"):
        EpochFile(fs, made).read()
    (made / EPOCH).unlink()
    with pytest.raises(DataLoss, match=r"epoch\.json is damaged or missing"):
        EpochFile(fs, made).read()


class Interrupted(Exception):
    pass


class InterruptedFileSystem(RealFileSystem):
    """Gives up before the rename."""

    def rename(self, source: Path, target: Path) -> None:
        raise Interrupted


def test_a_file_is_replaced_whole_or_not_at_all(fs: FileSystem, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(fs, path, b"old")
    with pytest.raises(Interrupted):
        write_atomically(InterruptedFileSystem(), path, b"new")
    assert path.read_bytes() == b"old"
    write_atomically(fs, path, b"newer")
    assert path.read_bytes() == b"newer"
    assert os.listdir(tmp_path) == ["file"]
