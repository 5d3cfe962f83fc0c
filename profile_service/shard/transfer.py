"""What a shard holds of some partitions, as pieces that another shard, or its standby, adds to what it holds: rows,
forgotten users, and what makes events count once.

    Departure   here: everything once, then again what has changed since it was taken, until nothing is left
    receive     there, and when its log is replayed

While events go on, a piece is already old when it is taken; the last pieces, after writes to the partitions have ended,
make up for it. A row is taken whole, however often, so the events between need not be sent: nothing is decided twice.

    step ─▶ rows in the order of their numbers ─▶ ┐
            producers, requests, event ids      ─▶ ├─▶ … ─▶ rows, names and users touched meanwhile ─▶ … ─▶ is_caught_up
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.columns import EventColumns
from profile_service.domain.index import Strings
from profile_service.domain.memory import reserve
from profile_service.domain.row_batch import RowBatch, check_rows, has_room, put_rows, take_rows
from profile_service.domain.table import ProfileTable
from profile_service.errors import ResourceExhausted
from profile_service.shard.dedupe import NO_PARTITION, EventIds
from profile_service.shard.old_layouts import OldLayout
from profile_service.shard.state import ShardState
from profile_service.shard.state_blocks import describe_layout
from profile_service.wire.apply_request import REQUEST_PREFIX
from userprofile.internal.v1 import shard_log_pb2

PIECE_BYTES = 1 << 18
"""Rows of a piece: half a millisecond of copying on either side, and one short sync."""

SCANNED_ROWS = 1 << 14
"""Rows looked at for a piece, at most."""

PRODUCERS_A_PIECE = 256
REQUESTS_A_PIECE = 1 << 12
EVENT_IDS_A_PIECE = 1 << 14

Transfer = shard_log_pb2.Transfer


class Departure:
    """Takes what a state holds of some partitions, piece by piece, while the state goes on.

    Whoever changes the state tells it afterwards, in the same turn of the loop as a rule: `applied`, `noted`, `forgot`.

    Args:
        follows: whether it takes again what changes; else what there is at the beginning is taken once, as it is just
            then, and nobody tells it anything.
    """

    def __init__(self, state: ShardState, partitions: Sequence[int], *, follows: bool = True) -> None:
        self._state = state
        self.partitions = list(partitions)
        self._wanted = np.zeros(state.producers.partitions, np.bool_)
        self._wanted[self.partitions] = True
        self._shift = 64 - (state.producers.partitions.bit_length() - 1)
        users = state.table.users
        self._rows_a_piece = max(1, PIECE_BYTES // state.table.layout.row_bytes)
        self._next_row, self._end_row = 0, users.high_water
        """Rows that were not looked at yet. Later ones are told of."""
        self._rows: deque[NDArray[np.int64]] = deque()
        """Numbers of rows to be taken."""
        self._row_count = 0
        self._is_waiting: NDArray[np.uint8] = reserve(users.capacity, np.uint8)
        """By number: whether it is among `_rows`."""
        self._forgotten: dict[bytes, None] = {}
        self._next_producer, self._end_producer = 0, state.producers.places
        self._next_request, self._end_request = state.producers.requests_held
        self._names: dict[str, None] = {}
        """Producers and requests that are to be taken, again perhaps."""
        self._next_event_id, end_event_id = state.event_ids.held
        self._end_event_id = None if follows else end_event_id
        self.row_count = 0
        """Rows taken so far, each as often as it was."""

    @property
    def behind(self) -> int:
        """About how much is left to be taken: rows, names, event ids."""
        producers = self._end_producer - self._next_producer
        requests = self._end_request - self._next_request
        event_ids = self._last_event_id - self._next_event_id
        scanned = self._end_row - self._next_row
        return scanned + self._row_count + len(self._forgotten) + len(self._names) + producers + requests + event_ids

    @property
    def is_caught_up(self) -> bool:
        """Whether everything is taken as it is now."""
        return self.behind <= 0

    @property
    def _last_event_id(self) -> int:
        return self._state.event_ids.held[1] if self._end_event_id is None else self._end_event_id

    def applied(self, columns: EventColumns) -> None:
        """These events are applied."""
        count = columns.count
        partitions = (columns.user_hash[:count] >> np.uint64(self._shift)).astype(np.int64)
        ours = np.flatnonzero(self._wanted[partitions])
        if len(ours):
            users = Strings(
                columns.buffer, columns.user_offset[ours], columns.user_length[ours], columns.user_hash[ours]
            )
            self._add_rows(self._state.table.users.get_many(users))

    def noted(self, producer_id: str, partitions: NDArray[np.int64]) -> None:
        """A part of this producer, or of this request, was noted for these partitions."""
        if producer_id and (not len(partitions) or self._wanted[partitions].any()):
            self._names[producer_id] = None

    def forgot(self, user_ids: Iterable[bytes]) -> None:
        """These users are no more."""
        for user_id in user_ids:
            self._forgotten[user_id] = None

    def _add_rows(self, numbers: NDArray[np.int64]) -> None:
        numbers = np.unique(numbers[numbers >= 0])
        fresh = numbers[self._is_waiting[numbers] == 0]
        if len(fresh):
            self._is_waiting[fresh] = 1
            self._rows.append(fresh)
            self._row_count += len(fresh)

    def step(self) -> bytes:
        """The next piece: an encoded Transfer, of next to nothing where little is left."""
        piece = Transfer(
            schema_fingerprint=self._state.schema.fingerprint,
            layout=describe_layout(self._state.table),
            partitions=self.partitions,
        )
        # Before the rows: a user who was forgotten and is there again has a row that follows.
        piece.forgotten.extend(self._forgotten)
        self._forgotten = {}
        self._take_rows(piece)
        self._take_producers(piece)
        self._take_requests(piece)
        self._take_event_ids(piece)
        return piece.SerializeToString()

    def _take_rows(self, piece: Transfer) -> None:
        if self._next_row < self._end_row and self._row_count < self._rows_a_piece:
            end = min(self._next_row + SCANNED_ROWS, self._end_row)
            self._add_rows(self._state.table.users.choose(self._next_row, end, self._shift, self._wanted))
            self._next_row = end
        taken: list[NDArray[np.int64]] = []
        room = self._rows_a_piece
        while self._rows and room:
            numbers = self._rows.popleft()
            if len(numbers) > room:
                self._rows.appendleft(numbers[room:])
                numbers = numbers[:room]
            taken.append(numbers)
            room -= len(numbers)
        if not taken:
            return
        numbers = np.concatenate(taken)
        self._is_waiting[numbers] = 0
        self._row_count -= len(numbers)
        # A number may have gone to somebody of another partition since.
        batch = take_rows(self._state.table, self._still_ours(numbers))
        self.row_count += len(batch.lengths)
        piece.id_lengths, piece.ids = batch.lengths.tobytes(), batch.ids.tobytes()
        piece.rows = batch.rows.tobytes()
        piece.text_lengths, piece.texts = batch.text_lengths.tobytes(), batch.texts.tobytes()

    def _still_ours(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        keys = self._state.table.users.hashes(numbers)
        return numbers[self._wanted[(keys >> np.uint64(self._shift)).astype(np.int64)]]

    def _take_producers(self, piece: Transfer) -> None:
        held = self._state.producers
        end = min(self._next_producer + PRODUCERS_A_PIECE, self._end_producer)
        names = [producer.producer_id for producer in held.producers(self._next_producer, end)]
        self._next_producer = end
        touched = list(self._names)[:PRODUCERS_A_PIECE]
        for name in touched:
            del self._names[name]
            if name.startswith(REQUEST_PREFIX):
                self._add_request(piece, name)
            else:
                names.append(name)
        for name in names:
            producer = held.producer(name)
            if producer is not None:
                piece.producers.add(
                    producer_id=name,
                    acknowledged=producer.acknowledged,
                    used_ns=producer.used_ns,
                    last=producer.last[self.partitions].tobytes(),
                )

    def _take_requests(self, piece: Transfer) -> None:
        end = min(self._next_request + REQUESTS_A_PIECE, self._end_request)
        for request in self._state.producers.requests(self._next_request, end):
            self._add_request(piece, request.request_id)
        self._next_request = end

    def _add_request(self, piece: Transfer, request_id: str) -> None:
        request = self._state.producers.request(request_id)
        if request is not None:
            reached = request.among(np.array(self.partitions))
            if reached:
                piece.requests.add(request_id=request_id, used_ns=request.used_ns, reached=reached)

    def _take_event_ids(self, piece: Transfer) -> None:
        event_ids = self._state.event_ids
        end = min(self._next_event_id + EVENT_IDS_A_PIECE, self._last_event_id)
        if end > self._next_event_id:
            copied = event_ids.copy(self._next_event_id, end)
            # Of an old snapshot's it is not known where they belong.
            ours = (copied.partitions == NO_PARTITION) | self._wanted[copied.partitions]
            piece.event_id_keys = copied.keys[ours].tobytes()
            piece.event_id_times = copied.times[ours].tobytes()
            piece.event_id_partitions = copied.partitions[ours].tobytes()
        self._next_event_id = max(self._next_event_id, end)


def check(state: ShardState, piece: Transfer) -> RowBatch:
    """The rows of a piece that `receive` can take, room provided.

    Raises ValueError where it cannot.
    """
    if piece.schema_fingerprint != state.schema.fingerprint:
        raise ValueError("its rows are of another schema")
    rows = RowBatch(
        np.frombuffer(piece.id_lengths, np.int32),
        np.frombuffer(piece.ids, np.uint8),
        _rows(state.table, piece),
        np.frombuffer(piece.text_lengths, np.int32),
        np.frombuffer(piece.texts, np.uint8),
    )
    check_rows(state.table.layout, rows)
    partitions = list(piece.partitions)
    if sorted(set(partitions)) != sorted(partitions) or not set(partitions) <= set(range(state.producers.partitions)):
        raise ValueError(f"there are no such partitions: {partitions}")
    if any(len(producer.last) != 8 * len(partitions) for producer in piece.producers):
        raise ValueError("a producer's sequences are not one for each partition")
    if any(not set(request.reached) <= set(partitions) for request in piece.requests):
        raise ValueError("a request has reached other partitions")
    _event_ids(piece)
    return rows


def check_room(state: ShardState, batch: RowBatch) -> None:
    """Raises ResourceExhausted where `receive` finds no room for it."""
    if not has_room(state.table, batch):
        raise ResourceExhausted(f"there is no room for more than {len(state.table)} users", retry_after_s=10.0)


def receive(state: ShardState, piece: Transfer, batch: RowBatch, position: int | None = None) -> int:
    """Adds a piece to the state; returns how many users are new.

    Args:
        state: one that has room for it.
        piece: one that `check` has seen.
        batch: its rows.
        position: of the record that holds it, on a replay: a row that holds it already stays as it is.
    """
    state.forget(piece.forgotten, position)
    before = len(state.table)
    put_rows(state.table, _still_to_come(state, batch, position))
    partitions = np.array(piece.partitions, np.int64)
    for producer in piece.producers:
        last = np.zeros(state.producers.partitions, np.int64)
        last[partitions] = np.frombuffer(producer.last, np.int64)
        state.producers.receive(producer.producer_id, last, producer.acknowledged, producer.used_ns)
    for request in piece.requests:
        state.producers.receive_request(request.request_id, request.reached, request.used_ns)
    state.event_ids.load(_event_ids(piece))
    return len(state.table) - before


def _still_to_come(state: ShardState, batch: RowBatch, position: int | None) -> RowBatch:
    """Without the rows that a snapshot brought as they were after the record at `position`."""
    if position is None or not len(batch.lengths):
        return batch
    ends = np.cumsum(batch.lengths, dtype=np.int64)
    joined = batch.ids.tobytes()
    users = [joined[start:end] for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]
    held = state.holds_already(state.table.users.get_many(Strings.join(users)), position)
    if not held.any():
        return batch
    kept = [user for user, is_held in zip(users, held.tolist(), strict=True) if not is_held]
    return batch._replace(
        lengths=batch.lengths[~held], ids=np.frombuffer(b"".join(kept), np.uint8), rows=batch.rows[~held]
    )


def _rows(table: ProfileTable, piece: Transfer) -> NDArray[np.uint8]:
    """The piece's rows in the layout of this version."""
    row_bytes = table.layout.row_bytes
    rows = np.frombuffer(piece.rows, np.uint8)
    if piece.layout == describe_layout(table):
        return rows.reshape(-1, row_bytes)
    old = OldLayout.parse(piece.layout, table.layout, table.population.layout).users
    return old.convert(rows.reshape(-1, old.row_bytes), row_bytes)


def _event_ids(piece: Transfer) -> EventIds:
    event_ids = EventIds(
        np.frombuffer(piece.event_id_keys, np.uint64),
        np.frombuffer(piece.event_id_times, np.int64),
        np.frombuffer(piece.event_id_partitions, np.int32),
    )
    if len({len(part) for part in event_ids}) > 1:
        raise ValueError("event ids, their times and their partitions are not as many")
    return event_ids
