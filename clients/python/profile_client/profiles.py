"""Profiles as a program reads them: typed views over the messages, which stay at hand as `.message`."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf import json_format, timestamp_pb2

from userprofile.v1 import profile_pb2

F = TypeVar("F", bound="Feature")


def _time(message: timestamp_pb2.Timestamp) -> dt.datetime:
    return message.ToDatetime(tzinfo=dt.UTC)


class Feature:
    """A feature's value, of whichever kind. Asking for what its kind has not raises AttributeError."""

    def __init__(self, name: str, message: profile_pb2.Feature) -> None:
        self.name = name
        self.message = message

    @property
    def kind(self) -> str:
        """The kind, as in the schema file; "unknown" for one that is newer than this client."""
        return self.message.WhichOneof("kind") or "unknown"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Feature):
            return NotImplemented
        return self.name == other.name and self.message == other.message

    __hash__ = None  # type: ignore[assignment]  # as the message, which can change

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}>"


class CounterFeature(Feature):
    """A count."""

    @property
    def value(self) -> float:
        """The decayed sum of weights, or the plain number of events."""
        return self.message.counter.value

    def __repr__(self) -> str:
        return f"<counter {self.name}: {self.value:g}>"


@dataclass(frozen=True)
class CategoryValue:
    """One value of a categorical."""

    value: str
    weight: float
    likelihood: float
    lift: float


class CategoricalFeature(Feature):
    """Likelihoods over a closed list of values."""

    @property
    def weight(self) -> float:
        """Decayed weight over all values."""
        return self.message.categorical.weight

    @property
    def confidence(self) -> float:
        """0 is the prior alone; towards 1 the user speaks."""
        return self.message.categorical.confidence

    @property
    def values(self) -> list[CategoryValue]:
        """Every value, the likeliest first."""
        return [CategoryValue(v.value, v.weight, v.likelihood, v.lift) for v in self.message.categorical.values]

    def __getitem__(self, value: str) -> CategoryValue:
        for held in self.values:
            if held.value == value:
                return held
        raise KeyError(f"{value!r} is not a value of {self.name}: {', '.join(v.value for v in self.values)}")

    def likelihood(self, value: str) -> float:
        """How likely the value is for this user."""
        return self[value].likelihood

    def lift(self, value: str) -> float:
        """How much likelier than by the prior."""
        return self[value].lift

    def __repr__(self) -> str:
        shown = ", ".join(f"{v.value} {v.likelihood:.2f}" for v in self.values[:3])
        return f"<categorical {self.name}: {shown}{', …' if len(self.values) > 3 else ''}>"


@dataclass(frozen=True)
class Histogram:
    """Weights by bin: under the first edge, each bin, over the last edge."""

    edges: Sequence[float]
    weights: Sequence[float]


class DistributionFeature(Feature):
    """How a number is distributed. Mean and the like are None before a value was seen."""

    @property
    def weight(self) -> float:
        """Decayed weight of all values."""
        return self.message.distribution.weight

    def _seen(self, value: float) -> float | None:
        return value if self.message.distribution.quantiles else None

    @property
    def mean(self) -> float | None:
        """Weighted mean."""
        return self._seen(self.message.distribution.mean)

    @property
    def stddev(self) -> float | None:
        """Weighted standard deviation."""
        return self._seen(self.message.distribution.stddev)

    @property
    def min(self) -> float | None:
        """Smallest value ever."""
        return self._seen(self.message.distribution.min)

    @property
    def max(self) -> float | None:
        """Largest value ever."""
        return self._seen(self.message.distribution.max)

    @property
    def median(self) -> float | None:
        """The quantile of 0.5."""
        return self.quantile(0.5)

    def quantile(self, probability: float) -> float | None:
        """One of the quantiles that the service gives: 0.05, 0.25, 0.5, 0.75 or 0.95.

        Raises:
            KeyError: the service does not give that one.
        """
        quantiles = {round(q.probability, 6): q.value for q in self.message.distribution.quantiles}
        if not quantiles:
            return None
        if round(probability, 6) not in quantiles:
            raise KeyError(f"{probability} is not among the quantiles {sorted(quantiles)}")
        return quantiles[round(probability, 6)]

    @property
    def histogram(self) -> Histogram:
        """The bins."""
        message = self.message.distribution.histogram
        return Histogram(tuple(message.edges), tuple(message.weights))

    def __repr__(self) -> str:
        if self.median is None:
            return f"<distribution {self.name}: nothing seen>"
        return f"<distribution {self.name}: median {self.median:g}, mean {self.mean:g}>"


@dataclass(frozen=True)
class TopKEntry:
    """A heavy value."""

    value: str
    weight: float
    error: float
    share: float


class TopKFeature(Feature):
    """The heaviest values of an open vocabulary."""

    @property
    def weight(self) -> float:
        """Decayed weight of all events."""
        return self.message.top_k.weight

    @property
    def entries(self) -> list[TopKEntry]:
        """The heaviest first."""
        return [TopKEntry(e.value, e.weight, e.error, e.share) for e in self.message.top_k.entries]

    @property
    def values(self) -> list[str]:
        """The values alone."""
        return [entry.value for entry in self.entries]

    def __repr__(self) -> str:
        return f"<top_k {self.name}: {', '.join(self.values[:5])}>"


