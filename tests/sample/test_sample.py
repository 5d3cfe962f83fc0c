"""The bundled sample is what SOURCES.md says, and its generator gives the same events for the same seed."""

from __future__ import annotations

import numpy as np

from profile_service.sample import bundled_listings, generate_events, load_sample
from profile_service.sample.listings import (
    COLORS,
    MAX_PRICE_EUR,
    MIN_PRICE_EUR,
    clean_color,
    clean_make,
    clean_price_eur,
)
from profile_service.sample.shoppers import EVENT_TYPES, SPAN_DAYS
from userprofile.v1 import event_service_pb2

DAY_MS = 24 * 3600 * 1000


def test_the_bundled_sample_is_whole() -> None:
    sample = load_sample()
    listings, events = sample.listings, sample.events
    assert (len(listings), len(sample.tastes), len(events)) == (20_000, 2_000, 200_000)
    assert len(set(listings.item_id)) == len(listings)
    assert listings.price_eur.min() >= MIN_PRICE_EUR
    assert listings.price_eur.max() <= MAX_PRICE_EUR
    assert (listings.color == -1).sum() == 2_000
    assert events.shopper.max() < 2_000
    assert events.listing.max() < len(listings)
    assert events.age_ms[-1] == 0
    assert (np.diff(events.age_ms) <= 0).all()
    assert events.age_ms[0] <= (SPAN_DAYS + 1) * DAY_MS
    assert set(np.unique(events.type)) == set(range(len(EVENT_TYPES)))
    assert all(
        2 <= len(colors) <= 3 and 1 <= len(makes) <= 3
        for colors, makes in zip(sample.tastes.colors, sample.tastes.makes, strict=True)
    )


def test_most_events_are_within_the_shoppers_tastes() -> None:
    sample = load_sample()
    liked_color = np.zeros((len(sample.tastes), len(COLORS) + 1), dtype=np.bool_)
    for shopper, colors in enumerate(sample.tastes.colors):
        liked_color[shopper, list(colors)] = True
    color = sample.listings.color[sample.events.listing]
    price = sample.listings.price_eur[sample.events.listing]
    band = sample.tastes.price_eur[sample.events.shopper]
    assert liked_color[sample.events.shopper, color].mean() > 0.85
    assert ((price >= band[:, 0]) & (price <= band[:, 1])).mean() > 0.85


def test_a_favorite_or_contact_follows_a_view_of_the_same_listing() -> None:
    events = load_sample().events
    order = np.lexsort((-events.age_ms, events.listing, events.shopper))
    shopper, listing, kind = events.shopper[order], events.listing[order], events.type[order]
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = (shopper[1:] != shopper[:-1]) | (listing[1:] != listing[:-1])
    assert (kind[first] == EVENT_TYPES.index("view")).all()


def test_serialized_events_end_now_and_hold_the_schemas_attributes() -> None:
    sample = load_sample()
    end_ns = 1_800_000_000_123_456_789
    count, names = 0, set()
    for encoded in sample.serialized(end_ns):
        count += len(encoded)
        last = event_service_pb2.IngestEventsRequest.FromString(encoded.run(len(encoded) - 200, len(encoded)))
        for event in last.events:
            names |= set(event.attributes.fields)
    assert count == len(sample.events)
    assert last.events[-1].time.ToNanoseconds() == end_ns
    assert names == {"color", "make", "price", "mileage", "query", "item_id"}


def test_the_same_seed_gives_the_same_events_and_another_seed_others(seed: int) -> None:
    listings = bundled_listings()
    one, two, other = (generate_events(50, 3_000, drawn, listings) for drawn in (seed, seed, seed + 1))
    for name in ("shopper", "listing", "type", "age_ms", "query"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert not np.array_equal(one.listing, other.listing)
    assert one.queries == two.queries
    assert len(one) == len(other) == 3_000


def test_what_sellers_wrote_is_brought_to_one_spelling() -> None:
    def color(text: str | None) -> str | None:
        place = clean_color(text)
        return COLORS[place] if place >= 0 else None

    assert [color(text) for text in ("Gray", "LIGHTGRAY", "snow", "Oxford White", "no_color", "custom", None)] == [
        "grey", "grey", "white", "white", None, None, None,
    ]  # fmt: skip
    assert [clean_make(text) for text in ("mercedes_benz", "Mercedes-Benz", "Land", "VW", "Others", None)] == [
        "mercedes-benz", "mercedes-benz", "land rover", "volkswagen", "", "",
    ]  # fmt: skip
    prices = ((11_111_111, "EUR"), (12345, "EUR"), (1, "USD"), (1000, "USD"), (9, None))
    assert [clean_price_eur(*price) for price in prices] == [None, None, None, 880.0, None]
