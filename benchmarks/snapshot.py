"""What a snapshot does to the time of an acknowledgement.

One shard with many users gets batches at a fixed rate; now and then it is told to write a snapshot of all of them. The
time of an acknowledgement counts from when its batch was due, whatever held it up (see `producing.SteadyProducer`).
Quiet stretches and snapshots take turns in one run, and batches are told apart by when they were due:

    ──── without ────┬──── while a snapshot is written ────┬─ after ─┬──── without ────┬────

`after` are the seconds that follow, in which the snapshot before the last is removed.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.chart import Span, curves
from benchmarks.load import MARKETPLACE, SCHEMAS, build_load
from benchmarks.processes import Disk, cpu_seconds, data_directory, describe_machine, serve, started
from benchmarks.producing import SteadyProducer, check_totals, create_snapshot
from benchmarks.recovery import BYTES_PER_EVENT, BYTES_PER_USER, fill, newest_snapshot
from benchmarks.report import cost

BOUND_MS = 10.0
"""How much later the 99th of a hundred acknowledgements may come while a snapshot is written."""

STRETCHES = ("without", "during", "after")
QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}

_AFTER_S = 5.0
_SETTLE_S = 2.0
"""Before the first stretch: the first batches of a stream wait for connections, and caches are cold."""
_SNAPSHOT_TIMEOUT_S = 600.0
_LIKELY_SNAPSHOT_S = 20.0
_BUCKET_S = 0.25
_NEVER = ("--snapshot-log-bytes", str(1 << 50), "--snapshot-interval-s", "1e9")
"""No snapshot but those that are asked for."""


@dataclass(frozen=True)
class Options:
    """What is measured."""

    users: int
    history: int
    """Events of each user before the measurement."""
    rate: int
    """Events a second."""
    batch: int
    """Events a batch."""
    quiet_s: float
    """Length of a stretch without a snapshot."""
    rounds: int
    sync: str
    data_dir: Path | None
    seed: int | None


@dataclass(frozen=True)
class _Run:
    """What was seen, in seconds of `time.monotonic`."""

    due: NDArray[np.float64]
    latency: NDArray[np.float64]
    snapshots: list[tuple[float, float]]
    sizes: list[int]


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measures, and returns everything as one JSON object. `console` hears how far it is."""
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0]) % 10**6
    result: dict[str, Any] = {
        "benchmark": "snapshot",
        "machine": describe_machine(),
        "users": options.users,
        "events_per_user": options.history,
        "events_per_second": options.rate,
        "batch": options.batch,
        "sync_mode": options.sync,
        "seed": seed,
        "bound_ms": BOUND_MS,
    }
    before = options.users * options.history
    likely = int(options.rounds * (options.quiet_s + _LIKELY_SNAPSHOT_S) * options.rate)
    room = options.users * BYTES_PER_USER + (before + likely) * BYTES_PER_EVENT
    with data_directory(options.data_dir, room) as directory:
        result["disk"] = str(Disk.below(directory))
        with (
            console.status("starting") as progress,
            started(
                serve(
                    SCHEMAS[MARKETPLACE], "--shards", "1", "--sync", options.sync, "--data-dir", str(directory), *_NEVER
                )
            ) as child,
        ):
            address = child.address
            fill(address, options.users, options.history, 5_000, seed, progress.update)
            # Whole batches, which are sent again and again.
            events = max(options.users // options.batch, 1) * options.batch
            load = build_load(
                MARKETPLACE, events, options.users, options.batch, seed + options.history, every_user=True
            )
            interval_s = options.batch / options.rate
            producer = SteadyProducer(
                address,
                load,
                interval_s,
                most_batches=int(
                    options.rounds * (options.quiet_s + _SNAPSHOT_TIMEOUT_S) * options.rate / options.batch
                ),
            )
            cpu_before = cpu_seconds(child.process)
            began = time.monotonic()
            seen = uvloop.run(_alternate(producer, address, options, directory, progress.update))
            seconds = time.monotonic() - began
            spent = {name: used - cpu_before.get(name, 0.0) for name, used in cpu_seconds(child.process).items()}
            check_totals(address, before + len(seen.due) * options.batch, options.users)
    result["cpu_share_by_process"] = {name: used / seconds for name, used in spent.items() if used / seconds > 0.002}
    _summarise(result, seen, options.quiet_s)
    without = statistics.median(one["without_p99_ms"] for one in result["snapshots"])
    slowest = without + result["p99_difference_ms"]
    result["costs"] = [
        cost(
            f"p99 of acknowledgements during or after a snapshot of {options.users:,} users, {options.rate:,} events/s",
            bound=f"{BOUND_MS:g} ms above without",
            figure=f"{slowest:.1f} ms, in the worst of {options.rounds} rounds "
            f"{result['worst_p99_difference_ms']:+.1f} ms",
            floor=f"without a snapshot {without:.1f} ms",
            ratio=slowest / without,
            held=result["within_bound"],
        )
    ]
    result["verified"] = True
    return result


async def _alternate(producer: SteadyProducer, address: str, options: Options, directory: Path, tell: Any) -> _Run:
    """Runs the producer, and quiet stretches and snapshots beside it."""
    # A collection of this process's garbage is no wait of the service's.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        producing = asyncio.create_task(producer.run())
        controlling = asyncio.create_task(_control(producer, address, options, directory, tell))
        done, _ = await asyncio.wait((producing, controlling), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            _ = task.result()
        snapshots, sizes = await controlling
        await producing
    finally:
        gc.enable()
        gc.unfreeze()
    due, latency = producer.latencies()
    return _Run(due, latency, snapshots, sizes)


async def _control(
    producer: SteadyProducer, address: str, options: Options, directory: Path, tell: Any
) -> tuple[list[tuple[float, float]], list[int]]:
    snapshots, sizes = [], []
    tell("settling")
    await asyncio.sleep(_SETTLE_S)
    for number in range(options.rounds):
        tell(f"round {number + 1} of {options.rounds}: without a snapshot")
        await asyncio.sleep(options.quiet_s)
        tell(f"round {number + 1} of {options.rounds}: while a snapshot is written")
        began = time.monotonic()
        await create_snapshot(address, _SNAPSHOT_TIMEOUT_S)
        snapshots.append((began, time.monotonic()))
        sizes.append(newest_snapshot(directory).stat().st_size)
        await asyncio.sleep(_AFTER_S)
    producer.stop()
    return snapshots, sizes


def _summarise(result: dict[str, Any], seen: _Run, quiet_s: float) -> None:
    began = float(seen.due[0]) + _SETTLE_S
    stretch = np.zeros(len(seen.due), dtype=np.int8)
    for start, stop in seen.snapshots:
        stretch[(seen.due >= start) & (seen.due < stop)] = 1
        stretch[(seen.due >= stop) & (seen.due < stop + _AFTER_S)] = 2
    settled = seen.due >= began
    for number, name in enumerate(STRETCHES):
        latency_ms = seen.latency[settled & (stretch == number)] * 1e3
        result[name] = {
            "batches": len(latency_ms),
            **{f"{title}_ms": float(np.quantile(latency_ms, q)) for title, q in QUANTILES.items()},
        }
    origin = float(seen.due[0])
    result["snapshots"] = []
    for (start, stop), size in zip(seen.snapshots, seen.sizes, strict=True):
        edges = (max(began, start - quiet_s), start, stop, stop + _AFTER_S)
        p99s = {
            f"{name}_p99_ms": _p99_ms(seen, first, last)
            for name, (first, last) in zip(STRETCHES, itertools.pairwise(edges), strict=True)
        }
        slowest = max(p99s["during_p99_ms"], p99s["after_p99_ms"])
        one = {"start_s": start - origin, "seconds": stop - start, "bytes": size, **p99s}
        result["snapshots"].append({**one, "p99_difference_ms": slowest - p99s["without_p99_ms"]})
    differences = [one["p99_difference_ms"] for one in result["snapshots"]]
    result["p99_difference_ms"] = statistics.median(differences)
    result["worst_p99_difference_ms"] = max(differences)
    result["within_bound"] = result["p99_difference_ms"] <= BOUND_MS
    bucket = ((seen.due - origin) / _BUCKET_S).astype(np.int64)
    result["timeline"] = {
        "seconds": [number * _BUCKET_S for number in range(int(bucket[-1]) + 1)],
        "p50_ms": _by_bucket(seen.latency, bucket, 0.5),
        "p99_ms": _by_bucket(seen.latency, bucket, 0.99),
    }


def _p99_ms(seen: _Run, start: float, stop: float) -> float:
    """Of the batches that were due then, in milliseconds."""
    return float(np.quantile(seen.latency[(seen.due >= start) & (seen.due < stop)], 0.99) * 1e3)


def _by_bucket(latency: NDArray[np.float64], bucket: NDArray[np.int64], quantile: float) -> list[float]:
    """The quantile of each bucket, in milliseconds."""
    edges = np.searchsorted(bucket, np.arange(int(bucket[-1]) + 2)).tolist()
    return [
        float(np.quantile(latency[start:stop], quantile) * 1e3) if stop > start else 0.0
        for start, stop in itertools.pairwise(edges)
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """The figures as tables."""
    table = Table(
        title=f"acknowledgement of {result['batch']} events, {result['events_per_second']:,} events/s, "
        f"{result['users']:,} users, sync {result['sync_mode']}, ms"
    )
    table.add_column("")
    table.add_column("batches", justify="right")
    for name in QUANTILES:
        table.add_column(name, justify="right")
    for stretch in STRETCHES:
        found = result[stretch]
        table.add_row(stretch, f"{found['batches']:,}", *(f"{found[f'{name}_ms']:.1f}" for name in QUANTILES))
    console.print(table)
    snapshots = Table(title="snapshots")
    for title in ("", "seconds", "MB", "MB/s", *(f"p99 {name}, ms" for name in STRETCHES)):
        snapshots.add_column(title, justify="left" if not title else "right")
    for number, one in enumerate(result["snapshots"]):
        snapshots.add_row(
            f"round {number + 1}",
            f"{one['seconds']:.1f}",
            f"{one['bytes'] / 1e6:,.0f}",
            f"{one['bytes'] / 1e6 / one['seconds']:,.0f}",
            *(f"{one[f'{name}_p99_ms']:.1f}" for name in STRETCHES),
        )
    console.print(snapshots)
    used = ", ".join(f"{name} {share:.2f}" for name, share in result["cpu_share_by_process"].items())
    console.print(f"cores used: {used}")
    held = "held" if result["within_bound"] else "MISSED"
    console.print(
        f"p99 while a snapshot is written, or after it: {result['p99_difference_ms']:+.1f} ms in the median round, "
        f"{result['worst_p99_difference_ms']:+.1f} ms in the worst; "
        f"bound, at most {result['bound_ms']:g} ms: {held}"
    )


def draw(result: dict[str, Any]) -> str:
    """The time of acknowledgements over the run, with the snapshots marked."""
    spans = [Span(one["start_s"], one["start_s"] + one["seconds"]) for one in result["snapshots"]]
    timeline = result["timeline"]
    return curves(
        f"Acknowledgements at {result['events_per_second']:,} events/s, {result['users']:,} users",
        timeline["seconds"],
        {"p99": timeline["p99_ms"], "p50": timeline["p50_ms"]},
        unit="ms",
        spans=spans,
        spans_are="a snapshot is written",
    )
