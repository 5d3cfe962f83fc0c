"""The load: events of the sample's kind, serialised into batches before anything is timed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from profile_service.config import Limits
from profile_service.domain.schema import load_schema
from profile_service.domain.table import ProfileTable
from profile_service.sample import bundled_listings, generate_events, serialize_events
from profile_service.wire.decode import decode_events
from profile_service.wire.gather import gather
from profile_service.wire.plan import WirePlan
from profile_service.wire.scan import scan_batch

SCHEMA = "marketplace"
_KERNEL_BATCHES = 50
_DRAWN_USERS = 100_000
"""Shoppers that are drawn with tastes where the events are given to others anyway."""


@dataclass(frozen=True)
class Load:
    """Bodies of batches: each is a run of `events` fields."""

    batches: list[bytes]
    events: int

    def measure_kernels(self) -> dict[str, float]:
        """What the kernels alone cost on one core, in µs an event: the median batch, in a table warmed by the batches
        before."""
        schema = load_schema(SCHEMA)
        plan = WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)
        table = ProfileTable(schema)
        now_ns = time.time_ns()
        samples: dict[str, list[float]] = {"scan": [], "gather": [], "decode": [], "apply": []}
        for batch in self.batches[: 2 * _KERNEL_BATCHES]:
            marks = [time.perf_counter()]
            scanned = scan_batch(batch, plan, Limits(), now_ns)
            marks.append(time.perf_counter())
            events = gather(scanned.buffer, scanned.offset, scanned.length, np.arange(scanned.count))
            marks.append(time.perf_counter())
            columns = decode_events(events, plan, now_ns)
            marks.append(time.perf_counter())
            table.has_room(columns.count, len(events))
            for start in range(0, columns.count, 2048):
                table.apply(columns, start, min(start + 2048, columns.count), now_ns)
            marks.append(time.perf_counter())
            for name, before, after in zip(samples, marks, marks[1:], strict=False):
                samples[name].append((after - before) / max(1, columns.count) * 1e6)
        half = len(samples["scan"]) // 2
        return {name: float(np.median(costs[half:])) for name, costs in samples.items()}


def build_load(events: int, users: int, batch: int, seed: int, *, every_user: bool = False) -> Load:
    """`events` events by `users` shoppers over the bundled listings, `batch` to a batch; the newest is an hour old.

    The same arguments give the same events. With `every_user` each of the shoppers comes once in every `users` events,
    in no order.
    """
    listings = bundled_listings()
    end_ns = time.time_ns() - 3600 * 10**9
    drawn = generate_events(min(users, _DRAWN_USERS) if every_user else users, events, seed, listings)
    if every_user:
        rng = np.random.default_rng(seed)
        turns = [rng.permutation(users) for _ in range(0, events, users)]
        drawn = replace(drawn, shopper=np.concatenate(turns)[:events].astype(np.int32))
    bodies, waiting, held = [], b"", 0
    for encoded in serialize_events(drawn, listings, end_ns):
        start = 0
        while start < len(encoded):
            stop = min(start + batch - held, len(encoded))
            waiting += encoded.run(start, stop)
            held += stop - start
            start = stop
            if held == batch:
                bodies.append(waiting)
                waiting, held = b"", 0
    if held:
        bodies.append(waiting)
    return Load(bodies, events)
