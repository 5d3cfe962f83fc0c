"""A snapshot taken while the state goes on, and the log from where it began, are the state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from random import Random
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from profile_service.config import Capacity
from profile_service.domain.columns import EventColumns
from profile_service.domain.population import Population
from profile_service.domain.schema import Schema, parse_schema
from profile_service.errors import DataLoss
from profile_service.shard import state_blocks
from profile_service.shard.state import ShardState
from profile_service.storage.snapshot import SALVAGED, Block
from profile_service.wire.decode import decode_events
from profile_service.wire.plan import WirePlan
from tests.domain.oracles.profile import Event
from tests.domain.strategies import schemas
from tests.domain.test_profile_table import NOW_NS, ORDERED, SCHEMA
from userprofile.v1 import event_service_pb2

PARTITIONS = 16
SECOND_NS = 10**9

USERS = [f"u{n}" for n in range(9)]
PRODUCERS = ["", "p1", "p2", "request:a", "request:b", "request:c"]


@contextmanager
def small_steps(**changed: int) -> Iterator[None]:
    """Steps so small that a dozen users and texts make several blocks of each kind."""
    sizes = {"ROWS_A_STEP": 2, "REQUESTS_A_STEP": 2, "EVENT_IDS_A_STEP": 3, "TEXTS_A_STEP": 3, "PRODUCERS_A_STEP": 1}
    with ExitStack() as patches:
        for name, size in (sizes | changed).items():
            patches.enter_context(mock.patch.object(state_blocks, name, size))
        yield


def new_state(schema: Schema, *, event_ids: int = 1000) -> ShardState:
    return ShardState(
        schema,
        partitions=PARTITIONS,
        capacity=Capacity(event_ids_per_shard=event_ids),
        most_users=2000,
        most_texts=2000,
    )


def plan_of(schema: Schema) -> WirePlan:
    return WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)


def columns_of(schema: Schema, events: Sequence[Event], event_ids: Sequence[str] = ()) -> EventColumns:
    request = event_service_pb2.IngestEventsRequest()
    for number, event in enumerate(events):
        event_id = event_ids[number] if event_ids else ""
        message = request.events.add(user_id=event.user, type=event.type, event_id=event_id)
        message.time.FromNanoseconds(event.time_ns)
        message.attributes.update(dict(event.attributes))
    return decode_events(request.SerializeToString(), plan_of(schema), NOW_NS)


@dataclass
class Batch:
    """A part as it comes, with what makes it count once."""

    events: Sequence[Event]
    event_ids: Sequence[str] = ()
    producer_id: str = ""
    sequence: int = 0


@dataclass
class _Logged:
    position: int
    batch: Batch
    columns: EventColumns
    received_ns: int
    forgotten: Sequence[bytes] = ()


@dataclass
class Straight:
    """A shard's state that nothing happens to, its log, and the snapshots that are taken of it."""

    schema: Schema
    state: ShardState
    log: list[_Logged] = field(default_factory=list)
    position: int = 0

    def commit(self, batch: Batch) -> None:
        columns = columns_of(self.schema, batch.events, batch.event_ids)
        received_ns = NOW_NS + self.position * SECOND_NS
        partitions = (columns.user_hash[: columns.count] >> np.uint64(60)).astype(np.int64)
        fresh = self.state.admit(
            batch.producer_id,
            batch.sequence,
            max(0, batch.sequence - 1),
            partitions,
            columns.event_id_hash[: columns.count],
            received_ns,
        )
        if fresh is not None:
            columns = columns.select(np.flatnonzero(fresh))
        if columns.count:
            self._log(batch, columns, received_ns)
            assert self.state.table.has_room(columns.count, len(columns.buffer))
            self.state.apply(columns, 0, columns.count, received_ns)

    def forget(self, users: Iterable[str]) -> None:
        self._log(Batch([]), columns_of(self.schema, []), 0, [user.encode() for user in users])
        self.state.forget(self.log[-1].forgotten)

    def _log(self, batch: Batch, columns: EventColumns, received_ns: int, forgotten: Sequence[bytes] = ()) -> None:
        self.log.append(_Logged(self.position, batch, columns, received_ns, forgotten))
        self.position += 7


