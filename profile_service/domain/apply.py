"""Events into rows: the one kernel that a group of events runs through.

    a block of events ─▶ users' rows ─▶ numbers of texts and values ─▶ every feature ─▶ population
                          └ called into the caches meanwhile ┘          └ a pass each ┘

A block is so small that its rows stay in the processor's caches from one feature's pass to the next, and so large that
their way from memory overlaps. What comes out does not depend on where one block ends and the next begins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.decay import decompose
from profile_service.domain.features import update
from profile_service.domain.features.base import ABSENT, Events, RowViews, Tables, Weights
from profile_service.domain.header import update_header
from profile_service.domain.index import HIGH_WATER, IndexArrays, find_many
from profile_service.domain.kernel import leaf_kernel, prefetch

BLOCK_EVENTS = 64

POPULATION = 1
"""Numbers of texts, and the population's row."""
USERS = 2
"""Users' rows. By itself, it takes the numbers of texts that were found before."""

_LINE_BYTES = 64
"""Of a cache line."""


class Scratch(NamedTuple):
    """Space for one block."""

    rows: NDArray[np.int64]
    everyone: NDArray[np.int64]
    """Zeros: the population's row for each event."""
    numbers: NDArray[np.int64]
    grids: NDArray[np.int64]
    mantissas: NDArray[np.float64]
    text_ids: NDArray[np.uint32]
    value_numbers: NDArray[np.int64]

    @classmethod
    def make(cls, half_lives: int, text_attributes: int) -> Scratch:
        return cls(
            rows=np.empty(BLOCK_EVENTS, np.int64),
            everyone=np.zeros(BLOCK_EVENTS, np.int64),
            numbers=np.empty(BLOCK_EVENTS, np.int64),
            # What does not decay keeps these.
            grids=np.zeros((half_lives, BLOCK_EVENTS), np.int64),
            mantissas=np.ones((half_lives, BLOCK_EVENTS), np.float64),
            text_ids=np.zeros((text_attributes, BLOCK_EVENTS), np.uint32),
            value_numbers=np.full((text_attributes, BLOCK_EVENTS), ABSENT, np.int64),
        )


