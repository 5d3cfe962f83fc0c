"""One shard: the single writer of its users' profiles, without Ray, gRPC or a disk.

    submit ─▶ queue (bounded in bytes) ─▶ run: take all that waits ─▶ check ─▶ append ─▶ sync ─▶ apply ─▶ answer
                                                                                           ▲
    read ──────────────────────────────────────────── between two slices of applying ──────┘

Everything is checked before it is appended, so that applying cannot fail: what is readable is durable, what is answered
is both. While one group syncs, the next one gathers. Applying runs on the loop in slices of about a millisecond; a read
between two of them sees whole events only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from profile_service.clock import Clock
from profile_service.config import Capacity
from profile_service.domain.columns import EventColumns
from profile_service.domain.decay import NS
from profile_service.domain.population import Population
from profile_service.domain.schema import Schema
from profile_service.domain.table import ProfileTable
from profile_service.errors import InvalidArgument, NotMine, ProfileServiceError, ResourceExhausted, Unavailable
from profile_service.shard.dedupe import EventIdWindow, ProducerSequences
from profile_service.storage.log import Log
from profile_service.wire.decode import decode_events
from profile_service.wire.plan import WirePlan
from userprofile.internal.v1 import shard_pb2

SLICE_EVENTS = 2048
"""Events applied before the loop may turn: about half a millisecond of work."""

EXPIRY_INTERVAL_S = 1.0
EXPIRY_ROWS = 1 << 16
"""Rows looked at for the TTL at a time."""

RECORD_EVENTS = 1
"""A part as it came: an encoded ApplyRequest.Part."""
RECORD_FORGET = 2
"""User ids whose profiles are removed, each behind its length in two bytes."""

_EVENTS_TAG = bytes([shard_pb2.ApplyRequest.Part.EVENTS_FIELD_NUMBER << 3 | 2])


@dataclass
class ShardCounters:
    """How a shard does."""

    user_count: int
    event_count: int
    state_bytes: int
    log_position: int
    queued_bytes: int
    duplicate_count: int
    event_id_count: int
    sync_mode: str


@dataclass
class _Submission:
    parts: Sequence[shard_pb2.ApplyRequest.Part]
    size_bytes: int
    epoch: int
    done: asyncio.Future[None]


@dataclass
class _Applicable:
    """A part that was checked and appended."""

    columns: EventColumns
    events: bytes
    """The part's events as they came."""
    received_ns: int


