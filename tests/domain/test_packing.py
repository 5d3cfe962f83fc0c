"""A packed row says by itself all that its user's row said, in whatever table it comes to; damage is found."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profile_service.domain.index import Strings
from profile_service.domain.packing import HEAD_BYTES, Packing, pack_rows, unpack_rows
from profile_service.domain.population import Population, PopulationRow
from profile_service.domain.schema import Schema
from profile_service.domain.table import ProfileTable
from profile_service.errors import DataLoss
from profile_service.wire.decode import decode_events
from profile_service.wire.plan import WirePlan
from tests.domain.oracles.profile import Event
from tests.domain.strategies import events_of, schemas
from tests.domain.test_profile_table import NOW_NS, SCHEMA, encode, events
from userprofile.v1 import profile_pb2


def filled(schema: Schema, given_events: list[Event]) -> ProfileTable:
    table = small(schema)
    plan = WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)
    columns = decode_events(encode(given_events), plan, NOW_NS)
    assert table.has_room(columns.count, len(columns.buffer))
    table.apply(columns, 0, columns.count, NOW_NS)
    return table


def small(schema: Schema) -> ProfileTable:
    return ProfileTable(schema, most_users=1000, most_texts=10_000)


def user_ids(table: ProfileTable) -> list[bytes]:
    return [table.users.bytes_of(number) for number in range(table.users.high_water)]


@given(st.data())
def test_rows_that_came_packed_read_as_before(data: st.DataObject) -> None:
    schema = data.draw(schemas())
    table = filled(schema, data.draw(events_of(schema, NOW_NS)))
    ids = user_ids(table)
    packing = Packing.of(table.layout)
    packed = pack_rows(packing, table.rows, np.arange(len(ids)), table.texts)
    other = small(schema)
    # Its numbers of texts are others.
    other.texts.add([b"something else", b"w" * 300])
    users = Strings.join(ids)
    other.load_rows(users.length, users.joined(), unpack_rows(packing, packed, other.texts))
    other.check_invariants()
    for user_id in ids:
        assert other.profile(user_id.decode(), NOW_NS) == table.profile(user_id.decode(), NOW_NS)
    numbers = np.arange(len(ids))
    assert pack_rows(packing, other.rows, numbers, other.texts) == packed


@given(st.lists(events(), min_size=1, max_size=30))
def test_the_population_survives_packing(given_events: list[Event]) -> None:
    table = filled(SCHEMA, given_events)
    other = small(SCHEMA)
    other.texts.add([b"something else"])
    other.population.unpack(table.population.pack(table.texts), other.texts)
    assert other.population.to_state(other.texts) == table.population.to_state(table.texts)
    assert other.population.event_count == len(given_events)


@given(st.lists(events(), min_size=1, max_size=30), st.lists(events(), min_size=1, max_size=30))
def test_populations_add_up(some: list[Event], others: list[Event]) -> None:
    table, added = filled(SCHEMA, [*some, *others]), small(SCHEMA)
    for part in (some, others):
        held = filled(SCHEMA, part)
        row = PopulationRow(SCHEMA)
        row.unpack(held.population.pack(held.texts), added.texts)
        added.population.add(row)
    assert added.population.event_count == table.population.event_count
    both = Population.merge(SCHEMA, [state_of(filled(SCHEMA, part)) for part in (some, others)])
    again = Population.merge(SCHEMA, [state_of(added)])
    assert profile_pb2.Profile.FromString(again.profile(NOW_NS)) == profile_pb2.Profile.FromString(both.profile(NOW_NS))


def state_of(table: ProfileTable) -> bytes:
    return table.population.to_state(table.texts)


def test_every_damaged_byte_is_found(seed: int) -> None:
    drawn = Random(seed)
    table = filled(SCHEMA, [Event("u1", "view", NOW_NS, {"make": "vw", "price": 10.0, "color": "red"})])
    packing = Packing.of(table.layout)
    (packed,) = pack_rows(packing, table.rows, np.arange(1), table.texts)
    for place in range(len(packed)):
        damaged = bytearray(packed)
        damaged[place] ^= drawn.randrange(1, 256)
        with pytest.raises(DataLoss):
            unpack_rows(packing, [packed, bytes(damaged)], small(SCHEMA).texts)
    for size in range(len(packed)):
        with pytest.raises(DataLoss):
            unpack_rows(packing, [packed[:size]], small(SCHEMA).texts)
    assert len(packed) > HEAD_BYTES + packing.row_bytes
