"""What a start does before its code is loaded: brings in memory for the rows of the newest snapshot, and reads the
files into the page cache.

    interpreter, Ray ─▶ our modules, kernels ─────────────▶ snapshot ─▶ log ─▶ serving
                    └─▶ fresh memory, without the          ▲
                        interpreter's lock ────────────────┘

Code takes one processor and the interpreter's lock for a second; so does the kernel, without the lock, for as many
fresh pages as a million rows need. So nothing may be imported here that takes long to import.
"""

from __future__ import annotations

import ctypes
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
_MADV_POPULATE_WRITE = 23  # of <linux/mman.h>
_PIECE_BYTES = 1 << 21

logger = logging.getLogger(__name__)


class Preload:
    """What is brought in for one shard, in threads of its own. It begins at once.

    Nothing is decided by it: what cannot be done ahead is done when it is needed.
    """

    def __init__(self, directory: Path) -> None:
        snapshot = max((directory / SNAPSHOT_DIRECTORY).glob("*.snapshot"), default=None)
        self._space = None if snapshot is None else _address_space()
        if snapshot is not None and self._space is not None:
            files = [snapshot, *sorted((directory / LOG_DIRECTORY).glob("*.log"))]
            for work in (functools.partial(_take_memory, self._space, snapshot), functools.partial(_read, files)):
                threading.Thread(target=work, name="preload", daemon=True).start()

    def space(self) -> mmap.mmap | None:
        """Zeros in whose beginning the rows of the newest snapshot have their pages, now or soon; the first time that
        it is asked for. None where there is no snapshot, or no address space."""
        space, self._space = self._space, None
        return space


def _address_space() -> mmap.mmap | None:
    try:
        return mmap.mmap(-1, SPACE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as error:
        logger.warning("no memory is taken ahead: %s", error)
        return None


def _take_memory(space: mmap.mmap, snapshot: Path) -> None:
    """Gives their pages to as many bytes as the snapshot has: rows are nearly all of it. What is in pages that are
    there already stays."""
    try:
        size_bytes = min(snapshot.stat().st_size, SPACE_BYTES)
    except OSError as error:
        logger.warning("no memory is taken ahead: %s", error)
        return
    # `mmap.madvise` would hold the interpreter's lock meanwhile.
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    begin = ctypes.addressof(ctypes.c_char.from_buffer(space))
    # Piece by piece: whoever maps something, as an import does, waits for the call that is under way.
    for offset in range(0, size_bytes, _PIECE_BYTES):
        if madvise(begin + offset, min(_PIECE_BYTES, size_bytes - offset), _MADV_POPULATE_WRITE) != 0:
            logger.info("no memory is taken ahead: Linux can from 5.14 on")
            break


def _read(files: list[Path]) -> None:
    try:
        for path in files:
            with path.open("rb", buffering=0) as file:
                read_ahead(file.fileno(), path.stat().st_size)
    except OSError as error:
        logger.warning("no file is read ahead: %s", error)
