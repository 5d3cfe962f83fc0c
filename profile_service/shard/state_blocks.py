"""A shard's state as the blocks of a snapshot: taken piece by piece from a state that goes on, and put together again.

    SCHEMA      the schema file's text                                                  ┐
    LAYOUT      which slots of a row each feature owns, as JSON                         │ at once, when the copy
    COUNTERS    event_count, duplicate_count, users, texts                              │ begins
    POPULATION  the population's row: f8, i8, f4 (64 bits wide), u4, u1                 │
    ADOPTED     shards whose sums count as this one's, where there are any              ┘
    ROWS        rows in use, in the order of their places, and the ids of their users   ┐
    PRODUCERS   sequences of producers                                                  │ in steps, in this order
    REQUESTS    partitions that request ids have reached                                │
    EVENT_IDS   keys of event ids, when they came, of which partitions, in their order  │
    TEXTS       texts with numbers from a first one on                                  ┘
    END         rows and texts copied

Rows hold numbers of texts. Texts are copied last, and until then they are only added: so whatever a row refers to is
there. Before they are copied those go that nothing refers to any more. A text keeps its number. The layout is there so
that a version which lays out the same schema otherwise does not take one number for another: it brings the rows into
its own layout where an earlier version is known to have laid them out so (`shard.old_layouts`), and refuses them else.

What a salvage brings may lack any block but the first two: a text that is gone is then called lost, and the others are
as if they had never been.

    ROWS        u4 count   u4 row bytes   u8 id bytes     | rows | i4 lengths of ids  | ids
    PRODUCERS   u4 count   u4 partitions  u8 id bytes     | i8 acknowledged | i8 used ns | i8 last sequences, by
                producer and partition | i4 lengths of ids | ids
    REQUESTS    u4 count   u4 mask bytes  u8 id bytes     | i8 used ns | masks, the lowest partition in the first
                byte's lowest bit | i4 lengths of ids | ids
    EVENT_IDS   u4 count   u4 4           u8 0            | u8 keys | i8 times | i4 partitions; an older one has no
                partitions, and 0 in place of the 4
    TEXTS       u4 count   u4 0           u8 text bytes   | u8 first number | i4 lengths, -1 for a number not in use
                | texts
    COUNTERS    i8 each                                     END  i8 each                      ADOPTED  i4 each

All numbers are little-endian; every section begins at a multiple of 8 bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from profile_service.domain.layout import Layout
from profile_service.domain.schema import Schema, parse_schema
from profile_service.domain.table import ProfileTable
from profile_service.errors import DataLoss
from profile_service.shard.dedupe import NO_PARTITION, EventIds
from profile_service.shard.old_layouts import OldLayout, describe
from profile_service.storage.snapshot import SALVAGED, Block

if TYPE_CHECKING:
    from profile_service.shard.state import ShardState

SCHEMA, LAYOUT, COUNTERS, POPULATION, ROWS, PRODUCERS, REQUESTS, EVENT_IDS, TEXTS, END, ADOPTED = range(1, 12)

SPACE_BYTES = 1 << 19
"""What a step copies at most, unless a single row is larger: a few tenths of a millisecond of copying."""

_PREFIX = struct.Struct("<IIQ")
_COUNTERS = struct.Struct("<4q")
_END = struct.Struct("<2q")

ROWS_A_STEP = 1024
PRODUCERS_A_STEP = 256
REQUESTS_A_STEP = 512
EVENT_IDS_A_STEP = 1 << 14
TEXTS_A_STEP = 1 << 12

_ID_BYTES = 64
"""Room for an id on average; where it does not do, a step copies fewer."""


class StateCopy:
    """A copy under way. Each call of `step` gives one block, or None when all are taken."""

    def __init__(self, state: ShardState) -> None:
        self._state = state
        self._rows = state.table.users.high_water
        """Rows from here on are made of what the log holds after the beginning."""
        self._copied_rows = 0
        table = state.table
        table.begin_copy()
        self._first = [
            (SCHEMA, state.schema.text.encode()),
            (LAYOUT, describe_layout(table)),
            (
                COUNTERS,
                _COUNTERS.pack(state.event_count, state.duplicate_count, len(table), table.texts.high_water),
            ),
            (POPULATION, table.population.copy()),
        ]
        if state.adopted:
            self._first.append((ADOPTED, np.array(sorted(state.adopted), np.int32).tobytes()))
        self._blocks = self._generate()
        self._space: NDArray[np.uint8] = np.empty(0, np.uint8)

    @property
    def space_bytes(self) -> int:
        """The size of the space that `step` fills."""
        row_bytes = self._state.table.layout.row_bytes
        partitions = self._state.producers.partitions
        return max(SPACE_BYTES, row_bytes + (1 << 17), 8 * partitions + (1 << 17))

    def step(self, space: NDArray[np.uint8]) -> tuple[int, memoryview] | None:
        """The next block, (kind, payload), which may lie in `space`: at least `space_bytes` bytes."""
        self._space = space
        return next(self._blocks, None)

    def _generate(self) -> Iterator[tuple[int, memoryview]]:
        for kind, payload in self._first:
            yield kind, memoryview(payload)
        yield from self._copy_rows()
        yield from self._copy_producers()
        yield from self._copy_requests()
        yield from self._copy_event_ids()
        texts = self._state.table.texts.high_water
        yield from self._copy_texts(texts)
        yield END, memoryview(_END.pack(self._copied_rows, texts))

    def _copy_rows(self) -> Iterator[tuple[int, memoryview]]:
        table = self._state.table
        row_bytes = table.layout.row_bytes
        row = 0
        while row < self._rows:
            # The ids, whose size is not known before, are copied to the end of the space first.
            room = max(1, (len(self._space) - (1 << 16) - 64) // (row_bytes + _ID_BYTES + 4))
            count = min(room, ROWS_A_STEP, self._rows - row)
            at = _PREFIX.size
            rows = self._space[at : at + count * row_bytes].reshape(count, row_bytes)
            lengths = np.empty(count, np.int32)
            ids = self._space[_aligned(at + count * (row_bytes + 4)) :]
            row, count, id_bytes = table.copy_rows(row, row + count, lengths, ids, rows)
            self._copied_rows += count
            # Without a row in use it is an empty block: a step must end somewhere.
            yield ROWS, self._join(count, row_bytes, id_bytes, (rows[:count], lengths[:count], ids[:id_bytes]))

    def _copy_producers(self) -> Iterator[tuple[int, memoryview]]:
        held = self._state.producers
        step = max(1, min(PRODUCERS_A_STEP, (len(self._space) // 2) // (8 * held.partitions + 1024)))
        for first in range(0, held.places, step):
            producers = held.producers(first, first + step)
            if producers:
                ids = [producer.producer_id.encode() for producer in producers]
                sections = (
                    np.array([producer.acknowledged for producer in producers], np.int64),
                    np.array([producer.used_ns for producer in producers], np.int64),
                    np.stack([producer.last for producer in producers]),
                    np.array(list(map(len, ids)), np.int32),
                    np.frombuffer(b"".join(ids), np.uint8),
                )
                yield PRODUCERS, self._join(len(ids), held.partitions, len(sections[-1]), sections)

    def _copy_requests(self) -> Iterator[tuple[int, memoryview]]:
        held = self._state.producers
        mask_bytes = -(-held.partitions // 8)
        step = max(1, min(REQUESTS_A_STEP, (len(self._space) // 2) // (mask_bytes + 1024)))
        start, stop = held.requests_held
        for first in range(start, stop, step):
            requests = held.requests(first, min(first + step, stop))
            if requests:
                ids = [request.request_id.encode() for request in requests]
                masks = b"".join(request.reached.to_bytes(mask_bytes, "little") for request in requests)
                sections = (
                    np.array([request.used_ns for request in requests], np.int64),
                    np.frombuffer(masks, np.uint8),
                    np.array(list(map(len, ids)), np.int32),
                    np.frombuffer(b"".join(ids), np.uint8),
                )
                yield REQUESTS, self._join(len(ids), mask_bytes, len(sections[-1]), sections)

    def _copy_event_ids(self) -> Iterator[tuple[int, memoryview]]:
        start, stop = self._state.event_ids.held
        for first in range(start, stop, EVENT_IDS_A_STEP):
            copied = self._state.event_ids.copy(first, min(first + EVENT_IDS_A_STEP, stop))
            if len(copied.keys):
                yield EVENT_IDS, self._join(len(copied.keys), copied.partitions.itemsize, 0, copied)

    def _copy_texts(self, stop: int) -> Iterator[tuple[int, memoryview]]:
        number = 0
        while number < stop:
            count = min(TEXTS_A_STEP, stop - number)
            lengths = np.empty(count, np.int32)
            target = self._space[_aligned(_PREFIX.size + 8 + 4 * count) :]
            self._state.table.sweep_texts(number, number + count)
            following, size = self._state.table.texts.copy_strings(number, number + count, lengths, target)
            count = following - number
            sections = (np.array([number], np.uint64), lengths[:count], target[:size])
            yield TEXTS, self._join(count, 0, size, sections)
            number = following

    def _join(self, count: int, width: int, size: int, sections: Sequence[NDArray[Any]]) -> memoryview:
        """The block of these sections, put together in the space; sections that lie there stand in order."""
        space = self._space
        space[: _PREFIX.size] = np.frombuffer(_PREFIX.pack(count, width, size), np.uint8)
        at = _PREFIX.size
        for section in sections:
            data = section.reshape(-1).view(np.uint8)
            if data.ctypes.data != space.ctypes.data + at:
                space[at : at + len(data)] = data
            end = at + len(data)
            at = _aligned(end)
            space[end:at] = 0
        return space[:at].data


class _Reader:
    """Takes the sections of a block one after the other."""

    def __init__(self, payload: memoryview) -> None:
        self._data = np.frombuffer(payload, np.uint8) if len(payload) else np.zeros(0, np.uint8)
        if len(self._data) < _PREFIX.size:
            raise ValueError(f"{len(payload)} bytes")
        self.count, self.width, self.size = _PREFIX.unpack(payload[: _PREFIX.size])
        self._at = _PREFIX.size

    def take(self, count: int, dtype: DTypeLike, *, last: bool = False) -> NDArray[Any]:
        """The next section; the block ends with the last one."""
        size = count * np.dtype(dtype).itemsize
        if self._at + size > len(self._data):
            raise ValueError(f"{len(self._data)} bytes, needs {self._at + size}")
        section = self._data[self._at : self._at + size].view(dtype)
        self._at = _aligned(self._at + size)
        if last and self._at != len(self._data):
            raise ValueError(f"{len(self._data)} bytes, ends at {self._at}")
        return section

    def strings(self) -> list[str]:
        """The ids that the block ends with."""
        lengths = self.take(self.count, np.int32)
        joined = self.take(self.size, np.uint8, last=True).tobytes()
        if (lengths < 0).any() or lengths.sum(dtype=np.int64) != self.size:
            raise ValueError("lengths of ids")
        ends = np.cumsum(lengths).tolist()
        return [joined[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]


def load_state(blocks: Iterable[Block], new_state: Callable[[Schema], ShardState]) -> ShardState:
    """The state that the blocks hold.

    Raises:
        DataLoss: the blocks are not those of a snapshot, or not all of them.
        SchemaError: this version cannot read the snapshot's schema.
    """
    loading: _Loading | None = None
    salvaged = False
    for block in blocks:
        if block.kind == SALVAGED:
            salvaged = True
        elif block.kind == SCHEMA:
            schema = parse_schema(bytes(block.payload).decode(), "the snapshot's schema")
            loading = _Loading(new_state(schema), salvaged=salvaged)
        elif loading is None:
            raise DataLoss("the snapshot does not begin with its schema: its rows cannot be read")
        else:
            try:
                loading.take(block)
            except (ValueError, struct.error) as error:
                raise DataLoss(f"a block of kind {block.kind} cannot be read: {error}") from error
    if loading is None:
        raise DataLoss("the snapshot holds no schema")
    return loading.finish()


class _Loading:
    def __init__(self, state: ShardState, *, salvaged: bool) -> None:
        self._state = state
        self._salvaged = salvaged
        self._rows = 0
        self._texts = 0
        self._old: OldLayout | None = None
        """Of the rows, where an earlier version wrote them otherwise than this one does."""
        self._ways: dict[int, Callable[[memoryview], None]] = {
            LAYOUT: self._take_layout,
            COUNTERS: self._take_counters,
            POPULATION: self._take_population,
            ADOPTED: self._take_adopted,
            PRODUCERS: self._take_producers,
            REQUESTS: self._take_requests,
            EVENT_IDS: self._take_event_ids,
            TEXTS: self._take_texts,
            END: self._take_end,
        }
        self._missing = {LAYOUT, COUNTERS, POPULATION, END}

    def take(self, block: Block) -> None:
        if block.kind != LAYOUT and LAYOUT in self._missing:
            raise ValueError("the layout of the rows must come before it")
        self._missing.discard(block.kind)
        if block.kind == ROWS:
            self._take_rows(block.payload, block.stamp)
        elif block.kind in self._ways:
            self._ways[block.kind](block.payload)
        else:
            raise ValueError("this version does not know it")

    def finish(self) -> ShardState:
        table = self._state.table
        if LAYOUT in self._missing:
            raise DataLoss("the snapshot does not say how its rows are laid out")
        if self._salvaged:
            self._name_lost_texts(max(self._texts, table.highest_text()))
        elif self._missing or (self._rows, self._texts) != (0, table.texts.high_water):
            raise DataLoss("the snapshot does not hold all blocks of a state")
        self._state.producers.finish_load()
        return self._state

    def _name_lost_texts(self, stop: int) -> None:
        """Gives texts to the numbers up to `stop` whose own are in no block."""
        texts = self._state.table.texts
        for number in range(texts.high_water, stop):
            lost = f"(lost text {number})".encode()
            texts.load_numbered(number, np.array([len(lost)], np.int32), np.frombuffer(lost, np.uint8))

    def _take_layout(self, payload: memoryview) -> None:
        table = self._state.table
        if bytes(payload) == describe_layout(table):
            return
        self._old = OldLayout.parse(bytes(payload), table.layout, table.population.layout)

    def _take_counters(self, payload: memoryview) -> None:
        state = self._state
        state.event_count, state.duplicate_count, users, texts = _COUNTERS.unpack(payload)
        state.table.users.make_room(min(users, state.table.users.capacity), 0)
        state.table.texts.make_room(min(texts, state.table.texts.capacity), 0)

    def _take_population(self, payload: memoryview) -> None:
        population = self._state.table.population
        population.load(payload if self._old is None else self._old.population_bytes(payload))

    def _take_adopted(self, payload: memoryview) -> None:
        self._state.adopted.update(np.frombuffer(payload, np.int32).tolist())

    def _take_rows(self, payload: memoryview, stamp: int) -> None:
        reader = _Reader(payload)
        row_bytes = self._state.table.layout.row_bytes
        written = row_bytes if self._old is None else self._old.users.row_bytes
        if reader.width != written:
            raise ValueError(f"its rows have {reader.width} bytes, those of the schema have {written}")
        rows = reader.take(reader.count * written, np.uint8).reshape(reader.count, written)
        if self._old is not None:
            rows = self._old.users.convert(rows, row_bytes)
        lengths = reader.take(reader.count, np.int32)
        numbers = self._state.table.load_rows(lengths, reader.take(reader.size, np.uint8, last=True), rows)
        self._state.stamp_rows(numbers, stamp)
        self._rows -= reader.count

    def _take_producers(self, payload: memoryview) -> None:
        reader = _Reader(payload)
        producers = self._state.producers
        if reader.width != producers.partitions:
            raise ValueError(f"it has {reader.width} partitions, the service has {producers.partitions}")
        acknowledged = reader.take(reader.count, np.int64).tolist()
        used_ns = reader.take(reader.count, np.int64).tolist()
        last = reader.take(reader.count * reader.width, np.int64).reshape(reader.count, reader.width)
        producers.load_producers(list(zip(reader.strings(), last, acknowledged, used_ns, strict=True)))

    def _take_requests(self, payload: memoryview) -> None:
        reader = _Reader(payload)
        used_ns = reader.take(reader.count, np.int64).tolist()
        masks = reader.take(reader.count * reader.width, np.uint8).tobytes()
        reached = [
            int.from_bytes(masks[at : at + reader.width], "little") for at in range(0, len(masks), max(1, reader.width))
        ]
        self._state.producers.load_requests(list(zip(reader.strings(), reached, used_ns, strict=True)))

    def _take_event_ids(self, payload: memoryview) -> None:
        reader = _Reader(payload)
        keys = reader.take(reader.count, np.uint64)
        if reader.width:
            times = reader.take(reader.count, np.int64)
            partitions = reader.take(reader.count, np.int32, last=True)
        else:
            times = reader.take(reader.count, np.int64, last=True)
            partitions = np.full(reader.count, NO_PARTITION, np.int32)
        self._state.event_ids.load(EventIds(keys, times, partitions))

    def _take_texts(self, payload: memoryview) -> None:
        reader = _Reader(payload)
        first = int(reader.take(1, np.uint64)[0])
        if self._salvaged:
            self._name_lost_texts(first)
        lengths = reader.take(reader.count, np.int32)
        self._state.table.texts.load_numbered(first, lengths, reader.take(reader.size, np.uint8, last=True))

    def _take_end(self, payload: memoryview) -> None:
        rows, self._texts = _END.unpack(payload)
        self._rows += rows


def _aligned(size: int) -> int:
    return -(-size // 8) * 8


def describe_layout(table: ProfileTable) -> bytes:
    """Where everything is in a row of a user, and in the population's."""
    return describe_layouts(table.layout, table.population.layout)


def describe_layouts(users: Layout, population: Layout) -> bytes:
    """The same of these layouts, as JSON."""
    layouts = {"users": describe(users), "population": describe(population)}
    return json.dumps(layouts).encode()
