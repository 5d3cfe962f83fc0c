"""Rows that go from table to table say there what they said before, whatever texts the other table knows."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import xxhash

from profile_service.domain.row_batch import check_rows, has_room, put_rows, take_rows
from profile_service.domain.table import ProfileTable
from tests.domain.oracles.profile import Event
from tests.domain.test_profile_table import NOW_NS, SCHEMA
from tests.shard.test_state import columns_of


def random_events(seed: int, users: list[str], count: int) -> list[Event]:
    random = Random(seed)
    return [
        Event(
            random.choice(users),
            random.choice(["view", "buy"]),
            NOW_NS - random.randrange(10**15),
            {"make": f"make {random.randrange(100)}", "color": "red", "price": random.uniform(0, 100)},
        )
        for _ in range(count)
    ]


def filled(seed: int, users: list[str], events: int = 300) -> ProfileTable:
    table = ProfileTable(SCHEMA, most_users=20_000, most_texts=20_000)
    columns = columns_of(SCHEMA, random_events(seed, users, events))
    assert table.has_room(columns.count, len(columns.buffer))
    table.apply(columns, 0, columns.count, NOW_NS)
    return table


def profiles(table: ProfileTable, users: list[str]) -> list[bytes]:
    return [table.profile(user, NOW_NS) for user in users]


@pytest.mark.parametrize("copying", [False, True])
def test_rows_say_the_same_in_another_table(seed: int, copying: bool) -> None:
    moved, others = [f"moved {n}" for n in range(40)], [f"other {n}" for n in range(30)]
    source = filled(seed, moved + others)
    target = filled(seed + 1, [*others, *moved[:7]])
    before = profiles(target, others)
    if copying:
        target.begin_copy()
    numbers = np.array([source.users.get(user.encode()) for user in moved], np.int64)
    numbers = numbers[numbers >= 0]
    # One number that nobody has any more.
    source.remove(moved[3])
    batch = take_rows(source, numbers)
    check_rows(target.layout, batch)
    assert has_room(target, batch)
    put_rows(target, batch)
    if copying:
        lengths, ids = np.empty(1000, np.int32), np.empty(100_000, np.uint8)
        target.copy_rows(0, 1000, lengths, ids, np.empty((1000, target.layout.row_bytes), np.uint8))
        target.sweep_texts(0, 20_000)
        target.finish_copy()
    staying = [user for user in moved if user != moved[3]]
    assert profiles(target, staying) == profiles(source, staying)
    assert profiles(target, others) == before
    target.check_invariants()
    source.check_invariants()


def test_what_is_no_batch_of_this_layout_is_refused(seed: int) -> None:
    source, target = filled(seed, ["a", "b"]), filled(seed + 1, ["c"])
    batch = take_rows(source, source.users.numbers())
    for damaged in (
        batch._replace(rows=batch.rows[:, :-8]),
        batch._replace(lengths=batch.lengths[:1]),
        batch._replace(text_lengths=batch.text_lengths[:-1]),
        batch._replace(ids=batch.ids[:-1]),
    ):
        with pytest.raises(ValueError, match=r"rows|text|lengths"):
            check_rows(target.layout, damaged)


def test_users_are_chosen_by_their_partitions(seed: int) -> None:
    users = [f"u{n}" for n in range(200)]
    table = filled(seed, users, 2000)
    wanted = np.zeros(16, np.bool_)
    wanted[[3, 9]] = True
    chosen = table.users.choose(0, 1000, 60, wanted)
    held = table.users.numbers().tolist()
    assert chosen.tolist() == [n for n in held if wanted[xxhash.xxh64_intdigest(table.users.bytes_of(n)) >> 60]]
