"""Says where the time of decode and apply goes, feature by feature, as docs/performance.md records it.

    python scripts/bench_kernels.py [--users N]... [--events N] [--rounds N]

The work of `benchmarks/preferences.yaml` is counted by schemas that have one feature more each time; first by one that
has a plain counter alone. Users' rows and the population are counted apart, so what both need, the half-lives and the
numbers of listed values, is done twice; the last line has it once. A figure is the CPU time of an event in the median
batch, each in its quietest round; what a feature takes is the difference to the schema before.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]

sys.path.insert(0, str(ROOT))
from benchmarks.load import PREFERENCES, SCHEMAS, build_load  # noqa: E402
from profile_service.domain.columns import EventColumns  # noqa: E402
from profile_service.domain.schema import Schema, load_schema, parse_schema  # noqa: E402
from profile_service.domain.table import ProfileTable  # noqa: E402
from profile_service.shard.shard import SLICE_EVENTS  # noqa: E402
from profile_service.wire.decode import decode_events  # noqa: E402
from profile_service.wire.plan import WirePlan  # noqa: E402

BATCH = 4_000
COUNTER = "{name: c, events: {view: {weight: 1}}, features: {views: {kind: counter, half_life: none}}}"


def main() -> None:
    """Measures, and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, action="append", help="By default 20 and 100,000.")
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    sizes = arguments.users or [20, 100_000]
    found = [_measure(users, arguments.events, arguments.rounds) for users in sizes]
    print(f"| ns an event | {' | '.join(f'{users:,} users' for users in sizes)} |")
    print(f"|---|{'---|' * len(sizes)}")
    for name in found[0]:
        print(f"| {name} | {' | '.join(f'{one[name]:.0f}' for one in found)} |")


def _measure(users: int, events: int, rounds: int) -> dict[str, float]:
    """By what it is: nanoseconds an event."""
    load = build_load(PREFERENCES, events, users, BATCH, 7)
    full = load_schema(SCHEMAS[PREFERENCES])
    plan = WirePlan.compile(full.event_type_names, full.text_attributes, full.number_attributes)
    now_ns = time.time_ns()
    decode: NDArray[np.float64] = np.empty((rounds, len(load.batches)))
    for turn in range(rounds):
        for number, batch in enumerate(load.batches):
            began = time.thread_time_ns()
            columns = decode_events(batch, plan, now_ns, count=min(BATCH, events - number * BATCH))
            decode[turn, number] = (time.thread_time_ns() - began) / columns.count
    batches = [decode_events(batch, plan, now_ns) for batch in load.batches]
    schemas = [("what every profile has, and a counter", _with_features(full, 0))]
    schemas += [(full.features[n].name, _with_features(full, n + 1)) for n in range(len(full.features))]
    answer = {"decode": _quietest(decode)}
    before = {"users": 0.0, "population": 0.0}
    parts: dict[str, dict[str, float]] = {part: {} for part in before}
    for name, schema in schemas:
        costs = _apply(schema, batches, rounds, now_ns)
        for part, cost in costs.items():
            parts[part][f"{part}: {name}"] = cost - before[part]
        before = costs
    for figures in parts.values():
        answer.update(figures)
    answer["decode and apply, in one"] = answer["decode"] + _apply_in_one(full, batches, rounds, now_ns)
    return answer


def _with_features(full: Schema, count: int) -> Schema:
    """The schema with so many of its features; the attributes keep their places."""
    features = (*parse_schema(COUNTER).features, *full.features[:count])
    return replace(full, features=features)


def _apply(schema: Schema, batches: list[EventColumns], rounds: int, now_ns: int) -> dict[str, float]:
    table = ProfileTable(schema)
    spent = {part: np.empty((rounds + 1, len(batches))) for part in ("users", "population")}
    for turn in range(rounds + 1):
        for number, columns in enumerate(batches):
            assert table.has_room(columns.count, len(columns.buffer))
            received: NDArray[np.int64] = np.full(columns.count, now_ns, np.int64)
            positions: NDArray[np.int64] = np.zeros(columns.count, np.int64)
            marks = [time.thread_time_ns()]
            texts = table.replay_population(columns, received)
            marks.append(time.thread_time_ns())
            table.replay_users(columns, received, positions, None, texts)
            marks.append(time.thread_time_ns())
            for part, cost in zip(("population", "users"), np.diff(marks), strict=True):
                spent[part][turn, number] = cost / columns.count
    # In the first round all users are new.
    return {part: _quietest(costs[1:]) for part, costs in spent.items()}


def _apply_in_one(schema: Schema, batches: list[EventColumns], rounds: int, now_ns: int) -> float:
    table = ProfileTable(schema)
    spent: NDArray[np.float64] = np.empty((rounds + 1, len(batches)))
    for turn in range(rounds + 1):
        for number, columns in enumerate(batches):
            assert table.has_room(columns.count, len(columns.buffer))
            began = time.thread_time_ns()
            for start in range(0, columns.count, SLICE_EVENTS):
                table.apply(columns, start, min(start + SLICE_EVENTS, columns.count), now_ns)
            spent[turn, number] = (time.thread_time_ns() - began) / columns.count
    return _quietest(spent[1:])


def _quietest(costs: NDArray[np.float64]) -> float:
    """(rounds, batches) costs: of each batch the quietest round, of them the median."""
    return float(np.median(costs.min(axis=0)))


if __name__ == "__main__":
    main()
