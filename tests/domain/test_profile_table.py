"""Any order, any batching and any split of the events gives the oracle's profile."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profile_service.domain.features import KINDS
from profile_service.domain.population import Population
from profile_service.domain.schema import Schema, parse_schema
from profile_service.domain.table import ProfileTable
from profile_service.wire.decode import decode_events
from profile_service.wire.plan import WirePlan
from tests.domain.oracles import ProfileOracle
from tests.domain.oracles.profile import Event
from userprofile.v1 import event_service_pb2, profile_pb2

NOW_NS = 1_790_000_000 * 10**9
DAY_NS = 86_400 * 10**9

ORDERED = """
name: all
events: {view: {weight: 1}, buy: {weight: 7.5}}
half_life: 30d
features:
  color:    {kind: categorical, attribute: color, values: [red, blue, "no"], prior: population, prior_strength: 3}
  shade:    {kind: categorical, attribute: color, values: [red], events: [buy], half_life: 2h}
  make:     {kind: top_k, attribute: make, k: 40}
  few:      {kind: top_k, attribute: make, k: 3, half_life: none}
  price:    {kind: distribution, attribute: price, bins: {scale: log, min: 1, max: 1000, count: 7}}
  bought:   {kind: distribution, attribute: price, events: [buy], half_life: none,
             bins: {scale: linear, min: -5, max: 5, count: 4}}
  bands:    {kind: distribution, attribute: price, half_life: 1d, bins: {scale: explicit, edges: [0, 10, 11, 500]}}
  buys:     {kind: counter, events: [buy], half_life: none}
  activity: {kind: counter, half_life: 12h}
  day:      {kind: window_count, window: 24h, bucket: 1h}
  minutes:  {kind: window_count, events: [view], window: 5m, bucket: 7s}
  last:     {kind: latest, attribute: make}
  items:    {kind: recent, attribute: make, size: 4}
  makes:    {kind: distinct, attribute: make}