class Taken:
    """A snapshot of a `Straight` under way."""

    def __init__(self, straight: Straight) -> None:
        self._straight = straight
        self.start = straight.position
        self._copy = straight.state.copy_blocks()
        self._space = np.empty(self._copy.space_bytes, np.uint8)
        self.blocks: list[Block] = []
        self.is_complete = False

    def step(self) -> None:
        if self.is_complete:
            return
        # The space is used again: nothing of a block may be left in it.
        self._space[:] = 0xEE
        found = self._copy.step(self._space)
        if found is None:
            self.is_complete = True
            self._straight.state.finish_copy()
        else:
            self.blocks.append(Block(found[0], self._straight.position, memoryview(bytes(found[1]))))

    def finish(self) -> None:
        while not self.is_complete:
            self.step()

    def recover(self, blocks: Sequence[Block] | None = None) -> ShardState:
        """What a recovery makes of the snapshot and the log."""
        recovered = ShardState.load(self.blocks if blocks is None else blocks, new_state)
        recovered.check_invariants()
        for record in self._straight.log:
            if record.position < self.start:
                continue
            if record.forgotten:
                recovered.forget(record.forgotten, record.position)
                continue
            batch = record.batch
            recovered.note(
                batch.producer_id,
                batch.sequence,
                max(0, batch.sequence - 1),
                record.columns.user_hash[: record.columns.count],
                record.columns.event_id_hash[: record.columns.count],
                record.received_ns,
            )
            replay(recovered, record)
        recovered.finish_replay()
        recovered.check_invariants()
        return recovered


def replay(state: ShardState, record: _Logged) -> None:
    """The record by itself."""
    count = record.columns.count
    state.replay(record.columns, np.full(count, record.position), np.full(count, record.received_ns))


def check_same(state: ShardState, other: ShardState, users: Iterable[str] = USERS) -> None:
    """Nobody can tell one from the other by asking."""
    population = state.table.population.to_state(state.table.texts)
    assert other.table.population.to_state(other.table.texts) == population
    assert (other.event_count, len(other.table)) == (state.event_count, len(state.table))
    everyone = Population.merge(state.schema, [population])
    for user in users:
        read_ns = NOW_NS + 3600 * SECOND_NS
        mine, theirs = (s.table.profile(user, read_ns, population=everyone) for s in (state, other))
        assert mine == theirs, user
    partitions = np.arange(PARTITIONS, dtype=np.int64)
    for producer in [producer for producer in PRODUCERS if producer]:
        for sequence in range(8):
            asked = [
                s.producers.fresh(producer, sequence, partitions, NOW_NS + 10**4 * SECOND_NS) for s in (state, other)
            ]
            assert _answer(asked[0]) == _answer(asked[1]), (producer, sequence)
        assert state.producers.acknowledged(producer) == other.producers.acknowledged(producer)


def _answer(fresh: NDArray[np.bool_] | None) -> list[bool]:
    return [True] * PARTITIONS if fresh is None else fresh.tolist()


def held_event_ids(state: ShardState) -> set[int]:
    return set(state.event_ids.copy(*state.event_ids.held)[0].tolist())


TEXTS = [*(f"m{n}" for n in range(25)), "", "red", "blue", "w" * 300, "日産"]
NUMBERS = [-1.0, 0.0, 5.0, 10.5, 499.0, 1e6]
AGES_S = [0, 1, 60, 86_400, 40 * 86_400, 20 * 365 * 86_400]


def draw_batch(schema: Schema, rng: Random) -> Batch:
    events = []
    for _ in range(rng.randint(1, 6)):
        attributes: dict[str, str | float] = {}
        attributes |= {name: rng.choice(TEXTS) for name in schema.text_attributes if rng.random() < 0.7}
        attributes |= {name: rng.choice(NUMBERS) for name in schema.number_attributes if rng.random() < 0.7}
        time_ns = NOW_NS - rng.choice(AGES_S) * SECOND_NS
        events.append(Event(rng.choice(USERS), rng.choice(schema.event_type_names), time_ns, attributes))
    event_ids = [rng.choice(["", f"e{rng.randrange(30)}"]) for _ in events] if rng.random() < 0.5 else []
    return Batch(events, event_ids, rng.choice(PRODUCERS), rng.randint(1, 6))


