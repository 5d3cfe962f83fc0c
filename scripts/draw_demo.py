"""Draws docs/demo.svg: what `profile-service demo` shows, of the sample as it is bundled now."""

from __future__ import annotations

import io
import time
from pathlib import Path

from rich.console import Console

from profile_service.commands.demo import SHOWN_SHOPPER, render_shopper
from profile_service.commands.get import read_profile
from profile_service.commands.send import replay
from profile_service.commands.service import StopSignal, running
from profile_service.config import Settings
from profile_service.sample import load_sample
from profile_service.sample.shoppers import shopper_id

SHOWN = {"color", "make", "price", "mileage", "last_search"}
TARGET = Path(__file__).parents[1] / "docs" / "demo.svg"


def main() -> None:
    """Replays the sample into a service of its own and records the answer."""
    stop = StopSignal()
    with running(Settings(grpc_port=0, http_port=0), stop) as service:
        sample = load_sample()
        replay(sample.serialized(time.time_ns()), len(sample.events), service.grpc_address, Console(stderr=True), stop)
        profile, schema = read_profile(service.grpc_address, shopper_id(SHOWN_SHOPPER))
    for name in set(profile.features) - SHOWN:
        del profile.features[name]
    console = Console(record=True, width=110, highlight=False, force_terminal=True, file=io.StringIO())
    console.print(render_shopper(sample, profile, schema, SHOWN_SHOPPER))
    TARGET.write_text(console.export_svg(title="make demo"), encoding="utf-8")


if __name__ == "__main__":
    main()
