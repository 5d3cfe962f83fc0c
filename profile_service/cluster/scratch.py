"""Directories that are of use while this process lives, and no longer: Ray's files, and the data of a service that was
given no place to keep it. Those of a process that was killed are removed when the next one makes its own."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "profile-service-"
"""Of the directories' names."""

LOCK = ".scratch"
"""The file that makes a directory one of these, locked by its process. Nothing without it is ever removed."""

ABANDONED_AFTER_S = 120.0
"""A directory that is older, and that no process has locked, was left by one that was killed: agents of Ray hold on to
theirs for another minute."""

LONGEST_PARENT = 40
"""Ray puts Unix sockets below its directory, and their paths have to stay below 108 bytes."""


class ScratchDirectory:
    """A new directory that only this user can read, with a path short enough for sockets."""

    def __init__(self) -> None:
        preferred = Path(tempfile.gettempdir())
        parent = preferred if len(str(preferred)) <= LONGEST_PARENT else Path("/tmp")  # noqa: S108
        _remove_abandoned(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = _lock(self.path, os.O_CREAT)
        assert lock is not None, "nobody else knows the directory yet"
        self._lock = lock

    def remove(self) -> None:
        """Removes it with all that is in it. May be called more than once."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _remove_abandoned(parent: Path) -> None:
    for directory in parent.glob(f"{PREFIX}*"):
        try:
            status = directory.stat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < ABANDONED_AFTER_S:
                continue
            lock = _lock(directory)
        except OSError:
            # It is none of ours, or its owner is removing it just now.
            continue
        if lock is not None:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)


def _lock(directory: Path, flags: int = 0) -> int | None:
    """Locks a directory for as long as this process lives; None where another process has it."""
    handle = os.open(directory / LOCK, os.O_RDWR | flags, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
