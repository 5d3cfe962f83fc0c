"""Events of an invented shop in a Parquet file, with all that real files hold: repeats, gaps, returns, strange prices,
and rows that nobody can count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TYPES = ("view", "cart", "purchase", "return")
BRANDS = [f"brand-{i}" for i in range(40)]
CATEGORIES = [f"shop.aisle-{i}.shelf" for i in range(25)]
COUNTRIES = ["France", "Österreich", "日本", "United Kingdom", "Unspecified"]

SCHEMA = pa.schema(
    {
        "user_id": pa.large_string(),
        "event_time": pa.timestamp("ms", tz="UTC"),
        "event_type": pa.large_string(),
        "item_id": pa.large_string(),
        "category": pa.large_string(),
        "brand": pa.large_string(),
        "price": pa.float64(),
        "country": pa.large_string(),
        "session_id": pa.large_string(),
    }
)

BAD_ROWS: tuple[tuple[str, str, Any], ...] = (
    ("user_id", "user_id", None),
    ("user_id", "user_id", ""),
    ("user_id", "user_id", "u" * 257),
    ("event_type", "type", "refund"),
    ("event_type", "type", None),
    ("event_time", "time", None),
    ("event_time", "time", timedelta(days=2)),
    ("price", "attributes.price", math.nan),
    ("price", "attributes.price", math.inf),
    ("brand", "attributes.brand", "b" * 1025),
)
"""(column, field that is refused, value); a timedelta is a time so far from now."""


@dataclass(frozen=True)
class ShopFile:
    """A written file, and what its writer knows of it."""

    path: Path
    valid: int
    refused: dict[str, int]
    """Rows by the field that is wrong with them."""
    users: set[str]


def write_shop_events(path: Path, seed: int, rows: int, users: int) -> ShopFile:
    """Writes `rows` rows of which about one in fifty is refused."""
    random = Random(seed)
    now = datetime.now(UTC).replace(microsecond=0)
    refused: dict[str, int] = {}
    table: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(table) < rows:
        row = _row(random, now, random.choices(range(users), [1 / (i + 1) for i in range(users)])[0])
        # A basket: several rows of one user at one moment; now and then the very same row again.
        for _ in range(random.choice((1, 1, 1, 2, 5))):
            table.append(dict(row))
            row |= {"item_id": f"item-{random.randrange(300)}", "price": _price(random)}
        if random.random() < 0.05:
            table.append(dict(table[-1]))
    del table[rows:]
    for row in table:
        if random.random() < 0.02:
            column, field, value = random.choice(BAD_ROWS)
            row[column] = now + value if isinstance(value, timedelta) else value
            refused[field] = refused.get(field, 0) + 1
        else:
            seen.add(row["user_id"])
    pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), path, row_group_size=1_000)
    return ShopFile(path, rows - sum(refused.values()), refused, seen)


def _row(random: Random, now: datetime, user: int) -> dict[str, Any]:
    ago = random.choice(
        (
            timedelta(seconds=random.randrange(40 * 3600)),
            timedelta(days=random.randrange(400)),
            timedelta(days=random.randrange(6000)),
        )
    )
    return {
        "user_id": f"{'кл' if user % 7 == 0 else 'shopper'} {user}",
        "event_time": now - ago,
        "event_type": random.choices(TYPES, (60, 8, 25, 7))[0],
        "item_id": f"item-{random.randrange(300)}",
        # The keenest have more brands than a profile keeps, others a few.
        "category": random.choice([None, *CATEGORIES[: 3 + user]]),
        "brand": random.choice([None, *BRANDS[: 2 + 2 * user]]),
        "price": _price(random),
        "country": random.choice([None, *COUNTRIES]),
        "session_id": f"session-{random.randrange(10_000)}",
    }


def _price(random: Random) -> float | None:
    odd = random.random()
    if odd < 0.05:
        return None
    if odd < 0.15:
        return random.choice((0.0, -0.0, -12.5, 0.1, 10_000.0, 11_111_111.0, 1e-9))
    return round(random.lognormvariate(2.5, 1.6), 2)
