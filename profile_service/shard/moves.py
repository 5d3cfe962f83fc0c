"""A shard's part in moves of partitions: what its coordinator has it do, one step after the other, and what it may not
do meanwhile (who decides is in `cluster.coordinator`).

    source                                            target
    depart: copies, and follows what changes ───────▶ expect, receive: logged, synced, applied
    finish: takes no more writes, sends the rest ───▶ receive
    (a new epoch: owned no more)                      (a new epoch: owned)
    clean                                             clean, if the new epoch gives them to somebody else

What was received counts for nothing before an epoch gives its partitions to this shard: it is neither read nor written,
and a move that ends otherwise has it cleaned away. A new epoch ends whatever is under way, and so does a restart:
nothing of it is remembered, and a piece of a move that is not expected is refused. So whoever begins anew begins clean.

What a step of a move answers is an acknowledgement as any other: a process without a lease, which may have been
replaced, gives none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from profile_service.domain.columns import EventColumns
from profile_service.errors import InvalidArgument, NotMine, Unavailable
from profile_service.shard.log_records import (
    RECORD_ADOPTION,
    RECORD_FORGET,
    RECORD_TRANSFER,
    encode_forget,
)
from profile_service.shard.reports import Departed
from profile_service.shard.state import ShardState
from profile_service.shard.state_blocks import describe_layout
from profile_service.shard.transfer import Departure, Transfer, check, check_room, receive
from userprofile.internal.v1 import shard_log_pb2

NEARLY_THERE = 256
"""Rows, names and event ids that may be left when writes end: one piece or two."""

MOST_ROUNDS = 10_000
"""Pieces after which a departure gives up: its users change faster than they are copied."""

CLEANED_ROWS = 1 << 14
CLEANED_USERS = 256
"""What a step of cleaning looks at, and how many users it forgets: half a millisecond."""

REST = 1.0
"""Between two steps of copying or cleaning a shard rests so many times as long as the last one took: a move has time,
and leaves the machine to events and reads,"""
MOST_REST_S = 0.05
"""but no longer than this."""

RETRY_S = 0.1


class Target(Protocol):
    """The way to the shard that partitions go to. Raises Unavailable where it cannot be reached, or refuses."""

    async def receive(self, move_id: str, piece: bytes) -> None:
        """Returns when the piece is durable there."""


class Writer(Protocol):
    """The shard, as its moves need it."""

    shard_id: int
    epoch: int

    def check_lease(self) -> None:
        """Raises Unavailable where the shard may not acknowledge anything just now."""

    def owns(self, partitions: Sequence[int]) -> NDArray[np.bool_]:
        """Which of the partitions it owns."""

    async def between_groups(self, job: Callable[[], Awaitable[None]]) -> None:
        """Runs the job when everything that was logged is applied, and nothing else is logged meanwhile."""

    async def log_now(self, kind: int, payload: Sequence[bytes]) -> None:
        """For a job: makes a record durable. Raises StorageFull."""


@dataclass
class _Arrival:
    move_id: str
    partitions: frozenset[int]
    users: int = 0
    """Users that came with it."""


@dataclass
class _Leaving:
    move_id: str
    departure: Departure
    target: Target
    sent_bytes: int = 0


class _Handover:
    """What moves have in common, wherever the state is."""

    def __init__(self, writer: Writer, partitions: int) -> None:
        self._writer = writer
        self.frozen: NDArray[np.bool_] = np.zeros(partitions, np.bool_)
        """By partition: whether it takes no writes, although it is owned."""
        self.is_freezing = False
        """Whether any is."""

    def new_epoch(self) -> None:
        """Another topology counts: whatever was under way is over."""
        self.frozen[:] = False
        self.is_freezing = False

    async def _freeze(self, partitions: Sequence[int]) -> None:
        """Returns when writes to the partitions have ended."""
        self._writer.check_lease()
        self.frozen[partitions] = True
        self.is_freezing = True
        await self._writer.between_groups(_nothing)

    def _check_leaving(self, epoch: int, partitions: Sequence[int]) -> None:
        self._check_epoch(epoch)
        if not self._writer.owns(partitions).all():
            raise NotMine(f"shard {self._writer.shard_id} does not own every partition of the move", self._writer.epoch)

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self._writer.epoch:
            raise NotMine(
                f"shard {self._writer.shard_id} is at epoch {self._writer.epoch}, the move at {epoch}",
                self._writer.epoch,
            )


class StoredMoves(_Handover):
    """The moves of a shard whose state is in a store: nothing has to be copied, but writes must have ended before
    another shard claims the partitions. Each method as in `Moves`."""

    arriving_users = 0

    def __init__(self, writer: Writer, partitions: int) -> None:
        super().__init__(writer, partitions)
        self._leaving: tuple[str, list[int]] | None = None

    def applied(self, columns: EventColumns) -> None:
        """Nobody has to know."""

    def noted(self, producer_id: str, partitions: NDArray[np.int64]) -> None:
        """Nobody has to know."""

    def forgot(self, user_ids: Iterable[bytes]) -> None:
        """Nobody has to know."""

    def new_epoch(self) -> None:
        super().new_epoch()
        self._leaving = None

    async def expect(self, move_id: str, epoch: int, partitions: Sequence[int]) -> None:
        """Nothing will come. Raises NotMine where the shard goes by another epoch."""
        self._check_epoch(epoch)

    async def receive(self, move_id: str, encoded: bytes) -> None:
        """Raises Unavailable: nothing is to come."""
        raise Unavailable(f"shard {self._writer.shard_id} has its state in a store, and takes none", RETRY_S)

    async def depart(self, move_id: str, epoch: int, partitions: Sequence[int], target: Target) -> Departed:
        """Nothing has to be copied."""
        self._check_leaving(epoch, partitions)
        self._leaving = (move_id, list(partitions))
        return Departed(0, 0)

    async def finish(self, move_id: str) -> Departed:
        """Returns when writes to the partitions have ended. Raises Unavailable where the move was ended."""
        if self._leaving is None or self._leaving[0] != move_id:
            raise Unavailable(f"shard {self._writer.shard_id} is not in move {move_id}", RETRY_S)
        await self._freeze(self._leaving[1])
        self._writer.check_lease()
        return Departed(0, 0)

    async def clean(self, partitions: Sequence[int]) -> None:
        """Nothing is left over in the store."""

    async def adopt(self, encoded: bytes) -> None:
        """Sums are in the store, by partition."""

    def sums(self) -> bytes:
        """None: they are in the store, by partition."""
        return b""


class Moves(_Handover):
    """The moves of one shard: at most one goes out and one comes in at a time."""

    def __init__(self, writer: Writer, state: ShardState) -> None:
        super().__init__(writer, state.producers.partitions)
        self._state = state
        self._arrival: _Arrival | None = None
        self._leaving: _Leaving | None = None

    @property
    def state(self) -> ShardState:
        """What the shard holds."""
        return self._state

    @property
    def arriving_users(self) -> int:
        """Users in the table who are not this shard's yet."""
        return 0 if self._arrival is None else self._arrival.users

    # --- what the shard tells ---

    def applied(self, columns: EventColumns) -> None:
        """Events were applied."""
        if self._leaving is not None:
            self._leaving.departure.applied(columns)

    def noted(self, producer_id: str, partitions: NDArray[np.int64]) -> None:
        """A part was noted as counted."""
        if self._leaving is not None:
            self._leaving.departure.noted(producer_id, partitions)

    def forgot(self, user_ids: Iterable[bytes]) -> None:
        """Users were forgotten."""
        if self._leaving is not None:
            self._leaving.departure.forgot(user_ids)

    def new_epoch(self) -> None:
        super().new_epoch()
        self._arrival = self._leaving = None

    # --- what the coordinator asks for ---

    async def expect(self, move_id: str, epoch: int, partitions: Sequence[int]) -> None:
        """Pieces of this move may come from now on. What was left of the partitions here is cleaned away first.

        Raises NotMine where the shard goes by another epoch, or owns any of them.
        """
        self._check_epoch(epoch)
        self._arrival = None
        # It answers by its lease.
        await self.clean(partitions)
        self._check_epoch(epoch)
        self._arrival = _Arrival(move_id, frozenset(partitions))

    async def receive(self, move_id: str, encoded: bytes) -> None:
        """Returns when the piece is durable.

        Raises:
            Unavailable: the move is not expected, or not any more.
            InvalidArgument: it is no piece that this shard can take.
            ResourceExhausted: the table, or the disk, has no room for it.
        """
        self._expected(move_id)
        try:
            piece = Transfer.FromString(encoded)
            rows = check(self._state, piece)
        except (DecodeError, ValueError) as error:
            raise InvalidArgument("transfer", str(error)) from None

        async def take() -> None:
            arrival = self._expected(move_id)
            if not arrival.partitions.issuperset(piece.partitions):
                raise InvalidArgument("transfer.partitions", "holds others than the move was announced with")
            check_room(self._state, rows)
            await self._writer.log_now(RECORD_TRANSFER, [encoded])
            # The move may be over by now; the record counts all the same, and is cleaned away as the rest of it.
            arrival.users += receive(self._state, piece, rows)

        await self._writer.between_groups(take)
        self._writer.check_lease()

    async def depart(self, move_id: str, epoch: int, partitions: Sequence[int], target: Target) -> Departed:
        """Copies what this shard holds of the partitions to the target; returns when next to nothing is left to copy.
        From then on it follows what changes, until `finish` or a new epoch.

        Raises:
            NotMine: the shard goes by another epoch, or does not own all of them.
            Unavailable: the target cannot be reached, or the move was ended.
        """
        self._check_leaving(epoch, partitions)
        leaving = _Leaving(move_id, Departure(self._state, partitions), target)
        self._leaving = leaving
        for _ in range(MOST_ROUNDS):
            if leaving.departure.behind <= NEARLY_THERE:
                return Departed(leaving.departure.row_count, leaving.sent_bytes)
            async with _resting():
                await self._send(leaving)
        raise Unavailable(f"shard {self._writer.shard_id} cannot copy its users as fast as they change", RETRY_S)

    async def finish(self, move_id: str) -> Departed:
        """Takes no more writes to the partitions, and sends what is left; returns when the target has all of it. A new
        epoch says who takes writes then.

        Raises Unavailable where the target cannot be reached, or the move was ended.
        """
        leaving = self._left(move_id)
        await self._freeze(leaving.departure.partitions)
        # The target has to agree once more, even where nothing is left.
        await self._send(leaving)
        while not leaving.departure.is_caught_up:
            await self._send(leaving)
        self._writer.check_lease()
        return Departed(leaving.departure.row_count, leaving.sent_bytes)

    async def clean(self, partitions: Sequence[int]) -> None:
        """Forgets the users of partitions that are others'.

        Raises:
            NotMine: this shard owns any of them, or expects them.
            Unavailable: it has no lease. One that has a successor would clean its own state in vain.
        """
        wanted = np.zeros(len(self.frozen), np.bool_)
        wanted[list(partitions)] = True
        row = 0

        async def step() -> None:
            nonlocal row
            expected = self._arrival is not None and not self._arrival.partitions.isdisjoint(partitions)
            if expected or self._writer.owns(partitions).any():
                raise NotMine(f"shard {self._writer.shard_id} has use for what is to be cleaned", self._writer.epoch)
            users = self._state.table.users
            numbers = users.choose(row, row + CLEANED_ROWS, self._state.hash_shift, wanted)
            row += CLEANED_ROWS
            if len(numbers) > CLEANED_USERS:
                numbers = numbers[:CLEANED_USERS]
                row = int(numbers[-1]) + 1
            if len(numbers):
                gone = [users.bytes_of(number) for number in numbers.tolist()]
                await self._writer.log_now(RECORD_FORGET, encode_forget(gone))
                self._state.forget(gone)

        await self._writer.between_groups(step)
        while row < self._state.table.users.high_water:
            async with _resting():
                await self._writer.between_groups(step)
        self._writer.check_lease()

    async def adopt(self, encoded: bytes) -> None:
        """Takes the sums of a shard that is no more, an encoded Adoption; once, however often they come.

        Raises:
            InvalidArgument: they are of another schema.
            ResourceExhausted: the table, or the disk, has no room.
        """
        adoption = shard_log_pb2.Adoption.FromString(encoded)

        async def take() -> None:
            if adoption.shard_id not in self._state.adopted:
                try:
                    self._state.check_adoption(adoption)
                except ValueError as error:
                    raise InvalidArgument("sums", str(error)) from None
                await self._writer.log_now(RECORD_ADOPTION, [encoded])
                self._state.adopt(adoption)

        await self._writer.between_groups(take)
        self._writer.check_lease()

    def sums(self) -> bytes:
        """This shard's sums, for another one to adopt. Raises NotMine while it owns a partition."""
        self._writer.check_lease()
        if self._writer.owns(range(len(self.frozen))).any():
            raise NotMine(f"shard {self._writer.shard_id} still owns partitions", self._writer.epoch)
        return shard_log_pb2.Adoption(
            shard_id=self._writer.shard_id,
            population=self._state.table.population.to_state(self._state.table.texts),
            event_count=self._state.event_count,
            duplicate_count=self._state.duplicate_count,
            layout=describe_layout(self._state.table),
        ).SerializeToString()

    def _expected(self, move_id: str) -> _Arrival:
        if self._arrival is None or self._arrival.move_id != move_id:
            raise Unavailable(f"shard {self._writer.shard_id} does not expect move {move_id}", RETRY_S)
        return self._arrival

    def _left(self, move_id: str) -> _Leaving:
        if self._leaving is None or self._leaving.move_id != move_id:
            raise Unavailable(f"shard {self._writer.shard_id} is not in move {move_id}", RETRY_S)
        return self._leaving

    async def _send(self, leaving: _Leaving) -> None:
        piece = leaving.departure.step()
        await leaving.target.receive(leaving.move_id, piece)
        leaving.sent_bytes += len(piece)
        if self._leaving is not leaving:
            raise Unavailable(f"move {leaving.move_id} was ended", RETRY_S)
        # Where the target is in the same process, events still have their turn.
        await asyncio.sleep(0)


@asynccontextmanager
async def _resting() -> AsyncIterator[None]:
    """Rests after what is done in it."""
    # The loop's clock, which a simulation makes up.
    clock = asyncio.get_running_loop().time
    began_s = clock()
    yield
    await asyncio.sleep(min(REST * (clock() - began_s), MOST_REST_S))


async def _nothing() -> None:
    """The moment between two groups is all that is wanted."""
