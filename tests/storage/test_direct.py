"""What is appended past the page cache is what a reader finds, wherever it begins and however it is cut."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profile_service.storage import direct
from profile_service.storage.direct import BLOCK_BYTES, DirectWriter
from profile_service.storage.fs import DiskFull, RealFileSystem

FILE_BYTES = 24 * BLOCK_BYTES
SIZES = st.one_of(st.integers(0, 40), st.integers(0, 3 * BLOCK_BYTES), st.just(BLOCK_BYTES))


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MEMORY_BYTES", 2 * BLOCK_BYTES)


@given(
    begin=st.integers(0, 2 * BLOCK_BYTES),
    groups=st.lists(st.lists(SIZES, max_size=3), max_size=6),
    reopened=st.sets(st.integers(0, 5)),
    seed=st.integers(0, 2**32),
)
def test_a_reader_finds_what_was_appended(
    begin: int, groups: list[list[int]], reopened: set[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    fs = RealFileSystem()
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as directory:
        path = Path(directory) / "log"
        file = fs.create(path, FILE_BYTES)
        expected = bytearray(FILE_BYTES)
        noise = (seed | 1).to_bytes(5, "little") * FILE_BYTES
        expected[:begin] = noise[:begin]
        file.write(0, [noise[:begin]])
        offset = begin
        for number, sizes in enumerate(groups):
            buffers = [memoryview(noise)[offset + size : offset + 2 * size] for size in sizes]
            if offset + sum(sizes) > FILE_BYTES:
                break
            if number in reopened:
                file.close()
                file = fs.open(path, writable=True)
            file.append(offset, buffers)
            written = b"".join(buffers)
            expected[offset : offset + len(written)] = written
            offset += len(written)
            assert file.read(0, 2 * FILE_BYTES) == expected
        file.sync()
        file.close()
        assert fs.map(path) == expected


def test_a_new_file_grows_by_whole_blocks(tmp_path: Path) -> None:
    file = RealFileSystem().create(tmp_path / "log")
    file.append(0, [bytes(BLOCK_BYTES), b"x"])
    assert file.size == 2 * BLOCK_BYTES
    file.append(BLOCK_BYTES + 1, [b"y" * BLOCK_BYTES])
    assert file.size == 3 * BLOCK_BYTES
    assert file.read(BLOCK_BYTES, BLOCK_BYTES + 2) == b"x" + b"y" * BLOCK_BYTES + b"\0"
    file.close()


def test_what_is_written_in_between_is_not_undone(tmp_path: Path) -> None:
    file = RealFileSystem().create(tmp_path / "log", BLOCK_BYTES)
    file.append(0, [b"abc"])
    file.write(1, [b"B"])
    file.append(3, [b"d"])
    assert file.read(0, 5) == b"aBcd\0"
    file.close()


def test_a_disk_with_other_blocks_is_written_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    refused = []

    def only_through_the_cache(descriptor: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "no such alignment")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", only_through_the_cache)
    file = RealFileSystem().create(tmp_path / "log", 2 * BLOCK_BYTES)
    file.append(5, [b"abc"])
    file.append(8, [b"d"])
    assert refused == [0]
    assert file.read(0, 10) == b"\0\0\0\0\0abcd\0"
    file.close()


def test_a_file_system_without_such_writes_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: DirectWriter, *_: object) -> None:
        raise OSError(errno.EINVAL, "no O_DIRECT here")

    monkeypatch.setattr(DirectWriter, "__init__", refuse)
    file = RealFileSystem().create(tmp_path / "log", BLOCK_BYTES)
    file.append(1, [b"ab"])
    file.append(3, [b"c"])
    assert file.read(0, 5) == b"\0abc\0"
    file.close()


def test_a_full_disk_has_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    file = RealFileSystem().create(tmp_path / "log")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFull):
        file.append(0, [b"a"])
    file.close()
