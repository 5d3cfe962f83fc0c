"""Cars that were for sale: cleaning the collected listings, and the cleaned ones as columns.

A collected listing comes as found: five countries, four currencies, colours and makes in many spellings, prices that
mean "make me an offer". A cleaned one has a make, a price in euros, a mileage and a year that can be true; its colour
may be unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

COLORS = (
    "black", "grey", "silver", "white", "blue", "red", "green", "brown", "beige", "yellow", "orange", "gold", "violet",
)  # fmt: skip
"""The colours of the `marketplace` schema."""

EUR_PER_UNIT = {"EUR": 1.0, "USD": 0.88, "RUB": 0.0125, "NGN": 0.0021}
"""Rough rates of the years in which the listings were collected: enough to put prices on one scale, and no more."""

MIN_PRICE_EUR, MAX_PRICE_EUR = 500.0, 300_000.0
MAX_MILEAGE_KM = 500_000.0
FIRST_YEAR, LAST_YEAR = 1970, 2022

_COLOR_WORDS = {
    **{color: color for color in COLORS},
    "gray": "grey", "lightgray": "grey", "charcoal": "grey", "magnetic": "grey",
    "snow": "white", "off-white": "white",
    "mediumblue": "blue", "dodgerblue": "blue", "darkslateblue": "blue", "morningsky": "blue",
    "crimson": "red", "burgandy": "red", "burgundy": "red", "maroon": "red", "ruby": "red",
    "teal": "green", "peru": "brown", "tan": "beige", "coral": "orange", "goldenrod": "gold",
    "purple": "violet", "indigo": "violet",
}  # fmt: skip
_MAKES = {
    "alfa": "alfa romeo", "aston": "aston martin", "land": "land rover", "mercedes benz": "mercedes-benz",
    "mercedes": "mercedes-benz", "vw": "volkswagen", "chev": "chevrolet", "benz": "mercedes-benz",
}  # fmt: skip
_NOT_MAKES = {
    "", "sonstige autos", "others", "other", "unknown", "caravans-wohnm", "trailer-anhänger", "heartland",
    "swipe key cards",
}  # fmt: skip
_MODEL_WORDS = 3


@dataclass(frozen=True)
class Listings:
    """Cleaned listings by column, all of one length."""

    item_id: NDArray[np.object_]
    make: NDArray[np.object_]
    model: NDArray[np.object_]
    """Empty where unknown."""
    color: NDArray[np.int8]
    """Index into `COLORS`, -1 where unknown."""
    price_eur: NDArray[np.float64]
    mileage_km: NDArray[np.float64]
    year: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.item_id)

    @cached_property
    def make_names(self) -> tuple[str, ...]:
        """Every make once."""
        return tuple(sorted(set(self.make.tolist())))

    @cached_property
    def make_code(self) -> NDArray[np.int16]:
        """Index into `make_names`."""
        code = {make: place for place, make in enumerate(self.make_names)}
        return np.array([code[make] for make in self.make.tolist()], dtype=np.int16)

    @classmethod
    def read(cls, path: Path) -> Listings:
        """The listings that `write` has written."""
        table = pq.read_table(path)
        columns = {name: table[name].to_numpy() for name in table.column_names}
        return cls(
            **{name: columns[name].astype(object) for name in ("item_id", "make", "model")},
            color=np.array(
                [-1 if color is None else COLORS.index(color) for color in table["color"].to_pylist()], np.int8
            ),
            **{name: columns[name].astype(np.float64) for name in ("price_eur", "mileage_km")},
            year=columns["year"].astype(np.int16),
        )

    def write(self, path: Path) -> None:
        """Writes the listings as Parquet."""
        table = pa.table(
            {
                "item_id": pa.array(self.item_id, pa.string()),
                "make": pa.array(self.make, pa.string()),
                "model": pa.array(self.model, pa.string()),
                "color": pa.array([COLORS[color] if color >= 0 else None for color in self.color], pa.string()),
                "price_eur": pa.array(self.price_eur.astype(np.float32)),
                "mileage_km": pa.array(self.mileage_km.astype(np.int32)),
                "year": pa.array(self.year),
            }
        )
        pq.write_table(table, path, compression="zstd", compression_level=19)


def clean_listings(path: Path, keep: int, seed: int) -> Listings:
    """At most `keep` of the usable listings of a collected file, drawn by `seed`; those with a known colour come first.

    One listing in ten is kept without a colour, as real ones often come.
    """
    columns = ["item_id", "make", "model", "colour", "mileage_km", "price", "currency", "year"]
    rows = [row for raw in pq.read_table(path, columns=columns).to_pylist() if (row := _clean(raw)) is not None]
    rng = np.random.default_rng(seed)
    rng.shuffle(rows)
    colored = [row for row in rows if row["color"] >= 0][: keep - keep // 10]
    plain = [row for row in rows if row["color"] < 0][: keep - len(colored)]
    chosen = sorted(colored + plain, key=lambda row: (row["make"], row["model"], row["item_id"]))

    def column(name: str, dtype: Any) -> NDArray[Any]:
        return np.array([row[name] for row in chosen], dtype=dtype)

    return Listings(
        column("item_id", object),
        column("make", object),
        column("model", object),
        column("color", np.int8),
        column("price_eur", np.float64),
        column("mileage_km", np.float64),
        column("year", np.int16),
    )


def clean_color(text: str | None) -> int:
    """Index into `COLORS` of the colour that a seller wrote, -1 where it says none of them.

    >>> COLORS[clean_color("Ingot Silver metallic")], clean_color("custom")
    ('silver', -1)
    """
    words = re.split(r"[\s_]+", (text or "").strip().lower())
    known = [_COLOR_WORDS[word] for word in words if word in _COLOR_WORDS]
    return COLORS.index(known[-1]) if known else -1


def clean_make(text: str | None) -> str:
    """A make in one spelling, empty where the seller named none.

    >>> clean_make("Mercedes_Benz"), clean_make("sonstige_autos")
    ('mercedes-benz', '')
    """
    make = " ".join((text or "").lower().replace("_", " ").split())
    make = _MAKES.get(make, make)
    return "" if make in _NOT_MAKES else make


def clean_price_eur(price: float | None, currency: str | None) -> float | None:
    """A price in whole euros, or None for one that cannot be meant: outside the range, or 11111, 123456 and such."""
    if price is None or currency not in EUR_PER_UNIT:
        return None
    digits = str(int(price))
    if len(digits) >= 4 and (len(set(digits)) == 1 or "123456789".startswith(digits)):
        return None
    euros = float(round(price * EUR_PER_UNIT[currency]))
    return euros if MIN_PRICE_EUR <= euros <= MAX_PRICE_EUR else None


def _clean(raw: dict[str, Any]) -> dict[str, Any] | None:
    make, price = clean_make(raw["make"]), clean_price_eur(raw["price"], raw["currency"])
    mileage, year = raw["mileage_km"], raw["year"]
    if not make or price is None or mileage is None or year is None:
        return None
    if not (0 <= mileage <= MAX_MILEAGE_KM and FIRST_YEAR <= year <= LAST_YEAR):
        return None
    model = " ".join((raw["model"] or "").lower().replace("_", " ").split()[:_MODEL_WORDS])
    model = "" if model in ("other", "others", "andere", "unknown") else model
    color = clean_color(raw["colour"])
    return {
        "item_id": raw["item_id"],
        "make": make,
        "model": model,
        "color": color,
        "price_eur": price,
        "mileage_km": float(round(mileage)),
        "year": year,
    }
