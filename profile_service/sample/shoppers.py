"""Shoppers who were made up: hidden tastes, and what each does with the listings because of them.

A shopper draws two or three colours, one to three makes, a price band and a mileage band, then comes back now and then
for a session of some twenty looks. Most looks (`IN_TASTE`) go to listings within the tastes, the rest to any listing.
What was looked at is sometimes marked as a favourite, more seldom its seller is contacted, and both far more often
where it is within the tastes. All of it is drawn by a seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profile_service.sample.listings import COLORS, Listings

EVENT_TYPES = ("view", "favorite", "contact")
IN_TASTE = 0.88
"""Share of looks that go to listings within the tastes."""
SPAN_DAYS = 21
"""How far back the first events lie."""
MOST_TASTES = 2_000
"""Different tastes that are drawn; more shoppers than these share them."""

_DAY_MS = 24 * 3600 * 1000
_LOOKS_PER_SESSION = 20
_PAUSE_MS = 45_000
_BAND_FACTORS = (1.7, 2.6)
_FEWEST_LISTINGS = 12
_FEWEST_OF_MAKE = 100
_FOLLOW_UP = 0.16
_FOLLOW_UP_OUTSIDE = 0.15
"""Chance that a wish to follow up survives where the listing is outside the tastes."""
_CONTACT = 0.3
_QUERY = 0.12


@dataclass(frozen=True)
class Tastes:
    """What shoppers like, one entry a shopper."""

    colors: list[tuple[int, ...]]
    """Indices into `COLORS`, two or three."""
    makes: list[tuple[str, ...]]
    price_eur: NDArray[np.float64]
    """(shoppers, 2) band, both ends included."""
    mileage_km: NDArray[np.float64]
    """(shoppers, 2) band, both ends included."""

    def __len__(self) -> int:
        return len(self.colors)


@dataclass(frozen=True)
class SampleEvents:
    """Events by column, the oldest first; `listing` points into the listings they were made from."""

    shopper: NDArray[np.int32]
    listing: NDArray[np.int32]
    type: NDArray[np.uint8]
    """Index into `EVENT_TYPES`."""
    age_ms: NDArray[np.int64]
    """Milliseconds before the last event."""
    query: NDArray[np.int32]
    """Index into `queries`, -1 where nothing was searched for."""
    queries: list[str]

    def __len__(self) -> int:
        return len(self.shopper)


def shopper_id(shopper: int) -> str:
    """The user id of a shopper.

    >>> shopper_id(42)
    'shopper-00042'
    """
    return f"shopper-{shopper:05d}"


def draw_tastes(listings: Listings, count: int, rng: np.random.Generator) -> Tastes:
    """`count` tastes, each of which at least a dozen listings meet, some in every colour and of every make."""
    color_share = np.bincount(listings.color[listings.color >= 0], minlength=len(COLORS)) ** 0.5
    color_share /= color_share.sum()
    make_counts = np.bincount(listings.make_code)
    make_share = np.where(make_counts >= _FEWEST_OF_MAKE, make_counts, 0) ** 0.5
    make_share /= make_share.sum()
    of_make = _by_make(listings)
    tastes = Tastes([], [], np.zeros((count, 2)), np.zeros((count, 2)))
    while len(tastes) < count:
        colors = tuple(sorted(rng.choice(len(COLORS), rng.integers(2, 4), replace=False, p=color_share).tolist()))
        makes = tuple(sorted(rng.choice(len(make_share), rng.integers(1, 4), replace=False, p=make_share).tolist()))
        of_makes = np.concatenate([of_make[make] for make in makes])
        center = listings.price_eur[rng.choice(of_makes)]
        factor = rng.uniform(*_BAND_FACTORS) ** 0.5
        price = (round(center / factor, -2), round(center * factor, -2))
        mileage_center = max(listings.mileage_km[rng.choice(of_makes)], 20_000.0)
        mileage = (round(mileage_center / 2.0, -3), round(mileage_center * 1.6, -3))
        fitting = _within(listings, of_makes, colors, price, mileage)
        if len(fitting) < _FEWEST_LISTINGS or not _all_there(listings, fitting, colors, makes):
            continue
        tastes.price_eur[len(tastes)], tastes.mileage_km[len(tastes)] = price, mileage
        tastes.colors.append(colors)
        tastes.makes.append(tuple(listings.make_names[make] for make in makes))
    return tastes


def draw_events(
    listings: Listings, tastes: Tastes, shoppers: int, events: int, rng: np.random.Generator
) -> SampleEvents:
    """Exactly `events` events of `shoppers` shoppers; shopper `i` has taste `i % len(tastes)`."""
    activity = rng.gamma(1.6, 1.0, shoppers) + 0.05
    counts = rng.multinomial(events, activity / activity.sum())
    shopper = np.repeat(np.arange(shoppers, dtype=np.int32), counts)
    place = np.arange(events) - np.repeat(np.cumsum(counts) - counts, counts)
    look, liked = _looks(listings, tastes, shopper % len(tastes), rng)

    first = place % _LOOKS_PER_SESSION == 0
    follows = ~first & (rng.random(events) < _FOLLOW_UP)
    for _ in range(2):  # the second time over listings that the first time has changed
        seen = _last_view(follows)
        outside = follows & ~liked[seen] & (rng.random(events) > _FOLLOW_UP_OUTSIDE)
        follows &= ~outside
    seen = _last_view(follows)
    types = np.where(follows, np.where(rng.random(events) < _CONTACT, 2, 1), 0).astype(np.uint8)

    when = _times(first, rng)
    order = np.argsort(when, kind="stable")
    listing = look[seen]
    searched = ~follows & (rng.random(events) < _QUERY)
    query, queries = _queries(listings, listing, searched, rng)
    when = when[order]
    last = when[-1] if events else 0
    return SampleEvents(shopper[order], listing[order], types[order], last - when, query[order], queries)


def _by_make(listings: Listings) -> list[NDArray[np.int64]]:
    """Places of the listings of each make, by its code."""
    return [np.flatnonzero(listings.make_code == code) for code in range(len(listings.make_names))]


def _within(
    listings: Listings,
    candidates: NDArray[np.int64],
    colors: tuple[int, ...],
    price: tuple[float, float],
    mileage: tuple[float, float],
) -> NDArray[np.int64]:
    """Those of `candidates` that meet every taste; a listing of unknown colour meets none."""
    of = candidates
    fits = (listings.price_eur[of] >= price[0]) & (listings.price_eur[of] <= price[1])
    fits &= (listings.mileage_km[of] >= mileage[0]) & (listings.mileage_km[of] <= mileage[1])
    fits &= _mask(colors)[listings.color[of]]
    return of[fits]


def _mask(colors: tuple[int, ...]) -> NDArray[np.bool_]:
    """Whether each colour is among `colors`; the last place, -1, stands for an unknown one."""
    mask = np.zeros(len(COLORS) + 1, dtype=np.bool_)
    mask[list(colors)] = True
    return mask


def _looks(
    listings: Listings, tastes: Tastes, taste: NDArray[np.int32], rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """A listing for every event, and whether it was drawn for taste."""
    order = np.argsort(taste, kind="stable")
    bounds = np.searchsorted(taste[order], np.arange(len(tastes) + 1))
    of_make = dict(zip(listings.make_names, _by_make(listings), strict=True))
    look = rng.integers(0, len(listings), len(taste)).astype(np.int32)
    liked = rng.random(len(taste)) < IN_TASTE
    for i in range(len(tastes)):
        drawn = order[bounds[i] : bounds[i + 1]]
        drawn = drawn[liked[drawn]]
        if len(drawn) == 0:
            continue
        of_makes = np.concatenate([of_make[make] for make in tastes.makes[i]])
        low_price, high_price = tastes.price_eur[i]
        low_mileage, high_mileage = tastes.mileage_km[i]
        fitting = _within(listings, of_makes, tastes.colors[i], (low_price, high_price), (low_mileage, high_mileage))
        look[drawn] = rng.choice(fitting, len(drawn), p=_evenly(listings, fitting))
    return look, liked


def _all_there(listings: Listings, fitting: NDArray[np.int64], colors: tuple[int, ...], makes: tuple[int, ...]) -> bool:
    """Whether every liked colour and make can be had."""
    found_colors, found_makes = set(listings.color[fitting].tolist()), set(listings.make_code[fitting].tolist())
    return found_colors == set(colors) and found_makes == set(makes)


def _evenly(listings: Listings, fitting: NDArray[np.int64]) -> NDArray[np.float64]:
    """A chance for each listing, so that of what is liked the rare is looked at about as often as the common."""
    color, make = listings.color[fitting], listings.make_code[fitting]
    chance = 1.0 / (np.bincount(color)[color] * np.bincount(make)[make])
    return np.asarray(chance / chance.sum())


def _last_view(follows: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each event the last one, itself included, that is a view. A shopper's first event always is one."""
    places = np.arange(len(follows))
    return np.maximum.accumulate(np.where(follows, 0, places))


