"""All users' profiles by naive recomputation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from profile_service.domain.schema import Schema
from tests.domain.oracles.kinds import KIND_ORACLES, Oracle, Seen
from userprofile.v1 import profile_pb2


@dataclass
class Event:
    """An event, as a test writes it."""

    user: str
    type: str
    time_ns: int
    attributes: Mapping[str, str | float] = field(default_factory=dict)


class _User:
    def __init__(self, schema: Schema) -> None:
        self.times: list[int] = []
        self.features = {f.name: KIND_ORACLES[f.kind](f.options, f.half_life_s) for f in schema.features}


class ProfileOracle:
    """Keeps every event of every user, in the order of arrival."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._weights = {event.name: event.weight for event in schema.event_types}
        self.users: dict[str, _User] = {}

    def add(self, event: Event) -> None:
        user = self.users.setdefault(event.user, _User(self._schema))
        user.times.append(event.time_ns)
        for spec in self._schema.features:
            if event.type not in spec.events:
                continue
            attribute = getattr(spec.options, "attribute", None)
            value = event.attributes.get(attribute) if attribute else None
            if attribute is None or value is not None:
                user.features[spec.name].seen.append(Seen(event.time_ns, self._weights[event.type], value))

    def check(self, name: str, encoded: bytes) -> None:
        """Compares a user's encoded Profile with what their events say."""
        user = self.users[name]
        profile = profile_pb2.Profile.FromString(encoded)
        assert profile.user_id == name
        assert profile.event_count == len(user.times)
        assert profile.first_seen_time.ToNanoseconds() == min(user.times)
        assert profile.last_seen_time.ToNanoseconds() == max(user.times)
        assert set(profile.features) == set(user.features)
        read_ns = profile.read_time.ToNanoseconds()
        kinds = {spec.name: spec.kind for spec in self._schema.features}
        for feature, oracle in user.features.items():
            assert profile.features[feature].WhichOneof("kind") == kinds[feature], f"{name}.{feature}"
            everyone: list[Oracle] = [other.features[feature] for other in self.users.values()]
            oracle.check(f"{name}.{feature}", profile.features[feature], read_ns, everyone)
