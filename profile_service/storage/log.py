"""The log of a shard, as the shard sees it: opaque records in order, durable once `sync` has returned."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol


class Log(Protocol):
    """An append-only sequence of records."""

    @property
    def position(self) -> int:
        """Bytes appended so far: where the next record will start."""

    @property
    def sync_mode(self) -> str:
        """How records become durable, as GetStatus says it."""

    def append(self, record_type: int, payload: Sequence[bytes]) -> int:
        """Appends one record made of the joined payload and returns its position."""

    async def sync(self) -> None:
        """Returns when everything appended before the call is durable."""

    async def close(self) -> None:
        """Releases what the log holds."""


class MemoryLog:
    """A log without a disk: ordered and bounded, gone with the process.

    Args:
        retained_bytes: the oldest records are dropped beyond so many bytes.
    """

    sync_mode = "memory"

    def __init__(self, retained_bytes: int = 0) -> None:
        self._retained_bytes = retained_bytes
        self._held_bytes = 0
        self._records: deque[tuple[int, int, bytes]] = deque()
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    @property
    def records(self) -> list[tuple[int, int, bytes]]:
        """What is retained, as (position, type, payload)."""
        return list(self._records)

    def append(self, record_type: int, payload: Sequence[bytes]) -> int:
        position = self._position
        size = sum(map(len, payload))
        self._position += size
        if self._retained_bytes:
            self._records.append((position, record_type, b"".join(payload)))
            self._held_bytes += size
            while self._held_bytes > self._retained_bytes:
                self._held_bytes -= len(self._records.popleft()[2])
        return position

    async def sync(self) -> None:
        """Nothing outlives the process, so there is nothing to wait for."""

    async def close(self) -> None:
        self._records.clear()
