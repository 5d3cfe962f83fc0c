"""Ships a shard's log to its standby: the same shard on another node, where everything that is acknowledged is durable
and applied (its side is `following.py`; who decides is `cluster.replicas`).

    append ─▶ log ─────▶ sync here ───┐
        └───▶ standby ─▶ sync there ──┴─▶ both are done: acknowledged, and applied at both ends

The two syncs run at the same time, so a group takes as long as the slower one. What the standby gets is in one order:

    Beginning   the sums as of now; whatever it held before counts for nothing
    records     as they are logged from here on, byte for byte
    Transfer    in between, piece by piece, each user that there was at the beginning, as of just then

A record that comes before its user's piece changes there what is not there yet; the piece then replaces it. So each
user is copied once, and nothing is kept back meanwhile: once the last piece is there, so is everything.

    none ──▶ building ──the last piece is there──▶ in sync ──no answer──▶ lost ──released──▶ none
                └──────────────no answer──────────────────────────────────────────────────────▲

As soon as it is in sync the coordinator may count on the standby, and promote it. So nothing is acknowledged without it
any more, until the coordinator has released the shard: which it does when it is durable that it does not count on it. A
standby that was promoted takes nothing: the process that ships to it has been replaced, and ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from profile_service.errors import ProfileServiceError, Replaced, Unavailable
from profile_service.shard.keeping import DurableLog
from profile_service.shard.log_records import RECORD_BEGINNING, RECORD_TRANSFER
from profile_service.shard.moves import Writer
from profile_service.shard.reports import BUILDING, IN_SYNC, LOST, Shipping
from profile_service.shard.state import ShardState
from profile_service.shard.transfer import Departure

TAKE_TIMEOUT_S = 3.0
"""A standby that has not made some records durable after so long is lost."""

MESSAGE_BYTES = 4 << 20
"""Records that go into one message, about."""

RETRY_S = 0.5

logger = logging.getLogger(__name__)

Payload = Sequence[bytes | memoryview]


class Shipped(NamedTuple):
    """A record of the log."""

    kind: int
    payload: Payload
    """In pieces."""


class Standby(Protocol):
    """The way to the standby."""

    async def take(self, replication: str, number: int, records: Sequence[Shipped]) -> None:
        """Returns when the records are durable there. Raises Replaced where it was promoted, Unavailable where it
        cannot be reached or refuses."""

    async def close(self) -> None:
        """Ends the connection."""


class ReplicatedLog:
    """`DurableLog` of a shard that may have a standby: the log here, and what is shipped of it.

    Args:
        log: the one here.
    """

    def __init__(self, log: DurableLog) -> None:
        self._log = log
        self._replication: _Replication | None = None
        self._building: asyncio.Task[None] | None = None
        self._message = ""

    @property
    def position(self) -> int:
        """As WriteAheadLog.position."""
        return self._log.position

    @property
    def sync_mode(self) -> str:
        """As WriteAheadLog.sync_mode."""
        return self._log.sync_mode

    @property
    def size_bytes(self) -> int:
        """As WriteAheadLog.size_bytes."""
        return self._log.size_bytes

    def on_failure(self, failed: Callable[[], None]) -> None:
        """As WriteAheadLog.on_failure."""
        self._log.on_failure(failed)

    def check(self) -> None:
        """As WriteAheadLog.check. Raises Replaced where the standby has taken this process's place."""
        self._log.check()
        if self._replication is not None:
            self._replication.check()

    async def reserve(self, size_bytes: int, records: int) -> None:
        """As WriteAheadLog.reserve."""
        await self._log.reserve(size_bytes, records)

    def append(self, kind: int, payload: Payload, /) -> object:
        """As WriteAheadLog.append."""
        position = self._log.append(kind, payload)
        if self._replication is not None and self._replication.has_begun:
            self._replication.put(kind, payload)
        return position

    async def sync(self) -> None:
        """Returns when everything appended is durable here, and at the standby where there is one.

        Raises:
            OSError: as WriteAheadLog.sync.
            Replaced: the standby has taken this process's place.
        """
        replication = self._replication
        if replication is None or not replication.has_begun:
            await self._log.sync()
            return
        # Both to their end, whatever becomes of the other.
        for outcome in await asyncio.gather(self._log.sync(), replication.flush(), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def close(self) -> None:
        """Ends the replication, and closes the log as WriteAheadLog.close."""
        if self._building is not None:
            self._building.cancel()
            await asyncio.wait([self._building])
        if self._replication is not None:
            await self._replication.close()
        await self._log.close()

    # --- what the coordinator asks for ---

    @property
    def shipping(self) -> Shipping:
        """How the replication does."""
        replication = self._replication
        if replication is None:
            return Shipping(message=self._message)
        return Shipping(replication.name, replication.state, replication.message)

    def replicate(self, name: str, standby: Standby, writer: Writer, state: ShardState) -> None:
        """Begins to build a standby.

        Raises Unavailable while there is another one, or the shard has no lease.
        """
        if self._replication is not None:
            raise Unavailable(f"shard {writer.shard_id} ships its log to another standby already", RETRY_S)
        writer.check_lease()
        self._replication = replication = _Replication(name, standby, self._ended)
        self._building = asyncio.create_task(self._build(replication, writer, state))

    def release(self, name: str) -> None:
        """The shard goes on without this standby; it was lost, or is to be another one."""
        if self._replication is not None and self._replication.name == name:
            self._replication.release("it was released")

    def _ended(self, replication: _Replication) -> None:
        if self._replication is replication:
            self._replication, self._message = None, replication.message

    async def _build(self, replication: _Replication, writer: Writer, state: ShardState) -> None:
        departure: Departure | None = None

        async def begin() -> None:
            nonlocal departure
            writer.check_lease()
            departure = Departure(state, range(state.producers.partitions), follows=False)
            replication.begin()
            replication.put(RECORD_BEGINNING, [state.beginning().SerializeToString()])

        async def take_a_piece() -> None:
            assert departure is not None
            replication.put(RECORD_TRANSFER, [departure.step()])

        try:
            # Between two groups the state is that of the log's end: what is taken then stands where it belongs.
            await writer.between_groups(begin)
            await replication.flush()
            assert departure is not None
            while not departure.is_caught_up and not replication.is_over:
                await writer.between_groups(take_a_piece)
                await replication.flush()
            replication.complete()
        except ProfileServiceError as error:
            replication.fail(error.message)


class _Replication:
    """One standby, from its beginning until it is released.

    Args:
        ended: called when nothing waits for it any more.
    """

    def __init__(self, name: str, standby: Standby, ended: Callable[[_Replication], None]) -> None:
        self.name = name
        self.state = BUILDING
        self.message = ""
        self.has_begun = False
        """Whether what is appended is shipped."""
        self.is_over = False
        """Whether nothing is shipped, nor waited for, any more."""
        self._standby = standby
        self._ended = ended
        self._waiting: list[Shipped] = []
        self._put = self._durable = 0
        """Records so far."""
        self._replaced: Replaced | None = None
        self._wanted = asyncio.Event()
        self._changed = asyncio.Event()
        self._shipping = asyncio.create_task(self._ship())

    def begin(self) -> None:
        """From now on what is appended is shipped."""
        self.has_begun = True

    def put(self, kind: int, payload: Payload) -> None:
        """Takes a record; it goes when `flush` is called."""
        if not self.is_over:
            self._waiting.append(Shipped(kind, payload))
            self._put += 1

    async def flush(self) -> None:
        """Returns when everything that was put is durable at the standby, or the shard is released from it. Raises
        Replaced."""
        until = self._put
        self._wanted.set()
        while self._durable < until and not self.is_over:
            self.check()
            # Each change has an event of its own, as several may wait.
            await self._changed.wait()

    def check(self) -> None:
        """Raises Replaced where the standby was promoted."""
        if self._replaced is not None and not self.is_over:
            raise self._replaced

    def complete(self) -> None:
        """The standby has everything; from now on nothing is acknowledged without it."""
        if self.state == BUILDING and not self.is_over:
            self.state = IN_SYNC
            logger.info("the standby of replication %s is in sync", self.name)

    def fail(self, reason: str) -> None:
        """The standby is lost. One that nobody counts on yet is given up at once."""
        if self.is_over or self.state == LOST:
            return
        logger.warning("the standby of replication %s is lost: %s", self.name, reason)
        if self.state == BUILDING:
            self.release(reason)
        else:
            self.state, self.message = LOST, reason
            self._stop()

    def release(self, reason: str) -> None:
        """The shard goes on without it."""
        self.is_over, self.message = True, self.message or reason
        self._waiting.clear()
        self._stop()
        self._ended(self)
        self._notify()

    async def close(self) -> None:
        """Ends shipping. What waits for it never hears that it is durable."""
        self._shipping.cancel()
        await asyncio.wait([self._shipping])

    def _stop(self) -> None:
        # Where it has failed by itself it is about to end.
        if asyncio.current_task() is not self._shipping:
            self._shipping.cancel()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _ship(self) -> None:
        number = 0
        try:
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                while self._waiting:
                    number += 1
                    records = self._next_records()
                    async with asyncio.timeout(TAKE_TIMEOUT_S):
                        await self._standby.take(self.name, number, records)
                    self._durable += len(records)
                    self._notify()
        except Replaced as error:
            logger.critical("replication %s: %s", self.name, error.message)
            self._replaced = error
            self._notify()
        except TimeoutError:
            self.fail(f"it has not answered for {TAKE_TIMEOUT_S:g} s")
        except ProfileServiceError as error:
            self.fail(error.message)
        finally:
            await self._standby.close()

    def _next_records(self) -> list[Shipped]:
        size_bytes = count = 0
        while count < len(self._waiting) and size_bytes < MESSAGE_BYTES:
            size_bytes += sum(map(len, self._waiting[count].payload))
            count += 1
        records, self._waiting = self._waiting[:count], self._waiting[count:]
        return records