def _times(first: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """Milliseconds from the span's beginning: sessions anywhere in it, more of them in the evening, pauses inside."""
    sessions = int(first.sum())
    day = rng.integers(0, SPAN_DAYS, sessions)
    hour = np.where(rng.random(sessions) < 0.6, rng.normal(20.0, 2.0, sessions), rng.uniform(7.0, 24.0, sessions)) % 24
    start = day * _DAY_MS + (hour / 24 * _DAY_MS).astype(np.int64)
    pause = np.where(first, 0, rng.exponential(_PAUSE_MS, len(first)).astype(np.int64) + 500)
    passed = np.cumsum(pause)
    session = np.cumsum(first) - 1
    return np.asarray(start[session] + passed - passed[first][session])


def _queries(
    listings: Listings, listing: NDArray[np.int32], searched: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[NDArray[np.int32], list[str]]:
    known: dict[str, int] = {}
    query = np.full(len(listing), -1, dtype=np.int32)
    for place in np.flatnonzero(searched).tolist():
        car = int(listing[place])
        make, model, color = listings.make[car], listings.model[car], int(listings.color[car])
        kind = rng.integers(3)
        if kind == 0 and color >= 0:
            text = f"{COLORS[color]} {make}"
        elif kind == 1:
            text = f"{make} under {int(-(-listings.price_eur[car] // 5000)) * 5000}"
        else:
            text = f"{make} {model}".strip()
        query[place] = known.setdefault(text, len(known))
    return query, list(known)
