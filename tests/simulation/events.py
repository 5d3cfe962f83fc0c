"""Schemas, users and events of the simulation: small, and every event to be told from every other."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from random import Random

from profile_service.domain.schema import Schema, parse_schema
from profile_service.wire.apply_request import ApplyPart
from profile_service.wire.framing import message_field
from userprofile.v1 import event_pb2

TTL_S = 3600
_HEAD = f"""
name: simulated
events: {{view: {{weight: 1}}, contact: {{weight: 8}}}}
half_life: 30d
ttl: {TTL_S}s
features:
  items: {{kind: recent, attribute: item, size: 500}}
"""
# `items` names every event that a user's profile counts, so it is in each of them.
_FEATURES = {
    "color": "{kind: categorical, attribute: color, values: [red, blue], prior: population, prior_strength: 2}",
    "price": "{kind: distribution, attribute: price, bins: {scale: linear, min: 0, max: 100, count: 8}}",
    "views": "{kind: counter, events: [view], half_life: none}",
    "contacts": "{kind: counter, events: [contact]}",
    "makes": "{kind: top_k, attribute: make, k: 3}",
    "query": "{kind: latest, attribute: query}",
    "lately": "{kind: window_count, events: [view], window: 1h, bucket: 10m}",
    "distinct": "{kind: distinct, attribute: item}",
}
# The same name, but not the same thing.
_OTHERWISE = {
    "color": "{kind: top_k, attribute: color, k: 2}",
    "price": "{kind: distribution, attribute: price, bins: {scale: log, min: 1, max: 100, count: 4}}",
    "makes": "{kind: top_k, attribute: make, k: 5}",
    "lately": "{kind: window_count, events: [view], window: 2h, bucket: 30m}",
}
MAKES = ("audi", "bmw", "fiat", "lada", "opel", "saab")


@dataclass(frozen=True)
class SchemaText:
    """A schema file of a run."""

    features: tuple[tuple[str, bool], ...]
    """Names, and whether the feature is the other one of that name."""

    @functools.cached_property
    def yaml(self) -> str:
        """The file's text."""
        lines = (f"  {name}: {(_OTHERWISE if other else _FEATURES)[name]}\n" for name, other in self.features)
        return _HEAD.lstrip() + "".join(lines)


def _draw_schema(random: Random) -> SchemaText:
    names = random.sample(sorted(_FEATURES), random.randint(2, 5))
    return SchemaText(tuple((name, name in _OTHERWISE and random.random() < 0.3) for name in names))


# Of two to five features beside `items`, in any order; not more of them, for to parse one takes its time.
_SCHEMAS = [_draw_schema(Random(number)) for number in range(24)]


def draw_schema(random: Random) -> SchemaText:
    """One of the schemas."""
    return random.choice(_SCHEMAS)


def schema_of(yaml: str) -> SchemaText:
    """The schema that has this text."""
    return next(schema for schema in _SCHEMAS if schema.yaml == yaml)


@functools.lru_cache(maxsize=64)
def parsed(yaml: str, source: str = "") -> Schema:
    """The schema of a text."""
    return parse_schema(yaml)


@dataclass(frozen=True)
class Event:
    """An event as it was sent."""

    number: int
    user_id: str
    event_id: str
    encoded: bytes
    """An encoded userprofile.v1.Event."""

    @property
    def key(self) -> int | tuple[str, str]:
        """What counts once."""
        return (self.user_id, self.event_id) if self.event_id else self.number

    @property
    def item(self) -> str:
        """The value by which a profile names it."""
        return item_of(self.number)

    def __str__(self) -> str:
        return f"event {self.number} of {self.user_id}{f' ({self.event_id})' if self.event_id else ''}"


def item_of(number: int) -> str:
    """The value by which a profile names an event."""
    return f"i{number}"


class Events:
    """Draws events; none twice."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._last = 0
        width = random.choice((2, 4, 12, 12, 30))
        self.most_at_once = 40 if width > 4 else 8
        """Events of one batch; a user's profile cannot name any number of them."""
        self.user_ids = [f"u{n}{'-long' * random.choice((0, 0, 0, 40))}" for n in range(width)]

    def draw(self, now_ns: int, *, user_id: str = "", event_id: str = "") -> Event:
        """One event of about now, or of some days before."""
        random = self._random
        self._last += 1
        message = event_pb2.Event(
            user_id=user_id or random.choice(self.user_ids),
            type=random.choice(("view", "view", "contact")),
            event_id=event_id,
        )
        if random.random() < 0.6:
            message.time.FromNanoseconds(now_ns - int(random.expovariate(1 / random.choice((10, 1e6))) * 10**9))
        message.attributes["item"] = item_of(self._last)
        message.attributes["price"] = round(random.uniform(-10, 120), 2)
        for name, values in (("color", ("red", "blue", "pink")), ("make", MAKES), ("query", MAKES)):
            if random.random() < 0.7:
                message.attributes[name] = random.choice(values)
        return Event(self._last, message.user_id, event_id, message.SerializeToString())


def part_of(
    events: tuple[Event, ...], *, producer_id: str, sequence: int, acknowledged_sequence: int, arrival_time_ns: int
) -> ApplyPart:
    """The part that carries them."""
    return ApplyPart(
        producer_id=producer_id,
        sequence=sequence,
        acknowledged_sequence=acknowledged_sequence,
        arrival_time_ns=arrival_time_ns,
        events=b"".join(message_field(1, event.encoded) + event.encoded for event in events),
        event_count=len(events),
    )
