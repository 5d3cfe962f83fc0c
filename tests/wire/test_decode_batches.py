"""Batches decoded together are what each of them is alone."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from profile_service.domain.columns import EventColumns
from profile_service.errors import InvalidArgument
from profile_service.wire.decode import decode_batches, decode_events
from profile_service.wire.plan import WirePlan
from userprofile.v1 import event_service_pb2

PLAN = WirePlan.compile(["view", "buy"], ["color", "make"], ["price"])


def batch(random: Random, events: int) -> bytes:
    request = event_service_pb2.IngestEventsRequest()
    for _ in range(events):
        event = request.events.add(user_id=f"u{random.randrange(9)}", type=random.choice(["view", "buy"]))
        if random.random() < 0.5:
            event.time.FromNanoseconds(random.randrange(2**60))
        if random.random() < 0.5:
            event.event_id = f"e{random.randrange(99)}"
        for name in ("color", "make"):
            if random.random() < 0.7:
                event.attributes[name] = f"{name}{random.randrange(5)}"
        if random.random() < 0.7:
            event.attributes["price"] = random.random()
    return request.SerializeToString()


def texts(columns: EventColumns, name: str, start: int, stop: int) -> list[bytes]:
    offset, length = getattr(columns, f"{name}_offset"), getattr(columns, f"{name}_length")
    extents = zip(offset[..., start:stop].ravel().tolist(), length[..., start:stop].ravel().tolist(), strict=True)
    return [columns.buffer[at : at + max(size, 0)].tobytes() for at, size in extents]


@pytest.mark.parametrize("sizes", [[], [0], [1], [3, 0, 0, 5, 1], [1] * 70])
def test_batches_decoded_together_are_what_each_is_alone(seed: int, sizes: list[int]) -> None:
    random = Random(seed)
    batches = [batch(random, size) for size in sizes]
    arrivals = [random.randrange(2**60) for _ in sizes]
    together = decode_batches(batches, sizes, PLAN, arrivals)
    assert together.count == sum(sizes)
    start = 0
    for given, size, arrival_ns in zip(batches, sizes, arrivals, strict=True):
        alone = decode_events(given, PLAN, arrival_ns)
        for name in ("user_length", "user_hash", "type_index", "time_ns", "event_id_hash", "text_length", "text_hash"):
            ours = getattr(together, name)[..., start : start + size]
            np.testing.assert_array_equal(ours, getattr(alone, name)[..., :size], name)
        np.testing.assert_array_equal(together.number[:, start : start + size], alone.number[:, :size])
        for name in ("user", "text"):
            assert texts(together, name, start, start + size) == texts(alone, name, 0, size)
        start += size


def test_numbers_of_events_that_do_not_add_up_are_refused(seed: int) -> None:
    batches = [batch(Random(seed), 2), batch(Random(seed), 3)]
    with pytest.raises(InvalidArgument, match="says 4, the bytes hold 5"):
        decode_batches(batches, [2, 2], PLAN, [0, 0])
