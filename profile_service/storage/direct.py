"""Writes past the page cache (O_DIRECT), for what is written in order and read back only after a restart: a log.

    appended      │····block····│····block····│··
    memory        [ what the last block held so far, new bytes, zeros up to the next block ]   ──▶ one write

Written through the page cache, each byte of a log takes a page that nobody reads: memory that the system has to find,
and copies into, at several times the cost of the copy made here (docs/performance.md). Whole blocks are written, so the
last one is written again with what follows; its old bytes are the same in both, so a write that is torn harms none of
them.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence

BLOCK_BYTES = 4096
"""A multiple of every usual device's."""

MEMORY_BYTES = 1 << 20
"""Of each file that is written; more goes in several writes."""

_ZEROS = bytes(BLOCK_BYTES)


class DirectWriter:
    """The writes of one file.

    Args:
        descriptor: of the file, open for writing.
        read: (offset, size) -> what the file holds there.

    Raises:
        OSError: the file system has no such writes.
    """

    def __init__(self, descriptor: int, read: Callable[[int, int], bytes]) -> None:
        # The flag belongs to what is opened, and reads shall go through the cache.
        self._descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
        self._read = read
        self._memory = mmap.mmap(-1, MEMORY_BYTES)
        self._view = memoryview(self._memory)
        self._end = 0
        """Up to where the file was written here; the memory begins with the last block's bytes before it."""

    def append(self, offset: int, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        """Writes the buffers one after the other from `offset` on; what is behind them in their last block becomes
        zero. Raises OSError."""
        filled = offset % BLOCK_BYTES
        start = offset - filled
        if offset != self._end:
            self._view[:filled] = self._read(start, filled)
        for buffer in buffers:
            rest = memoryview(buffer)
            while rest:
                size = min(len(rest), MEMORY_BYTES - filled)
                self._view[filled : filled + size] = rest[:size]
                rest = rest[size:]
                filled += size
                if filled == MEMORY_BYTES:
                    self._write(start, MEMORY_BYTES)
                    start += MEMORY_BYTES
                    filled = 0
        stop = -(-filled // BLOCK_BYTES) * BLOCK_BYTES
        self._view[filled:stop] = _ZEROS[: stop - filled]
        self._write(start, stop)
        last = filled % BLOCK_BYTES
        self._view[:last] = bytes(self._view[filled - last : filled])
        self._end = start + filled

    def _write(self, start: int, size: int) -> None:
        done = 0
        while done < size:
            try:
                done += os.pwrite(self._descriptor, self._view[done:size], start + done)
            except OSError as error:
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                    raise
                # Blocks of another size, or a write that was cut short: the rest goes through the page cache.
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)

    def close(self) -> None:
        """Releases the file. Closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._view.release()
            self._memory.close()
