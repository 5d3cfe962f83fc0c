"""Views of cars by users some of whom are far more active than others: the load of `preferences.yaml`.

An event has a user, a type, a time, an id, and four attributes: some 144 bytes. Who looks is drawn by Zipf's law with
YCSB's exponent; every user has a favourite colour and make, and a price about which the others lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from profile_service.files.encode import Columns, EncodedEvents, Times, encode_events
from profile_service.sample.shoppers import shopper_id

COLORS = (
    "black", "grey", "silver", "white", "blue", "red", "green", "brown",
    "beige", "yellow", "orange", "gold", "violet", "bronze", "turquoise", "ivory",
)  # fmt: skip
MAKES = (
    "Volkswagen", "BMW", "Mercedes-Benz", "Audi", "Opel", "Ford", "Renault", "Skoda", "Peugeot", "Fiat",
    "Toyota", "Hyundai", "Seat", "Kia", "Volvo", "Nissan", "Mazda", "Citroen", "Dacia", "Porsche",
    "Mini", "Honda", "Suzuki", "Mitsubishi", "Smart", "Tesla", "Jeep", "Jaguar", "Lexus", "Subaru",
)  # fmt: skip
ZIPF_EXPONENT = 0.99
"""Cooper et al., Benchmarking Cloud Serving Systems with YCSB, SoCC 2010."""
SPAN_S = 7 * 24 * 3600
"""The events happened within so many seconds."""

_ENCODED_AT_ONCE = 100_000
_LOYALTY = 0.6
"""Chance that a view goes to the favourite colour, and that it goes to the favourite make."""


@dataclass(frozen=True)
class Views:
    """Events by column, the oldest first."""

    user: NDArray[np.int32]
    color: NDArray[np.int8]
    """Index into `COLORS`."""
    make: NDArray[np.int8]
    """Index into `MAKES`."""
    price: NDArray[np.float64]
    mileage: NDArray[np.float64]
    time_ns: NDArray[np.int64]
    """Since 1970, in whole milliseconds."""
    id_prefix: int
    """Event `i` has an id of 24 hexadecimal digits: 14 of this and 10 of `i`."""

    def __len__(self) -> int:
        return len(self.user)

    def serialized(self) -> Iterator[EncodedEvents]:
        """The events as the stream carries them, some hundred thousand at a time."""
        colors, makes = _Names(list(COLORS)), _Names(list(MAKES))
        for start in range(0, len(self), _ENCODED_AT_ONCE):
            part = slice(start, min(start + _ENCODED_AT_ONCE, len(self)))
            users, user = np.unique(self.user[part], return_inverse=True)
            seconds, nanos = np.divmod(self.time_ns[part], 10**9)
            count = len(seconds)
            yield encode_events(
                Columns(
                    user_id=_Names(list(map(shopper_id, users.tolist()))).take(user),
                    type=_Names(["view"]).take(np.zeros(count, np.int32)),
                    time=Times(seconds, nanos, np.ones(count, np.bool_)),
                    event_id=_ids(self.id_prefix, start, count),
                    texts={"color": colors.take(self.color[part]), "make": makes.take(self.make[part])},
                    numbers={"price": pa.array(self.price[part]), "mileage": pa.array(self.mileage[part])},
                )
            )


def draw_views(
    events: int, users: int, seed: int, end_ns: int, *, every_user: bool = False, first_user: int = 0
) -> Views:
    """`events` events by `users` users from `first_user` on, the last at `end_ns`; the same arguments give the same
    events.

    With `every_user` each of the users comes once in every `users` events, in no order.
    """
    rng = np.random.default_rng(seed)
    if every_user:
        user = np.concatenate([rng.permutation(users) for _ in range(0, events, users)])[:events]
    else:
        # Who is active has nothing to do with the number, so hot rows do not lie beside each other.
        share = np.cumsum(np.arange(1, users + 1, dtype=np.float64) ** -ZIPF_EXPONENT)
        rank = np.searchsorted(share, rng.random(events) * share[-1], side="right")
        user = np.random.default_rng(users).permutation(users)[np.minimum(rank, users - 1)]
    price = np.exp(rng.normal(9.5 + user % 17 / 12, 0.45, events)).round(-1)
    mileage = np.exp(rng.normal(11.0, 0.8, events)).round(-2)
    time_ns = np.sort(end_ns // 10**6 - rng.integers(0, SPAN_S * 1000, events)) * 10**6
    return Views(
        user=(first_user + user).astype(np.int32),
        color=_favourites(user, len(COLORS), rng),
        make=_favourites(user // len(COLORS), len(MAKES), rng),
        price=price,
        mileage=mileage,
        time_ns=time_ns,
        # With a bit at the top, so that no number looks like it; and room to count up from it.
        id_prefix=1 << 55 | int(rng.integers(1 << 30)) << 24,
    )


def _favourites(user: NDArray[np.int64], values: int, rng: np.random.Generator) -> NDArray[np.int8]:
    loyal = rng.random(len(user)) < _LOYALTY
    return np.where(loyal, user % values, rng.integers(0, values, len(user))).astype(np.int8)


class _Names:
    """Texts to take from by number."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = pa.array([text.encode() for text in texts], pa.large_binary())

    def take(self, numbers: NDArray[Any]) -> pa.Array:
        return self._texts.take(pa.array(numbers))


def id_prefix(number: int) -> bytes:
    """The digits that ids begin with."""
    return f"{number:014x}".encode()


def _ids(prefix: int, first: int, count: int) -> pa.Array:
    low = first + np.arange(count, dtype=np.int64)
    digits = np.empty((count, 24), np.uint8)
    digits[:, :14] = np.frombuffer(id_prefix(prefix), np.uint8)
    nibbles = low[:, None] >> np.arange(36, -4, -4) & 15
    digits[:, 14:] = np.frombuffer(b"0123456789abcdef", np.uint8)[nibbles]
    offsets = np.arange(count + 1, dtype=np.int64) * 24
    return pa.Array.from_buffers(
        pa.large_binary(), count, [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(digits.reshape(-1)))]
    )