Happenings = list[tuple[str, int]]
HAPPENINGS = st.lists(
    st.tuples(st.sampled_from(["batch", "copy", "batch", "forget"]), st.integers(0, 2**32 - 1)), max_size=25
)
"""What happens next, and the seed of how: a batch, users who go, or some blocks copied."""


def happen(straight: Straight, taken: Taken | None, happenings: Happenings) -> None:
    for what, seed in happenings:
        rng = Random(seed)
        if what == "batch":
            straight.commit(draw_batch(straight.schema, rng))
        elif what == "forget":
            straight.forget(rng.sample(USERS, rng.randint(1, 3)))
        elif taken is not None:
            for _ in range(rng.randint(1, 4)):
                taken.step()


@settings(max_examples=100)
@given(HAPPENINGS, HAPPENINGS, HAPPENINGS)
def test_a_snapshot_taken_meanwhile_and_the_log_give_the_same_state(
    before: Happenings, during: Happenings, after: Happenings
) -> None:
    with small_steps():
        straight = Straight(SCHEMA, new_state(SCHEMA))
        happen(straight, None, before)
        taken = Taken(straight)
        happen(straight, taken, during)
        taken.finish()
        happen(straight, None, after)
        recovered = taken.recover()
        straight.state.check_invariants()
        assert held_event_ids(recovered) == held_event_ids(straight.state)
        check_same(straight.state, recovered)


@settings(max_examples=30)
@given(st.data())
def test_so_it_is_for_any_schema_and_for_snapshots_of_what_was_recovered(data: st.DataObject) -> None:
    schema = data.draw(schemas())
    with small_steps():
        straight = Straight(schema, new_state(schema))
        happen(straight, None, data.draw(HAPPENINGS))
        for _ in range(2):
            taken = Taken(straight)
            happen(straight, taken, data.draw(HAPPENINGS))
            taken.finish()
            happen(straight, None, data.draw(HAPPENINGS))
            recovered = taken.recover()
            # Life goes on with the recovered state; the one that was never restarted goes on beside it.
            other = Straight(schema, recovered, list(straight.log), straight.position)
            more = data.draw(HAPPENINGS)
            happen(straight, None, more)
            happen(other, None, more)
            assert [record.position for record in other.log] == [record.position for record in straight.log]
            for user in USERS:
                profiles = [s.state.table.profile(user, NOW_NS + SECOND_NS) for s in (straight, other)]
                assert profiles[0] == profiles[1]
            straight = other


def test_a_batch_of_which_every_event_was_counted_leaves_nothing() -> None:
    """Nothing of it is in the log: whoever asks before a crash is told what a recovery tells."""
    straight = Straight(SCHEMA, new_state(SCHEMA))
    taken = Taken(straight)
    taken.finish()
    for producer, sequence in (("", 0), ("p1", 3), ("request:a", 1)):
        straight.commit(Batch([Event("u1", "view", NOW_NS, {})], ["e1"], producer, sequence))
    assert (straight.state.event_count, straight.state.duplicate_count, len(straight.log)) == (1, 2, 1)
    check_same(straight.state, taken.recover())


def test_a_user_who_goes_and_comes_again_while_blocks_are_copied() -> None:
    """Each way that a user can move between copied and not yet copied blocks."""
    view = [Event("", "view", NOW_NS, {"make": "vw", "price": 3.0})]

    def seen(user: str) -> Batch:
        return Batch([Event(user, e.type, e.time_ns, e.attributes) for e in view])

    with small_steps(ROWS_A_STEP=1):
        for copied in range(12):
            straight = Straight(SCHEMA, new_state(SCHEMA))
            for user in USERS[:6]:
                straight.commit(seen(user))
            taken = Taken(straight)
            for _ in range(copied):
                taken.step()
            straight.forget(["u1", "u4"])
            # The last place that became free is the first to be used: u1 moves back, u4 forward, and so on.
            for user in ("u1", "u4", "u7"):
                straight.commit(seen(user))
                taken.step()
            straight.forget(["u7"])
            straight.commit(seen("u0"))
            taken.finish()
            straight.commit(seen("u1"))
            check_same(straight.state, taken.recover())