"""
SCHEMA = parse_schema(ORDERED)
PLAN = WirePlan.compile(SCHEMA.event_type_names, SCHEMA.text_attributes, SCHEMA.number_attributes)

PRICES = st.one_of(
    st.sampled_from([0.0, -3.5, 1.0, 10.0, 11.0, 500.0, 1000.0, 11_111_111.0, 5.0, -5.0]),
    st.floats(-100, 1e7, allow_nan=False),
)
MAKES = st.one_of(st.sampled_from(["vw", "bmw", "kia", "škoda", "日産"]), st.integers(0, 60).map(lambda n: f"m{n}"))
AGES_NS = st.one_of(
    st.integers(-200 * 10**9, 3600 * 10**9),
    st.sampled_from([0, 3600 * 10**9, DAY_NS]),
    st.integers(0, 60 * DAY_NS),
    st.integers(0, 20 * 365 * DAY_NS),
)


@st.composite
def events(draw: st.DrawFn) -> Event:
    attributes: dict[str, str | float] = {}
    colors = st.sampled_from(["red", "blue", "no", "pink", ""])
    choices: dict[str, st.SearchStrategy[Any]] = {"color": colors, "make": MAKES, "price": PRICES}
    for name, values in choices.items():
        if draw(st.integers(0, 3)):
            attributes[name] = draw(values)
    return Event(
        draw(st.sampled_from(["u1", "u2", "ü/3"])),
        draw(st.sampled_from(["view", "buy"])),
        NOW_NS - draw(AGES_NS),
        attributes,
    )


def encode(batch: Sequence[Event]) -> bytes:
    request = event_service_pb2.IngestEventsRequest()
    for event in batch:
        message = request.events.add(user_id=event.user, type=event.type)
        message.time.FromNanoseconds(event.time_ns)
        message.attributes.update(dict(event.attributes))
    return request.SerializeToString()


def fresh_table(schema: Schema = SCHEMA) -> ProfileTable:
    return ProfileTable(schema, most_users=50_000, most_texts=200_000)


def apply(table: ProfileTable, batch: Sequence[Event], plan: WirePlan = PLAN) -> None:
    encoded = encode(batch)
    columns = decode_events(encoded, plan, NOW_NS)
    assert table.has_room(columns.count, len(encoded))
    table.apply(columns, 0, columns.count, NOW_NS)


def check(table: ProfileTable, oracle: ProfileOracle, read_ns: int, users: Sequence[str] | None = None) -> None:
    population = Population.merge(table.schema, [table.population.to_state(table.texts)])
    for user in users or oracle.users:
        oracle.check(user, table.profile(user, read_ns, population=population))


@settings(max_examples=150)
@given(st.lists(events(), min_size=1, max_size=60), st.data())
def test_any_batching_gives_the_oracles_profile(given_events: list[Event], data: st.DataObject) -> None:
    table, oracle = fresh_table(), ProfileOracle(SCHEMA)
    waiting = list(given_events)
    while waiting:
        size = data.draw(st.integers(1, len(waiting)))
        apply(table, waiting[:size])
        waiting = waiting[size:]
    for event in given_events:
        oracle.add(event)
    check(table, oracle, NOW_NS + data.draw(st.integers(0, 40 * DAY_NS)))


@settings(max_examples=60)
@given(st.lists(events(), min_size=2, max_size=40, unique_by=lambda event: event.time_ns), st.randoms())
def test_any_order_of_arrival_gives_the_same_profile(given_events: list[Event], random: Random) -> None:
    """Times differ, so that even what goes by event time has one answer."""
    shuffled = list(given_events)
    random.shuffle(shuffled)
    table, oracle = fresh_table(), ProfileOracle(SCHEMA)
    apply(table, shuffled)
    for event in given_events:
        oracle.add(event)
    check(table, oracle, NOW_NS)


@settings(max_examples=60)
@given(
    st.lists(events(), min_size=1, max_size=20, unique_by=lambda event: event.time_ns),
    st.lists(events(), min_size=1, max_size=20),
)
def test_merging_two_users_is_replaying_both_as_one(mine: list[Event], theirs: list[Event]) -> None:
    times = {event.time_ns for event in mine}
    given_events = [Event("target", e.type, e.time_ns, e.attributes) for e in mine]
    given_events += [Event("source", e.type, e.time_ns, e.attributes) for e in theirs if e.time_ns not in times]
    if len({event.user for event in given_events}) < 2:
        return
    table, oracle = fresh_table(), ProfileOracle(SCHEMA)
    apply(table, given_events)
    table.merge("target", "source")
    for event in given_events:
        oracle.add(Event("target", event.type, event.time_ns, event.attributes))
    check(table, oracle, NOW_NS)
    assert table.profile("source", NOW_NS) == b""


@settings(max_examples=60)
@given(st.lists(events(), min_size=1, max_size=60), st.lists(st.integers(0, 2), min_size=60, max_size=60))
def test_the_population_of_several_shards_is_that_of_all_events(given_events: list[Event], owners: list[int]) -> None:
    tables = [fresh_table() for _ in range(3)]
    oracle = ProfileOracle(SCHEMA)
    # Equal times on different shards have no order of arrival between them: keep one event a time.
    once = list({event.time_ns: event for event in given_events}.values())
    for event, owner in zip(once, owners, strict=False):
        apply(tables[owner], [event])
        oracle.add(Event("", event.type, event.time_ns, event.attributes))
    population = Population.merge(SCHEMA, [table.population.to_state(table.texts) for table in tables])
    profile = population.profile(NOW_NS)
    everyone = oracle.users[""]
    message = profile_pb2.Profile.FromString(profile)
    assert message.event_count == len(once)
    for name, feature in everyone.features.items():
        if name == "few":
            continue  # three of several shards' heaviest: bounded below
        feature.check(name, message.features[name], NOW_NS, [feature])
    few = message.features["few"].top_k
    assert few.weight == pytest.approx(sum(seen.weight for seen in everyone.features["few"].seen))


def test_a_value_far_in_the_past_keeps_its_precision_beside_a_new_one() -> None:
    table, oracle = fresh_table(), ProfileOracle(SCHEMA)
    old = [Event("u1", "view", NOW_NS - 30 * 365 * DAY_NS + n, {"price": 10.0 + n}) for n in range(5)]
    new = [Event("u1", "buy", NOW_NS, {"color": "red"})]
    apply(table, [*new, *old])
    for event in [*new, *old]:
        oracle.add(event)
    check(table, oracle, NOW_NS)


def test_a_long_history_of_one_user_stays_within_the_bound() -> None:
    """Thirty thousand events for one row: sums of 32 bits must not drift."""
    rng = np.random.default_rng(7)
    batch = [
        Event("u1", "view", NOW_NS - int(age), {"color": "red", "price": float(price), "make": "vw"})
        for age, price in zip(rng.integers(0, 200 * DAY_NS, 30_000), rng.lognormal(3, 1, 30_000), strict=True)
    ]
    table, oracle = fresh_table(), ProfileOracle(SCHEMA)
    for event in batch:
        oracle.add(event)
    for start in range(0, len(batch), 5000):
        apply(table, batch[start : start + 5000])
    check(table, oracle, NOW_NS)


def test_where_a_group_of_events_is_cut_changes_no_bit() -> None:
    """Several of the kernel's blocks at once, or pieces that fit none of them."""
    rng = np.random.default_rng(11)
    batch = [
        Event(
            f"u{user}",
            ("view", "buy")[int(user) % 2],
            NOW_NS - int(age),
            {"color": ("red", "blue", "pink")[make % 3], "make": f"m{make}", "price": float(price)},
        )
        for user, age, make, price in zip(
            rng.integers(0, 40, 1000),
            rng.integers(0, 400 * DAY_NS, 1000),
            rng.integers(0, 90, 1000),
            rng.lognormal(3, 2, 1000),
            strict=True,
        )
    ]
    whole, pieces = fresh_table(), fresh_table()
    apply(whole, batch)
    start = 0
    while start < len(batch):
        stop = start + int(rng.integers(1, 150))
        apply(pieces, batch[start:stop])
        start = stop
    users = {event.user for event in batch}
    assert all(whole.profile(user, NOW_NS) == pieces.profile(user, NOW_NS) for user in users)
    assert whole.population.to_state(whole.texts) == pieces.population.to_state(pieces.texts)


