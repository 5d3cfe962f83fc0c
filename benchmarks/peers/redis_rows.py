"""A consumer that keeps a packed row per user in Redis: a batch's rows come in one MGET, NumPy counts the whole batch,
and one MSET takes them back. Redis appends to its log and syncs it every second (`appendfsync everysec`), so a crash
costs about a second; what is delivered again then is counted twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.peers.redis_server import RedisServer
from benchmarks.peers.work import COLORS, EDGES, HALF_LIFE_S, LANDMARK_S, PeerProfile, Spread
from benchmarks.processes import BenchmarkError
from userprofile.v1 import event_service_pb2

MOST_MAKES = 32
"""Slots of the make table."""

_BINS = {name: len(edges) + 1 for name, edges in EDGES.items()}

# The row, in f4 but for what needs more:
#   count i8 | last seen f8 | price mean, M2 f8 | mileage mean, M2 f8 | weights f4: colours, makes, bins of both
ROW = np.dtype(
    [
        ("count", "<i8"),
        ("last_seen", "<f8"),
        ("price", "<f8", 2),
        ("mileage", "<f8", 2),
        ("color_weights", "<f4", len(COLORS) + 1),
        ("make_weights", "<f4", MOST_MAKES),
        ("price_bins", "<f4", _BINS["price"]),
        ("mileage_bins", "<f4", _BINS["mileage"]),
    ]
)


class RedisRows:
    """A Redis server of its own, and the consumer."""

    name = "Redis, packed rows"
    durability = "log synced every second: a crash costs about a second, redelivery counts twice"

    def __init__(self) -> None:
        self._server = RedisServer()
        self.server: psutil.Process | None = self._server.process
        self._redis = self._server.client
        self._colors = {name: number for number, name in enumerate(COLORS)}
        self._makes: dict[str, int] = {}
        self._empty = np.zeros(1, ROW).tobytes()

    def consume(self, batch: bytes) -> None:
        """Counts a batch."""
        events = event_service_pb2.IngestEventsRequest.FromString(batch).events
        count = len(events)
        numbers = np.empty((4, count))
        texts = np.empty((2, count), np.int64)
        of_user: dict[str, int] = {}
        row_of = np.empty(count, np.int64)
        for place, event in enumerate(events):
            fields = event.attributes.fields
            row_of[place] = of_user.setdefault(event.user_id, len(of_user))
            numbers[0, place] = event.time.seconds + event.time.nanos * 1e-9
            numbers[1, place] = fields["price"].number_value
            numbers[2, place] = fields["mileage"].number_value
            texts[0, place] = self._colors.get(fields["color"].string_value, len(COLORS))
            texts[1, place] = self._makes.setdefault(fields["make"].string_value, len(self._makes))
        if len(self._makes) > MOST_MAKES:
            raise BenchmarkError(f"the row has room for {MOST_MAKES} makes, {len(self._makes)} came")
        keys = list(of_user)
        found: Any = self._redis.mget(keys)
        rows = np.frombuffer(bytearray(b"".join(row or self._empty for row in found)), ROW)
        weight = np.exp2((numbers[0] - LANDMARK_S) / HALF_LIFE_S)
        self._count(rows, row_of, numbers, texts, weight)
        packed, size = rows.tobytes(), ROW.itemsize
        self._redis.mset({key: packed[n * size : (n + 1) * size] for n, key in enumerate(keys)})

    def _count(
        self,
        rows: NDArray[np.void],
        row_of: NDArray[np.int64],
        numbers: NDArray[np.float64],
        texts: NDArray[np.int64],
        weight: NDArray[np.float64],
    ) -> None:
        users = len(rows)
        rows["count"] += np.bincount(row_of, minlength=users)
        np.maximum.at(rows["last_seen"], row_of, numbers[0])
        for name, value in (("price", numbers[1]), ("mileage", numbers[2])):
            before = rows[f"{name}_bins"].sum(axis=1, dtype=np.float64)
            # Chan's merge of the batch's sums into the row's.
            added = np.bincount(row_of, weight, users)
            mean = np.bincount(row_of, weight * value, users) / added
            m2 = np.bincount(row_of, weight * (value - mean[row_of]) ** 2, users)
            delta, total = mean - rows[name][:, 0], before + added
            rows[name][:, 0] += delta * added / total
            rows[name][:, 1] += m2 + delta**2 * before * added / total
            bins = np.searchsorted(EDGES[name], value, side="right")
            self._add(rows[f"{name}_bins"], row_of, bins, weight)
        self._add(rows["color_weights"], row_of, texts[0], weight)
        self._add(rows["make_weights"], row_of, texts[1], weight)

    @staticmethod
    def _add(
        slots: NDArray[np.float32], row_of: NDArray[np.int64], slot: NDArray[np.int64], weight: NDArray[np.float64]
    ) -> None:
        width = slots.shape[1]
        slots += np.bincount(row_of * width + slot, weight, slots.size).reshape(slots.shape).astype(np.float32)

    def profile(self, user_id: str) -> PeerProfile:
        """What is known of a user."""
        found: Any = self._redis.get(user_id)
        row = np.frombuffer(found, ROW)[0]
        makes = {name: float(row["make_weights"][slot]) for name, slot in self._makes.items()}
        colors = dict(zip(COLORS, row["color_weights"].tolist(), strict=False))
        price, mileage = (
            Spread(float(bins.sum()), float(row[name][0]), float(row[name][1]), bins.tolist())
            for name, bins in ((name, row[f"{name}_bins"]) for name in ("price", "mileage"))
        )
        return PeerProfile(int(row["count"]), float(row["last_seen"]), colors, makes, price, mileage)

    def close(self) -> None:
        """Ends the server and removes its files."""
        self._server.close()
