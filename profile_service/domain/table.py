"""The profiles of a shard's users: one row a user, and the two indexes that lead to rows and texts.

    ByteIndex users   user id → row              rows     (users, row_bytes), in reserved address space
    ByteIndex texts   text → interned id - 1     layout   which slots of a row each feature owns

A text that no row refers to any more is found while rows are copied anyway (`begin_copy`): each copied row marks its
texts, and so does whatever touches a text after that. What has no mark when all rows are copied is nobody's.

Nothing here waits, reads a clock or draws a random number: the same events in the same order give the same rows.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.apply import POPULATION, USERS, Scratch, apply_events
from profile_service.domain.columns import EventColumns
from profile_service.domain.decay import NS, half_life_to_ns
from profile_service.domain.header import merge_header
from profile_service.domain.index import ByteIndex, Strings
from profile_service.domain.kernel import leaf_kernel
from profile_service.domain.layout import EVENT_COUNT, LAST_RECEIVED, Layout
from profile_service.domain.memory import Space, reserve
from profile_service.domain.population import Population, PopulationRow
from profile_service.domain.profile import EVERY_TIME, UNKNOWN, Encoder
from profile_service.domain.schema import Schema

MOST_USERS = 1 << 25
MOST_TEXTS = 1 << 26
USER_ID_BYTES = 32
"""Address space set aside for a user's id on average."""

_NO_STAMPS = np.zeros(0, dtype=np.int64)
_NO_MARKS = np.zeros(0, dtype=np.uint8)


