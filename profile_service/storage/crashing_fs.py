"""A file system in memory that can crash, tear writes, fail and fill up; every choice comes from its seed.

It keeps two states of everything: as the process sees it, and as the disk has it. `crash` throws the first one away,
but for what happened to reach the disk:

    file contents     each 512-byte sector of each write since the last `sync` is there or is not; where a sector was
                      written several times, any of its versions may be the one that is there
    file length       grows with the sectors that are there
    directories       creations, renames and removals since the last `sync_directory` are undone, the latest first;
                      how many of them, the seed says
    locks             are gone

`kill` is the end of the process alone: everything written stays visible, and still unsynced.

    fs = CrashingFileSystem(seed=7)
    fs.fail_after(20)         # the 20th operation from now raises Crashed, done or half done or not at all
    ...
    fs = fs.crash()           # what a restart finds

A failed sync is as bad as Linux makes it: what was not written yet may be dropped, although it stays readable and the
next sync succeeds (see https://wiki.postgresql.org/wiki/Fsync_Errors).
"""

from __future__ import annotations

import errno
import random
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Literal

from profile_service.storage.fs import Buffer, DiskFull, LockHeld

SECTOR_BYTES = 512


class Crashed(Exception):
    """The machine has crashed: nothing that the process does from here on happens."""


class _Fate(Enum):
    """What becomes of everything unsynced in one crash; mixed fates are rare in a purely random choice."""

    LOST = 0
    KEPT = 1
    PREFIX = 2
    RANDOM = 3


_FATES = list(_Fate)


