"""Whether producers that are too fast are slowed, and not served with growing memory.

Producers, each in a process of its own, send whatever the transport takes and do not wait for acknowledgements. What
the service may hold of it is bounded, in bytes:

    each stream      `STREAM_LOOKAHEAD_BYTES`   taken in by the transport, not read
                     `stream_window_bytes`      read and not acknowledged
    to each shard    `owner_window_bytes`       sent on by the frontend and not answered
    in each shard    `shard_queue_bytes`        waiting to be logged and applied

and windows let the one message through that fills them. The growth of the resident memory of all processes of the
service is held against the sum. Everybody's rows, and what the service takes for itself under load, are there before:
the same users had events in a warm-up. There are no snapshots meanwhile (`bench soak` has them). Afterwards every event
that was sent is acknowledged and counted.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.chart import Span, curves
from benchmarks.generator import Generator
from benchmarks.load import MARKETPLACE, SCHEMAS
from benchmarks.processes import (
    Disk,
    ResidentMemory,
    data_directory,
    describe_machine,
    is_ours,
    role_names,
    serve,
    started,
)
from benchmarks.producing import STREAM, check_totals
from benchmarks.report import cost
from profile_service.config import MIB, STREAM_LOOKAHEAD_BYTES

_LIKELY_EVENTS_PER_SECOND = 1_000_000
_BYTES_PER_EVENT = 400
_EVENTS_PER_USER = 20
"""Of each producer in its load, but not more events than `_MOST_EVENTS`. They are sent again and again, and count
again: events of `MARKETPLACE` have no ids."""
_MOST_EVENTS = 200_000
_WARM_UPS = 3
_INTERVAL_S = 0.05
_NEVER = ("--snapshot-log-bytes", str(1 << 50), "--snapshot-interval-s", "1e9")
"""No snapshot."""


@dataclass(frozen=True)
class Options:
    """What is measured."""

    seconds: float
    producers: int
    users: int
    batch: int
    """Events a batch."""
    stream_window_bytes: int
    owner_window_bytes: int
    shard_queue_bytes: int
    data_dir: Path | None
    seed: int | None


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measures, and returns everything as one JSON object. `console` hears how far it is."""
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0]) % 10**6
    events = max(min(options.users * _EVENTS_PER_USER, _MOST_EVENTS) // options.batch, 1) * options.batch
    warm = events * options.producers * _WARM_UPS
    room = int(warm + options.seconds * _LIKELY_EVENTS_PER_SECOND) * _BYTES_PER_EVENT
    with ExitStack() as stack:
        directory = stack.enter_context(data_directory(options.data_dir, room))
        generators = [stack.enter_context(Generator()) for _ in range(options.producers)]
        with console.status("serialising"):
            bytes_per_event = 0.0
            for number, generator in enumerate(generators):
                bytes_per_event = generator.build(MARKETPLACE, events, options.users, options.batch, seed + number)
        capacity = [
            *("--stream-window-bytes", str(options.stream_window_bytes)),
            *("--owner-window-bytes", str(options.owner_window_bytes)),
            *("--shard-queue-bytes", str(options.shard_queue_bytes)),
        ]
        with console.status("starting") as progress:
            child = stack.enter_context(
                started(serve(SCHEMAS[MARKETPLACE], "--data-dir", str(directory), *capacity, *_NEVER))
            )
            for number in range(_WARM_UPS):
                progress.update(f"warming up, {number + 1} of {_WARM_UPS}")
                for generator in generators:
                    generator.send(child.address, STREAM, producers=2, window=8)
            before = check_totals(child.address, warm)
            progress.update(f"{options.producers} producers, {options.seconds:g} s")
            with ResidentMemory(child.process, _INTERVAL_S) as memory:
                floods = [generator.flood(child.address, options.seconds) for generator in generators]
                sent = [flood.result() for flood in floods]
            total = sum(one.events for one in sent)
            check_totals(child.address, warm + total, before.user_count)
    at, resident = memory.series()
    ours = {name: values for name, values in resident.items() if is_ours(name)}
    together = np.sum(list(ours.values()), axis=0)
    shards = len(before.shards)
    message_bytes = int(bytes_per_event * options.batch)
    bounds = {
        "transport": options.producers * (STREAM_LOOKAHEAD_BYTES + message_bytes),
        "streams": options.producers * (options.stream_window_bytes + message_bytes),
        "owners": shards * (options.owner_window_bytes + message_bytes),
        "queues": shards * options.shard_queue_bytes,
    }
    growth, bound = float(together.max() - together[0]), sum(bounds.values())
    seconds = max(one.seconds for one in sent)
    result: dict[str, Any] = {
        "benchmark": "flood",
        "machine": describe_machine(),
        "disk": str(Disk.below(directory)),
        "producers": options.producers,
        "shards": shards,
        "users": options.users,
        "batch": options.batch,
        "seed": seed,
        "seconds": options.seconds,
        "drained_after_s": seconds,
        "events": total,
        "events_per_second": total / seconds,
        "bounds_bytes": bounds,
        "bound_bytes": bound,
        "growth_bytes": growth,
        "growth_bytes_by_process": {name: float(values.max() - values[0]) for name, values in ours.items()},
        "resident_bytes_before": float(together[0]),
        "unacknowledged_bytes": [one.unacknowledged_bytes for one in sent],
        "timeline": {
            "seconds": (at - at[0]).tolist(),
            "resident_bytes": {name: values.tolist() for name, values in ours.items()},
        },
        "within_bound": growth <= bound,
        "verified": True,
    }
    result["costs"] = [
        cost(
            f"growth of resident memory, {options.producers} producers without restraint for {options.seconds:g} s",
            bound=f"{bound / MIB:,.0f} MiB, all queues full",
            figure=f"{growth / MIB:,.0f} MiB",
            floor="–",
            ratio=growth / bound,
            held=growth <= bound,
        )
    ]
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """The figures as tables."""
    table = Table(title=f"{result['producers']} producers without restraint, {result['events']:,} events, MiB")
    table.add_column("")
    table.add_column("MiB", justify="right")
    for name, value in result["growth_bytes_by_process"].items():
        table.add_row(f"growth of {name}", f"{value / MIB:,.1f}")
    table.add_row("growth of all together", f"{result['growth_bytes'] / MIB:,.1f}")
    for name, value in result["bounds_bytes"].items():
        table.add_row(f"bound of {name}", f"{value / MIB:,.1f}")
    for number, value in enumerate(result["unacknowledged_bytes"]):
        table.add_row(f"most that was not acknowledged, producer {number + 1}", f"{value / MIB:,.1f}")
    console.print(table)
    held = "held" if result["within_bound"] else "MISSED"
    console.print(
        f"growth {result['growth_bytes'] / MIB:,.1f} MiB; bound, all queues full, "
        f"{result['bound_bytes'] / MIB:,.1f} MiB: {held}"
    )
    console.print(
        f"{result['events_per_second']:,.0f} events/s; the last acknowledged after {result['drained_after_s']:.1f} s"
    )


def draw(result: dict[str, Any]) -> str:
    """Resident memory during the flood."""
    timeline = result["timeline"]
    return curves(
        f"Resident memory while {result['producers']} producers send what they can",
        timeline["seconds"],
        {
            shown: [value / MIB for value in timeline["resident_bytes"][name]]
            for name, shown in role_names(timeline["resident_bytes"]).items()
        },
        unit="MiB",
        spans=[Span(0.0, result["seconds"])],
        spans_are="flood",
    )
