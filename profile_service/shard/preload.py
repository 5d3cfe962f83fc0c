"""What a start does before its code is loaded: brings in memory for the rows of the newest snapshot, and reads the
files into the page cache.

    interpreter, Ray ─▶ our modules, kernels ─────────────▶ snapshot ─▶ log ─▶ serving
                    └─▶ fresh memory, without the          ▲
                        interpreter's lock ────────────────┘

Code takes one processor and the interpreter's lock for a second; so does the kernel, without the lock, for as many
fresh pages as a million rows need. So nothing may be imported here that takes long to import.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from pathlib import Path

from profile_service.shard.files import LOG_DIRECTORY, SNAPSHOT_DIRECTORY
from profile_service.storage.fs import read_ahead

SPACE_BYTES = 1 << 36
"""Address space for rows; pages come as they are touched."""

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named by the standard library from Python 3.13 on
_LARGEST_READ = 1 << 30

logger = logging.getLogger(__name__)


class Preload:
    """What is brought in for one shard, in threads of its own. It begins at once.

    Nothing is decided by it: what cannot be done ahead is done when it is needed.
    """

    def __init__(self, directory: Path) -> None:
        self._space: mmap.mmap | None = None
        snapshot = max((directory / SNAPSHOT_DIRECTORY).glob("*.snapshot"), default=None)
        files = [] if snapshot is None else [snapshot, *sorted((directory / LOG_DIRECTORY).glob("*.log"))]
        self._threads = [
            threading.Thread(target=self._take_memory, args=(files[:1],), name="preload memory", daemon=True),
            threading.Thread(target=self._read, args=(files,), name="preload files", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def space(self) -> mmap.mmap | None:
        """Zeros in whose beginning the rows of the newest snapshot have their pages, once they are there; the first
        time that it is asked for. None where there is no snapshot, or no such memory."""
        self._threads[0].join()
        space, self._space = self._space, None
        return space

    def _take_memory(self, files: list[Path]) -> None:
        try:
            for snapshot in files:
                # Rows are nearly all of it.
                self._space = _zeros(snapshot.stat().st_size)
        except OSError as error:
            logger.warning("no memory is taken ahead: %s", error)

    def _read(self, files: list[Path]) -> None:
        try:
            for path in files:
                with path.open("rb", buffering=0) as file:
                    read_ahead(file.fileno(), path.stat().st_size)
        except OSError as error:
            logger.warning("no file is read ahead: %s", error)


def _zeros(size_bytes: int) -> mmap.mmap:
    """Address space whose first `size_bytes` have their pages."""
    space = mmap.mmap(-1, SPACE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    with Path("/dev/zero").open("rb", buffering=0) as zeros:
        # As a read: `mmap.madvise` would hold the interpreter's lock meanwhile.
        view = memoryview(space)[: min(size_bytes, SPACE_BYTES)]
        while view:
            view = view[os.readv(zeros.fileno(), [view[:_LARGEST_READ]]) :]
    return space
