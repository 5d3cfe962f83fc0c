"""A shard on a disk that crashes, tears, fails and fills up, held against a model of plain dictionaries.

pytest tests/simulation                                    a few hundred runs, other ones each time
pytest tests/simulation --runs 10000 [--first-seed N]      so many, spread over all processors, with progress
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.simulation.campaign import Summary, explain, run_many
from tests.simulation.run import CRASH_PLACES, run

RUNS = 200
MANY = 5_000
"""With so many runs every single place of a crash must have been reached."""

SHOWN = 3
"""Failed runs that are explained."""

ALWAYS_REACHED = (
    "recoveries",
    "power failures",
    "processes killed",
    "clean stops",
    "records lost in a crash",
    "torn tail cut",
    "snapshot loaded",
    "log replayed from its beginning",
    "log of several segments",
    "log trimmed",
    "newest snapshot is damaged",
    "older snapshot loaded",
    "disk was full",
    "shard ended by an I/O error",
    "start fails with an I/O error",
    "start with another schema",
    "features reset",
    "features converted",
    "change of the schema refused",
    "acknowledged events lost without sync",
    "snapshot published on request",
    "users forgotten",
    "batch in several parts",
    "producer changes its frontend",
    "producer repeats what was acknowledged",
    "request sent twice at once",
    "event id sent again in another batch",
    "caller gives up",
    "caller is refused",
    "caller in doubt",
    "reads",
    "crash: write segment",
    "crash: sync segment",
    "crash: write snapshot",
    "crash in recovery: write segment",
    "crash in recovery: sync segment",
)
REACHED_BY_MANY = (
    *(f"crash: {place}" for place in CRASH_PLACES),
    "crash in recovery: create segment",
    "crash in recovery: rename segment",
    "crash in recovery: remove segment",
    "crash in recovery: sync log directory",
    "DiskFull in write segment",
    "DiskFull in write snapshot",
    "OSError in write segment",
    "OSError in sync segment",
    "OSError in create segment",
    "OSError in write snapshot",
    "OSError in sync snapshot",
    "OSError in create snapshot",
)


@pytest.mark.timeout(4 * 3600)
def test_what_was_acknowledged_is_counted_once_whatever_happens_to_disk_and_process(
    request: pytest.FixtureRequest, seed: int, tell: Callable[[str], None]
) -> None:
    asked = request.config.option.runs
    first = request.config.option.first_seed
    first = seed * RUNS if first is None else first
    runs = RUNS if asked is None else asked
    processes = 1 if asked is None or asked < 200 else os.cpu_count() or 1
    summary = run_many(first, runs, processes=processes, progress=(lambda _: None) if asked is None else tell)
    text = f"{summary.runs:,} runs from seed {first} on in {summary.seconds:.0f} s:\n{summary.table()}"
    if asked is not None:
        tell(text)
    explained = [explain(failed, fault) for failed, fault in sorted(summary.faults.items())[:SHOWN]]
    assert not summary.faults, (
        f"{len(summary.faults)} runs failed, of seeds {sorted(summary.faults)[:50]}\n" + "\n".join(explained)
    )
    _check_reached(summary, text)


def _check_reached(summary: Summary, text: str) -> None:
    """A simulation that never comes to a case proves nothing about it."""
    wanted = ALWAYS_REACHED if summary.runs >= RUNS else ()
    if summary.runs >= MANY:
        wanted = (*wanted, *REACHED_BY_MANY)
    never = [what for what in wanted if not summary.seen[what]]
    assert not never, f"never reached: {never}\n{text}"


def test_a_seed_is_the_same_run_every_time(seed: int) -> None:
    once, again = run(seed, traced=True), run(seed, traced=True)
    assert once.trace == again.trace
    assert once.seen == again.seen
