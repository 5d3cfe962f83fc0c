"""Makes the bundled files of the sample from a file of collected listings.

    python -m profile_service.sample.generate --listings car_listings.parquet --out profile_service/sample

The same listings and seed give the same files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from profile_service.sample import EVENTS_FILE, LISTINGS_FILE, SHOPPERS_FILE, make_sample, write_events, write_tastes
from profile_service.sample.listings import clean_listings


def main() -> None:
    """Reads the arguments and writes the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listings", type=Path, required=True, help="collected listings, Parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--keep", type=int, default=20_000, help="listings to keep (%(default)s)")
    parser.add_argument("--shoppers", type=int, default=2_000, help="shoppers (%(default)s)")
    parser.add_argument("--events", type=int, default=200_000, help="events (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="seed of every draw (%(default)s)")
    arguments = parser.parse_args()

    listings = clean_listings(arguments.listings, arguments.keep, arguments.seed)
    sample = make_sample(listings, arguments.shoppers, arguments.events, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    listings.write(arguments.out / LISTINGS_FILE)
    write_tastes(sample.tastes, arguments.out / SHOPPERS_FILE)
    write_events(sample.events, arguments.out / EVENTS_FILE)
    for name in (LISTINGS_FILE, SHOPPERS_FILE, EVENTS_FILE):
        path = arguments.out / name
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