def test_an_old_event_id_is_not_counted_again_after_the_window_was_full() -> None:
    """The window in the snapshot is ahead of the log's replay; what it holds at the end is what it would hold."""
    with small_steps():
        straight = Straight(SCHEMA, new_state(SCHEMA, event_ids=8))
        number = 0

        def some(count: int) -> Batch:
            nonlocal number
            number += count
            ids = [f"e{n}" for n in range(number - count, number)]
            return Batch([Event("u1", "view", NOW_NS, {})] * count, ids)

        straight.commit(some(6))
        taken = Taken(straight)
        for _ in range(5):
            straight.commit(some(3))
        taken.finish()
        straight.commit(some(1))
        recovered = ShardState.load(taken.blocks, lambda schema: new_state(schema, event_ids=8))
        for record in straight.log:
            if record.position >= taken.start:
                columns = record.columns
                hashes = columns.user_hash[: columns.count], columns.event_id_hash[: columns.count]
                recovered.note("", 0, 0, *hashes, record.received_ns)
                replay(recovered, record)
        recovered.check_invariants()
        assert held_event_ids(recovered) == held_event_ids(straight.state)


def whole_snapshot() -> tuple[Straight, Taken]:
    straight = Straight(SCHEMA, new_state(SCHEMA))
    for number, user in enumerate(USERS):
        attributes: dict[str, str | float] = {"make": f"m{number}", "price": 5.0 * number, "color": "red"}
        event = Event(user, "view", NOW_NS, attributes)
        straight.commit(Batch([event] * 2, (f"e{number}", f"f{number}"), PRODUCERS[number % 6], number))
    taken = Taken(straight)
    taken.finish()
    return straight, taken


def test_a_snapshot_without_one_of_its_blocks_is_refused() -> None:
    with small_steps():
        _, taken = whole_snapshot()
        needed = {state_blocks.SCHEMA, state_blocks.COUNTERS, state_blocks.POPULATION, state_blocks.ROWS}
        needed |= {state_blocks.TEXTS, state_blocks.END, state_blocks.LAYOUT}
        for place, block in enumerate(taken.blocks):
            if block.kind in needed:
                with pytest.raises(DataLoss):
                    ShardState.load(taken.blocks[:place] + taken.blocks[place + 1 :], new_state)


