"""The disk of the simulation: the crashing file system, watched, so that it fails where a run wants it to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from profile_service.storage.crashing_fs import Crashed, CrashingFileSystem
from profile_service.storage.fs import Buffer, DiskFull, File, Lock

Result = TypeVar("Result")


@dataclass
class CrashPoint:
    """Crashes in the `countdown`-th operation from now whose label begins with `label`: "sync segment", "rename"."""

    countdown: int
    label: str = ""


class Disk:
    """A file system that says what is done to it, and crashes at a chosen point.

    Attributes:
        inner: what the disk holds; replaced after each crash.
        crashed_in: label of the operation in which it crashed.
    """

    def __init__(self, inner: CrashingFileSystem, seen: Counter[str], trace: Callable[[str], None]) -> None:
        self.inner = inner
        self.crashed_in = ""
        self.full = False
        """Whether an operation has found no room."""
        self.taken_bytes = 0
        """Free room that others take between the question for it and its use."""
        self._seen = seen
        self._trace = trace
        self._point: CrashPoint | None = None
        self._on_crash: Callable[[], None] = lambda: None

    def crash_at(self, point: CrashPoint, then: Callable[[], None]) -> None:
        """Crashes there, and calls `then` the moment it does."""
        self._point, self._on_crash = point, then

    def disarm(self) -> None:
        """Fails no more."""
        self.inner._errors.clear()
        self.inner._crash_at = None
        self._point = None

    def _do(
        self, operation: str, path: Path, work: Callable[[], Result], of: CrashingFileSystem | None = None
    ) -> Result:
        if of is not None and of is not self.inner:
            # A process that is gone holds the file still.
            raise Crashed
        label = f"{operation} {_what(path)}"
        point = self._point
        if point is not None and label.startswith(point.label):
            point.countdown -= 1
            if point.countdown <= 0:
                self._point = None
                self.inner.fail_after(1)
        try:
            result = work()
        except Crashed:
            if not self.crashed_in:
                self.crashed_in = label
                self._trace(f"disk: {label} {path.name}: crashes")
                self._on_crash()
            raise
        except OSError as error:
            self.full |= isinstance(error, DiskFull)
            self._seen[f"{type(error).__name__} in {label}"] += 1
            self._trace(f"disk: {label} {path.name}: {error}")
            raise
        self._trace(f"disk: {label} {path.name}")
        return result

    # --- FileSystem ---

    def create(self, path: Path, size: int = 0) -> File:
        return _WatchedFile(self, path, self._do("create", path, lambda: self.inner.create(path, size)))

    def open(self, path: Path, *, writable: bool = False) -> File:
        return _WatchedFile(self, path, self.inner.open(path, writable=writable))

    def map(self, path: Path) -> memoryview:
        return self.inner.map(path)

    def names(self, directory: Path) -> list[str]:
        return self.inner.names(directory)

    def rename(self, source: Path, target: Path) -> None:
        self._do("rename", target, lambda: self.inner.rename(source, target))

    def remove(self, path: Path) -> None:
        self._do("remove", path, lambda: self.inner.remove(path))

    def make_directory(self, path: Path) -> None:
        self._do("make", path, lambda: self.inner.make_directory(path))

    def sync_directory(self, path: Path) -> None:
        self._do("sync", path, lambda: self.inner.sync_directory(path))

    def lock(self, path: Path, holder: str) -> Lock:
        return self.inner.lock(path, holder)

    def free_bytes(self, path: Path) -> int:
        return self.inner.free_bytes(path) + self.taken_bytes


class _WatchedFile:
    def __init__(self, disk: Disk, path: Path, inner: File) -> None:
        self._disk = disk
        self._path = path
        self._inner = inner
        self._of = disk.inner

    @property
    def size(self) -> int:
        return self._inner.size

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._disk._do("write", self._path, lambda: self._inner.write(offset, buffers), self._of)

    def append(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._disk._do("write", self._path, lambda: self._inner.append(offset, buffers), self._of)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        return self._inner.read_into(offset, buffer)

    def read(self, offset: int, size: int) -> bytes:
        return self._inner.read(offset, size)

    def sync(self) -> None:
        self._disk._do("sync", self._path, self._inner.sync, self._of)

    def truncate(self, size: int) -> None:
        self._disk._do("truncate", self._path, lambda: self._inner.truncate(size), self._of)

    def close(self) -> None:
        self._inner.close()


def _what(path: Path) -> Literal["segment", "snapshot", "log directory", "snapshots directory", "directory"]:
    if path.parent.name == "log":
        return "segment"
    if path.parent.name == "snapshots":
        return "snapshot"
    if path.name == "log":
        return "log directory"
    return "snapshots directory" if path.name == "snapshots" else "directory"
