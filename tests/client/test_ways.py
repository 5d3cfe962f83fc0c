"""Which way each event goes, and when a batch is acknowledged of which every part went another way."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from profile_client.errors import Rejected
from profile_client.events import frame
from profile_client.owners import Owner
from profile_client.ways import FRONTEND, Ways, split
from profile_client.window import Batch
from profile_service.cluster.partitioning import partition_of, user_hash
from userprofile.v1 import event_pb2

BITS = 4
OWNERS = [Owner(f"127.0.0.1:{7000 + number}") for number in range(3)]

users = st.one_of(st.text(max_size=5), st.text(min_size=100, max_size=300))


def settled(partitions: Sequence[Owner | None], *, closed: Sequence[int] = ()) -> Ways:
    ways = Ways(partitions, 64 - BITS)
    for number, way in enumerate(ways.all):
        way.is_open = number not in closed
    ways.settle()
    return ways


@given(st.lists(st.builds(lambda user, kind: event_pb2.Event(user_id=user, type=kind), users, st.text(max_size=3))))
def test_every_event_goes_to_the_owner_of_its_user_in_order(events: list[event_pb2.Event]) -> None:
    way_of = [number % 3 for number in range(1 << BITS)]
    elements = [frame(event.SerializeToString()) for event in events]
    found = split(b"".join(elements), way_of, 64 - BITS)
    assert found is not None
    expected: dict[int, tuple[list[bytes], list[int]]] = {}
    for index, (event, element) in enumerate(zip(events, elements, strict=True)):
        pieces, places = expected.setdefault(way_of[partition_of(user_hash(event.user_id), BITS)], ([], []))
        pieces.append(element)
        places.append(index)
    assert found == expected


@given(st.permutations([1, 2, 4, 3]), st.booleans())
def test_a_user_is_found_wherever_its_field_stands(order: list[int], twice: bool) -> None:
    fields = {
        1: b"\x0a\x02u7",
        2: b"\x12\x04view",
        # A field that this client does not know, of each kind of wire.
        3: b"\x99\x06" + b"\xff" * 8 + b"\x98\x06\xff\x01" + b"\x9d\x06" + b"\xff" * 4,
        4: b"\x22\x01e",
    }
    event = b"".join(fields[number] for number in order)
    # Of a field that comes twice the last counts, unless it came first: then it is the owner who says "not mine".
    if twice and order[0] != 1:
        event = b"\x12\x01v" + fields[1].replace(b"u7", b"u8") + event
    way_of = list(range(1 << BITS))
    found = split(frame(event), way_of, 64 - BITS)
    assert found is not None
    assert list(found) == [xxhash.xxh64_intdigest(b"u7") >> (64 - BITS)]


@given(st.binary(max_size=40))
def test_bytes_that_are_no_events_go_to_a_frontend_whole(body: bytes) -> None:
    found = split(body, [1] * (1 << BITS), 64 - BITS)
    if found is not None:
        assert b"".join(piece for pieces, _ in found.values() for piece in pieces) == body


def test_a_batch_is_acknowledged_when_all_its_parts_are_and_in_order(seed: int) -> None:
    random = Random(seed)
    for _ in range(30):
        partitions = [random.choice([*OWNERS, None]) for _ in range(1 << BITS)]
        closed = [number for number in (1, 2, 3) if random.random() < 0.3]
        ways = settled(partitions, closed=closed)
        batches = [_batch(number, random) for number in range(1, 20)]
        unanswered = dict.fromkeys(range(len(ways.all)), 0)
        told: list[tuple[int, int]] = []
        last = 0
        waiting = list(batches)
        while last < len(batches):
            if waiting and random.random() < 0.4:
                ways.put(waiting.pop(0))
            number = random.randrange(len(ways.all))
            if random.random() < 0.5:
                while (part := ways.take(number)) is not None and random.random() < 0.8:
                    unanswered[number] = part.batch.sequence
            elif ways.all[number].sent:
                upto = random.choice([part.batch.sequence for part in ways.all[number].sent])
                parts = [part for part in ways.all[number].sent if part.batch.sequence <= upto]
                # Of each part the first event is refused.
                ways.acknowledge(number, upto, [Rejected(part.batch.sequence, 0, "type", "bad") for part in parts])
            assert number == FRONTEND or number not in closed or not ways.all[number].sent
            if (acknowledged := ways.acknowledged()) is not None:
                sequence, rejected = acknowledged
                assert sequence > last
                last = sequence
                told += [(each.sequence, each.index) for each in rejected]
            ways.check_invariants()
        assert told == sorted(set(told))
        # One refusal for each part, at the place of its first event.
        for batch in batches:
            first: dict[int, int] = {}
            for index in range(batch.events):
                partition = partition_of(user_hash(f"u{batch.position + index}"), BITS)
                owner = partitions[partition]
                at = next((n for n, way in enumerate(ways.all) if way.owner is owner and way.is_open), FRONTEND)
                first.setdefault(at, index)
            assert [index for sequence, index in told if sequence == batch.sequence] == sorted(first.values())


def test_without_owners_batches_go_whole_and_empty_ones_too() -> None:
    ways = Ways()
    ways.settle()
    for number in (1, 2):
        ways.put(Batch(b"", 0, 0, sequence=number))
    assert ways.acknowledged() is None
    parts = [ways.take(FRONTEND), ways.take(FRONTEND), ways.take(FRONTEND)]
    assert [part.batch.sequence for part in parts if part is not None] == [1, 2]
    ways.acknowledge(FRONTEND, 2, ())
    assert ways.acknowledged() == (2, [])


def _batch(number: int, random: Random) -> Batch:
    count = random.randrange(6)
    first = number * 100
    events = [event_pb2.Event(user_id=f"u{first + index}", type="view") for index in range(count)]
    body = b"".join(frame(event.SerializeToString()) for event in events)
    return Batch(body, count, first, sequence=number)
