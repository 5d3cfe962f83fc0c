"""Rows of users that live in a store, kept near: those that were used lately, of which nothing is newer in the store.

    stored bytes ─▶ table (this generation) ─▶ stage: a group's rows, changed and not yet stored ─▶ stored bytes
                     ▲                                                    │
                     └── the generation before ◀── full: turn             └─▶ table, once the store has them

When the table is full it becomes the generation before, whose rows come over when they are used again; the rest goes
with the next turn. So the cache is bounded, what is used stays, and texts that nobody refers to any more go by
themselves. What is staged refers to the texts of one table, and is brought over packed if the table has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.decay import NS
from profile_service.domain.index import Strings
from profile_service.domain.layout import EVENT_COUNT, LAST_RECEIVED
from profile_service.domain.packing import Packing, pack_rows, unpack_rows
from profile_service.domain.schema import Schema
from profile_service.domain.table import ProfileTable
from profile_service.errors import DataLoss

TEXTS_A_USER = 8
"""Different texts for each user that a generation has room for; common ones are kept once."""


def damaged_row(user_id: bytes, key: bytes, where: str) -> DataLoss:
    """What whoever runs the service has to know of a row that cannot be read."""
    return DataLoss(
        f"{where}: the row of user {user_id.decode()!r} is damaged, or of another layout: restore the key "
        f"{key.decode()!r}, or delete it, which forgets the user's profile; nothing of the user is read or counted "
        "until then"
    )


@dataclass
class Stage:
    """The rows of one group's users."""

    table: ProfileTable
    users: Strings
    """Their ids, by row."""

    def __len__(self) -> int:
        return len(self.users.key)


class Moment(NamedTuple):
    """When something was asked for, in what has befallen the cache."""

    clears: int
    generation: int


class RowCache:
    """Rows by user.

    Args:
        most_users: rows of both generations together, about.
        most_run_users: the most that come at once.
    """

    def __init__(self, schema: Schema, *, most_users: int, most_run_users: int) -> None:
        self.schema = schema
        self._turn_users = max(1, most_users // 2)
        self._most_run_users = most_run_users
        self._old: ProfileTable | None = None
        self._set_table(self._new_table())
        self.packing = Packing.of(self.table.layout)
        self.generation = 0
        self._clears = 0
        self._pins = 0

    def _new_table(self) -> ProfileTable:
        most_users = self._turn_users + self._most_run_users
        return ProfileTable(self.schema, most_users=most_users, most_texts=TEXTS_A_USER * most_users)

    def _set_table(self, table: ProfileTable) -> None:
        self.table = table
        self._stage = ProfileTable(self.schema, most_users=self._most_run_users, most_texts=0, texts=table.texts)

    @property
    def memory_bytes(self) -> int:
        """Bytes in use."""
        return self.table.memory_bytes + (self._old.memory_bytes if self._old is not None else 0)

    def turn(self) -> None:
        """This generation becomes the one before. The population stays."""
        before = self.table
        packed = before.population.pack(before.texts)
        self._old = before
        self._set_table(self._new_table())
        self.table.population.unpack(packed, self.table.texts)
        self.generation += 1

    def clear(self) -> None:
        """Forgets everything, the population too."""
        self._old = None
        self._set_table(self._new_table())
        self._clears += 1

    @property
    def moment(self) -> Moment:
        """Now."""
        return Moment(self._clears, self.generation)

    def may_have_forgotten(self, asked: Moment) -> bool:
        """Whether a row may have been here since that moment, and be gone: then what the store was asked for at that
        moment may be older. One turn keeps what was here, a clear keeps nothing."""
        return self._clears != asked.clears or self.generation > asked.generation + 1

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Meanwhile the table stays as long as it has room, however many rows it has."""
        self._pins += 1
        try:
            yield
        finally:
            self._pins -= 1

    def make_room(self, events: int, size_bytes: int) -> bool:
        """Makes sure that so many events fit, whatever their users' stored rows hold; returns whether the table has
        turned for it."""
        fits = self.table.has_room(events, size_bytes)
        turns = not fits or (len(self.table) >= self._turn_users and not self._pins)
        if turns:
            self.turn()
        return turns

    def holds(self, stage: Stage) -> bool:
        """Whether the stage's rows refer to the texts of the table of now."""
        return stage.table.texts is self.table.texts

    def pack(self, stage: Stage, first: int, last: int) -> list[bytes]:
        """The stage's rows from `first` up to `last`, to be stored."""
        return pack_rows(self.packing, stage.table.rows, np.arange(first, last), stage.table.texts)

    def begin(self, user_ids: Strings) -> Stage:
        """A stage for the users, each with a fresh row, in the order in which they first stand in `user_ids`. One at a
        time: the one before is over."""
        stage = self._stage
        stage.clear()
        assert stage.users.make_room(len(user_ids.key), int(user_ids.length.sum(dtype=np.int64)))
        numbers = np.empty(len(user_ids.key), np.int64)
        stage.users.find(*user_ids, numbers, insert=True)
        count = stage.users.high_water
        stage.rows[:count] = stage.layout.template
        return Stage(stage, stage.users.strings())

    def find(self, users: Strings) -> NDArray[np.bool_]:
        """Which of them have a row here. Those of the generation before are brought over."""
        found = self.table.users.get_many(users) >= 0
        if self._old is not None and not found.all():
            missing = np.flatnonzero(~found)
            numbers = self._old.users.get_many(users.take(missing))
            held = missing[numbers >= 0]
            if len(held):
                packed = pack_rows(self.packing, self._old.rows, numbers[numbers >= 0], self._old.texts)
                self.put(users.take(held), packed)
                found[held] = True
        return found

    def put(self, users: Strings, packed: Sequence[bytes]) -> None:
        """Takes the users' rows as stored. Raises DataLoss where one is damaged."""
        rows = unpack_rows(self.packing, packed, self.table.texts)
        self.table.load_rows(users.length, users.joined(), rows)

    def first_damaged(self, packed: Sequence[bytes]) -> int:
        """The number of the first row that `put` would refuse; of them all where there is none."""
        for number, row in enumerate(packed):
            try:
                unpack_rows(self.packing, [row], self.table.texts)
            except DataLoss:
                return number
        return len(packed)

    def fill(self, stage: Stage, now_ns: int) -> None:
        """Gives the stage the rows that its users have here; one not heard of for the schema's TTL is fresh."""
        self.find(stage.users)
        numbers = self.table.users.get_many(stage.users)
        held = np.flatnonzero(numbers >= 0)
        rows = stage.table.rows[: len(stage)]
        rows[held] = self.table.rows[numbers[held]]
        if self.schema.ttl_s is not None and len(held):
            i8 = self.table.layout.views_of(rows).i8
            gone = (i8[:, EVENT_COUNT] > 0) & (i8[:, LAST_RECEIVED] < now_ns - int(self.schema.ttl_s * NS))
            rows[gone] = self.table.layout.template

    def publish(self, stage: Stage, packed: Sequence[bytes]) -> None:
        """The stage's rows can be read from now on; `packed` are the same rows, as stored."""
        if self.holds(stage):
            self.table.load_rows(stage.users.length, stage.users.joined(), stage.table.rows[: len(stage)])
        else:
            self.put(stage.users, packed)

    def drop(self, users: Strings) -> None:
        """Forgets these users' rows."""
        for user_id in users.to_list():
            self.table.remove(user_id.decode())
            if self._old is not None:
                self._old.remove(user_id.decode())
