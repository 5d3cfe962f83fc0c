"""A file's events in blocks of as many rows each, so that a run that was interrupted finds its place again.

    block n   the events of the rows (n − 1)·rows + 1 … n·rows   =   the batch with sequence n

Where a block begins and ends depends on the numbers of the rows alone: not on how the file is read, on what is refused,
or on which columns are taken. So a block is the same block in every run, also after an upgrade, and after the service's
schema has changed. A block whose rows are all refused has no events, and keeps its number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profile_service.files.chunk import Chunk
from profile_service.files.encode import EncodedEvents


@dataclass(frozen=True)
class Block:
    """The events of a stretch of rows."""

    number: int
    """From 1."""
    pieces: list[EncodedEvents]
    rows: NDArray[np.int64]
    """Row of the file, from 1, of each event."""
    done: float
    """How much of the file has been read with it, 0 to 1."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size_bytes(self) -> int:
        """Bytes of its events."""
        return sum(piece.size_bytes for piece in self.pieces)

    def body(self) -> bytes:
        """Its events as the body of a batch."""
        return b"".join(piece.view(0, len(piece)) for piece in self.pieces)

    def parts(self, size_bytes: int) -> Iterator[tuple[bytes, NDArray[np.int64]]]:
        """Its events as bodies of at most `size_bytes`, unless one event alone is larger, each with its rows."""
        before = 0
        for piece in self.pieces:
            for start, stop in piece.batches(len(piece), size_bytes):
                yield piece.run(start, stop), self.rows[before + start : before + stop]
            before += len(piece)


def cut_blocks(chunks: Iterable[Chunk], rows: int) -> Iterator[Block]:
    """The events of a file's chunks, in blocks of `rows` rows; the last one may have less.

    Where the file cannot be read on, the block that would go on there is not given: when the file can be read again, it
    has other events under the same number.
    """
    number = 1
    pieces: list[EncodedEvents] = []
    numbers: list[NDArray[np.int64]] = []
    done = 0.0

    def block() -> Block:
        return Block(number, pieces, np.concatenate(numbers) if numbers else np.zeros(0, dtype=np.int64), done)

    for chunk in chunks:
        done = chunk.done
        block_of = (chunk.rows - 1) // rows + 1
        start = 0
        while start < len(block_of):
            while number < block_of[start]:
                yield block()
                number, pieces, numbers = number + 1, [], []
            stop = int(np.searchsorted(block_of, number, side="right"))
            pieces.append(chunk.events.part(start, stop))
            numbers.append(chunk.rows[start:stop])
            start = stop
            if chunk.rows[stop - 1] == number * rows:
                yield block()
                number, pieces, numbers = number + 1, [], []
    if pieces:
        yield block()
