"""What a start does before its code is loaded: brings in memory for the rows of the newest snapshot, and asks the disk
for what will be read.

    interpreter, Ray ─▶ our modules, kernels ─────────────▶ snapshot ─▶ log ─▶ serving
                    └─▶ fresh memory, without the          ▲
                        interpreter's lock ────────────────┘

Code takes one processor and the interpreter's lock for a second; so does the kernel, without the lock, for as many
fresh pages as a million rows need. So nothing may be imported here that takes long to import.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
from pathlib import Path

from profile_service.shard.files import LOG_DIRECTORY, SNAPSHOT_DIRECTORY

SPACE_BYTES = 1 << 36
"""Address space for rows; pages come as they are touched."""

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named by the standard library from Python 3.13 on
_LARGEST_READ = 1 << 30

logger = logging.getLogger(__name__)


class Preload:
    """What is brought in for one shard, in a thread of its own. It begins at once.

    Nothing is decided by it: what cannot be done ahead is done when it is needed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._space: mmap.mmap | None = None
        self._thread = threading.Thread(target=self._run, name="preload", daemon=True)
        self._thread.start()

    def space(self) -> mmap.mmap | None:
        """Zeros in whose beginning the rows of the newest snapshot have their pages, once they are there; the first
        time that it is asked for. None where there is no snapshot, or no such memory."""
        self._thread.join()
        space, self._space = self._space, None
        return space

    def _run(self) -> None:
        try:
            snapshot = max((self._directory / SNAPSHOT_DIRECTORY).glob("*.snapshot"), default=None)
            if snapshot is None:
                return
            for path in (snapshot, *sorted((self._directory / LOG_DIRECTORY).glob("*.log"))):
                _ask_for(path)
            # Rows are nearly all of it.
            self._space = _zeros(snapshot.stat().st_size)
        except OSError as error:
            logger.warning("nothing is loaded ahead: %s", error)


def _ask_for(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def _zeros(size_bytes: int) -> mmap.mmap:
    """Address space whose first `size_bytes` have their pages."""
    space = mmap.mmap(-1, SPACE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    descriptor = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    try:
        # As a read: `mmap.madvise` would hold the interpreter's lock meanwhile.
        view = memoryview(space)[: min(size_bytes, SPACE_BYTES)]
        while view:
            view = view[os.readv(descriptor, [view[:_LARGEST_READ]]) :]
    finally:
        os.close(descriptor)
    return space
