"""A crowd's events are those of other users with another id in them, and nothing else."""

from __future__ import annotations

import pytest

from benchmarks.crowd import FIRST_USER, Crowd
from benchmarks.load import SCHEMAS
from profile_service.sample.shoppers import shopper_id
from userprofile.v1 import event_pb2, event_service_pb2


def events_of(body: bytes) -> list[event_pb2.Event]:
    return list(event_service_pb2.IngestEventsRequest.FromString(body).events)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_user_has_one_event_of_those_that_were_serialised(schema: str) -> None:
    crowd = Crowd(schema, batch=30, seed=7, serialised=100)
    bodies = [events_of(body) for body in crowd.batches(0, 250)]
    assert [len(events) for events in bodies] == [30, 30, 30, 10, 30, 30, 30, 10, 30, 20]
    events = [event for body in bodies for event in body]
    assert [event.user_id for event in events] == [shopper_id(FIRST_USER + number) for number in range(250)]
    for event in events:
        event.user_id = ""
    assert events[100:200] == events[:100]
    assert events[200:] == events[:50]
    assert len({event.SerializeToString() for event in events[:100]}) > 50


def test_it_goes_on_where_it_is_told_to() -> None:
    crowd = Crowd("preferences", batch=50, seed=7, serialised=100)
    (body,) = crowd.batches(80_000_000, 80_000_003)
    assert [event.user_id for event in events_of(body)] == [f"shopper-{90_000_000 + number}" for number in range(3)]
