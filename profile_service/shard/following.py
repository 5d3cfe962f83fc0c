"""A shard as the standby of another process of the same shard, whose log it follows; its other end: `replication.py`.

    expect ─▶ take Beginning, records, pieces: logged, synced (answered then), applied ─▶ … ─▶ promote: takes no more

It owns nothing, so it serves nobody, until a coordinator gives it the shard's partitions. Its log is a log as any
other: what follows its last Beginning is the shard. So it needs no replay when it is promoted, and the usual one when
its process was started anew: what it has answered is in its log. It follows nobody after that: it is built anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import numpy as np
from google.protobuf.message import DecodeError

from profile_service.errors import InvalidArgument, Replaced, ResourceExhausted, Unavailable
from profile_service.shard.log_records import (
    RECORD_ADOPTION,
    RECORD_BEGINNING,
    RECORD_EVENTS,
    RECORD_FORGET,
    RECORD_TRANSFER,
    decode_forget,
)
from profile_service.shard.state import ShardState
from profile_service.shard.transfer import Transfer, check, check_room, receive
from profile_service.wire.apply_request import decode_part
from profile_service.wire.decode import decode_batches
from profile_service.wire.plan import WirePlan
from userprofile.internal.v1 import shard_log_pb2

SLICE_EVENTS = 2048
"""Events applied before the loop may turn."""

RETRY_S = 0.5

Taken = tuple[int, memoryview]
"""A record: its type and its payload."""

Work = Callable[[], Awaitable[None]]


class Writer(Protocol):
    """The shard, as its following needs it."""

    shard_id: int

    async def between_groups(self, job: Callable[[], Awaitable[None]]) -> None:
        """Runs the job when everything that was logged is applied, and nothing else is logged meanwhile."""

    async def log_together(self, records: Sequence[tuple[int, Sequence[bytes | memoryview]]]) -> None:
        """For a job: makes records durable. Raises StorageFull."""

    async def abandon_snapshot(self) -> None:
        """For a job: returns when no snapshot is under way."""


class Following:
    """What one shard follows: nothing at first.

    Args:
        plan: how its events are decoded.
    """

    def __init__(self, writer: Writer, state: ShardState, plan: WirePlan) -> None:
        self._writer = writer
        self._state = state
        self._plan = plan
        self.replication = ""
        """Name of the replication that it takes; empty where it takes none."""
        self.promoted = False
        """Whether it was told that it is nobody's standby any more, and has followed nobody since."""
        self._number = 0

    def expect(self, replication: str) -> None:
        """From now on it takes this replication, and none before."""
        self.replication, self.promoted, self._number = replication, False, 0

    async def promote(self) -> None:
        """Takes nothing any more; returns when all that was taken is applied."""
        self.replication, self.promoted = "", True
        await self._writer.between_groups(_nothing)

    async def take(self, replication: str, number: int, records: Sequence[Taken]) -> None:
        """Returns when the records are durable; they are applied before anything else happens to the shard.

        Raises:
            Replaced: this shard has taken its owner's place.
            Unavailable: it follows another replication, or none.
            InvalidArgument: they are not what this shard can take.
            ResourceExhausted: the table, or the disk, has no room for them.
        """
        self._check(replication, number)
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        job = asyncio.ensure_future(
            self._writer.between_groups(lambda: self._take(replication, number, records, durable))
        )
        # Whoever waits may go away; the error is then nobody's.
        job.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        await asyncio.wait([durable, job], return_when=asyncio.FIRST_COMPLETED)
        if not durable.done():
            await job
            # It was promoted while it made them durable: they may count, and nobody may be told so.
            self._check(replication, number)

    def _check(self, replication: str, number: int) -> None:
        if self.promoted:
            raise Replaced(f"the standby of shard {self._writer.shard_id} was promoted")
        if replication != self.replication or number != self._number + 1:
            raise Unavailable(
                f"shard {self._writer.shard_id} does not expect message {number} of replication {replication}", RETRY_S
            )

    async def _take(
        self, replication: str, number: int, records: Sequence[Taken], durable: asyncio.Future[None]
    ) -> None:
        self._check(replication, number)
        first = records[0] if records else None
        if (number == 1) != (first is not None and first[0] == RECORD_BEGINNING):
            raise InvalidArgument("records", "a replication begins with its beginning, and only there")
        work: list[Work] = []
        if number == 1:
            # What it holds makes way before there is to be room for what follows.
            work.append(await self._begin(bytes(records[0][1])))
            await self._writer.log_together([(RECORD_BEGINNING, [records[0][1]])])
            await work.pop()()
            records = records[1:]
        work += self._prepare(records)
        await self._writer.log_together([(kind, [payload]) for kind, payload in records])
        self._number = number
        if self.replication == replication and not durable.done():
            durable.set_result(None)
        for apply in work:
            await apply()

    async def _begin(self, encoded: bytes) -> Work:
        try:
            beginning = shard_log_pb2.Beginning.FromString(encoded)
            self._state.check_beginning(beginning)
        except (DecodeError, ValueError) as error:
            raise InvalidArgument("records[0]", str(error)) from None
        await self._writer.abandon_snapshot()

        async def begin() -> None:
            self._state.begin_anew(beginning)

        return begin

    def _prepare(self, records: Sequence[Taken]) -> list[Work]:
        """What is to be done with the records once they are durable: nothing of it can fail."""
        work: list[Work] = []
        events: list[memoryview] = []
        try:
            self._check_room(records)
            for kind, payload in records:
                if kind == RECORD_EVENTS:
                    events.append(payload)
                    continue
                if events:
                    work.append(self._prepare_events(events))
                    events = []
                work.append(self._prepare_other(kind, payload))
        except (DecodeError, ValueError) as error:
            raise InvalidArgument("records", str(error)) from None
        if events:
            work.append(self._prepare_events(events))
        return work

    def _check_room(self, records: Sequence[Taken]) -> None:
        """Whether there is room for all events together, were each a user's of its own."""
        payloads = [payload for kind, payload in records if kind == RECORD_EVENTS]
        events = sum(decode_part(payload).event_count for payload in payloads)
        if not self._state.table.has_room(events, sum(map(len, payloads))):
            raise ResourceExhausted(f"there is no room for more than {len(self._state.table)} users", RETRY_S)

    def _prepare_events(self, payloads: Sequence[memoryview]) -> Work:
        parts = [decode_part(payload) for payload in payloads]
        counts = [part.event_count for part in parts]
        columns = decode_batches(
            [part.events for part in parts], counts, self._plan, [part.arrival_time_ns for part in parts]
        )
        received_ns = np.repeat(np.array([part.arrival_time_ns for part in parts], np.int64), counts)

        async def apply() -> None:
            start = 0
            for part, count in zip(parts, counts, strict=True):
                these = slice(start, start + count)
                self._state.note(
                    part.producer_id,
                    part.sequence,
                    part.acknowledged_sequence,
                    columns.user_hash[these],
                    columns.event_id_hash[these],
                    part.arrival_time_ns,
                )
                start += count
            for first in range(0, columns.count, SLICE_EVENTS):
                self._state.apply_each(columns, first, min(first + SLICE_EVENTS, columns.count), received_ns)
                await asyncio.sleep(0)

        return apply

    def _prepare_other(self, kind: int, payload: memoryview) -> Work:
        state = self._state
        if kind == RECORD_FORGET:
            user_ids = decode_forget(payload)
            change: Callable[[], object] = lambda: state.forget(user_ids)  # noqa: E731
        elif kind == RECORD_TRANSFER:
            piece = Transfer.FromString(bytes(payload))
            rows = check(state, piece)
            check_room(state, rows)
            change = lambda: receive(state, piece, rows)  # noqa: E731
        elif kind == RECORD_ADOPTION:
            adoption = shard_log_pb2.Adoption.FromString(bytes(payload))
            state.check_adoption(adoption)
            change = lambda: state.adopt(adoption)  # noqa: E731
        else:
            raise InvalidArgument("records", f"holds one of type {kind}, which no owner ships")

        async def apply() -> None:
            change()

        return apply


async def _nothing() -> None:
    """The moment between two groups is all that is wanted."""