@leaf_kernel
def apply_events(
    user_slots: NDArray[np.uint64],
    user_entries: NDArray[np.uint64],
    user_arena: NDArray[np.uint8],
    user_state: NDArray[np.int64],
    user_free: NDArray[np.int64],
    user_next_free: NDArray[np.int64],
    text_slots: NDArray[np.uint64],
    text_entries: NDArray[np.uint64],
    text_arena: NDArray[np.uint8],
    text_state: NDArray[np.int64],
    text_free: NDArray[np.int64],
    text_next_free: NDArray[np.int64],
    value_slots: NDArray[np.uint64],
    value_entries: NDArray[np.uint64],
    value_arena: NDArray[np.uint8],
    value_state: NDArray[np.int64],
    value_free: NDArray[np.int64],
    value_next_free: NDArray[np.int64],
    template: NDArray[np.uint8],
    header: int,
    f8: NDArray[np.float64],
    i8: NDArray[np.int64],
    f4: Weights,
    u4: NDArray[np.uint32],
    u1: NDArray[np.uint8],
    operations: NDArray[np.int64],
    reals: NDArray[np.float64],
    codes: NDArray[np.int64],
    population_f8: NDArray[np.float64],
    population_i8: NDArray[np.int64],
    population_f4: Weights,
    population_u4: NDArray[np.uint32],
    population_u1: NDArray[np.uint8],
    population_operations: NDArray[np.int64],
    population_reals: NDArray[np.float64],
    population_codes: NDArray[np.int64],
    half_lives_ns: NDArray[np.int64],
    interned: NDArray[np.int64],
    listed: NDArray[np.int64],
    block_rows: NDArray[np.int64],
    everyone: NDArray[np.int64],
    block_numbers: NDArray[np.int64],
    block_grids: NDArray[np.int64],
    block_mantissas: NDArray[np.float64],
    block_text_ids: NDArray[np.uint32],
    block_value_numbers: NDArray[np.int64],
    buffer: NDArray[np.uint8],
    user_offset: NDArray[np.int64],
    user_length: NDArray[np.int32],
    user_hash: NDArray[np.uint64],
    type_index: NDArray[np.int16],
    time_ns: NDArray[np.int64],
    text_offset: NDArray[np.int64],
    text_length: NDArray[np.int32],
    text_hash: NDArray[np.uint64],
    number: NDArray[np.float64],
    start: int,
    stop: int,
    received_ns: NDArray[np.int64],
    stamps: NDArray[np.int64],
    positions: NDArray[np.int64],
    marks: NDArray[np.uint8],
    parts: int,
    text_ids: NDArray[np.uint32],
) -> None:
    """Counts the events `start` to `stop` of columns into their users' rows and into the population, or, by `parts`,
    into one of them. The two may run at the same time, each with scratch space of its own: `text_ids`, by interned
    attribute and event, carries over what the first one has found; where both are one call, it has no columns.

    `header` is the slot with which a row's header begins. `interned` and `listed` are the attributes that some feature
    keeps as text, or lists values of. `received_ns` and `positions` begin with the event `start`. An event goes to the
    population alone where its row's stamp is above its position; no stamps are none. `marks` gets those of the texts
    that are touched.
    """
    users = IndexArrays(user_slots, user_entries, user_arena, user_state, user_free, user_next_free)
    texts = IndexArrays(text_slots, text_entries, text_arena, text_state, text_free, text_next_free)
    values = IndexArrays(value_slots, value_entries, value_arena, value_state, value_free, value_next_free)
    views = RowViews(f8, i8, f4, u4, u1)
    tables = Tables(reals, codes)
    population = RowViews(population_f8, population_i8, population_f4, population_u4, population_u1)
    population_tables = Tables(population_reals, population_codes)
    for first in range(start, stop, BLOCK_EVENTS):
        last = min(first + BLOCK_EVENTS, stop)
        count = last - first
        rows = block_rows[:count]
        if parts & USERS:
            fresh = user_state[HIGH_WATER]
            find_many(
                users, buffer, user_offset[first:last], user_length[first:last], user_hash[first:last], True, rows
            )
            for row in range(fresh, user_state[HIGH_WATER]):
                for k in range(len(template)):
                    u1[row, k] = template[k]
            for i in range(count):
                line = rows[i] * u1.shape[1]
                end = line + u1.shape[1]
                while line < end:
                    prefetch(u1, line)
                    line += _LINE_BYTES
        for n in range(len(half_lives_ns)):
            if half_lives_ns[n] != 0:
                decompose(time_ns[first:last], half_lives_ns[n], block_grids[n], block_mantissas[n])
        for n in range(len(interned)):
            a = interned[n]
            numbers, ids = block_numbers[:count], block_text_ids[a]
            if not parts & POPULATION:
                for i in range(count):
                    ids[i] = text_ids[n, first - start + i]
                continue
            offset, length, key = text_offset[a][first:last], text_length[a][first:last], text_hash[a][first:last]
            find_many(texts, buffer, offset, length, key, True, numbers)
            for i in range(count):
                ids[i] = numbers[i] + 1
                if 0 <= numbers[i] < len(marks):
                    marks[numbers[i]] = 1
            if text_ids.shape[1] > 0:
                for i in range(count):
                    text_ids[n, first - start + i] = ids[i]
        for n in range(len(listed)):
            a = listed[n]
            numbers = block_value_numbers[a]
            length = text_length[a][first:last]
            find_many(values, buffer, text_offset[a][first:last], length, text_hash[a][first:last], False, numbers)
            for i in range(count):
                if length[i] < 0:
                    numbers[i] = ABSENT
        types, times = type_index[first:last], time_ns[first:last]
        events = Events(
            types,
            times,
            block_grids,
            block_mantissas,
            block_text_ids,
            block_value_numbers,
            first,
            text_length,
            text_hash,
            number,
        )
        received = received_ns[first - start : last - start]
        if parts & POPULATION:
            update_header(population_i8, 0, everyone[:count], times, received)
            for n in range(len(population_operations)):
                update(population, population_operations[n], population_tables, events, everyone[:count])
        if parts & USERS:
            if len(stamps) > 0:
                for i in range(count):
                    if stamps[rows[i]] > positions[first - start + i]:
                        rows[i] = -1
            update_header(i8, header, rows, times, received)
            for n in range(len(operations)):
                update(views, operations[n], tables, events, rows)