class CrashingFileSystem:
    """See the module's text.

    Args:
        seed: of every choice.
        capacity_bytes: beyond so many bytes in all files, growing one raises DiskFull. May be changed at any time.

    Attributes:
        operations: how many operations that change or sync something were done.
    """

    def __init__(self, seed: int = 0, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.operations = 0
        self._random = random.Random(seed)
        self._directories: dict[Path, _Directory] = {Path(): _Directory(), Path("/"): _Directory()}
        self._locks: dict[Path, str] = {}
        self._used_bytes = 0
        self._dead = False
        self._crash_at: int | None = None
        self._errors: dict[str, int] = {}

    # --- faults ---

    def fail_after(self, operations: int) -> None:
        """The `operations`-th operation from now (1 is the next) raises Crashed, and so does everything after it."""
        self._crash_at = self.operations + operations

    def fail_once(self, operation: Literal["write", "sync", "create"], after: int = 0) -> None:
        """The next such operation, but for `after` of them, raises EIO."""
        self._errors[operation] = after

    def crash(self) -> CrashingFileSystem:
        """The machine goes down; returns the file system as a restart finds it. This one is dead from here on."""
        self._dead = True
        found = self._successor()
        survivors: dict[int, _Inode] = {}
        for path, directory in self._directories.items():
            names = directory.after_crash(self._random)
            target = found._directories.setdefault(path, _Directory())
            for name, inode in names.items():
                if id(inode) not in survivors:
                    survivors[id(inode)] = inode.after_crash(self._random)
                target.names[name] = target.synced[name] = survivors[id(inode)]
        found._used_bytes = sum(len(inode.data) for inode in survivors.values())
        return found

    def kill(self) -> CrashingFileSystem:
        """The process goes down, the machine does not: nothing is lost but locks. This one is dead from here on."""
        self._dead = True
        found = self._successor()
        found._directories = self._directories
        found._used_bytes = self._used_bytes
        return found

    def _successor(self) -> CrashingFileSystem:
        return CrashingFileSystem(self._random.getrandbits(64), self.capacity_bytes)

    def _operate(self, operation: str = "") -> bool:
        """Counts an operation. Returns False when the machine crashes in it, but only after it has happened."""
        if self._dead:
            raise Crashed
        self.operations += 1
        if operation in self._errors:
            self._errors[operation] -= 1
            if self._errors[operation] < 0:
                del self._errors[operation]
                raise OSError(errno.EIO, f"injected error of {operation}")
        if self.operations == self._crash_at:
            self._dead = True
            if self._random.random() < 0.5:
                raise Crashed
            return False
        return True

    def _check(self) -> None:
        if self._dead:
            raise Crashed

    # --- FileSystem ---

    def create(self, path: Path, size: int = 0) -> _File:
        alive = self._operate("create")
        directory = self._directory(path.parent)
        if path.name in directory.names:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        self._take(size)
        inode = _Inode()
        if size:
            inode.write(0, bytes(size))
        directory.change(path.name, inode)
        if not alive:
            raise Crashed
        return _File(self, inode, writable=True)

    def open(self, path: Path, *, writable: bool = False) -> _File:
        self._check()
        return _File(self, self._inode(path), writable=writable)

    def map(self, path: Path) -> memoryview:
        self._check()
        return memoryview(bytes(self._inode(path).data))

    def names(self, directory: Path) -> list[str]:
        self._check()
        inside = {path.name for path in self._directories if path.parent == directory and path != directory}
        return sorted(inside | self._directory(directory).names.keys())

    def rename(self, source: Path, target: Path) -> None:
        assert source.parent == target.parent, "renames are within one directory"
        alive = self._operate()
        inode = self._inode(source)
        directory = self._directory(source.parent)
        replaced = directory.names.get(target.name)
        if replaced is not None:
            self._used_bytes -= len(replaced.data)
        directory.rename(source.name, target.name, inode)
        if not alive:
            raise Crashed

    def remove(self, path: Path) -> None:
        alive = self._operate()
        self._used_bytes -= len(self._inode(path).data)
        self._directory(path.parent).change(path.name, None)
        if not alive:
            raise Crashed

    def make_directory(self, path: Path) -> None:
        if path in self._directories:
            self._check()
            return
        self.make_directory(path.parent)
        if self._operate():
            self._directories[path] = _Directory()
        else:
            raise Crashed

    def sync_directory(self, path: Path) -> None:
        if not self._operate():
            raise Crashed
        self._directory(path).sync()

    def lock(self, path: Path, holder: str) -> _Lock:
        self._check()
        self._directory(path.parent)
        if path in self._locks:
            raise LockHeld(path, self._locks[path])
        self._locks[path] = holder
        return _Lock(self, path)

    def free_bytes(self, path: Path) -> int:
        self._check()
        self._directory(path)
        return sys.maxsize if self.capacity_bytes is None else max(0, self.capacity_bytes - self._used_bytes)

    def _directory(self, path: Path) -> _Directory:
        try:
            return self._directories[path]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(path)) from None

    def _inode(self, path: Path) -> _Inode:
        try:
            return self._directory(path.parent).names[path.name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from None

    def _take(self, size: int) -> None:
        if self.capacity_bytes is not None and size > 0 and self._used_bytes + size > self.capacity_bytes:
            raise DiskFull(errno.ENOSPC, "no space left in the simulation")
        self._used_bytes += size


class _Directory:
    """Names as the process sees them and as the disk has them, and the changes in between, in order."""

    def __init__(self) -> None:
        self.names: dict[str, _Inode] = {}
        self.synced: dict[str, _Inode] = {}
        self._changes: list[dict[str, _Inode | None]] = []

    def change(self, name: str, inode: _Inode | None) -> None:
        self._apply({name: inode})

    def rename(self, source: str, target: str, inode: _Inode) -> None:
        self._apply({source: None, target: inode})

    def _apply(self, change: dict[str, _Inode | None]) -> None:
        self._changes.append(change)
        _apply(self.names, change)

    def sync(self) -> None:
        self.synced = dict(self.names)
        self._changes.clear()

    def after_crash(self, rng: random.Random) -> dict[str, _Inode]:
        names = dict(self.synced)
        for change in self._changes[: rng.randint(0, len(self._changes))]:
            _apply(names, change)
        return names


def _apply(names: dict[str, _Inode], change: dict[str, _Inode | None]) -> None:
    for name, inode in change.items():
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


class _Inode:
    """A file's bytes as the process sees them and as the disk has them, and the writes in between, in order."""

    def __init__(self, data: bytes | bytearray = b"") -> None:
        self.data = bytearray(data)
        self._disk = bytearray(data)
        self._writes: list[tuple[int, bytes]] = []

    def write(self, offset: int, data: bytes) -> None:
        if offset > len(self.data):
            self.data += bytes(offset - len(self.data))
        self.data[offset : offset + len(data)] = data
        self._writes.append((offset, data))

    def sync(self) -> None:
        for offset, data in self._writes:
            self._keep(offset // SECTOR_BYTES * SECTOR_BYTES, -(-(offset + len(data)) // SECTOR_BYTES) * SECTOR_BYTES)
        self._writes.clear()

    def truncate(self, size: int) -> None:
        """It is durable at once: whoever shortens a file must have made sure before that nobody misses the rest."""
        self._writes = [(offset, data[: size - offset]) for offset, data in self._writes if offset < size]
        del self.data[size:], self._disk[size:]

    def fail_to_sync(self, rng: random.Random) -> None:
        """Each sector that was written reaches the disk, or never will unless it is written again."""
        for offset, data in self._writes:
            for start in range(offset // SECTOR_BYTES * SECTOR_BYTES, offset + len(data), SECTOR_BYTES):
                if rng.random() < 0.5:
                    self._keep(start, start + SECTOR_BYTES)
        self._writes.clear()

    def _keep(self, start: int, end: int) -> None:
        self._lengthen(min(end, len(self.data)))
        self._disk[start:end] = self.data[start:end]

    def _lengthen(self, size: int) -> None:
        if size > len(self._disk):
            self._disk += bytes(size - len(self._disk))

    def after_crash(self, rng: random.Random) -> _Inode:
        """What the disk has; the process is gone, so it is made by changing `_disk` in place."""
        fate = rng.choice(_FATES)
        if fate is _Fate.LOST:
            self._writes.clear()
        whole = {_Fate.KEPT: len(self._writes), _Fate.PREFIX: rng.randint(0, len(self._writes))}.get(fate, 0)
        for offset, data in self._writes[:whole]:
            self._land(offset, data)
        torn = self._writes[whole : whole + 1 if fate is _Fate.PREFIX else None]
        share = rng.random()
        for sector, numbers in _by_sector(torn).items():
            count = len(numbers)
            for number in numbers[: count if rng.random() < share else rng.randrange(count)]:
                offset, data = torn[number]
                start = max(offset, sector * SECTOR_BYTES)
                end = min(offset + len(data), (sector + 1) * SECTOR_BYTES)
                self._land(start, data[start - offset : end - offset])
        return _Inode(self._disk)

    def _land(self, offset: int, data: bytes) -> None:
        self._lengthen(offset + len(data))
        self._disk[offset : offset + len(data)] = data


def _by_sector(writes: Sequence[tuple[int, bytes]]) -> dict[int, list[int]]:
    """Each sector that is written, with the numbers of the writes that touch it, in order."""
    touched: dict[int, list[int]] = {}
    for number, (offset, data) in enumerate(writes):
        for sector in range(offset // SECTOR_BYTES, -(-(offset + len(data)) // SECTOR_BYTES)):
            touched.setdefault(sector, []).append(number)
    return touched


class _File:
    def __init__(self, fs: CrashingFileSystem, inode: _Inode, *, writable: bool) -> None:
        self._fs = fs
        self._inode = inode
        self._writable = writable
        self._open = True

    @property
    def size(self) -> int:
        return len(self._inode.data)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        assert self._open, "the file is closed"
        assert self._writable, "the file was opened for reading"
        alive = self._fs._operate("write")
        data = b"".join(buffers)
        self._fs._take(max(0, offset + len(data) - self.size))
        self._inode.write(offset, data)
        if not alive:
            raise Crashed

    def append(self, offset: int, buffers: Sequence[Buffer]) -> None:
        assert not any(self._inode.data[offset:]), "there are only zeros behind what is appended"
        self.write(offset, buffers)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        data = self.read(offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, offset: int, size: int) -> bytes:
        assert self._open, "the file is closed"
        self._fs._check()
        return bytes(self._inode.data[offset : offset + size])

    def sync(self) -> None:
        assert self._open, "the file is closed"
        try:
            alive = self._fs._operate("sync")
        except OSError:
            self._inode.fail_to_sync(self._fs._random)
            raise
        # A machine that goes down during a sync is not asked for more than one that goes down just before.
        if not alive:
            raise Crashed
        self._inode.sync()

    def truncate(self, size: int) -> None:
        assert self._open, "the file is closed"
        assert self._writable, "the file was opened for reading"
        assert size <= self.size, "a file is shortened, not lengthened"
        alive = self._fs._operate("truncate")
        self._fs._used_bytes -= self.size - size
        self._inode.truncate(size)
        if not alive:
            raise Crashed

    def close(self) -> None:
        self._open = False


class _Lock:
    def __init__(self, fs: CrashingFileSystem, path: Path) -> None:
        self._fs = fs
        self._path = path

    def release(self) -> None:
        self._fs._locks.pop(self._path, None)
