"""One shard: the single writer of its users' profiles, without Ray, gRPC or a disk.

    submit ─▶ queue (bounded in bytes) ─▶ run: take all that waits ─▶ check ─▶ log: append, sync ─▶ apply ─▶ answer
                                           ▲       │                                          ▲
                 a block of a snapshot ────┘       └▶ a full disk refuses the group           └── read, between slices

Everything is checked, and room in the log is made sure of, before anything changes, so that applying cannot fail: what
is readable is durable, what is answered is both. While one group syncs, the next one gathers. Applying runs on the loop
in slices of about a millisecond; a read between two of them sees whole events only.

A record of the log holds only what is counted: what was counted before is left out when the record is made, so that
a replay does not decide again. The state is a function of the log alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from profile_service.clock import Clock
from profile_service.config import Capacity
from profile_service.domain.columns import EventColumns
from profile_service.domain.index import Strings
from profile_service.domain.population import Population
from profile_service.errors import (
    InvalidArgument,
    NotMine,
    ProfileServiceError,
    ResourceExhausted,
    StorageFull,
    Unavailable,
)
from profile_service.shard.following import Following, Taken
from profile_service.shard.health import FULL, SERVING, STALLED, Health
from profile_service.shard.keeping import DamagedRow, DurableLog, HeldState, Interrupted, Snapshots
from profile_service.shard.lease import Lease
from profile_service.shard.log_records import (
    RECORD_EVENTS,
    RECORD_FORGET,
    RECORD_OVERHEAD_BYTES,
    encode_forget,
)
from profile_service.shard.moves import Moves, StoredMoves
from profile_service.shard.state import ShardState
from profile_service.storage.fs import DiskFull
from profile_service.storage.record import MAX_PAYLOAD_BYTES
from profile_service.wire.apply_request import ApplyPart, encode_part
from profile_service.wire.decode import decode_events
from profile_service.wire.gather import gather_events
from profile_service.wire.plan import WirePlan

SLICE_EVENTS = 2048
"""Events applied before the loop may turn: about half a millisecond of work."""

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0
"""When a store that does not answer is asked again, at first and at last."""

LOOK_INTERVAL_S = 1.0
"""How often a shard looks for what time alone brings: profiles to forget, a snapshot that is due, room on a disk that
was full."""

EXPIRY_ROWS = 1 << 16
"""Rows looked at for the TTL at a time."""

FULL_RETRY_S = 2.0
"""When a caller may try again on a full disk."""

FULL_PROBE_BYTES = 1 << 20
"""A disk that was full has room again when what it refused fits, or so much where that was more."""

logger = logging.getLogger(__name__)


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
    log_bytes: int
    snapshot_position: int
    snapshot_time_ns: int


class AfterRefusal(Unavailable):
    """An earlier submission of the same sender was refused; nothing of this one is kept."""


@dataclass
class Sender:
    """One whose submissions are kept as a prefix of what it sends: no part may overtake the one before it, for its
    sequence would then be taken for a repetition when it comes again."""

    refused: bool = False
    """Whether one was refused; so is everything that comes after it."""

    def check(self) -> None:
        """Raises AfterRefusal."""
        if self.refused:
            raise AfterRefusal("an earlier request of the stream was refused", retry_after_s=0.1)


@dataclass
class _Submission:
    parts: Sequence[ApplyPart]
    size_bytes: int
    epoch: int
    sender: Sender
    done: asyncio.Future[None]


@dataclass
class _Checked:
    """A part whose events can be counted."""

    part: ApplyPart
    columns: EventColumns
    partitions: NDArray[np.int64]


_Admitted = tuple[_Submission, list[tuple[EventColumns, int]]]
"""A submission, and of each of its parts that were appended the events to be counted and when they came."""


class Shard:
    """The users of some partitions.

    Args:
        owned: the partitions that it owns.
        epoch: of the topology that says so.
        state: what it holds, as of the end of `log`.
        log: where events are made durable before they are applied.
        snapshotter: writes snapshots of `state`, a block between two groups.
        clock: for the moment of a read; what is written takes its time from the log.
        health: hears when the disk is full, and when it no longer is.
        lease: without it nothing is acknowledged.
    """

    def __init__(
        self,
        shard_id: int,
        *,
        partition_bits: int,
        owned: Iterable[int],
        epoch: int,
        state: HeldState,
        log: DurableLog,
        snapshotter: Snapshots,
        capacity: Capacity,
        clock: Clock,
        health: Health,
        lease: Lease,
    ) -> None:
        self.shard_id = shard_id
        self.schema = schema = state.schema
        self.epoch = epoch
        self._oldest_epoch = epoch
        """The latest one at which it lost a partition: what was routed by earlier ones is refused."""
        self._partition_shift = np.uint64(64 - partition_bits)
        self._owned = np.zeros(1 << partition_bits, dtype=np.bool_)
        self._owned[list(owned)] = True
        self._state = state
        self._log = log
        self._snapshotter = snapshotter
        self._capacity = capacity
        self._clock = clock
        self.plan = WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)
        self._population: Population | None = None
        self._feature_names = {feature.name for feature in schema.features}
        self._queue: deque[_Submission] = deque()
        self._queued_bytes = 0
        self._queued_events = 0
        self._wake = asyncio.Event()
        self._closed = False
        self._expiry_row = 0
        self._health = health
        self._lease = lease
        self._look_at_s = 0.0
        self._retry_s = 0.0
        """When a store that does not answer is asked next, after the last time."""
        self._lacking_bytes = 0
        """What the disk had no room for, when it is full: less may fit, and is taken."""
        snapshotter.on_ready(self._wake.set)
        log.on_failure(self._wake.set)
        self.moves = Moves(self, state) if isinstance(state, ShardState) else StoredMoves(self, len(self._owned))
        """Of partitions, from here and to here."""
        self.following = Following(self, state, self.plan) if isinstance(state, ShardState) else None
        """As another process's standby; None where the state is in a store."""
        self._jobs: deque[tuple[Callable[[], Awaitable[None]], asyncio.Future[None]]] = deque()

    async def submit(
        self, parts: Sequence[ApplyPart], size_bytes: int, epoch: int, sender: Sender | None = None
    ) -> None:
        """Returns when every event of the parts is durable and readable.

        Raises:
            AfterRefusal: something that the sender submitted before was refused meanwhile.
            NotMine: the epoch, or a user, is another owner's.
            ResourceExhausted: the queue or the table is full.
            InvalidArgument: the bytes are not what they should be.
            Unavailable: the shard is closing, or has no lease.
            DataLoss: the stored row of a user is damaged.
        In each of these cases nothing of the parts is kept, but where the lease ran out while they were committed, or
        the store failed meanwhile (Interrupted, which is an Unavailable): then nobody knows.
        """
        if self._closed:
            raise Unavailable(f"shard {self.shard_id} is shutting down", retry_after_s=1.0)
        sender = sender if sender is not None else Sender()
        self._check_epoch(epoch)
        self._lease.check(self.shard_id)
        if self._health.state == STALLED:
            raise Unavailable(self._health.message, retry_after_s=0.5)
        if self._queued_bytes + size_bytes > self._capacity.shard_queue_bytes and self._queue:
            raise ResourceExhausted(
                f"shard {self.shard_id} has {self._queued_bytes} bytes waiting to be logged", retry_after_s=0.1
            )
        events = sum(part.event_count for part in parts)
        table = self._state.table
        if not table.has_room(self._queued_events + events, self._queued_bytes + size_bytes):
            raise ResourceExhausted(
                f"shard {self.shard_id} holds {len(table)} users and has no room for more", retry_after_s=10.0
            )
        submission = _Submission(parts, size_bytes, epoch, sender, asyncio.get_running_loop().create_future())
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
            while not self._closed or self._queue:
                # It may have died beside the groups, of a sync that `interval` makes later: nobody else would say so.
                self._log.check()
                if self._queue:
                    group = list(self._queue)
                    self._queue.clear()
                    await self._commit(group)
                # Between two groups the state is that of the log's end: the moment for a block of a snapshot.
                more = await self._snapshotter.step()
                await self._run_jobs()
                await self._look_around()
                if not self._queue and not self._jobs and not self._closed and not more:
                    await self._idle()
                elif more:
                    await asyncio.sleep(0)
        except BaseException as error:
            self._closed = True
            self._fail_all(Unavailable(f"shard {self.shard_id} failed: {error}", retry_after_s=1.0))
            raise
        finally:
            await self._snapshotter.close()
            await self._log.close()

    async def close(self) -> None:
        """Refuses what comes from now on; `run` ends when everything before is answered."""
        self._closed = True
        self._wake.set()

    async def receive(self, move_id: str, piece: bytes) -> None:
        """As Moves.receive."""
        await self.moves.receive(move_id, piece)

    async def take(self, replication: str, number: int, records: Sequence[Taken]) -> None:
        """As Following.take."""
        if self.following is None:
            raise Unavailable(f"shard {self.shard_id} has its state in a store", retry_after_s=1.0)
        await self.following.take(replication, number, records)

    async def create_snapshot(self) -> int:
        """Returns when a snapshot that begins now is published: the log position from which a recovery replays.

        Raises:
            StorageFull: the disk has no room for it.
            Unavailable: the shard is closing.
        """
        if self._closed:
            raise Unavailable(f"shard {self.shard_id} is shutting down", retry_after_s=1.0)
        published = self._snapshotter.request()
        self._wake.set()
        return await published

    async def between_groups(self, job: Callable[[], Awaitable[None]]) -> None:
        """Runs the job when everything that was logged is applied, and nothing else is logged meanwhile. An error of
        the service is the caller's; any other ends the shard."""
        if self._closed:
            raise Unavailable(f"shard {self.shard_id} is shutting down", retry_after_s=1.0)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._jobs.append((job, done))
        self._wake.set()
        await asyncio.shield(done)

    async def _run_jobs(self) -> None:
        # Those that come meanwhile wait for the next group to pass.
        for _ in range(len(self._jobs)):
            job, done = self._jobs.popleft()
            try:
                await job()
            except ProfileServiceError as error:
                done.set_exception(error)
                # Whoever waited may have gone away; the error is then nobody's.
                done.exception()
            except BaseException as error:
                done.set_exception(Unavailable(f"shard {self.shard_id} failed: {error}", retry_after_s=1.0))
                done.exception()
                raise
            else:
                done.set_result(None)

    async def log_now(self, kind: int, payload: Sequence[bytes]) -> None:
        """For a job: makes a record durable. Raises StorageFull."""
        await self.log_together([(kind, payload)])

    async def log_together(self, records: Sequence[tuple[int, Sequence[bytes | memoryview]]]) -> None:
        """For a job: makes records durable. Raises StorageFull."""
        size_bytes = sum(len(piece) for _, payload in records for piece in payload)
        if not await self._make_room(size_bytes, len(records)):
            raise StorageFull(self._health.message, retry_after_s=FULL_RETRY_S)
        for kind, payload in records:
            self._log.append(kind, payload)
        await self._log.sync()

    async def abandon_snapshot(self) -> None:
        """For a job: returns when no snapshot is under way."""
        await self._snapshotter.abandon()

    def check_lease(self) -> None:
        """Raises Unavailable where the shard may not acknowledge anything just now."""
        self._lease.check(self.shard_id)

    @property
    def owns_any(self) -> bool:
        """Whether it owns any partition."""
        return bool(self._owned.any())

    def owns(self, partitions: Sequence[int]) -> NDArray[np.bool_]:
        """Which of the partitions it owns."""
        owned: NDArray[np.bool_] = self._owned[list(partitions)]
        return owned

    async def _idle(self) -> None:
        """Waits for work, at most until it is time to look around."""
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._look_at_s):
                await self._wake.wait()

    async def _look_around(self) -> None:
        """Does what time alone brings, however much work there is; but not each time."""
        now_s = asyncio.get_running_loop().time()
        if now_s < self._look_at_s or self._closed:
            return
        self._look_at_s = now_s + LOOK_INTERVAL_S
        if self._health.state == FULL:
            await self._make_room(self._lacking_bytes, 1)
        elif await self._settle(()) and self._lease.is_held:
            # A standby forgets whom its owner forgets.
            await self._forget_idle()

    async def _settle(self, group: Sequence[_Submission]) -> bool:
        """Whether all is known of the state that the group needs; else the group is refused, and the shard stalls."""
        producer_ids = {part.producer_id for submission in group for part in submission.parts}
        try:
            await self._state.settle(self.epoch, self._owned, producer_ids)
        except Interrupted as interruption:
            self._stall(interruption)
            for submission in group:
                _fail(submission, interruption)
            return False
        if self._health.state == STALLED:
            logger.info("shard %d goes on", self.shard_id)
            self._retry_s = 0.0
            self._health.serving(self._state.remark)
        elif self._health.state == SERVING and self._state.remark:
            self._health.message = self._state.remark
        return True

    def _stall(self, interruption: Interrupted) -> None:
        """Takes no writes until the state is settled again."""
        logger.error("shard %d takes no writes: %s", self.shard_id, interruption.message)
        if interruption.full:
            self._health.full(f"shard {self.shard_id} takes no writes: {interruption.message}")
            return
        self._health.stalled(f"shard {self.shard_id} takes no writes: {interruption.message}")
        self._retry_s = min(LAST_RETRY_S, max(FIRST_RETRY_S, 2 * self._retry_s))
        self._look_at_s = asyncio.get_running_loop().time() + self._retry_s

    async def _commit(self, group: list[_Submission]) -> None:
        try:
            for submission in await self._commit_together(group):
                if self._health.state == STALLED:
                    _fail(submission, Unavailable(self._health.message, retry_after_s=0.5))
                else:
                    await self._commit_together([submission])
        except BaseException as error:
            for submission in group:
                _fail(submission, Unavailable(f"shard {self.shard_id} failed: {error}", retry_after_s=1.0))
            raise
        finally:
            for submission in group:
                self._queued_bytes -= submission.size_bytes
                self._queued_events -= sum(part.event_count for part in submission.parts)

    async def _commit_together(self, group: Sequence[_Submission]) -> list[_Submission]:
        """Commits the submissions, and answers them; but for those that it returns, of which nothing is stored: the
        damaged row of one user has stopped them, and each may go on by itself."""
        if not await self._settle(group):
            return []
        checked, events = [], 0
        for submission in group:
            if (parts := self._check(submission)) is not None:
                checked.append((submission, parts))
            for part in submission.parts:
                events += part.event_count
            if events >= SLICE_EVENTS:
                # Decoding a large group takes long.
                events = 0
                await asyncio.sleep(0)
        if not checked or not await self._make_room_for(checked):
            return []
        applicable: list[_Admitted] = [
            (submission, [work for part in parts if (work := self._append(part)) is not None])
            for submission, parts in checked
        ]
        try:
            await self._log.sync()
        except Interrupted as interruption:
            self._stall(interruption)
            error = StorageFull(self._health.message, FULL_RETRY_S) if interruption.full else interruption
            for submission in self._answer_stored(applicable, interruption.stored, interruption):
                _fail(submission, error)
            return []
        except DamagedRow as loss:
            logger.error("shard %d: %s", self.shard_id, loss.message)
            stopped = self._answer_stored(applicable, loss.stored, loss)
            if len(stopped) > 1:
                return stopped
            for submission in stopped:
                _fail(submission, loss)
            return []
        for submission, works in applicable:
            for columns, received_ns in works:
                await self._apply(columns, received_ns)
                self.moves.applied(columns)
            self._acknowledge(submission)
        return []

    def _answer_stored(
        self, applicable: Sequence[_Admitted], parts: int, reason: ProfileServiceError
    ) -> list[_Submission]:
        """Answers those of a group of which something is stored, when its first so many parts are and then a store
        failed: acknowledges those that are stored whole. Returns those of which nothing is known to be stored."""
        rest = []
        for submission, works in applicable:
            if parts >= len(works):
                # What a store has was applied on the way there.
                self._acknowledge(submission)
            elif parts > 0:
                _fail(submission, Interrupted(f"of the request a part was stored: {reason.message}"))
            else:
                rest.append(submission)
            parts -= len(works)
        return rest

    def _acknowledge(self, submission: _Submission) -> None:
        """What is durable and applied is acknowledged, unless this process may have been replaced meanwhile: whoever
        sends it again finds it counted, here or where the shard is then."""
        if not self._lease.is_held:
            _fail(submission, Unavailable(f"shard {self.shard_id} lost its lease meanwhile", retry_after_s=0.1))
        elif not submission.done.done():
            submission.done.set_result(None)

    def _check(self, submission: _Submission) -> list[_Checked] | None:
        """Decodes the submission's parts; None if it was refused whole."""
        try:
            submission.sender.check()
            # Owners may have changed meanwhile. Once this shard has lost a partition, what was routed before goes back
            # whole, even if this shard still owns it: so whoever sent it asks for the owners of now.
            self._check_epoch(submission.epoch)
            checked = []
            for part in submission.parts:
                if len(part.events) > MAX_PAYLOAD_BYTES - RECORD_OVERHEAD_BYTES:
                    most = f"a record of the log holds {MAX_PAYLOAD_BYTES}"
                    raise InvalidArgument("parts.events", f"has {len(part.events)} bytes, {most}")
                columns = decode_events(part.events, self.plan, part.arrival_time_ns, count=part.event_count)
                partitions = (columns.user_hash[: columns.count] >> self._partition_shift).astype(np.int64)
                if not self._owned[partitions].all():
                    raise NotMine(f"shard {self.shard_id} does not own every user of the batch", self.epoch)
                if self.moves.is_freezing and self.moves.frozen[partitions].any():
                    raise NotMine(f"users of the batch are about to leave shard {self.shard_id}", self.epoch)
                checked.append(_Checked(part, columns, partitions))
        except ProfileServiceError as error:
            _fail(submission, error)
            return None
        return checked

    async def _make_room_for(self, checked: list[tuple[_Submission, list[_Checked]]]) -> bool:
        """Whether the log has room for the group; otherwise the group is refused, and nothing has changed."""
        parts = [part for _, parts in checked for part in parts]
        if await self._make_room(sum(len(one.part.events) + RECORD_OVERHEAD_BYTES for one in parts), len(parts)):
            return True
        for submission, _ in checked:
            _fail(submission, StorageFull(self._health.message, retry_after_s=FULL_RETRY_S))
        return False

    async def _make_room(self, size_bytes: int, records: int) -> bool:
        try:
            await self._log.reserve(size_bytes, records)
        except DiskFull as error:
            if self._health.state != FULL:
                logger.error("shard %d takes no writes: %s", self.shard_id, error)
            self._health.full(f"shard {self.shard_id} takes no writes until its disk has room: {error}")
            self._lacking_bytes = min(size_bytes, FULL_PROBE_BYTES)
            return False
        if self._health.state == FULL and size_bytes >= self._lacking_bytes:
            logger.info("shard %d takes writes again", self.shard_id)
            self._health.serving()
        return True

    def _append(self, checked: _Checked) -> tuple[EventColumns, int] | None:
        """Appends what of a part was not counted before, and returns what is to be applied; None for nothing."""
        part, columns = checked.part, checked.columns
        only_tells = part.producer_id and not part.event_count
        fresh = self._state.admit(
            part.producer_id,
            part.sequence,
            part.acknowledged_sequence,
            checked.partitions,
            columns.event_id_hash[: columns.count],
            part.arrival_time_ns,
        )
        if fresh is not None:
            chosen = np.flatnonzero(fresh)
            columns = columns.select(chosen)
            part = replace(part, events=gather_events(part.events, chosen), event_count=columns.count)
        if not columns.count and not only_tells:
            return None
        self.moves.noted(part.producer_id, checked.partitions)
        self._log.append(RECORD_EVENTS, encode_part(part))
        return columns, part.arrival_time_ns

    async def _apply(self, columns: EventColumns, received_ns: int) -> None:
        for start in range(0, columns.count, SLICE_EVENTS):
            stop = min(start + SLICE_EVENTS, columns.count)
            self._state.apply(columns, start, stop, received_ns)
            if stop - start == SLICE_EVENTS:
                await asyncio.sleep(0)

    async def _forget_idle(self) -> None:
        """Removes the users of one stretch of rows who were not heard of for the schema's TTL, by way of the log."""
        table = self._state.table
        idle = self._state.idle(self._clock(), self._expiry_row, self._expiry_row + EXPIRY_ROWS)
        record = encode_forget(idle)
        if idle and not await self._make_room(sum(map(len, record)), 1):
            return
        self._expiry_row += EXPIRY_ROWS
        if self._expiry_row >= table.users.high_water:
            self._expiry_row = 0
        if idle:
            self._log.append(RECORD_FORGET, record)
            await self._log.sync()
            self._state.forget(idle)
            self.moves.forgot(idle)

    def _fail_all(self, error: ProfileServiceError) -> None:
        for submission in self._queue:
            _fail(submission, error)
        self._queue.clear()
        for _, done in self._jobs:
            if not done.done():
                done.set_exception(error)
                done.exception()
        self._jobs.clear()

    def _check_epoch(self, epoch: int) -> None:
        if not self._oldest_epoch <= epoch <= self.epoch:
            raise NotMine(f"shard {self.shard_id} is at epoch {self.epoch}, the request at {epoch}", self.epoch)

    @property
    def is_remote(self) -> bool:
        """Whether what is to be read has to be brought first."""
        return self._state.is_remote

    async def bring(self, user_ids: Sequence[str] = (), producer_ids: Sequence[str] = ()) -> None:
        """Returns when what is asked for of users and producers can be read at once. Raises Unavailable."""
        await self._state.bring(user_ids, producer_ids)

    def read(self, user_ids: Sequence[str], features: Sequence[str], epoch: int | None = None) -> list[bytes]:
        """Encoded profiles in the order of `user_ids`, empty for users never seen; all as of one moment.

        Raises:
            NotMine: the epoch, where one is given, or a user, is another owner's.
            InvalidArgument: a feature that the schema does not declare.
        """
        if epoch is not None:
            self._check_epoch(epoch)
        if features:
            self._check_features(features)
        ids = [user_id.encode() for user_id in user_ids]
        keys = list(map(xxhash.xxh64_intdigest, ids))
        # Users are few, often one: NumPy would take longer.
        owned, shift = self._owned.data, int(self._partition_shift)
        for user_id, key in zip(user_ids, keys, strict=True):
            if not owned[key >> shift]:
                raise NotMine(f"shard {self.shard_id} does not own user {user_id!r}", self.epoch)
        return self._state.table.profiles(Strings.join(ids, keys), self._clock(), features, self._population)

    def _check_features(self, features: Sequence[str]) -> None:
        for index, name in enumerate(features):
            if name not in self._feature_names:
                known = ", ".join(sorted(self._feature_names))
                raise InvalidArgument(f"features[{index}]", f"the schema has no feature {name!r}; it has {known}")

    def acknowledged(self, producer_id: str) -> int:
        """The highest sequence up to which the producer is known to be acknowledged by every owner."""
        return self._state.producers.acknowledged(producer_id)

    def population_state(self) -> bytes:
        """The sums over this shard's users, for `set_population` of every shard."""
        return self._state.table.population.to_state(self._state.table.texts)

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
        """Takes a newer topology; older ones are ignored, and so is any while it is a standby, which owns nothing."""
        if epoch > self.epoch and not (self.following is not None and self.following.replication):
            self.epoch = epoch
            before = self._owned.copy()
            self._owned[:] = False
            self._owned[list(owned)] = True
            if (before & ~self._owned).any():
                self._oldest_epoch = epoch
            self.moves.new_epoch()
            self._look_at_s = 0.0
            self._wake.set()

    def status(self) -> ShardCounters:
        """How the shard does."""
        return ShardCounters(
            user_count=self._state.user_count - self.moves.arriving_users,
            event_count=self._state.event_count,
            state_bytes=self._state.table.memory_bytes,
            log_position=self._log.position,
            queued_bytes=self._queued_bytes,
            duplicate_count=self._state.duplicate_count,
            event_id_count=len(self._state.event_ids),
            sync_mode=self._log.sync_mode,
            log_bytes=self._log.size_bytes,
            snapshot_position=self._snapshotter.last_position,
            snapshot_time_ns=self._snapshotter.last_time_ns,
        )


def _fail(submission: _Submission, error: ProfileServiceError) -> None:
    submission.sender.refused = True
    if not submission.done.done():
        submission.done.set_exception(error)
        # Whoever waited may have gone away; the error is then nobody's.
        submission.done.exception()