def test_a_block_that_is_cut_or_unknown_is_refused() -> None:
    with small_steps():
        _, taken = whole_snapshot()
        for place, block in enumerate(taken.blocks):
            whole = len(block.payload)
            for size in {0, 1, 15, 16, 24, whole // 2, whole - 8, whole - 1} & set(range(whole)):
                if block.kind == state_blocks.SCHEMA:
                    continue
                cut = Block(block.kind, block.stamp, block.payload[:size])
                with pytest.raises(DataLoss):
                    ShardState.load([*taken.blocks[:place], cut, *taken.blocks[place + 1 :]], new_state)
        with pytest.raises(DataLoss, match="does not know"):
            ShardState.load([*taken.blocks, Block(99, 0, memoryview(b""))], new_state)


def test_what_was_salvaged_serves_without_what_was_lost() -> None:
    """Whichever block is missing but the first two: users of other blocks are as they were; texts that are gone are
    called lost."""
    with small_steps():
        straight, taken = whole_snapshot()
        told = Block(SALVAGED, taken.start, memoryview(b"lost"))
        for place, block in enumerate(taken.blocks):
            left = [told, *taken.blocks[:place], *taken.blocks[place + 1 :]]
            if block.kind in (state_blocks.SCHEMA, state_blocks.LAYOUT):
                with pytest.raises(DataLoss):
                    ShardState.load(left, new_state)
                continue
            state = ShardState.load(left, new_state)
            state.check_invariants()
            lost = len(straight.state.table) - len(state.table)
            assert lost == (2 if block.kind == state_blocks.ROWS and place < len(taken.blocks) else 0) or lost == 1
            for user in USERS:
                profile = state.table.profile(user, NOW_NS)
                if block.kind == state_blocks.TEXTS:
                    assert profile
                elif profile:
                    assert profile == straight.state.table.profile(user, NOW_NS)
            state.table.population.to_state(state.table.texts)
            # And it goes on.
            again = Straight(SCHEMA, state)
            again.commit(Batch([Event("u1", "view", NOW_NS, {"make": "new", "price": 1.0})]))
            state.check_invariants()


def test_a_changed_schema_keeps_what_it_can_and_is_copied_as_such() -> None:
    changed = parse_schema(ORDERED.replace("k: 40", "k: 20") + "  all: {kind: counter, half_life: none}\n")
    straight, _ = whole_snapshot()
    state = straight.state
    state.check_schema(changed, ())
    state.change_schema(changed, ())
    assert state.schema is changed
    state.check_invariants()
    taken = Taken(straight)
    taken.finish()
    recovered = ShardState.load(taken.blocks, new_state)
    assert recovered.schema.fingerprint == changed.fingerprint
    check_same(state, recovered)


def texts_of(state: ShardState) -> set[str]:
    return {state.table.texts.bytes_of(int(number)).decode() for number in state.table.texts.numbers()}


def test_texts_that_nothing_refers_to_go_with_a_snapshot() -> None:
    """What a list has pushed out, what a forgotten user had; and nothing that is touched meanwhile."""
    schema = parse_schema(
        "{name: s, events: {view: {weight: 1}}, features: {items: {kind: recent, attribute: item, size: 2}}}"
    )

    def seen(user: str, *items: str) -> Batch:
        return Batch([Event(user, "view", NOW_NS + n, {"item": item}) for n, item in enumerate(items)])

    with small_steps(ROWS_A_STEP=1):
        straight = Straight(schema, new_state(schema))
        straight.commit(seen("u1", "a", "b", "c"))
        straight.commit(seen("u2", "d", "e"))
        straight.commit(seen("u3", "x", "y"))
        straight.forget(["u3"])
        assert texts_of(straight.state) == {"a", "b", "c", "d", "e", "x", "y"}
        taken = Taken(straight)
        taken.finish()
        # The population's own list: the latest two that arrived of the latest time.
        population = {"x", "y", "c", "e"} & texts_of(straight.state)
        assert texts_of(straight.state) == {"b", "c", "d", "e"} | population
        assert "a" not in texts_of(straight.state)
        straight.state.check_invariants()
        check_same(straight.state, taken.recover())
        # What is touched while it is looked for stays, and what goes then may come again.
        taken = Taken(straight)
        for number in range(30):
            straight.commit(seen(f"u{number % 3}", f"n{number}", "a"))
            straight.state.check_invariants()
            taken.step()
        taken.finish()
        straight.state.check_invariants()
        recovered = taken.recover()
        check_same(straight.state, recovered)
        final = Taken(straight)
        final.finish()
        assert texts_of(final.recover()) == texts_of(straight.state)
        assert len(texts_of(straight.state)) <= 3 * 2 + 2


def test_texts_do_not_gather_over_many_snapshots() -> None:
    schema = parse_schema("{name: s, events: {view: {weight: 1}}, features: {last: {kind: latest, attribute: item}}}")
    with small_steps():
        straight = Straight(schema, new_state(schema))
        most = 0
        for turn in range(40):
            taken = Taken(straight)
            for number in range(20):
                item = f"item-{turn * 20 + number:06}"
                straight.commit(Batch([Event(USERS[number % 9], "view", NOW_NS + turn * 20 + number, {"item": item})]))
                taken.step()
            taken.finish()
            most = max(most, straight.state.table.texts.high_water)
        assert most <= 3 * 20 + 10
        assert straight.state.table.texts.memory_bytes <= 8 * 1024 + most * (8 + 11)


def test_a_copy_that_is_given_up_forgets_no_text() -> None:
    straight, _ = whole_snapshot()
    before = texts_of(straight.state)
    copy = straight.state.copy_blocks()
    for _ in range(6):
        copy.step(np.empty(copy.space_bytes, np.uint8))
    straight.state.finish_copy()
    assert texts_of(straight.state) == before
    straight.commit(Batch([Event("u1", "view", NOW_NS, {"make": "new"})]))
    straight.state.check_invariants()
