"""A shard's state that lives in a store: what is known here is a cache of it, and may be forgotten at any time.

    settle ─▶ (admit ─▶ append)… ─▶ sync: a run of parts at a time
                                    fetch the rows that are not here ─▶ count into staged rows ─▶ write each partition
                                    group in one step ─▶ what was staged can be read

    claim, at the start, after a change of owners and after every fault: a token in each partition group, new each time,
    fences whoever owned it before; then what the groups hold of requests, event ids and sums is read. Rows and
    producers are read when they are needed.

After a fault nothing is known of what was admitted since the last answer: the state is then `lost`, and claimed anew
before the next group. The sequences that were written with the rows tell what the senders' repetitions are.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from profile_service.clock import Clock
from profile_service.config import Capacity
from profile_service.domain.columns import EventColumns
from profile_service.domain.index import Strings
from profile_service.domain.population import PopulationRow
from profile_service.domain.schema import Schema
from profile_service.domain.table import ProfileTable
from profile_service.errors import DataLoss, Unavailable
from profile_service.shard.dedupe import NO_PARTITION, Admission, EventIds
from profile_service.shard.keeping import DamagedRow, Interrupted
from profile_service.shard.log_records import RECORD_EVENTS
from profile_service.shard.row_cache import RowCache, Stage, damaged_row
from profile_service.shard.run_writes import ACKNOWLEDGED, USED, OwnedGroup, RunEvents, RunWrites
from profile_service.shard.store_records import (
    decode_requests,
    merged_event_ids,
)
from profile_service.storage.fs import DiskFull
from profile_service.storage.redis_client import StoreAway, StoreFault, StoreFull
from profile_service.storage.redis_store import GroupState, GroupWrite, Meta, RedisStore
from profile_service.wire.apply_request import REQUEST_PREFIX, ApplyPart, decode_part
from profile_service.wire.decode import decode_batches
from profile_service.wire.plan import WirePlan

RUN_EVENTS = 8192
"""Events that are counted and stored together, at least those of one part: some megabytes of rows."""

MOST_RUN_USERS = 1 << 21
"""More than a part can have events."""

SLICE_EVENTS = 2048
"""Events counted before the loop may turn."""

MOST_ASKED = 16
"""How often rows are asked for at most, when claims or turns of the cache come between question and answer."""

logger = logging.getLogger(__name__)


class StoredState(Admission):
    """As `ShardState`, of what is in a store; and as a log, whose `sync` stores what was appended.

    Args:
        schema: what rows are of.
        store: where they are.
        meta: of the store, for one that has to be made anew.
        cached_users: rows that are kept near.
    """

    is_remote = True

    def __init__(
        self,
        schema: Schema,
        store: RedisStore,
        meta: Meta,
        *,
        capacity: Capacity,
        clock: Clock,
        sync_mode: str = "unknown",
    ) -> None:
        super().__init__(1 << meta.partition_bits, capacity)
        self.schema = schema
        self.remark = ""
        self.position = 0
        """Parts that were stored, in the order in which they were appended, also by a `sync` that then failed."""
        self.size_bytes = 0
        self.sync_mode = sync_mode
        self._store = store
        self._meta = meta
        self._capacity = capacity
        self._clock = clock
        self._plan = WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)
        self._shift = np.uint64(64 - meta.partition_bits)
        self._cache = RowCache(schema, most_users=capacity.cached_users_per_shard, most_run_users=MOST_RUN_USERS)
        self._owner = ""
        self._owned = np.zeros(1 << meta.partition_bits, np.bool_)
        self._lost = False
        self._full = False
        self._groups: dict[int, OwnedGroup] = {}
        self._group_of = np.array([store.keys.group_of(p) for p in range(1 << meta.partition_bits)], np.int64)
        self._users = 0
        self._pending: list[ApplyPart] = []
        self._no_sums = self.table.population.copy()

    @property
    def table(self) -> ProfileTable:
        """The rows that are here; all of them as the store has them."""
        return self._cache.table

    @property
    def user_count(self) -> int:
        """Users that were made in the store, those that have expired among them."""
        return self._users

    @property
    def event_count(self) -> int:
        """Events counted, since the store's beginning."""
        return self.table.population.event_count

    # --- taking hold ---

    async def settle(self, epoch: int, owned: NDArray[np.bool_], producer_ids: Collection[str]) -> None:
        """Returns when this shard is the owner of these partitions for the store, too, and knows what it holds of the
        producers. Raises Interrupted."""
        try:
            while self._lost or not np.array_equal(owned, self._owned):
                # `owned` may change meanwhile.
                await self._claim(epoch, owned.copy())
                await self._know_producers(producer_ids)
            await self._know_producers(producer_ids)
        except StoreFault as fault:
            raise self._interrupted(fault) from fault

    async def bring(self, user_ids: Sequence[str], producer_ids: Collection[str]) -> None:
        """Returns when the users' rows are in the table, as far as they have any, until the loop turns next.

        Raises:
            Unavailable: the store does not answer, or the partitions are not taken over yet.
            DataLoss: a row is damaged.
        """
        users = Strings.join([user_id.encode() for user_id in user_ids])
        owned = self._owned
        self._check_taken(users)
        try:
            if producer_ids:
                await self._know_producers(producer_ids)
            if user_ids:
                # The last that is waited for: nothing is to turn the cache before the rows are read.
                await self._fetch(users)
        except StoreFault as fault:
            raise Unavailable(fault.message, retry_after_s=0.5) from fault
        if self._owned is not owned:
            self._check_taken(users)

    def _check_taken(self, users: Strings) -> None:
        if not self._groups or not self._owned[(users.key >> self._shift).astype(np.int64)].all():
            raise Unavailable("the shard has not taken its partitions over yet", retry_after_s=0.1)

    async def _claim(self, epoch: int, owned: NDArray[np.bool_]) -> None:
        was_lost, self._lost = self._lost, True
        if await self._store.read_meta() is None:
            await self._make_anew()
        elif was_lost and self._owner:
            await self._look_for_losses()
        # From the first claim on nothing can be told of who owned it before.
        self._owner = ""
        owner = f"{epoch}:{secrets.token_hex(8)}"
        partitions = np.flatnonzero(owned)
        by_group = {
            int(group): partitions[self._group_of[partitions] == group].tolist()
            for group in np.unique(self._group_of[partitions])
        }
        await asyncio.gather(*(self._store.claim(group, mine, mine[0], owner) for group, mine in by_group.items()))
        held = await asyncio.gather(*(self._store.read_group(group, self.schema.fingerprint) for group in by_group))
        carried = await self._store.carried()
        # From here on nothing waits: whoever asked before sees that all is forgotten, and asks again.
        self._cache.clear()
        self.forget_admitted()
        self._users = 0
        self._groups = {
            group: self._take_group(group, mine, state)
            for (group, mine), state in zip(by_group.items(), held, strict=True)
        }
        self._load_dedupe(held, carried)
        self._owned, self._owner, self._lost = owned, owner, False

    async def _look_for_losses(self) -> None:
        """Whether the store has what this owner wrote: a replica that took over may lack the last of it."""
        groups = list(self._groups.values())
        found = await asyncio.gather(*(self._store.written(group.number, group.segment) for group in groups))
        for group, (owner, writes) in zip(groups, found, strict=True):
            # Another owner of no later epoch is one from before this one's claim.
            kept = writes >= group.writes if owner == self._owner else _epoch_of(owner) > _epoch_of(self._owner)
            if group.writes and not kept:
                self.remark = "the store has lost its last writes; profiles are as it has them"
                logger.critical("%s: %s", self._store.url.shown, self.remark)
                return

    async def _make_anew(self) -> None:
        """The store was emptied, or has come back without what it held."""
        self.remark = "the store came back empty: what it held before is gone"
        logger.critical("%s: %s", self._store.url.shown, self.remark)
        self._meta.store_id = secrets.token_hex(16)
        await self._store.make_meta(self._meta)

    def _take_group(self, number: int, mine: list[int], state: GroupState) -> OwnedGroup:
        """What the group holds under the segments that are this owner's now goes into the sums of the shard."""
        texts = self.table.texts
        group = OwnedGroup(number, mine)
        for segment, packed in state.population.items():
            if segment in mine:
                part = PopulationRow(self.schema)
                part.unpack(packed, texts)
                self.table.population.add(part)
                if segment == group.segment:
                    group.packed = packed
        self._users += sum(count for segment, count in state.users.items() if segment in mine)
        return group

    def _load_dedupe(self, held: Sequence[GroupState], carried: Sequence[bytes]) -> None:
        chunks = chain(carried, *(state.event_ids for state in held))
        keys, times = merged_event_ids(chunks)
        # They are in the store by partition group, and go nowhere from here.
        self.event_ids.load(EventIds(keys, times, np.full(len(keys), NO_PARTITION, np.int32)))
        requests = [request for state in held for chunk in state.requests for request in decode_requests(chunk)]
        for request_id, partitions, when in sorted(requests, key=lambda request: request[2]):
            self.producers.note(request_id, 0, 0, partitions, when)

    async def _know_producers(self, producer_ids: Collection[str]) -> None:
        while True:
            producers = self.producers
            unknown = [
                producer_id
                for producer_id in producer_ids
                if producer_id and not producer_id.startswith(REQUEST_PREFIX) and producer_id not in producers
            ]
            if not unknown or not self._groups:
                return
            found = await asyncio.gather(*(self._store.read_producers(group, unknown) for group in self._groups))
            if self.producers is producers:
                break
            # Claimed meanwhile: the answers may be from before the last write.
        for number, producer_id in enumerate(unknown):
            last = np.zeros(len(self._owned), np.int64)
            acknowledged = used_ns = 0
            for answers in found:
                for name, value in answers[number].items():
                    if name == ACKNOWLEDGED:
                        acknowledged = max(acknowledged, value)
                    elif name == USED:
                        used_ns = max(used_ns, value)
                    else:
                        last[int(name)] = value
            if used_ns and producer_id not in producers:
                producers.load_producers([(producer_id, last, acknowledged, used_ns)])

    def _interrupted(self, fault: StoreFault, stored: int = 0) -> Interrupted:
        self._lost = True
        self._full = isinstance(fault, StoreFull)
        return Interrupted(fault.message, full=self._full, stored=stored)

    # --- what the commit loop calls ---

    def apply(self, columns: EventColumns, start: int, stop: int, received_ns: int) -> None:
        """`sync` has."""

    def idle(self, now_ns: int, first: int, last: int) -> list[bytes]:
        """The store forgets by itself."""
        return []

    def forget(self, user_ids: Sequence[bytes], position: int | None = None) -> None:
        """Nothing is forgotten here."""
        assert not user_ids

    def on_failure(self, failed: Callable[[], None]) -> None:
        """Nothing fails here between two groups."""

    def check(self) -> None:
        """Nothing fails here between two groups."""

    async def reserve(self, size_bytes: int, records: int) -> None:
        """Raises DiskFull while the store that was full takes no writes."""
        if self._full:
            try:
                await self._store.probe()
            except StoreFault as fault:
                raise DiskFull(fault.message) from fault
            self._full = False

    def append(self, kind: int, payload: Sequence[bytes | memoryview]) -> None:
        """A part to be stored by the next `sync`."""
        assert kind == RECORD_EVENTS
        self._pending.append(decode_part(b"".join(payload)))

    async def sync(self) -> None:
        """Returns when the store has everything appended, and it can be read.

        Raises:
            Interrupted: the store has what that says, and nothing of the rest where it is full.
            DamagedRow: that of a user whose events were appended.
        """
        pending, self._pending = self._pending, []
        stored = 0
        try:
            for run in _runs(pending):
                await self._store_run(run)
                stored += len(run)
        except StoreFault as fault:
            raise self._interrupted(fault, stored) from fault
        except DataLoss as loss:
            # What was admitted is not all stored.
            self._lost = True
            raise DamagedRow(loss.message, stored) from loss
        finally:
            self.position += stored

    async def close(self) -> None:
        """Ends the store's connections."""
        await self._store.close()

    async def _store_run(self, run: list[ApplyPart]) -> None:
        """Counts the events of these parts, stores what they change, and lets it be read."""
        writes = RunWrites(self._groups, self._group_of, self.schema, self._capacity, self.producers.acknowledged)
        for part in run:
            # A shard that owns nothing, before its first move or after its last, has nowhere to note it; others have.
            if not part.event_count and self._groups:
                writes.note_acknowledged(part)
        parts = [part for part in run if part.event_count]
        if not parts:
            await self._write(writes.by_group)
            return
        events = self._decode(parts)
        for number in np.unique(events.group).tolist():
            writes.of(number)
        writes.note_admitted(parts, events, self._clock())
        stage, known = await self._stage(events.columns)
        try:
            await self._count(writes.by_group, stage, events)
            packed = await self._write_rows(writes.by_group, stage, known)
        except BaseException:
            self._cache.drop(stage.users)
            raise
        self._cache.publish(stage, packed)
        self.table.replay_population(events.columns, events.received_ns)

    def _decode(self, parts: Sequence[ApplyPart]) -> RunEvents:
        counts = [part.event_count for part in parts]
        arrivals_ns = np.array([part.arrival_time_ns for part in parts], np.int64)
        columns = decode_batches([part.events for part in parts], counts, self._plan, arrivals_ns.tolist())
        part = np.repeat(np.arange(len(parts)), counts)
        partition = (columns.user_hash[: columns.count] >> self._shift).astype(np.int64)
        group = self._group_of[partition]
        order = np.argsort(group, kind="stable")
        part = part[order]
        return RunEvents(columns.select(order), part, partition[order], group[order], arrivals_ns[part])

    async def _stage(self, columns: EventColumns) -> tuple[Stage, NDArray[np.bool_]]:
        """The rows of the events' users, and which of these had one."""
        users = Strings(columns.buffer, columns.user_offset, columns.user_length, columns.user_hash)
        self._cache.make_room(columns.count, len(columns.buffer))
        # Else readers could turn a small cache again and again.
        with self._cache.pinned():
            while True:
                stage = self._cache.begin(users)
                known = await self._fetch(stage.users)
                if self._cache.holds(stage):
                    self._cache.fill(stage, self._clock())
                    return stage, known

    async def _fetch(self, users: Strings) -> NDArray[np.bool_]:
        """Brings rows that are not here; returns which users have one. These are all in the table, until the loop turns
        next. Raises StoreFault and DataLoss."""
        for again in range(MOST_ASKED):
            asked = self._cache.moment
            missing = np.flatnonzero(~self._cache.find(users))
            if not len(missing):
                return np.ones(len(users.key), np.bool_)
            # Else others could turn a small cache each time.
            with self._cache.pinned() if again else nullcontext():
                rows = await self._ask(users.take(missing))
            if not self._cache.may_have_forgotten(asked):
                return self._take(users, dict(zip(missing.tolist(), rows, strict=True)))
        raise StoreAway(f"{self._store.url.shown} answers later than rows are forgotten, {MOST_ASKED} times over")

    async def _ask(self, users: Strings) -> list[bytes | None]:
        group = self._group_of[(users.key >> self._shift).astype(np.int64)]
        asked = [(number, np.flatnonzero(group == number)) for number in np.unique(group).tolist()]
        answers = await asyncio.gather(
            *(
                self._store.fetch(number, self.schema.fingerprint, users.take(which).to_list())
                for number, which in asked
            )
        )
        rows = dict(zip(np.concatenate([which for _, which in asked]).tolist(), chain(*answers), strict=True))
        return [rows[place] for place in range(len(users.key))]

    def _take(self, users: Strings, rows: dict[int, bytes | None]) -> NDArray[np.bool_]:
        """Puts rows that the store was asked for, by place in `users`, beside those that are here; returns which users
        have one now."""
        # What somebody else brought meanwhile, or stored, is not older.
        known = self._cache.find(users)
        packed = {place: row for place, row in rows.items() if row is not None and not known[place]}
        if self._cache.make_room(len(packed), sum(map(len, packed.values()))):
            # What was here is now in the generation before.
            self._cache.find(users)
        lacking = np.array(list(packed), np.int64)
        self._put(users.take(lacking), list(packed.values()))
        known[lacking] = True
        return known

    def _put(self, users: Strings, packed: list[bytes]) -> None:
        try:
            self._cache.put(users, packed)
        except DataLoss:
            number = self._cache.first_damaged(packed)
            user_id = users.to_list()[number]
            group = int(self._group_of[int(users.key[number] >> self._shift)])
            key = self._store.keys.row(group, self.schema.fingerprint, user_id)
            raise damaged_row(user_id, key, self._store.url.shown) from None

    async def _count(self, writes: dict[int, GroupWrite], stage: Stage, events: RunEvents) -> None:
        table = stage.table
        for number, write in writes.items():
            first, last = np.searchsorted(events.group, [number, number + 1]).tolist()
            if first == last:
                continue
            packed = self._groups[number].packed
            if packed:
                table.population.unpack(packed, table.texts)
            else:
                table.population.load(self._no_sums)
            for start in range(first, last, SLICE_EVENTS):
                table.apply_each(events.columns, start, min(start + SLICE_EVENTS, last), events.received_ns)
                await asyncio.sleep(0)
            write.population = table.population.pack(table.texts)

    async def _write_rows(self, writes: dict[int, GroupWrite], stage: Stage, known: NDArray[np.bool_]) -> list[bytes]:
        """Writes the stage's rows, which stand by group, and returns them as written."""
        group = self._group_of[(stage.users.key >> self._shift).astype(np.int64)]
        user_ids = stage.users.to_list()
        packed: list[bytes] = []
        for number in sorted(writes):
            first, last = np.searchsorted(group, [number, number + 1]).tolist()
            write = writes[number]
            write.user_ids = user_ids[first:last]
            write.rows = self._cache.pack(stage, first, last)
            write.new_users = int(last - first - np.count_nonzero(known[first:last]))
            packed += write.rows
        await self._write(writes)
        return packed

    async def _write(self, writes: dict[int, GroupWrite]) -> None:
        """Writes to each group. Where one fails, so does all of it, when it is known of the others."""
        done = await asyncio.gather(
            *(self._store.write(self._owner, write) for write in writes.values()), return_exceptions=True
        )
        faults = [answer for answer in done if isinstance(answer, BaseException)]
        for fault in faults:
            if not isinstance(fault, StoreFault):
                raise fault
        if faults:
            full = [fault for fault in faults if isinstance(fault, StoreFull)]
            if len(full) == len(done):
                raise full[0]
            if len(full) == len(faults):
                raise StoreAway(f"a part of a group was stored, the rest was not: {full[0].message}") from full[0]
            raise next(fault for fault in faults if not isinstance(fault, StoreFull))
        for number, write in writes.items():
            group = self._groups[number]
            group.writes += 1
            group.packed = write.population or group.packed
            self._users += write.new_users


def _epoch_of(owner: str) -> int:
    """Of epoch:token; 0 where there is none."""
    return int(owner.partition(":")[0] or 0)


def _runs(parts: Sequence[ApplyPart]) -> Iterator[list[ApplyPart]]:
    """Neighbours together, up to some number of events."""
    run: list[ApplyPart] = []
    events = 0
    for part in parts:
        if run and events + part.event_count > RUN_EVENTS:
            yield run
            run, events = [], 0
        run.append(part)
        events += part.event_count
    if run:
        yield run