class Shard:
    """The users of some partitions.

    Args:
        owned: the partitions that it owns.
        epoch: of the topology that says so.
        log: where events are made durable before they are applied.
        clock: for the moment of a read; what is written takes its time from the log.
    """

    def __init__(
        self,
        shard_id: int,
        schema: Schema,
        *,
        partition_bits: int,
        owned: Iterable[int],
        epoch: int,
        log: Log,
        capacity: Capacity,
        clock: Clock,
        table: ProfileTable | None = None,
    ) -> None:
        self.shard_id = shard_id
        self.schema = schema
        self.epoch = epoch
        self._partition_shift = np.uint64(64 - partition_bits)
        self._owned = np.zeros(1 << partition_bits, dtype=np.bool_)
        self._owned[list(owned)] = True
        self._log = log
        self._capacity = capacity
        self._clock = clock
        self._table = table if table is not None else ProfileTable(schema)
        self._plan = WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)
        self._producers = ProducerSequences(1 << partition_bits, int(capacity.producer_window_s * NS))
        self._event_ids = EventIdWindow(capacity.event_ids_per_shard, int(capacity.event_id_window_s * NS))
        self._population: Population | None = None
        self._feature_names = {feature.name for feature in schema.features}
        self._queue: deque[_Submission] = deque()
        self._queued_bytes = 0
        self._queued_events = 0
        self._wake = asyncio.Event()
        self._closed = False
        self._expiry_row = 0
        self._event_count = 0
        self._duplicate_count = 0

    async def submit(self, parts: Sequence[shard_pb2.ApplyRequest.Part], size_bytes: int, epoch: int) -> None:
        """Returns when every event of the parts is durable and readable.

        Raises:
            NotMine: the epoch, or a user, is another owner's.
            ResourceExhausted: the queue or the table is full.
            InvalidArgument: the bytes are not what they should be.
            Unavailable: the shard is closing.
        In each of these cases nothing of the parts is kept.
        """
        if self._closed:
            raise Unavailable(f"shard {self.shard_id} is shutting down", retry_after_s=1.0)
        self._check_epoch(epoch)
        if self._queued_bytes + size_bytes > self._capacity.shard_queue_bytes and self._queue:
            raise ResourceExhausted(
                f"shard {self.shard_id} has {self._queued_bytes} bytes waiting to be logged", retry_after_s=0.1
            )
        events = sum(part.event_count for part in parts)
        if not self._table.has_room(self._queued_events + events, self._queued_bytes + size_bytes):
            raise ResourceExhausted(
                f"shard {self.shard_id} holds {len(self._table)} users and has no room for more", retry_after_s=10.0
            )
        submission = _Submission(parts, size_bytes, epoch, asyncio.get_running_loop().create_future())
        self._queue.append(submission)
        self._queued_bytes += size_bytes
        self._queued_events += events
        self._wake.set()
        # A caller that goes away must not take the group's answer with it.
        await asyncio.shield(submission.done)

    async def run(self) -> None:
        """Commits what is submitted, group by group, until `close` and everything accepted is answered.

        An exception ends it, and with it the shard: what is on the log is the truth.
        """
        try:
            while True:
                group = await self._take_group()
                if group:
                    await self._commit(group)
                elif self._closed:
                    break
                else:
                    await self._forget_idle()
        except BaseException as error:
            self._closed = True
            self._fail_all(Unavailable(f"shard {self.shard_id} failed: {error}", retry_after_s=1.0))
            raise
        finally:
            await self._log.close()

    async def close(self) -> None:
        """Refuses what comes from now on; `run` ends when everything before is answered."""
        self._closed = True
        self._wake.set()

    async def _take_group(self) -> list[_Submission]:
        if not self._queue and not self._closed:
            self._wake.clear()
            try:
                async with asyncio.timeout(EXPIRY_INTERVAL_S if self.schema.ttl_s is not None else None):
                    await self._wake.wait()
            except TimeoutError:
                return []
        group = list(self._queue)
        self._queue.clear()
        return group

    async def _commit(self, group: list[_Submission]) -> None:
        try:
            accepted = [(submission, work) for submission in group if (work := self._check(submission)) is not None]
            for submission, work in accepted:
                for part, applicable in zip(submission.parts, work, strict=True):
                    self._log.append(RECORD_EVENTS, _record(part, applicable.events))
            if accepted:
                await self._log.sync()
            for submission, work in accepted:
                for applicable in work:
                    await self._apply(applicable)
                if not submission.done.done():
                    submission.done.set_result(None)
        except BaseException as error:
            for submission in group:
                _fail(submission, Unavailable(f"shard {self.shard_id} failed: {error}", retry_after_s=1.0))
            raise
        finally:
            for submission in group:
                self._queued_bytes -= submission.size_bytes
                self._queued_events -= sum(part.event_count for part in submission.parts)

    def _check(self, submission: _Submission) -> list[_Applicable] | None:
        """Decodes the submission's parts and leaves out what was counted before; None if it was refused whole."""
        try:
            # Owners may have changed meanwhile. What was routed by another epoch goes back whole, even if this shard
            # still owns it: the same producer's next batch must not overtake it.
            self._check_epoch(submission.epoch)
            decoded = []
            for part in submission.parts:
                # Each access to the field copies it: once is enough.
                events = part.events
                columns = decode_events(events, self._plan, part.arrival_time_ns)
                if columns.count != part.event_count:
                    raise InvalidArgument(
                        "parts.event_count", f"says {part.event_count}, the bytes hold {columns.count}"
                    )
                partitions = (columns.user_hash[: columns.count] >> self._partition_shift).astype(np.int64)
                if not self._owned[partitions].all():
                    raise NotMine(f"shard {self.shard_id} does not own every user of the batch", self.epoch)
                decoded.append((part, events, columns, partitions))
        except ProfileServiceError as error:
            _fail(submission, error)
            return None
        return [
            _Applicable(self._deduplicate(part, columns, partitions), events, part.arrival_time_ns)
            for part, events, columns, partitions in decoded
        ]

    def _deduplicate(
        self, part: shard_pb2.ApplyRequest.Part, columns: EventColumns, partitions: NDArray[np.int64]
    ) -> EventColumns:
        now_ns = part.arrival_time_ns
        before = columns.count
        if part.producer_id:
            fresh = self._producers.admit(
                part.producer_id, part.sequence, part.acknowledged_sequence, partitions, now_ns
            )
            if fresh is not None:
                columns = columns.select(np.flatnonzero(fresh))
        keys = columns.event_id_hash[: columns.count]
        if keys.any():
            fresh = self._event_ids.admit(keys, now_ns)
            if fresh is not None:
                columns = columns.select(np.flatnonzero(fresh))
        self._duplicate_count += before - columns.count
        return columns

    async def _apply(self, work: _Applicable) -> None:
        for start in range(0, work.columns.count, SLICE_EVENTS):
            stop = min(start + SLICE_EVENTS, work.columns.count)
            self._table.apply(work.columns, start, stop, work.received_ns)
            if stop - start == SLICE_EVENTS:
                await asyncio.sleep(0)
        self._event_count += work.columns.count

    async def _forget_idle(self) -> None:
        """Removes the users of one stretch of rows who were not heard of for the schema's TTL, by way of the log."""
        idle = self._table.idle(self._clock(), self._expiry_row, self._expiry_row + EXPIRY_ROWS)
        self._expiry_row += EXPIRY_ROWS
        if self._expiry_row >= self._table.users.high_water:
            self._expiry_row = 0
        if idle:
            self._log.append(RECORD_FORGET, [len(user).to_bytes(2, "little") + user for user in idle])
            await self._log.sync()
            for user in idle:
                self._table.remove(user.decode())

    def _fail_all(self, error: ProfileServiceError) -> None:
        for submission in self._queue:
            _fail(submission, error)
        self._queue.clear()

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            raise NotMine(f"shard {self.shard_id} is at epoch {self.epoch}, the request at {epoch}", self.epoch)

    def read(self, user_ids: Sequence[str], features: Sequence[str], epoch: int) -> list[bytes]:
        """Encoded profiles in the order of `user_ids`, empty for users never seen; all as of one moment.

        Raises:
            NotMine: the epoch, or a user, is another owner's.
            InvalidArgument: a feature that the schema does not declare.
        """
        self._check_epoch(epoch)
        self._check_features(features)
        for user_id in user_ids:
            if not self._owned[xxhash.xxh64_intdigest(user_id.encode()) >> int(self._partition_shift)]:
                raise NotMine(f"shard {self.shard_id} does not own user {user_id!r}", self.epoch)
        now_ns = self._clock()
        return [self._table.profile(user_id, now_ns, features, self._population) for user_id in user_ids]

    def _check_features(self, features: Sequence[str]) -> None:
        for index, name in enumerate(features):
            if name not in self._feature_names:
                known = ", ".join(sorted(self._feature_names))
                raise InvalidArgument(f"features[{index}]", f"the schema has no feature {name!r}; it has {known}")

    def acknowledged(self, producer_id: str) -> int:
        """The highest sequence up to which the producer is known to be acknowledged by every owner."""
        return self._producers.acknowledged(producer_id)

    def population_state(self) -> bytes:
        """The sums over this shard's users, for `set_population` of every shard."""
        return self._table.population.to_state(self._table.texts)

    def set_population(self, states: Sequence[bytes]) -> None:
        """Takes the sums of all shards, this one's among them, as the population from now on."""
        self._population = Population.merge(self.schema, states)

    def population_profile(self, features: Sequence[str]) -> bytes:
        """An encoded Profile of all users of all shards, as last gathered.

        Raises:
            InvalidArgument: a feature that the schema does not declare.
        """
        self._check_features(features)
        population = self._population if self._population is not None else Population(self.schema)
        return population.profile(self._clock(), features)

    def update_topology(self, epoch: int, owned: Iterable[int]) -> None:
        """Takes a newer topology; older ones are ignored."""
        if epoch > self.epoch:
            self.epoch = epoch
            self._owned[:] = False
            self._owned[list(owned)] = True

    def status(self) -> ShardCounters:
        """How the shard does."""
        return ShardCounters(
            user_count=len(self._table),
            event_count=self._event_count,
            state_bytes=self._table.memory_bytes,
            log_position=self._log.position,
            queued_bytes=self._queued_bytes,
            duplicate_count=self._duplicate_count,
            event_id_count=len(self._event_ids),
            sync_mode=self._log.sync_mode,
        )


def _record(part: shard_pb2.ApplyRequest.Part, events: bytes) -> tuple[bytes, ...]:
    """The part encoded, without copying its events: the fields of a message may stand in any order."""
    rest = shard_pb2.ApplyRequest.Part(
        producer_id=part.producer_id,
        sequence=part.sequence,
        acknowledged_sequence=part.acknowledged_sequence,
        arrival_time_ns=part.arrival_time_ns,
        event_count=part.event_count,
    ).SerializeToString()
    size, length = len(events), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return rest, _EVENTS_TAG, bytes(length), events


def _fail(submission: _Submission, error: ProfileServiceError) -> None:
    if not submission.done.done():
        submission.done.set_exception(error)
        # Whoever waited may have gone away; the error is then nobody's.
        submission.done.exception()
