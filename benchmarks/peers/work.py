"""The work as the peers do it: what `preferences.yaml` says, read from it, and relative to one landmark."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import psutil

from benchmarks.load import PREFERENCES, SCHEMAS
from profile_service.domain.features.categorical import CategoricalOptions
from profile_service.domain.features.distribution import DistributionOptions
from profile_service.domain.schema import load_schema

_features = {feature.name: feature for feature in load_schema(SCHEMAS[PREFERENCES]).features}
_colors = _features["color"].options
assert isinstance(_colors, CategoricalOptions)


def _edges(name: str) -> list[float]:
    options = _features[name].options
    assert isinstance(options, DistributionOptions)
    edges: list[float] = options.bins.to_array().tolist()
    return edges


COLORS: tuple[str, ...] = tuple(_colors.values)
EDGES = {name: _edges(name) for name in ("price", "mileage")}
HALF_LIFE_S: float = _features["color"].half_life_s or float("inf")
LANDMARK_S = time.time() // 86400 * 86400
"""Near enough to every event that no weight grows large."""


@dataclass(frozen=True)
class Spread:
    """A distribution: West's sums, and the weights under, in and over the bins."""

    weight: float
    mean: float
    m2: float
    bins: Sequence[float]


class Peer(Protocol):
    """Something that does the work."""

    name: str
    durability: str
    """What a crash costs."""
    server: psutil.Process | None
    """What holds the state, where that is not the consumer."""

    def consume(self, batch: bytes) -> None:
        """Counts a batch: an encoded IngestEventsRequest."""

    def profile(self, user_id: str) -> PeerProfile:
        """What is known of a user."""

    def close(self) -> None:
        """Ends what it has started."""


@dataclass(frozen=True)
class PeerProfile:
    """What a peer knows of a user; weights as of `LANDMARK_S`."""

    count: int
    last_seen_s: float
    colors: Mapping[str, float]
    makes: Mapping[str, float]
    price: Spread
    mileage: Spread

    def differs_from(self, profile: Any) -> str | None:
        """Where it says something else than a `userprofile.v1.Profile`; None where it does not."""
        read_s = profile.read_time.seconds + profile.read_time.nanos * 1e-9
        decay = 2.0 ** ((LANDMARK_S - read_s) / HALF_LIFE_S)
        colors = {value.value: value.weight for value in profile.features["color"].categorical.values}
        makes = {entry.value: entry.weight for entry in profile.features["make"].top_k.entries}
        errors = {entry.value: entry.error for entry in profile.features["make"].top_k.entries}
        seen_s = profile.last_seen_time.seconds + profile.last_seen_time.nanos * 1e-9
        checks: list[tuple[str, float, float, float]] = [
            ("event_count", profile.event_count, self.count, 0.0),
            ("last_seen_time", seen_s, self.last_seen_s, 0.0),
        ]
        checks += [(f"color {name}", colors[name], self.colors.get(name, 0.0) * decay, 0.0) for name in COLORS]
        checks += [
            (f"make {name}", makes[name], self.makes.get(name, 0.0) * decay, errors[name]) for name in sorted(makes)
        ]
        for name, mine in (("price", self.price), ("mileage", self.mileage)):
            theirs = profile.features[name].distribution
            checks += [
                (f"{name} weight", theirs.weight, mine.weight * decay, 0.0),
                (f"{name} mean", theirs.mean, mine.mean, 0.0),
                (f"{name} stddev", theirs.stddev, (max(mine.m2, 0.0) / mine.weight) ** 0.5, mine.mean * 1e-4),
            ]
            checks += [
                (f"{name} bin {number}", weight, own * decay, 0.0)
                for number, (weight, own) in enumerate(zip(theirs.histogram.weights, mine.bins, strict=True))
            ]
        for name, ours, own, slack in checks:
            if abs(ours - own) > slack + 1e-3 * max(abs(own), 0.01):
                return f"{name}: {ours} here, {own} there"
        return None
