"""What is gathered is exactly what was chosen, and the split by owner is the one that a loop would make."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profile_service.config import Limits
from profile_service.wire.gather import gather, gather_events, split_by_owner
from profile_service.wire.plan import WirePlan
from profile_service.wire.scan import scan_batch
from userprofile.v1 import event_service_pb2

PLAN = WirePlan.compile(["view"], [], [])


@given(
    users=st.lists(st.text(max_size=5), min_size=1, max_size=30),
    choice=st.lists(st.integers(0, 10**6), max_size=40),
    name=st.text(max_size=3),
)
def test_gathered_bytes_are_a_request_of_the_chosen_events(users: list[str], choice: list[int], name: str) -> None:
    request = event_service_pb2.IngestEventsRequest(request_id=name)
    for user in users:
        request.events.add(user_id=user, type="view")
    # Unknown fields and the name lie between, before and after the events.
    message = b"\x78\x01" + request.SerializeToString() + b"\x78\x02" + request.SerializeToString()
    chosen = np.array([number % (2 * len(users)) for number in choice], np.int64)
    scanned = scan_batch(message, PLAN, Limits(), 0)
    gathered = event_service_pb2.IngestEventsRequest.FromString(
        bytes(gather(scanned.buffer, scanned.offset, scanned.length, chosen))
    )
    assert [event.user_id for event in gathered.events] == [(users * 2)[i] for i in chosen]
    assert gathered.request_id == ""


@pytest.mark.parametrize("selection", [[1], [-1], [0, 2**62]])
def test_an_event_that_is_not_there_is_not_gathered(selection: list[int]) -> None:
    scanned = scan_batch(b"\x0a\x00", PLAN, Limits(), 0)
    with pytest.raises(IndexError, match="is not an event of the batch"):
        gather(scanned.buffer, scanned.offset, scanned.length, np.array(selection, np.int64))


def test_an_extent_beyond_the_buffer_is_not_gathered() -> None:
    buffer = scan_batch(b"\x0a\x00", PLAN, Limits(), 0).buffer
    for offset, length in ((0, 3), (1, 2), (-1, 1), (0, -1), (2**63 - 1, 2)):
        with pytest.raises(IndexError):
            gather(buffer, np.array([offset]), np.array([length], np.int32), np.array([0]))


@given(
    hashes=st.lists(st.integers(0, 2**64 - 1), max_size=60),
    bits=st.integers(0, 8),
    owners=st.integers(1, 5),
    random=st.integers(0, 2**32 - 1).map(Random),
)
def test_the_split_is_the_one_a_loop_makes(hashes: list[int], bits: int, owners: int, random: Random) -> None:
    owner_of = [random.randrange(owners) for _ in range(1 << bits)]
    status = [random.choice([0, 0, 0, 1, 5]) for _ in hashes]
    order, start = split_by_owner(
        np.array(hashes, np.uint64), np.array(status, np.uint8), np.array(owner_of, np.int32), bits, owners
    )
    for owner in range(owners):
        expected = [i for i, hash_ in enumerate(hashes) if status[i] == 0 and owner_of[hash_ >> (64 - bits)] == owner]
        assert list(order[start[owner] : start[owner + 1]]) == expected
    assert start[0] == 0
    assert start[owners] == order.size


def test_a_table_that_does_not_fit_is_refused() -> None:
    hashes, status = np.zeros(1, np.uint64), np.zeros(1, np.uint8)
    with pytest.raises(ValueError, match="must have 256 entries"):
        split_by_owner(hashes, status, np.zeros(255, np.int32), 8, 1)
    for owner in (-1, 1):
        with pytest.raises(ValueError, match="owners from 0 to 0"):
            split_by_owner(hashes, status, np.full(256, owner, np.int32), 8, 1)


@given(users=st.lists(st.text(max_size=5), max_size=30), choice=st.lists(st.integers(0, 10**6), max_size=40))
def test_events_gathered_by_index_are_those_of_a_request_of_events_alone(users: list[str], choice: list[int]) -> None:
    request = event_service_pb2.IngestEventsRequest()
    for user in users:
        request.events.add(user_id=user, type="view")
    chosen = np.array([number % len(users) for number in choice] if users else [], np.int64)
    gathered = event_service_pb2.IngestEventsRequest.FromString(
        bytes(gather_events(request.SerializeToString(), chosen))
    )
    assert [event.user_id for event in gathered.events] == [users[i] for i in chosen]


def test_an_index_beyond_the_events_is_not_gathered() -> None:
    with pytest.raises(IndexError, match="is not an event of the batch"):
        gather_events(b"\x0a\x00", np.array([0, 1], np.int64))
