"""The real file system, and where it differs from none: what is promised about files, names, locks and room."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from profile_service.errors import StartupError
from profile_service.storage.crashing_fs import CrashingFileSystem
from profile_service.storage.fs import DiskFull, FileSystem, LockHeld, RealFileSystem


@pytest.fixture(params=["real", "simulated"])
def fs(request: pytest.FixtureRequest) -> FileSystem:
    return RealFileSystem() if request.param == "real" else CrashingFileSystem()


@pytest.fixture
def directory(fs: FileSystem, tmp_path: Path) -> Path:
    path = tmp_path / "one" / "two"
    fs.make_directory(path)
    fs.make_directory(path)
    return path


def test_a_file_is_made_once_with_its_space(fs: FileSystem, directory: Path) -> None:
    file = fs.create(directory / "a", 3_000_000)
    assert file.size == 3_000_000
    assert file.read(2_999_990, 100) == bytes(10)
    file.close()
    file.close()
    with pytest.raises(FileExistsError):
        fs.create(directory / "a")
    empty = fs.create(directory / "b")
    assert empty.size == 0
    empty.close()
    assert fs.names(directory) == ["a", "b"]


def test_what_is_written_is_read(fs: FileSystem, directory: Path) -> None:
    file = fs.create(directory / "a")
    buffers = [bytes([number % 251]) * (number % 7) for number in range(5000)]  # more than one call takes
    file.write(10, [*buffers, memoryview(b"view"), bytearray(b"array")])
    file.sync()
    expected = bytes(10) + b"".join(buffers) + b"viewarray"
    assert file.size == len(expected)
    assert file.read(0, len(expected) + 5) == expected
    into = bytearray(len(expected))
    assert file.read_into(10, memoryview(into)) == len(expected) - 10
    assert into[:-10] == expected[10:]
    file.close()
    assert fs.map(directory / "a") == expected
    again = fs.open(directory / "a", writable=True)
    again.write(3, [b"xyz"])
    assert again.read(0, 8) == b"\0\0\0xyz\0\0"
    again.close()


def test_a_mapping_outlives_its_file(fs: FileSystem, directory: Path) -> None:
    file = fs.create(directory / "a")
    file.write(0, [b"mapped" * 1000])
    file.close()
    part = fs.map(directory / "a")[6:12]
    fs.remove(directory / "a")
    assert bytes(part) == b"mapped"
    assert part.readonly
    fs.create(directory / "empty").close()
    assert len(fs.map(directory / "empty")) == 0


def test_renaming_replaces(fs: FileSystem, directory: Path) -> None:
    for name in ("old", "new"):
        file = fs.create(directory / name)
        file.write(0, [name.encode()])
        file.close()
    fs.rename(directory / "new", directory / "old")
    fs.sync_directory(directory)
    assert fs.names(directory) == ["old"]
    assert bytes(fs.map(directory / "old")) == b"new"


def test_what_is_missing_is_not_found(fs: FileSystem, directory: Path) -> None:
    for action in (fs.open, fs.map, fs.remove, fs.names):
        with pytest.raises(FileNotFoundError):
            action(directory / "missing")
    with pytest.raises(FileNotFoundError):
        fs.create(directory / "missing" / "file")


def test_a_lock_is_held_once(fs: FileSystem, directory: Path) -> None:
    lock = fs.lock(directory / "LOCK", "me, of course")
    with pytest.raises(LockHeld, match="me, of course") as caught:
        fs.lock(directory / "LOCK", "somebody else")
    assert isinstance(caught.value, StartupError)
    assert (caught.value.path, caught.value.holder) == (directory / "LOCK", "me, of course")
    lock.release()
    lock.release()
    fs.lock(directory / "LOCK", "now").release()


def test_there_is_room(fs: FileSystem, directory: Path) -> None:
    assert fs.free_bytes(directory) > 1 << 20


# --- the real one alone ---


@pytest.fixture
def other_holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds a lock until it is told to end."""
    code = (
        "import pathlib, sys, profile_service.storage.fs as fs\n"
        "lock = fs.RealFileSystem().lock(pathlib.Path(sys.argv[1]), 'pid 4711 on thunder')\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "LOCK")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_lock_names_the_process_that_holds_it_and_goes_with_it(
    other_holder: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    fs = RealFileSystem()
    with pytest.raises(LockHeld, match=r"held by another process \(pid 4711 on thunder\): stop that one"):
        fs.lock(tmp_path / "LOCK", "me")
    other_holder.kill()
    other_holder.wait()
    lock = fs.lock(tmp_path / "LOCK", "me")
    assert (tmp_path / "LOCK").read_text() == "me"
    lock.release()
    assert (tmp_path / "LOCK").read_text() == ""


def test_a_lock_on_a_file_that_was_removed_keeps_nobody_out(tmp_path: Path) -> None:
    fs = RealFileSystem()
    first = fs.lock(tmp_path / "LOCK", "first")
    (tmp_path / "LOCK").unlink()
    second = fs.lock(tmp_path / "LOCK", "second")
    first.release()
    with pytest.raises(LockHeld, match="second"):
        fs.lock(tmp_path / "LOCK", "third")
    second.release()


def test_a_full_disk_has_its_own_error(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    file = RealFileSystem().open(full, writable=True)
    with pytest.raises(DiskFull) as caught:
        file.write(0, [b"x" * 5000])
    assert caught.value.errno == errno.ENOSPC
    file.close()


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    fs = RealFileSystem()
    fs.make_directory(tmp_path / "data")
    fs.create(tmp_path / "data" / "a").close()
    assert os.stat(tmp_path / "data" / "a").st_mode & 0o077 == 0
    assert os.stat(tmp_path / "data").st_mode & 0o077 == 0
