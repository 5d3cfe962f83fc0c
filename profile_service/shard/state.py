"""What a shard holds: profiles and what makes events count once. A function of the log alone.

    live      admit ─▶ (log) ─▶ apply          forget
    replay    note, replay                     forget with the record's position

A snapshot is fuzzy: it begins at the log position S0, from which a recovery replays, and each block of rows is a little
younger, as its stamp says. So a replayed record at position p belongs to

    the population and the counters     always: they were copied at S0
    what counts once                    always: to note something again changes nothing
    a row that a snapshot brought       if p is not below the stamp of its block: else the row holds it already
    any other row                       always: what the snapshot does not hold began, or ended, after S0

A user in two blocks was removed and came again between the two copies: the later one is true.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from profile_service.config import Capacity
from profile_service.domain.columns import EventColumns
from profile_service.domain.memory import Space, reserve
from profile_service.domain.migrate import compare, migrate
from profile_service.domain.schema import Schema
from profile_service.domain.table import MOST_TEXTS, MOST_USERS, ProfileTable
from profile_service.errors import ResourceExhausted
from profile_service.shard.dedupe import Admission
from profile_service.shard.old_layouts import OldLayout
from profile_service.shard.replay import ReplayRuns
from profile_service.shard.state_blocks import StateCopy, describe_layout, load_state
from profile_service.storage.snapshot import Block
from userprofile.internal.v1 import shard_log_pb2


class ShardState(Admission):
    """The profiles of some partitions' users, and what makes their events count once.

    Args:
        partitions: of the whole service; a power of two.
        capacity: bounds of what makes events count once.
        most_users: rows that the table can have.
        most_texts: different texts that the rows can refer to.
        space: memory for the rows, where there is some already.
    """

    is_remote = False
    remark = ""

    def __init__(
        self,
        schema: Schema,
        *,
        partitions: int,
        capacity: Capacity,
        most_users: int = MOST_USERS,
        most_texts: int = MOST_TEXTS,
        space: Space | None = None,
    ) -> None:
        assert partitions & (partitions - 1) == 0
        self.schema = schema
        self._most_users, self._most_texts = most_users, most_texts
        self.table = ProfileTable(schema, most_users=most_users, most_texts=most_texts, space=space)
        super().__init__(partitions, capacity)
        self.event_count = 0
        """Events counted, since the shard's beginning."""
        self.adopted: set[int] = set()
        """Shards that are no more, whose events and population count as this one's."""
        self.newest_stamp = 0
        """The log position that the loaded snapshot needs: a log that ends before it has lost its end."""
        self._stamps: NDArray[np.int64] | None = None
        """By row: the stamp of the block that brought it; None once nothing is left to tell apart."""
        self._replay: ReplayRuns | None = None
        self.hash_shift = 64 - (partitions.bit_length() - 1)
        """A user's hash, shifted right by it, is the partition."""
        self._partition_shift = np.uint64(self.hash_shift)

    @classmethod
    def load(cls, blocks: Iterable[Block], new_state: Callable[[Schema], ShardState]) -> ShardState:
        """The state that a snapshot holds, in an empty one that `new_state` makes of the snapshot's schema. Then the
        log is replayed from the snapshot's position, and `finish_replay` called.

        Raises:
            DataLoss: the blocks are not those of a snapshot, or not all of them.
            SchemaError: this version cannot read the snapshot's schema.
        """
        return load_state(blocks, new_state)

    def apply(self, columns: EventColumns, start: int, stop: int, received_ns: int) -> None:
        """Counts the events `start` to `stop`, which arrived at `received_ns`. The caller has seen the table's
        `has_room`."""
        self.table.apply(columns, start, stop, received_ns)
        self.event_count += stop - start

    def apply_each(self, columns: EventColumns, start: int, stop: int, received_ns: NDArray[np.int64]) -> None:
        """As `apply`, each event with its own time of arrival."""
        self.table.apply_each(columns, start, stop, received_ns)
        self.event_count += stop - start

    @property
    def user_count(self) -> int:
        """Users that there are."""
        return len(self.table)

    async def settle(self, epoch: int, owned: NDArray[np.bool_], producer_ids: Collection[str]) -> None:
        """Everything is here already."""

    async def bring(self, user_ids: Sequence[str], producer_ids: Collection[str]) -> None:
        """Everything is here already."""

    def idle(self, now_ns: int, first: int, last: int) -> list[bytes]:
        """Ids of the users in rows from `first` up to `last` who were not heard of for the schema's TTL."""
        return self.table.idle(now_ns, first, last)

    def forget(self, user_ids: Sequence[bytes], position: int | None = None) -> None:
        """Removes the users' profiles; on replay of the record at `position`, of those that do not hold it already."""
        self._flush_replay()
        for user_id in user_ids:
            if self._stamps is not None and position is not None:
                row = self.table.users.get(user_id)
                if row < 0 or self._stamps[row] > position:
                    continue
                # The row is free for somebody whom no snapshot brought.
                self._stamps[row] = 0
            self.table.remove(user_id.decode())

    def note(
        self,
        producer_id: str,
        sequence: int,
        acknowledged_sequence: int,
        user_hashes: NDArray[np.uint64],
        event_id_hashes: NDArray[np.uint64],
        now_ns: int,
    ) -> None:
        """Learns from a replayed record which events were counted; nothing is left out."""
        partitions = (user_hashes >> self._partition_shift).astype(np.int64)
        if producer_id:
            self.producers.note(producer_id, sequence, acknowledged_sequence, partitions, now_ns)
        if event_id_hashes.any():
            self.event_ids.note(event_id_hashes, partitions, now_ns)

    def replay(self, columns: EventColumns, positions: NDArray[np.int64], received_ns: NDArray[np.int64]) -> None:
        """Counts events, each with its record's position and its time of arrival, where they are not counted yet; they
        can be read after `finish_replay`. The columns must not be filled again before.

        Raises:
            ResourceExhausted: the table has no room for all users, or texts, of the log.
        """
        if self._replay is None:
            self._replay = ReplayRuns(self)
        self._replay.add(columns, positions, received_ns)
        self.event_count += columns.count

    def apply_run(self, columns: EventColumns, positions: NDArray[np.int64], received_ns: NDArray[np.int64]) -> None:
        """For `ReplayRuns`."""
        self._expect_room(self.table.has_room(columns.count, len(columns.buffer)))
        self.table.replay(columns, received_ns, positions, self._stamps_for(positions))

    def apply_to_population(self, columns: EventColumns, received_ns: NDArray[np.int64]) -> NDArray[np.uint32]:
        """For `ReplayRuns`."""
        self._expect_room(self.table.has_room_for_texts(columns.count, len(columns.buffer)))
        return self.table.replay_population(columns, received_ns)

    def apply_to_users(
        self,
        columns: EventColumns,
        positions: NDArray[np.int64],
        received_ns: NDArray[np.int64],
        text_ids: NDArray[np.uint32],
    ) -> None:
        """For `ReplayRuns`."""
        self._expect_room(self.table.has_room_for_users(columns.count, len(columns.buffer)))
        self.table.replay_users(columns, received_ns, positions, self._stamps_for(positions), text_ids)

    def _expect_room(self, has_room: bool) -> None:
        if not has_room:
            raise ResourceExhausted(f"the table has no room for more than {len(self.table)} users", retry_after_s=60.0)

    def _stamps_for(self, positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
        return self._stamps if positions[0] < self.newest_stamp else None

    def finish_replay(self) -> None:
        """Applies what is left of the replay, and forgets what only a replay needs."""
        self._flush_replay()
        if self._replay is not None:
            self._replay.close()
        self._replay = self._stamps = None

    def _flush_replay(self) -> None:
        if self._replay is not None:
            self._replay.flush()

    def holds_already(self, rows: NDArray[np.int64], position: int) -> NDArray[np.bool_]:
        """On a replay: which of these rows (-1 for none) a snapshot brought as they were after the record there."""
        if self._stamps is None:
            return np.zeros(len(rows), np.bool_)
        held: NDArray[np.bool_] = (rows >= 0) & (self._stamps[rows] > position)
        return held

    def check_adoption(self, adoption: shard_log_pb2.Adoption) -> None:
        """Raises what `adopt` would raise, and changes nothing that is kept.

        Raises:
            ValueError: the sums are of another schema.
            ResourceExhausted: the table has no room for their texts.
        """
        self.table.population.check(self._population_of(adoption), self.table.texts)

    def _population_of(self, adoption: shard_log_pb2.Adoption | shard_log_pb2.Beginning) -> bytes:
        """Its population in the layout of this version: an encoded PopulationState."""
        if adoption.layout == describe_layout(self.table):
            return adoption.population
        old = OldLayout.parse(adoption.layout, self.table.layout, self.table.population.layout)
        return self.table.population.relaid(adoption.population, lambda row: old.population_bytes(memoryview(row)))

    def adopt(self, adoption: shard_log_pb2.Adoption) -> None:
        """Takes the sums of a shard that is no more; once, however often they come. Raises as `check_adoption` does."""
        if adoption.shard_id in self.adopted:
            return
        self._flush_replay()
        self.table.add_population(self._population_of(adoption))
        self.event_count += adoption.event_count
        self.duplicate_count += adoption.duplicate_count
        self.adopted.add(adoption.shard_id)

    def beginning(self) -> shard_log_pb2.Beginning:
        """With which a standby of this state begins: the sums."""
        return shard_log_pb2.Beginning(
            population=self.table.population.to_state(self.table.texts),
            event_count=self.event_count,
            duplicate_count=self.duplicate_count,
            layout=describe_layout(self.table),
            adopted=sorted(self.adopted),
            schema_fingerprint=self.schema.fingerprint,
        )

    def check_beginning(self, beginning: shard_log_pb2.Beginning) -> None:
        """Raises ValueError where `begin_anew` cannot take it."""
        if beginning.schema_fingerprint != self.schema.fingerprint:
            raise ValueError("the sums are of another schema")
        self.table.population.check(self._population_of(beginning), self.table.texts)

    def begin_anew(self, beginning: shard_log_pb2.Beginning) -> None:
        """Holds these sums and nothing else: what it has held counts for nothing. `check_beginning` has seen them, and
        no copy is under way."""
        population = self._population_of(beginning)
        self._flush_replay()
        # A snapshot that is older has brought nothing that still counts, whatever its stamps say.
        self._stamps = None
        self.table = ProfileTable(self.schema, most_users=self._most_users, most_texts=self._most_texts)
        self.table.add_population(population)
        self.forget_admitted()
        self.event_count, self.duplicate_count = beginning.event_count, beginning.duplicate_count
        self.adopted = set(beginning.adopted)

    def check_schema(self, schema: Schema, reset_features: Sequence[str]) -> None:
        """Raises what `change_schema` would raise, and changes nothing."""
        compare(self.schema, schema, reset_features).raise_faults()

    def change_schema(self, schema: Schema, reset_features: Sequence[str]) -> None:
        """Rows are of `schema` from here on.

        Raises:
            SchemaChangeRefused: rows of the schema before cannot become rows of `schema`; nothing has changed.
        """
        self._flush_replay()
        self.table = migrate(self.table, schema, reset_features)
        self.schema = schema

    def copy_blocks(self) -> StateCopy:
        """A copy that begins now, to be taken in small steps while the state goes on. One at a time: `finish_copy` ends
        it, whether it was taken to its end or not."""
        return StateCopy(self)

    def finish_copy(self) -> None:
        """The copy that was begun is taken, or given up."""
        self.table.finish_copy()

    def stamp_rows(self, rows: NDArray[np.int64], stamp: int) -> None:
        """Notes that a snapshot's block of this stamp brought the rows; for `load`."""
        if self._stamps is None:
            self._stamps = reserve(self.table.users.capacity, np.int64)
        self._stamps[rows] = stamp
        self.newest_stamp = max(self.newest_stamp, stamp)

    def check_invariants(self) -> None:
        """For tests."""
        self.table.check_invariants()
        self.producers.check_invariants()
        self.event_ids.check_invariants()
        assert self.event_count >= 0
        assert self.duplicate_count >= 0
