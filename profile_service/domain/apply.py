"""Events into rows: the one kernel that a group of events runs through.

    a group of events ─▶ users' rows
      a block of them ─▶ numbers of texts and values ─▶ every feature of the rows, a pass each ─▶ of the population
                         └ between the passes, a few lines at a time, the next block's rows are called into the caches ┘

A block is so small that its rows stay in the processor's nearest caches from one feature's pass to the next. Some two
dozen lines can be on their way from memory at a time, and whoever asks for more waits: so what the next block needs is
asked for in pieces, which come while this one is counted. What comes out does not depend on where one group or block
ends and the next begins.
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
from profile_service.domain.kernel import inlined_kernel, leaf_kernel, prefetch

BLOCK_EVENTS = 32
GROUP_EVENTS = 2048
"""Events whose users are looked up together: many enough that their ways from memory overlap, too."""

POPULATION = 1
"""Numbers of texts, and the population's row."""
USERS = 2
"""Users' rows. By itself, it takes the numbers of texts that were found before."""

_LINE_BYTES = 64
"""Of a cache line."""


class Scratch(NamedTuple):
    """Space for one block, and for the rows of a group."""

    rows: NDArray[np.int64]
    """Of a group."""
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
            rows=np.empty(GROUP_EVENTS, np.int64),
            everyone=np.zeros(BLOCK_EVENTS, np.int64),
            numbers=np.empty(BLOCK_EVENTS, np.int64),
            # What does not decay keeps these.
            grids=np.zeros((half_lives, BLOCK_EVENTS), np.int64),
            mantissas=np.ones((half_lives, BLOCK_EVENTS), np.float64),
            text_ids=np.zeros((text_attributes, BLOCK_EVENTS), np.uint32),
            value_numbers=np.full((text_attributes, BLOCK_EVENTS), ABSENT, np.int64),
        )


@inlined_kernel
def _call_in(u1: NDArray[np.uint8], rows: NDArray[np.int64], line: int, lines: int) -> None:
    """Asks for so many lines of each of the rows, from the row's line `line` on."""
    row_bytes = u1.shape[1]
    # It may begin anywhere in its first line.
    row_lines = (row_bytes + 2 * _LINE_BYTES - 2) // _LINE_BYTES
    for n in range(line, min(line + lines, row_lines)):
        place = min(n * _LINE_BYTES, row_bytes - 1)
        for i in range(len(rows)):
            prefetch(u1, rows[i] * row_bytes + place)


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
    group_rows: NDArray[np.int64],
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
    passes = (len(operations) if parts & USERS else 0) + (len(population_operations) if parts & POPULATION else 0)
    lines_a_pass = u1.shape[1] // (_LINE_BYTES * max(1, passes)) + 1
    for group in range(start, stop, GROUP_EVENTS):
        group_stop = min(group + GROUP_EVENTS, stop)
        fresh = user_state[HIGH_WATER]
        if parts & USERS:
            offset, length, key = (
                user_offset[group:group_stop],
                user_length[group:group_stop],
                user_hash[group:group_stop],
            )
            find_many(users, buffer, offset, length, key, True, group_rows)
            _call_in(u1, group_rows[: min(BLOCK_EVENTS, group_stop - group)], 0, u1.shape[1])
        for first in range(group, group_stop, BLOCK_EVENTS):
            last = min(first + BLOCK_EVENTS, group_stop)
            count = last - first
            rows = group_rows[first - group : last - group]
            ahead = group_rows[last - group : (min(last + BLOCK_EVENTS, group_stop) if parts & USERS else last) - group]
            line = 0
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
                offset, length, key = text_offset[a][first:last], text_length[a][first:last], text_hash[a][first:last]
                find_many(values, buffer, offset, length, key, False, numbers)
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
            if parts & USERS:
                for i in range(count):
                    while fresh <= rows[i]:
                        for k in range(len(template)):
                            u1[fresh, k] = template[k]
                        fresh += 1
                if len(stamps) > 0:
                    for i in range(count):
                        if stamps[rows[i]] > positions[first - start + i]:
                            rows[i] = -1
                update_header(i8, header, rows, times, received)
                for n in range(len(operations)):
                    update(views, operations[n], tables, events, rows)
                    _call_in(u1, ahead, line, lines_a_pass)
                    line += lines_a_pass
            if parts & POPULATION:
                update_header(population_i8, 0, everyone[:count], times, received)
                for n in range(len(population_operations)):
                    update(population, population_operations[n], population_tables, events, everyone[:count])
                    _call_in(u1, ahead, line, lines_a_pass)
                    line += lines_a_pass