class ProfileTable:
    """Rows of users, updated by columns of events.

    >>> from profile_service.domain.schema import parse_schema
    >>> schema = parse_schema("{name: s, events: {view: {weight: 1}}, features: {views: {kind: counter}}}")
    >>> table = ProfileTable(schema, most_users=1000, most_texts=1000)
    >>> len(table), table.profile("nobody", read_ns=0)
    (0, b'')
    """

    def __init__(
        self,
        schema: Schema,
        *,
        most_users: int = MOST_USERS,
        most_texts: int = MOST_TEXTS,
        space: Space | None = None,
        texts: ByteIndex | None = None,
    ) -> None:
        self.users = ByteIndex(most_users, most_users * USER_ID_BYTES)
        self.texts = (
            texts if texts is not None else ByteIndex(most_texts, most_texts * USER_ID_BYTES, reuse_by_length=True)
        )
        """Another table's, where its rows are to move between the two."""
        self._marks: NDArray[np.uint8] | None = None
        """By number of a text that was there when a copy began: whether a row may refer to it. None while nothing is
        copied."""
        self._space = space
        layout = Layout.compile(schema)
        self._bind(
            schema,
            layout,
            reserve_rows(most_users, layout, None if space is None else space.region),
            PopulationRow(schema),
        )

    def _bind(self, schema: Schema, layout: Layout, rows: NDArray[np.uint8], population: PopulationRow) -> None:
        self.schema = schema
        self.layout = layout
        self.population = population
        self._rows = rows
        self._views = self.layout.views_of(self._rows)
        values = [value.encode() for value in layout.values]
        listed = ByteIndex(len(values), sum(map(len, values)))
        listed.add(values)
        features = layout.features
        self._interned = sorted({f.attribute for f in features if f.interns})
        self._constant: tuple[Any, ...] = (
            *listed.arrays,
            layout.template,
            layout.header,
            *layout.whole_views_of(rows),
            layout.operations,
            *layout.tables,
            *population.views,
            population.layout.operations,
            *population.layout.tables,
            np.array([half_life_to_ns(seconds) for seconds in layout.half_lives_s], dtype=np.int64),
            np.array(self._interned, dtype=np.int64),
            np.array(sorted({f.attribute for f in features if f.vocabulary()}), dtype=np.int64),
        )
        """What `apply_events` is given each time."""
        arrays = self.texts.arrays
        self._encoder = Encoder(layout, layout.whole_views_of(rows), arrays.entries, arrays.arena)
        self._scratch, self._scratch_beside = (
            Scratch.make(len(layout.half_lives_s), len(schema.text_attributes)) for _ in range(2)
        )

    def __len__(self) -> int:
        return len(self.users)

    @property
    def rows(self) -> NDArray[np.uint8]:
        """(most users, row_bytes): the users' rows, by their numbers. Below `users.high_water` one that nobody has is
        fresh; above, nothing is written yet."""
        return self._rows

    def rebound(
        self, schema: Schema, layout: Layout, rows: NDArray[np.uint8], population: PopulationRow
    ) -> ProfileTable:
        """A table of `schema` with this one's users and texts, and with these rows of theirs: it takes this one's
        place."""
        table = copy.copy(self)
        table._bind(schema, layout, rows, population)
        return table

    def clear(self) -> None:
        """Forgets every user."""
        self.users.clear()

    @property
    def memory_bytes(self) -> int:
        """Bytes in use by rows, indexes and texts."""
        return self.users.high_water * self.layout.row_bytes + self.users.memory_bytes + self.texts.memory_bytes

    def has_room(self, events: int, size_bytes: int) -> bool:
        """Whether that many events of that many bytes surely fit, were every user and text of theirs new."""
        return self.has_room_for_users(events, size_bytes) and self.has_room_for_texts(events, size_bytes)

    def has_room_for_users(self, events: int, size_bytes: int) -> bool:
        """As `has_room`, but for the users alone."""
        return self.users.make_room(events, size_bytes)

    def has_room_for_texts(self, events: int, size_bytes: int) -> bool:
        """As `has_room`, but for the texts alone."""
        return self.texts.make_room(events * max(1, len(self._interned)), size_bytes)

    def apply(self, columns: EventColumns, start: int, stop: int, received_ns: int) -> None:
        """Counts the events `start` to `stop` of `columns` into their users' rows and into the population.

        `received_ns` is when they arrived. The caller has seen `has_room`.
        """
        received = np.full(stop - start, received_ns, dtype=np.int64)
        self._apply(POPULATION | USERS, columns, start, stop, received, _NO_STAMPS, _NO_STAMPS, self._no_text_ids)

    def apply_each(self, columns: EventColumns, start: int, stop: int, received_ns: NDArray[np.int64]) -> None:
        """As `apply`, each event with its own time of arrival."""
        received = received_ns[start:stop]
        self._apply(POPULATION | USERS, columns, start, stop, received, _NO_STAMPS, _NO_STAMPS, self._no_text_ids)

    def replay(
        self,
        columns: EventColumns,
        received_ns: NDArray[np.int64],
        positions: NDArray[np.int64],
        stamps: NDArray[np.int64] | None,
    ) -> None:
        """As `apply` for all of `columns`, each with its own time of arrival; but an event goes to the population only
        where the stamp of its row, in `stamps`, is above its position: the row holds it already."""
        held = _NO_STAMPS if stamps is None else stamps
        self._apply(POPULATION | USERS, columns, 0, columns.count, received_ns, held, positions, self._no_text_ids)

    def replay_population(self, columns: EventColumns, received_ns: NDArray[np.int64]) -> NDArray[np.uint32]:
        """The part of `replay` that goes to the population; returns what `replay_users` must be given. Another thread
        may be in `replay_users` of events before meanwhile."""
        text_ids = np.empty((len(self._interned), columns.count), dtype=np.uint32)
        self._apply(POPULATION, columns, 0, columns.count, received_ns, _NO_STAMPS, _NO_STAMPS, text_ids)
        return text_ids

    def replay_users(
        self,
        columns: EventColumns,
        received_ns: NDArray[np.int64],
        positions: NDArray[np.int64],
        stamps: NDArray[np.int64] | None,
        text_ids: NDArray[np.uint32],
    ) -> None:
        """The part of `replay` that goes to users' rows."""
        held = _NO_STAMPS if stamps is None else stamps
        self._apply(USERS, columns, 0, columns.count, received_ns, held, positions, text_ids)

    @property
    def _no_text_ids(self) -> NDArray[np.uint32]:
        return np.empty((len(self._interned), 0), dtype=np.uint32)

    def _apply(
        self,
        parts: int,
        columns: EventColumns,
        start: int,
        stop: int,
        received_ns: NDArray[np.int64],
        stamps: NDArray[np.int64],
        positions: NDArray[np.int64],
        text_ids: NDArray[np.uint32],
    ) -> None:
        arguments: tuple[Any, ...] = (
            *self.users.arrays,
            *self.texts.arrays,
            *self._constant,
            *(self._scratch_beside if parts == USERS else self._scratch),
            columns.buffer,
            columns.user_offset,
            columns.user_length,
            columns.user_hash,
            columns.type_index,
            columns.time_ns,
            columns.text_offset,
            columns.text_length,
            columns.text_hash,
            columns.number,
            start,
            stop,
            received_ns,
            stamps,
            positions,
            _NO_MARKS if self._marks is None else self._marks,
            parts,
            text_ids,
        )
        apply_events(*arguments)

    def profile(
        self,
        user_id: str,
        read_ns: int,
        names: Sequence[str] = (),
        population: Population | None = None,
    ) -> bytes:
        """The user's encoded Profile as of `read_ns`; empty for a user never seen, or not heard of for the schema's
        TTL."""
        return self.profiles(Strings.join([user_id.encode()]), read_ns, names, population)[0]

    def profiles(
        self,
        user_ids: Strings,
        read_ns: int,
        names: Sequence[str] = (),
        population: Population | None = None,
    ) -> list[bytes]:
        """As `profile`, in the order of `user_ids`."""
        ttl_s = self.schema.ttl_s
        heard_ns = EVERY_TIME if ttl_s is None else read_ns - int(ttl_s * NS)
        priors = UNKNOWN if population is None else population.priors
        return self._encoder.encode(self.users.get_many(user_ids), user_ids, read_ns, names, priors, 1, heard_ns)

    def merge(self, user_id: str, source_user_id: str) -> None:
        """Adds the source user's row to the user's and removes the source, as if both users' events had been one's.

        Raises:
            KeyError: the source user has no row.
        """
        source = self.users.get(source_user_id.encode())
        if source < 0:
            raise KeyError(source_user_id)
        fresh = self.users.high_water
        row = self.users.add([user_id.encode()])[0]
        self._rows[fresh : self.users.high_water] = self.layout.template
        self.mark_texts(self._views.u4[source : source + 1], self.layout)
        merge_header(self._views.i8, row, self._views.i8, source)
        for feature in self.layout.features:
            feature.merge(self._views, row, self._views, source)
        self.remove(source_user_id)

    def add_population(self, state: bytes) -> None:
        """Adds another table's sums, an encoded PopulationState, to this one's.

        Raises:
            ValueError: they are of another schema.
            ResourceExhausted: there is no room for their texts.
        """
        self.population.add_state(state, self.texts)
        self.mark_texts(self.population.views.u4, self.population.layout)

    def begin_copy(self) -> None:
        """From here on it is noted which texts are referred to. All rows that there are now are copied next, each once,
        by `copy_rows`; then `sweep_texts` may be called, and at the end `finish_copy`."""
        self._marks = np.zeros(self.texts.high_water, dtype=np.uint8)
        self.mark_texts(self.population.views.u4, self.population.layout)

    def sweep_texts(self, first: int, last: int) -> int:
        """Forgets the texts with numbers from `first` up to `last` that nothing refers to; returns how many."""
        assert self._marks is not None
        return self.texts.remove_unmarked(self._marks, first, last)

    def finish_copy(self) -> None:
        """Nothing is noted any more."""
        self._marks = None

    def mark_texts(self, u4: NDArray[np.uint32], layout: Layout) -> None:
        """Notes, while rows are copied, that these rows of a layout refer to texts."""
        if self._marks is not None:
            for feature in layout.features:
                for first, count in feature.strings():
                    _mark_slots(self._marks, u4, first, count)

    def copy_rows(
        self, first: int, last: int, lengths: NDArray[np.int32], ids: NDArray[np.uint8], rows: NDArray[np.uint8]
    ) -> tuple[int, int, int]:
        """Copies the rows in use from `first` up to `last`, with their users' ids, as far as the targets reach.

        Returns the row to go on with, how many rows were copied, and the bytes of their ids.
        """
        last = min(last, self.users.high_water, first + len(lengths), first + len(rows))
        following, id_bytes = self.users.copy_strings(first, last, lengths, ids)
        chosen = np.flatnonzero(lengths[: following - first] >= 0)
        count = len(chosen)
        if count == following - first:
            rows[:count] = self._rows[first:following]
        else:
            np.take(self._rows[first:following], chosen, axis=0, out=rows[:count])
            lengths[:count] = lengths[chosen]
        self.mark_texts(self._views.u4[first:following], self.layout)
        return following, count, id_bytes

    def load_rows(
        self, lengths: NDArray[np.int32], ids: NDArray[np.uint8], rows: NDArray[np.uint8]
    ) -> NDArray[np.int64]:
        """Takes rows that `copy_rows` copied, in place of those that their users have; returns their places.

        Raises:
            ValueError: there is no room, or the lengths and rows do not fit.
        """
        fresh = self.users.high_water
        numbers = self.users.load(lengths, ids)
        if self._space is not None:
            self._space.claim(self.users.high_water * self.layout.row_bytes)
        if len(numbers) and numbers[0] == fresh and self.users.high_water == fresh + len(numbers):
            self._rows[fresh : fresh + len(numbers)] = rows
        else:
            self._rows[numbers] = rows
        return numbers

    def claim_rows(self) -> None:
        """To be called before anything but `load_rows` where the table was made with a space: no more is brought in
        ahead."""
        if self._space is not None:
            self._space.claim(len(self._space.region))
            self._space = None

    def highest_text(self) -> int:
        """The highest number, plus 1, of a text that a row or the population refers to; 0 for none."""
        return int(self._text_ids().max())

    def check_invariants(self) -> None:
        """Every text that a row or the population refers to is there; for tests."""
        self.users.check_invariants()
        self.texts.check_invariants()
        there = np.zeros(self.texts.high_water + 1, dtype=np.bool_)
        there[0] = True
        there[self.texts.numbers() + 1] = True
        assert there[self._text_ids()].all()

    def _text_ids(self) -> NDArray[np.uint32]:
        """The interned ids in all rows and in the population, 0 among them."""
        high = self.users.high_water
        sources = ((self.layout, self._views.u4[:high]), (self.population.layout, self.population.views.u4))
        runs = [
            u4[:, first : first + count].reshape(-1)
            for layout, u4 in sources
            for feature in layout.features
            for first, count in feature.strings()
        ]
        return np.concatenate([np.zeros(1, dtype=np.uint32), *runs])

    def remove(self, user_id: str) -> bool:
        """Forgets the user; False for a user never seen."""
        row = self.users.remove(user_id.encode())
        if row >= 0:
            self._rows[row] = self.layout.template
        return row >= 0

    def idle(self, now_ns: int, first: int, last: int) -> list[bytes]:
        """Ids of the users of the rows from `first` up to `last` who were not heard of for the schema's TTL."""
        ttl_s = self.schema.ttl_s
        last = min(last, self.users.high_water)
        if ttl_s is None or first >= last:
            return []
        counts = self._views.i8[first:last, EVENT_COUNT]
        received = self._views.i8[first:last, LAST_RECEIVED]
        rows = np.flatnonzero((counts > 0) & (received < now_ns - int(ttl_s * 1e9))) + first
        return [self.users.bytes_of(row) for row in rows.tolist()]


@leaf_kernel
def _mark_slots(marks: NDArray[np.uint8], u4: NDArray[np.uint32], first: int, count: int) -> None:
    for row in range(len(u4)):
        for slot in range(first, first + count):
            number = np.int64(u4[row, slot]) - 1
            if 0 <= number < len(marks):
                marks[number] = 1


def reserve_rows(most_users: int, layout: Layout, space: mmap.mmap | None = None) -> NDArray[np.uint8]:
    """(most_users, row_bytes) bytes in reserved address space: in `space`, where it is large enough."""
    size = most_users * layout.row_bytes
    rows: NDArray[np.uint8] = (
        np.frombuffer(space, np.uint8, size) if space is not None and len(space) >= size else reserve(size, np.uint8)
    )
    return rows.reshape(most_users, layout.row_bytes)
