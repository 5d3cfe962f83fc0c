"""The demo's sample: real car listings, and made-up shoppers with hidden tastes who look through them.

Nobody publishes which cars people look at, so the shoppers and everything they do are simulated; the cars are real.
`SOURCES.md` says which is which. Event times are stored as ages, and become times when the sample is replayed: the last
event happens "now".

    listings.py    cleaning what was collected, and the cleaned listings
    shoppers.py    tastes, and events because of them
    generate.py    makes the bundled files; `python -m profile_service.sample.generate`
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from profile_service.files.encode import Columns, EncodedEvents, Times, encode_events
from profile_service.sample.listings import COLORS, Listings
from profile_service.sample.shoppers import (
    EVENT_TYPES,
    MOST_TASTES,
    SampleEvents,
    Tastes,
    draw_events,
    draw_tastes,
    shopper_id,
)

LISTINGS_FILE, EVENTS_FILE, SHOPPERS_FILE = "listings.parquet", "events.parquet", "shoppers.parquet"
_HERE = Path(__file__).parent
_ENCODED_AT_ONCE = 50_000
_BILLION = 1_000_000_000


@dataclass(frozen=True)
class Sample:
    """Listings, the shoppers' hidden tastes, and what they did."""

    listings: Listings
    tastes: Tastes
    """Entry `i` is the taste of shopper `i`."""
    events: SampleEvents

    def serialized(self, end_ns: int) -> Iterator[EncodedEvents]:
        """The events as the stream carries them, the last of them at `end_ns`."""
        return serialize_events(self.events, self.listings, end_ns)


def load_sample() -> Sample:
    """The bundled sample."""
    listings = Listings.read(_HERE / LISTINGS_FILE)
    return Sample(listings, read_tastes(_HERE / SHOPPERS_FILE), read_events(_HERE / EVENTS_FILE))


def bundled_listings() -> Listings:
    """The bundled listings alone."""
    return Listings.read(_HERE / LISTINGS_FILE)


def generate_events(shoppers: int, events: int, seed: int, listings: Listings | None = None) -> SampleEvents:
    """Exactly `events` events of the sample's kind, by `shoppers` shoppers, over `listings` or else the bundled ones.

    The same arguments give the same events.
    """
    return make_sample(bundled_listings() if listings is None else listings, shoppers, events, seed).events


def make_sample(listings: Listings, shoppers: int, events: int, seed: int) -> Sample:
    """Tastes and events; from `MOST_TASTES` shoppers on, several share a taste."""
    rng = np.random.default_rng(seed)
    tastes = draw_tastes(listings, min(shoppers, MOST_TASTES), rng)
    return Sample(listings, tastes, draw_events(listings, tastes, shoppers, events, rng))


def serialize_events(events: SampleEvents, listings: Listings, end_ns: int) -> Iterator[EncodedEvents]:
    """`events` as the stream carries them, some ten thousand at a time, the last at `end_ns` nanoseconds since 1970."""
    types, queries = _texts(list(EVENT_TYPES)), _texts(events.queries)
    item_ids, makes, colors = _texts(listings.item_id.tolist()), _texts(listings.make.tolist()), _texts(list(COLORS))
    for start in range(0, len(events), _ENCODED_AT_ONCE):
        part = slice(start, start + _ENCODED_AT_ONCE)
        shoppers, shopper = np.unique(events.shopper[part], return_inverse=True)
        listing, query = events.listing[part], events.query[part]
        color = listings.color[listing]
        time_ns = end_ns - events.age_ms[part] * 1_000_000
        columns = Columns(
            user_id=_texts(list(map(shopper_id, shoppers.tolist()))).take(pa.array(shopper)),
            type=types.take(pa.array(events.type[part])),
            time=Times(time_ns // _BILLION, time_ns % _BILLION, np.ones(len(time_ns), dtype=np.bool_)),
            texts={
                "color": colors.take(pa.array(color, mask=color < 0)),
                "make": makes.take(pa.array(listing)),
                "item_id": item_ids.take(pa.array(listing)),
                "query": queries.take(pa.array(query, mask=query < 0)),
            },
            numbers={
                "price": pa.array(listings.price_eur[listing]),
                "mileage": pa.array(listings.mileage_km[listing]),
            },
        )
        yield encode_events(columns)


def read_events(path: Path) -> SampleEvents:
    """Events that `write_events` has written."""
    table = pq.read_table(path)
    queries = table["query"].combine_chunks().dictionary_encode()
    return SampleEvents(
        table["shopper"].to_numpy().astype(np.int32),
        table["listing"].to_numpy().astype(np.int32),
        table["type"].to_numpy().astype(np.uint8),
        table["age_ms"].to_numpy().astype(np.int64),
        queries.indices.fill_null(-1).to_numpy().astype(np.int32),
        queries.dictionary.to_pylist(),
    )


def write_events(events: SampleEvents, path: Path) -> None:
    """Writes `events` as Parquet."""
    query = pa.array(events.query, mask=events.query < 0)
    table = pa.table(
        {
            "shopper": pa.array(events.shopper.astype(np.int32)),
            "listing": pa.array(events.listing),
            "type": pa.array(events.type),
            "age_ms": pa.array(events.age_ms),
            "query": pa.array(events.queries, pa.string()).take(query),
        }
    )
    encoding = {"shopper": "PLAIN", "listing": "PLAIN", "type": "PLAIN", "age_ms": "DELTA_BINARY_PACKED"}
    pq.write_table(
        table, path, compression="zstd", compression_level=19, use_dictionary=["query"], column_encoding=encoding
    )


def read_tastes(path: Path) -> Tastes:
    """Tastes that `write_tastes` has written."""
    rows = pq.read_table(path).to_pylist()
    return Tastes(
        [tuple(COLORS.index(color) for color in row["colors"]) for row in rows],
        [tuple(row["makes"]) for row in rows],
        np.array([(row["min_price_eur"], row["max_price_eur"]) for row in rows], dtype=np.float64).reshape(-1, 2),
        np.array([(row["min_mileage_km"], row["max_mileage_km"]) for row in rows], dtype=np.float64).reshape(-1, 2),
    )


def write_tastes(tastes: Tastes, path: Path) -> None:
    """Writes `tastes` as Parquet, a row a shopper."""
    table = pa.table(
        {
            "user_id": [shopper_id(i) for i in range(len(tastes))],
            "colors": [[COLORS[color] for color in colors] for colors in tastes.colors],
            "makes": [list(makes) for makes in tastes.makes],
            "min_price_eur": tastes.price_eur[:, 0],
            "max_price_eur": tastes.price_eur[:, 1],
            "min_mileage_km": tastes.mileage_km[:, 0],
            "max_mileage_km": tastes.mileage_km[:, 1],
        }
    )
    pq.write_table(table, path, compression="zstd", compression_level=19)


def _texts(values: list[str]) -> pa.Array:
    return pa.array(values, pa.large_string()).cast(pa.large_binary())
