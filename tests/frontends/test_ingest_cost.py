"""What the way of a batch from a frontend to its acknowledgement costs in Python: calls are counted, not seconds, so
that no busy machine can fail it."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from tests.frontends.api_harness import Producer, api_over_shards

MOST_CALLS = 1_090
"""Python functions entered for a batch that goes to two shards by itself, at both ends of each stream; some are those
of asyncio's own loop, in place of uvloop's. 1,077 to 1,082 are measured of 20 events."""

MOST_CALLS_MORE = 60
"""Of a batch a hundred times as large: it is applied in more slices."""

ROUNDS = 20


class _Calls:
    """Counts the Python functions that are entered."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, _frame: FrameType, event: str, _argument: Any) -> None:
        self.count += event == "call"


async def calls_of_a_batch(events: int) -> int:
    """The fewest of some rounds: now and then a timer or a ping comes in between."""
    users = [f"u{number}" for number in range(events)]
    counts = []
    async with api_over_shards(2) as (api, _, _):
        producer = Producer(api)
        producer.send(producer_id="p")
        await producer.told()
        for sequence in range(1, ROUNDS + 1):
            producer.send(*users, sequence=sequence)
            calls = _Calls()
            before = sys.getprofile()
            sys.setprofile(calls)
            try:
                await producer.told_up_to(sequence)
            finally:
                sys.setprofile(before)
            counts.append(calls.count)
        producer.end()
        await producer.rest()
    return min(counts)


async def test_no_python_function_is_called_for_an_event_and_few_for_a_batch() -> None:
    small, large = await calls_of_a_batch(20), await calls_of_a_batch(2000)
    assert small <= MOST_CALLS
    assert large <= small + MOST_CALLS_MORE
