"""What a shard's commit loop needs of the place where its state lives.

    local      WriteAheadLog, Snapshotter, ShardState     the table is the state, the log makes it durable
    external   StoreLog, NoSnapshots, StoredState         the store is the state, the table is a cache of its rows

A group is checked, then `settle`d: whatever has to be known of the store before anything is decided. Then it is
admitted, appended and synced. Synced means durable; with a local state it is applied after that, with a store it has
been applied on the way there, to rows that nobody could read yet.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.columns import EventColumns
from profile_service.domain.schema import Schema
from profile_service.domain.table import ProfileTable
from profile_service.errors import DataLoss, Unavailable
from profile_service.shard.dedupe import EventIdWindow, ProducerSequences


class Interrupted(Unavailable):
    """What became of a group is not known, or nothing can be known of the state just now. Nothing is lost: the shard
    goes on from what is stored, once `settle` has read it.

    Attributes:
        full: the store has no room for writes.
        stored: so many of the parts that were appended are stored, the first ones, whatever became of the next.
    """

    def __init__(self, message: str, *, full: bool = False, stored: int = 0) -> None:
        super().__init__(message, retry_after_s=0.5)
        self.full = full
        self.stored = stored


class DamagedRow(DataLoss):
    """A stored row that events were to be counted into cannot be read.

    Attributes:
        stored: as of `Interrupted`.
    """

    def __init__(self, message: str, stored: int) -> None:
        super().__init__(message)
        self.stored = stored


class HeldState(Protocol):
    """What a shard holds. `ShardState` says what each of these does."""

    schema: Schema
    duplicate_count: int
    producers: ProducerSequences
    event_ids: EventIdWindow

    @property
    def event_count(self) -> int:
        """Events counted, since the beginning."""

    @property
    def table(self) -> ProfileTable:
        """Rows that can be read."""

    @property
    def user_count(self) -> int:
        """Users that there are, wherever their rows are."""

    @property
    def is_remote(self) -> bool:
        """Whether rows and producers have to be brought before they can be asked for."""

    @property
    def remark(self) -> str:
        """What has happened to the state, for people."""

    async def settle(self, epoch: int, owned: NDArray[np.bool_], producer_ids: Collection[str]) -> None:
        """Returns when the state is that of the partitions owned, and what is stored of the producers is known. Raises
        Interrupted."""

    async def bring(self, user_ids: Sequence[str], producer_ids: Collection[str]) -> None:
        """Returns when what is stored of them is in the table, or known. Raises Unavailable."""

    def admit(
        self,
        producer_id: str,
        sequence: int,
        acknowledged_sequence: int,
        partitions: NDArray[np.int64],
        event_id_hashes: NDArray[np.uint64],
        now_ns: int,
    ) -> NDArray[np.bool_] | None: ...

    def apply(self, columns: EventColumns, start: int, stop: int, received_ns: int) -> None: ...

    def idle(self, now_ns: int, first: int, last: int) -> list[bytes]:
        """Ids of the users in rows from `first` up to `last` who are to be forgotten now."""

    def forget(self, user_ids: Sequence[bytes], position: int | None = None) -> None: ...


class DurableLog(Protocol):
    """Where a group becomes durable. `WriteAheadLog` says what each of these does."""

    @property
    def position(self) -> int: ...

    @property
    def sync_mode(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    def on_failure(self, failed: Callable[[], None]) -> None: ...

    def check(self) -> None: ...

    async def reserve(self, size_bytes: int, records: int) -> None: ...

    def append(self, kind: int, payload: Sequence[bytes | memoryview], /) -> object: ...

    async def sync(self) -> None: ...

    async def close(self) -> None: ...


class Snapshots(Protocol):
    """Who takes snapshots of the state. `Snapshotter` says what each of these does."""

    last_position: int
    last_time_ns: int

    def on_ready(self, ready: Callable[[], None]) -> None: ...

    def request(self) -> Awaitable[int]: ...

    async def step(self) -> bool: ...

    async def abandon(self) -> None: ...

    async def close(self) -> None: ...


class NoSnapshots:
    """For a state of which everything is elsewhere at any time."""

    last_position = 0
    last_time_ns = 0

    def on_ready(self, ready: Callable[[], None]) -> None:
        """Nothing ever is."""

    async def request(self) -> int:
        """What is acknowledged is stored."""
        return 0

    async def step(self) -> bool:
        """Nothing to do."""
        return False

    async def abandon(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""
