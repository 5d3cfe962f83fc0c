"""What a start does before its code is loaded: brings in memory for the rows of the newest snapshot, and reads the
files into the page cache.

    interpreter, Ray ─▶ our modules, kernels ─────────────▶ snapshot ─▶ log ─▶ serving
                    └─▶ fresh memory, without the          ▲
                        interpreter's lock ────────────────┘

Code takes one processor and the interpreter's lock for a second; so does the kernel, without the lock, for as many
fresh pages as a million rows need. So nothing may be imported here that takes long to import.
"""

from __future__ import annotations

import functools
import logging
import mmap
import threading
from pathlib import Path

from profile_service.shard.files import LOG_DIRECTORY, SNAPSHOT_DIRECTORY
from profile_service.storage.fs import read_ahead

SPACE_BYTES = 1 << 36
"""Address space for rows; pages come as they are touched."""

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named by the standard library from Python 3.13 on
_PIECE_BYTES = 1 << 21
"""Written with the lock held."""

logger = logging.getLogger(__name__)


class Preload:
    """What is brought in for one shard, in threads of its own. It begins at once.

    Nothing is decided by it: what cannot be done ahead is done when it is needed.
    """

    def __init__(self, directory: Path) -> None:
        snapshot = max((directory / SNAPSHOT_DIRECTORY).glob("*.snapshot"), default=None)
        region = None if snapshot is None else _address_space()
        self._space = None if region is None else Zeros(region)
        if snapshot is not None and self._space is not None:
            files = [snapshot, *sorted((directory / LOG_DIRECTORY).glob("*.log"))]
            for work in (functools.partial(self._space.take, snapshot), functools.partial(_read, files)):
                threading.Thread(target=work, name="preload", daemon=True).start()

    def space(self) -> Zeros | None:
        """Memory in whose beginning the rows of the newest snapshot have their pages, now or soon; the first time that
        it is asked for. None where there is no snapshot, or no address space."""
        space, self._space = self._space, None
        return space


class Zeros:
    """Address space whose pages are brought in from its beginning on, ahead of whoever fills it.

    A page comes when it is written to, and zeros are what it holds anyway. Whoever maps something meanwhile, as imports
    do all the time, would have to wait if the kernel were asked for the pages alone (MADV_POPULATE_WRITE).
    """

    def __init__(self, region: mmap.mmap) -> None:
        self.region = region
        self._lock = threading.Lock()
        """Held while zeros are written."""
        self._next = 0
        """Zeros are written from here on only."""

    def claim(self, stop: int) -> None:
        """From now on nobody else writes to the bytes below `stop`."""
        if stop > self._next:
            with self._lock:
                self._next = max(self._next, stop)

    def take(self, snapshot: Path) -> None:
        """Brings in as many bytes as the snapshot has, for rows are nearly all of it; but none that are claimed."""
        try:
            size = min(snapshot.stat().st_size, len(self.region))
            with Path("/dev/zero").open("rb", buffering=0) as zeros, memoryview(self.region) as pages:
                while self._next < size:
                    with self._lock:
                        begin = self._next
                        written = zeros.readinto(pages[begin : min(begin + _PIECE_BYTES, size)])
                        self._next = begin + (written or 1)
        except OSError as error:
            logger.warning("no memory is taken ahead: %s", error)


def _address_space() -> mmap.mmap | None:
    try:
        return mmap.mmap(-1, SPACE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as error:
        logger.warning("no memory is taken ahead: %s", error)
        return None


def _read(files: list[Path]) -> None:
    try:
        for path in files:
            with path.open("rb", buffering=0) as file:
                read_ahead(file.fileno(), path.stat().st_size)
    except OSError as error:
        logger.warning("no file is read ahead: %s", error)