def test_a_user_removed_and_seen_again_starts_fresh() -> None:
    table, oracle = fresh_table(), ProfileOracle(SCHEMA)
    apply(table, [Event("u1", "buy", NOW_NS, {"color": "red", "price": 3.0, "make": "vw"})] * 5)
    assert table.remove("u1")
    assert not table.remove("u1")
    assert table.profile("u1", NOW_NS) == b""
    again = Event("u1", "view", NOW_NS - DAY_NS, {"price": 7.0})
    apply(table, [again])
    oracle.add(again)
    profile = profile_pb2.Profile.FromString(table.profile("u1", NOW_NS))
    assert profile.event_count == 1
    assert profile.features["price"].distribution.max == 7.0
    assert profile.features["few"].top_k.weight == 0


def test_features_can_be_asked_for_by_name() -> None:
    table = fresh_table()
    apply(table, [Event("u1", "buy", NOW_NS, {})])
    profile = profile_pb2.Profile.FromString(table.profile("u1", NOW_NS, ["last", "buys"]))
    assert set(profile.features) == {"last", "buys"}
    assert profile.features["buys"].counter.value == 1
    assert profile.features["last"].WhichOneof("kind") == "latest"


def test_every_kind_is_in_the_schema_under_test() -> None:
    assert {feature.kind for feature in SCHEMA.features} == set(KINDS)
