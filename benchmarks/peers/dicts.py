"""Plain Python: an object per user in a dict, updated event by event. A crash loses everything."""

from __future__ import annotations

import bisect

import psutil

from benchmarks.peers.work import EDGES, HALF_LIFE_S, LANDMARK_S, PeerProfile, Spread
from userprofile.v1 import event_service_pb2


class _Distribution:
    """A decayed histogram, mean and variance (West's update)."""

    __slots__ = ("bins", "m2", "mean", "weight")

    def __init__(self, edges: int) -> None:
        self.weight = 0.0
        self.mean = 0.0
        self.m2 = 0.0
        self.bins = [0.0] * (edges + 1)

    def add(self, value: float, weight: float, edges: list[float]) -> None:
        self.weight += weight
        delta = value - self.mean
        self.mean += delta * weight / self.weight
        self.m2 += weight * delta * (value - self.mean)
        self.bins[bisect.bisect_right(edges, value)] += weight

    def spread(self) -> Spread:
        return Spread(self.weight, self.mean, self.m2, self.bins)


class _User:
    __slots__ = ("colors", "count", "last_seen", "makes", "mileage", "price")

    def __init__(self) -> None:
        self.count = 0
        self.last_seen = 0.0
        self.colors: dict[str, float] = {}
        self.makes: dict[str, float] = {}
        self.price = _Distribution(len(EDGES["price"]))
        self.mileage = _Distribution(len(EDGES["mileage"]))


class Dicts:
    """The profiles of all users."""

    name = "Python dicts"
    durability = "none: a crash costs everything"

    def __init__(self) -> None:
        self._users: dict[str, _User] = {}
        self.server: psutil.Process | None = None

    def consume(self, batch: bytes) -> None:
        """Counts a batch."""
        users, price_edges, mileage_edges = self._users, EDGES["price"], EDGES["mileage"]
        for event in event_service_pb2.IngestEventsRequest.FromString(batch).events:
            user = users.get(event.user_id)
            if user is None:
                user = users[event.user_id] = _User()
            time_s = event.time.seconds + event.time.nanos * 1e-9
            weight = 2.0 ** ((time_s - LANDMARK_S) / HALF_LIFE_S)
            user.count += 1
            user.last_seen = max(user.last_seen, time_s)
            fields = event.attributes.fields
            color, make = fields["color"].string_value, fields["make"].string_value
            user.colors[color] = user.colors.get(color, 0.0) + weight
            user.makes[make] = user.makes.get(make, 0.0) + weight
            user.price.add(fields["price"].number_value, weight, price_edges)
            user.mileage.add(fields["mileage"].number_value, weight, mileage_edges)

    def profile(self, user_id: str) -> PeerProfile:
        """What is known of a user."""
        user = self._users[user_id]
        return PeerProfile(
            user.count, user.last_seen, user.colors, user.makes, user.price.spread(), user.mileage.spread()
        )

    def close(self) -> None:
        """Nothing is held."""