class WindowCountFeature(Feature):
    """Events in a sliding window."""

    @property
    def value(self) -> int:
        """Their number."""
        return self.message.window_count.value

    def __repr__(self) -> str:
        return f"<window_count {self.name}: {self.value}>"


class LatestFeature(Feature):
    """The newest value."""

    @property
    def value(self) -> str | None:
        """The value; None before one was seen."""
        return self.message.latest.value if self.message.latest.HasField("time") else None

    @property
    def time(self) -> dt.datetime | None:
        """Its event time."""
        return _time(self.message.latest.time) if self.message.latest.HasField("time") else None

    def __repr__(self) -> str:
        return f"<latest {self.name}: {'nothing seen' if self.value is None else repr(self.value)}>"


@dataclass(frozen=True)
class RecentEntry:
    """A value and when it was last seen."""

    value: str
    time: dt.datetime


class RecentFeature(Feature):
    """The newest values, each once."""

    @property
    def entries(self) -> list[RecentEntry]:
        """The newest first."""
        return [RecentEntry(e.value, _time(e.time)) for e in self.message.recent.entries]

    @property
    def values(self) -> list[str]:
        """The values alone."""
        return [e.value for e in self.message.recent.entries]

    def __repr__(self) -> str:
        return f"<recent {self.name}: {', '.join(self.values[:5])}>"


class DistinctFeature(Feature):
    """How many different values."""

    @property
    def estimate(self) -> float:
        """HyperLogLog's estimate."""
        return self.message.distinct.estimate

    def __repr__(self) -> str:
        return f"<distinct {self.name}: about {self.estimate:.0f}>"


_KINDS: dict[str, type[Feature]] = {
    "counter": CounterFeature,
    "categorical": CategoricalFeature,
    "distribution": DistributionFeature,
    "top_k": TopKFeature,
    "window_count": WindowCountFeature,
    "latest": LatestFeature,
    "recent": RecentFeature,
    "distinct": DistinctFeature,
}


class Profile(Mapping[str, Any]):
    """What is known of a user at one moment: a mapping of feature names to their values.

    >>> message = profile_pb2.Profile(user_id="u1", event_count=3)
    >>> message.features["contacts"].counter.value = 2
    >>> Profile(message)["contacts"].value
    2.0
    >>> Profile(message)
    <Profile 'u1': 3 events, <counter contacts: 2>>
    """

    def __init__(self, message: profile_pb2.Profile) -> None:
        self.message = message

    @property
    def user_id(self) -> str:
        """The user; empty for the population."""
        return self.message.user_id

    @property
    def event_count(self) -> int:
        """Events ever counted."""
        return self.message.event_count

    @property
    def first_seen_time(self) -> dt.datetime | None:
        """Earliest event time; None where nothing was counted."""
        return _time(self.message.first_seen_time) if self.message.HasField("first_seen_time") else None

    @property
    def last_seen_time(self) -> dt.datetime | None:
        """Latest event time; None where nothing was counted."""
        return _time(self.message.last_seen_time) if self.message.HasField("last_seen_time") else None

    @property
    def read_time(self) -> dt.datetime:
        """The moment to which decayed weights refer."""
        return _time(self.message.read_time)

    def __getitem__(self, name: str) -> Any:
        if name not in self.message.features:
            raise KeyError(f"no feature {name!r}: there are {', '.join(sorted(self.message.features))}")
        message = self.message.features[name]
        return _KINDS.get(message.WhichOneof("kind") or "", Feature)(name, message)

    def feature(self, name: str, kind: type[F]) -> F:
        """The feature, checked to be of a kind, for type checkers.

        Raises:
            KeyError: there is no such feature.
            TypeError: it is of another kind.
        """
        held = self[name]
        if not isinstance(held, kind):
            raise TypeError(f"{held!r} is no {kind.__name__}")
        return held

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.message.features))

    def __len__(self) -> int:
        return len(self.message.features)

    def __eq__(self, other: object) -> bool:
        return self.message == other.message if isinstance(other, Profile) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as the message, which can change

    def to_dict(self) -> dict[str, Any]:
        """The profile in proto3's JSON mapping."""
        return dict(json_format.MessageToDict(self.message, always_print_fields_with_no_presence=True))

    def __repr__(self) -> str:
        whose = repr(self.user_id) if self.user_id else "of the population"
        return f"<Profile {whose}: {', '.join([f'{self.event_count} events', *map(repr, self.values())])}>"


@dataclass(frozen=True)
class BatchProfiles:
    """Many profiles."""

    profiles: Sequence[Profile]
    """Of the users that exist, in the order asked for."""
    missing_user_ids: Sequence[str]
    """The others."""


@dataclass(frozen=True)
class RankedItem:
    """An item with its score."""

    item_id: str
    score: float
    contributions: Mapping[str, float]
    """What each feature adds to the score."""


@dataclass(frozen=True)
class Ranking:
    """Items, the best first."""

    items: Sequence[RankedItem]
    ranked_by_population: bool
    """Whether the user was unknown and the population stood in."""
