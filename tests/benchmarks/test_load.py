"""The loads of the benchmarks are what they say."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.load import PREFERENCES, SCHEMAS, build_load
from benchmarks.views import COLORS
from profile_service.commands import bench
from profile_service.domain.schema import load_schema
from profile_service.sample.shoppers import shopper_id
from userprofile.v1 import event_pb2, event_service_pb2


def events_of(body: bytes) -> list[event_pb2.Event]:
    return list(event_service_pb2.IngestEventsRequest.FromString(body).events)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_event_is_one_that_the_schema_counts(schema: str) -> None:
    declared = load_schema(SCHEMAS[schema])
    load = build_load(schema, 2_500, 300, 400, 7)
    assert [len(events_of(body)) for body in load.batches] == [400] * 6 + [100]
    for event in events_of(load.batches[3]):
        assert event.type in declared.event_type_names
        assert set(event.attributes.fields) <= {*declared.text_attributes, *declared.number_attributes}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_user_comes_once_in_a_turn(schema: str) -> None:
    load = build_load(schema, 600, 300, 300, 7, every_user=True)
    everyone = sorted(shopper_id(number) for number in range(300))
    assert [sorted(event.user_id for event in events_of(body)) for body in load.batches] == [everyone, everyone]


def test_views_have_four_attributes_an_id_of_their_own_and_some_144_bytes() -> None:
    load = build_load(PREFERENCES, 20_000, 1_000, 20_000, 7)
    events = events_of(load.batches[0])
    assert 138 <= len(load.batches[0]) / len(events) <= 150
    assert len({event.event_id for event in events}) == len(events)
    assert all(set(event.attributes.fields) == {"color", "make", "price", "mileage"} for event in events)
    assert {event.attributes["color"] for event in events} == set(COLORS)
    times = [event.time.ToNanoseconds() for event in events]
    assert times == sorted(times)


def test_other_seeds_give_other_ids() -> None:
    ids = [{e.event_id for e in events_of(build_load(PREFERENCES, 500, 9, 500, seed).batches[0])} for seed in (1, 2)]
    assert not ids[0] & ids[1]


def test_a_few_users_are_far_more_active_than_most() -> None:
    events = events_of(build_load(PREFERENCES, 20_000, 1_000, 20_000, 7).batches[0])
    counts = sorted(Counter(event.user_id for event in events).values(), reverse=True)
    assert 0.10 < counts[0] / len(events) < 0.16
    assert counts[len(counts) // 2] < len(events) / 1_000


def test_the_command_offers_these_loads() -> None:
    assert set(bench.SCHEMAS) == set(SCHEMAS)
