"""The load: events serialised into batches before anything is timed, and the schema that counts them.

preferences    views of cars with four attributes, of users by Zipf's law (views.py); what most benchmarks run
marketplace    the demo's sample: shoppers over real listings, four to six attributes, all kinds of features
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.views import draw_views, id_prefix
from profile_service.files.encode import EncodedEvents
from profile_service.sample import bundled_listings, generate_events, serialize_events

PREFERENCES, MARKETPLACE = "preferences", "marketplace"
SCHEMAS = {PREFERENCES: str(Path(__file__).with_name("preferences.yaml")), MARKETPLACE: "marketplace"}
"""What `serve --schema` and `load_schema` take, by the name of the load."""

_DRAWN_USERS = 100_000
"""Shoppers that are drawn with tastes where the events are given to others anyway."""


@dataclass(frozen=True)
class Load:
    """Bodies of batches: each is a run of `events` fields."""

    schema: str
    """Whose events they are: a key of `SCHEMAS`."""
    batches: list[bytes]
    events: int
    batch_events: int
    """Events of every batch but the last, which may have fewer."""
    ids: bytes = b""
    """What the ids of all events begin with; empty where events have none."""

    @property
    def whole_batches(self) -> int:
        """Batches of `batch_events` events."""
        return self.events // self.batch_events

    def batch(self, number: int, round_number: int) -> bytes:
        """Batch `number` with ids that no other round has: what was counted once is not counted again."""
        body = self.batches[number]
        if not self.ids or not round_number:
            return body
        return body.replace(self.ids, id_prefix(int(self.ids, 16) + round_number))

    def renewed(self, round_number: int) -> Load:
        """The same events with the ids of that round."""
        return replace(self, batches=[self.batch(number, round_number) for number in range(len(self.batches))])


def build_load(
    schema: str, events: int, users: int, batch: int, seed: int, *, every_user: bool = False, first_user: int = 0
) -> Load:
    """`events` events by `users` users, `batch` to a batch; the newest is an hour old. User `i` is
    `shopper_id(first_user + i)`.

    The same arguments give the same events. With `every_user` each of the users comes once in every `users` events,
    in no order.
    """
    runs, ids = encoded_events(schema, events, users, seed, every_user=every_user, first_user=first_user)
    return Load(schema, _batches(runs, batch), events, batch, ids)


def encoded_events(
    schema: str, events: int, users: int, seed: int, *, every_user: bool, first_user: int
) -> tuple[Iterator[EncodedEvents], bytes]:
    """The events of `build_load` before they are cut into batches, and what their ids begin with."""
    end_ns = time.time_ns() - 3600 * 10**9
    if schema == PREFERENCES:
        views = draw_views(events, users, seed, end_ns, every_user=every_user, first_user=first_user)
        return views.serialized(), id_prefix(views.id_prefix)
    listings = bundled_listings()
    drawn = generate_events(min(users, _DRAWN_USERS) if every_user else users, events, seed, listings)
    shopper = drawn.shopper
    if every_user:
        rng = np.random.default_rng(seed)
        shopper = np.concatenate([rng.permutation(users) for _ in range(0, events, users)])[:events]
    return serialize_events(replace(drawn, shopper=(first_user + shopper).astype(np.int32)), listings, end_ns), b""


def _batches(runs: Iterable[EncodedEvents], batch: int) -> list[bytes]:
    """The events of all runs, `batch` to each body but the last."""
    bodies, waiting, held = [], b"", 0
    for encoded in runs:
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
    return bodies
