"""The file system as storage sees it: few operations, each with what it promises about a crash.

`RealFileSystem` is the kernel's. `storage.crashing_fs.CrashingFileSystem` is one in memory that can crash, tear
writes, fail and fill up, by seed; everything in `storage` runs on both.

What a crash may do, and so what code on top has to do about it:

    what was done                  is sure to survive a crash of the machine after
    -------------                  -----------------------------------------------
    File.write                     File.sync; before, any of its 512-byte sectors may be kept or not, each on its own
    create, rename, remove         sync_directory of the directory; before, they may be undone, the latest first
    make_directory                 its return
    lock                           never: a lock goes with the process

A crash of the process alone undoes nothing: what was written is in the page cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from profile_service.errors import StartupError
from profile_service.storage.direct import DirectWriter

Buffer = bytes | bytearray | memoryview  # memoryviews are of bytes: format "B", one dimension, contiguous

_T = TypeVar("_T")

# pwritev takes at most so many buffers (IOV_MAX of Linux).
_MAX_BUFFERS = 1024
# What is written at once where space is taken by writing zeros.
_ZEROS = bytes(1 << 20)

_LOOKS = 64
"""At so many places it is looked whether a file is in the page cache."""
# Of Linux 5.14. Brings all pages in, and fails where touching one would raise SIGBUS; the mmap module does not name it.
_MADV_POPULATE_READ = 22
# How long to wait for a holder that has the lock but has not written its name yet.
_HOLDER_WAIT_S = 0.2


class DiskFull(OSError):
    """The disk, or the quota, has no room left; nothing else is wrong, and room may come back."""


class LockHeld(StartupError):
    """Another process holds the lock.

    Attributes:
        path: the lock's file.
        holder: what the other process wrote about itself, empty when it wrote nothing.
    """

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(
            f"{path} is held by another process ({holder or 'which did not say who it is'}): "
            "stop that one, or use another directory"
        )
        self.path = path
        self.holder = holder


class Runner(Protocol):
    """Runs blocking work beside the event loop: one piece after the other, in the order of the calls (one thread).

    A simulation runs it inline.
    """

    def __call__(self, work: Callable[[], _T], /) -> Awaitable[_T]:
        """Starts the work, at the latest when the result is awaited."""


class File(Protocol):
    """An open file. Offsets and sizes are in bytes."""

    @property
    def size(self) -> int:
        """The file's length."""

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Writes all buffers one after the other from `offset` on, and lengthens the file where needed.

        Raises:
            DiskFull: some of it may have been written.
            OSError: anything else that went wrong.
        """

    def append(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """As `write`, of a file that holds nothing but zeros from `offset` on, if it goes on at all; past the page
        cache where the system can do that. The file becomes as long as whole blocks of 4,096 bytes make it, at most.

        Raises as `write`.
        """

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills `buffer` from `offset` on; returns the bytes read, fewer than asked for at the file's end only."""

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset` on, fewer at the file's end only."""

    def sync(self) -> None:
        """Returns when everything written is durable (fdatasync).

        After an error nothing is known about what was written before, and trying again proves nothing: the kernel may
        have dropped it.
        """

    def truncate(self, size: int) -> None:
        """Shortens the file. What is cut off may be lost at once, and even when a crash undoes what was done before."""

    def close(self) -> None:
        """Releases the file; syncs nothing. Closing twice does nothing."""


class Lock(Protocol):
    """A lock that is held."""

    def release(self) -> None:
        """Lets others have it. Releasing twice does nothing."""


class FileSystem(Protocol):
    """Directories and files. Paths are absolute or relative to the working directory."""

    def create(self, path: Path, size: int = 0) -> File:
        """A new file of `size` zero bytes whose space is taken, open for writing.

        Raises:
            FileExistsError: `path` exists.
            DiskFull: no room for `size` bytes; no file is left.
        """

    def open(self, path: Path, *, writable: bool = False) -> File:
        """An existing file. Raises FileNotFoundError."""

    def map(self, path: Path) -> memoryview:
        """The whole file, read-only; lives as long as a slice of it does, even after the file was removed. It must not
        be shortened meanwhile."""

    def names(self, directory: Path) -> list[str]:
        """The names in a directory, sorted. Raises FileNotFoundError."""

    def rename(self, source: Path, target: Path) -> None:
        """Gives `source` the name `target`, in place of what had it, in one step. Both are in one directory."""

    def remove(self, path: Path) -> None:
        """Removes a file. Raises FileNotFoundError."""

    def make_directory(self, path: Path) -> None:
        """Makes a directory and those above it, durably; does nothing when it exists."""

    def sync_directory(self, path: Path) -> None:
        """Returns when what was created, renamed and removed in the directory is durable."""

    def lock(self, path: Path, holder: str) -> Lock:
        """Takes the lock at `path` for this process and leaves `holder` there for others to read.

        Raises:
            LockHeld: somebody else has it.
        """

    def free_bytes(self, path: Path) -> int:
        """Room left for files below the directory `path`."""


class RealFileSystem:
    """The kernel's file system. Files can be read by their owner only: profiles are about people."""

    def create(self, path: Path, size: int = 0) -> File:
        file = _RealFile(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        try:
            # Zeros are written, not asked for with posix_fallocate: docs/durability.md says what that saves later.
            for offset in range(0, size, len(_ZEROS)):
                file.write(offset, [_ZEROS if size - offset >= len(_ZEROS) else _ZEROS[: size - offset]])
        except BaseException:
            file.close()
            os.unlink(path)
            raise
        return file

    def open(self, path: Path, *, writable: bool = False) -> File:
        return _RealFile(os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC))

    def map(self, path: Path) -> memoryview:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if not size:
                return memoryview(b"")
            mapped = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ)
            read_ahead(descriptor, size)
        finally:
            os.close(descriptor)
        try:
            mapped.madvise(_MADV_POPULATE_READ)
        except OSError as error:
            # EINVAL is an older kernel's. Anything else is a disk that cannot be read: an error here, not SIGBUS later.
            if error.errno != errno.EINVAL:
                raise OSError(errno.EIO, "cannot read the file", str(path)) from error
        return memoryview(mapped)

    def names(self, directory: Path) -> list[str]:
        return sorted(os.listdir(directory))

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def make_directory(self, path: Path) -> None:
        if path.is_dir():
            return
        self.make_directory(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        self.sync_directory(path.parent)

    def sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def lock(self, path: Path, holder: str) -> Lock:
        while True:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                try:
                    raise LockHeld(path, _read_holder(descriptor)) from None
                finally:
                    os.close(descriptor)
            if _is_at(descriptor, path):
                return _RealLock(descriptor, holder)
            # Somebody removed the file in between: a lock on it keeps nobody out.
            os.close(descriptor)

    def free_bytes(self, path: Path) -> int:
        found = os.statvfs(path)
        if not found.f_blocks:  # a tmpfs without a limit
            return sys.maxsize
        return found.f_bavail * found.f_frsize


def read_ahead(descriptor: int, size: int) -> None:
    """Brings a file into the page cache: without the interpreter's lock, unlike `mmap.madvise`, and to its end, unlike
    POSIX_FADV_WILLNEED. Where a look here and there finds it in the cache, that is all that is done."""
    if _is_cached(descriptor, size):
        return
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < size and (count := os.sendfile(null, descriptor, done, size - done)):
            done += count
    except OSError as error:
        # A file system's that cannot.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(null)


def _is_cached(descriptor: int, size: int) -> bool:
    """Whether some bytes at even distances are in the page cache."""
    byte = bytearray(1)
    nowait = getattr(os, "RWF_NOWAIT", 0)
    try:
        return bool(nowait) and all(
            os.preadv(descriptor, [byte], offset, nowait) for offset in range(0, size, max(1, size // _LOOKS))
        )
    except OSError:  # it is not there, or the file system cannot tell
        return False


class _RealFile:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._direct: DirectWriter | None = None
        self._has_direct = sys.platform == "linux"

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def append(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self._has_direct and self._direct is None:
            try:
                self._direct = DirectWriter(self._descriptor, self.read)
            except OSError:
                self._has_direct = False
        if self._direct is None:
            self.write(offset, buffers)
            return
        try:
            self._direct.append(offset, buffers)
        except OSError as error:
            raise _named(error) from error

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self._direct is not None:
            # What it knows of the last block may be no more.
            self._direct.close()
            self._direct = None
        try:
            for first in range(0, len(buffers), _MAX_BUFFERS):
                offset = self._write_some(offset, buffers[first : first + _MAX_BUFFERS])
        except OSError as error:
            raise _named(error) from error

    def _write_some(self, offset: int, buffers: Sequence[Buffer]) -> int:
        """Writes at most `_MAX_BUFFERS` buffers; returns where they end."""
        end = offset + sum(map(len, buffers))
        offset += os.pwritev(self._descriptor, buffers, offset)
        while offset < end:  # rare: a full disk, a signal, more than 2 GiB
            left = end - offset
            rest: list[Buffer] = []
            for buffer in reversed(buffers):
                if not left:
                    break
                taken = min(left, len(buffer))
                rest.append(memoryview(buffer)[len(buffer) - taken :])
                left -= taken
            offset += os.pwritev(self._descriptor, rest[::-1], offset)
        return end

    def read_into(self, offset: int, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            if not count:
                break
            done += count
        return done

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        while size:
            part = os.pread(self._descriptor, size, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def sync(self) -> None:
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise _named(error) from error

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)

    def close(self) -> None:
        if self._direct is not None:
            self._direct.close()
            self._direct = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _RealLock:
    """An flock, which the kernel releases when the process ends, however it ends."""

    def __init__(self, descriptor: int, holder: str) -> None:
        self._descriptor = descriptor
        try:
            text = holder.encode()
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))
        except OSError as error:
            # A full disk must not keep a service from starting: it can still serve reads. The holder stays unnamed.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                os.close(descriptor)
                raise

    def release(self) -> None:
        if self._descriptor >= 0:
            # The file stays: removing it would let two processes hold locks on two files of one name.
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1


def _named(error: OSError) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(error.errno, os.strerror(error.errno))
    return error


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read_holder(descriptor: int) -> str:
    """What the holder wrote; waits a little for one that just took the lock."""
    deadline = time.monotonic() + _HOLDER_WAIT_S
    while True:
        text = os.pread(descriptor, 4096, 0).decode(errors="replace")
        if text or time.monotonic() > deadline:
            return text
        time.sleep(0.01)
