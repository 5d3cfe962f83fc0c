"""Whether anything grows or slows down in half an hour of work.

Every user has had an event before; then the highest rate is measured, and a share of it is kept up, with snapshots and
with reads beside it. What must not happen:

    memory    grows, though there are no new users: the slope of each process's resident memory over the second half
    latency   drifts: the p99 of acknowledgements and of reads, minute by minute, the last ones against the first ones
    totals    are not exactly what was acknowledged

Event ids are new all the time. A shard remembers so many of them and no more (`event_ids_per_shard`); it holds them all
before the second half begins, or else their number is the growth.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.chart import below, curves
from benchmarks.generator import Generator, Latencies
from benchmarks.load import SCHEMAS
from benchmarks.processes import (
    BenchmarkError,
    Disk,
    ResidentMemory,
    cpu_seconds,
    data_directory,
    describe_machine,
    is_ours,
    role_names,
    serve,
    started,
)
from benchmarks.producing import STREAM, check_totals, status
from benchmarks.report import cost
from profile_service.config import MIB

_EVENTS = 1_000_000
"""Of the load that is sent again and again, each time with new ids."""
_ROUNDS = 3
"""Of the search for the highest rate."""
_WINDOW = 8
_LOOK_S = 1.0
_MOST_WAIT_S = 600.0
_KEPT_BYTES_PER_EVENT = 400
_BYTES_PER_USER = 4_000


@dataclass(frozen=True)
class Options:
    """What is measured."""

    schema: str
    """A key of `SCHEMAS`."""
    minutes: float
    users: int
    share: float
    """Of the highest rate."""
    reads: float
    """A second."""
    batch: int
    """Events a batch."""
    producers: int
    snapshot_interval_s: float
    shards: int | None
    data_dir: Path | None
    seed: int | None


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measures, and returns everything as one JSON object. `console` hears how far it is."""
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0]) % 10**6
    seconds = options.minutes * 60
    with ExitStack() as stack:
        # The log of three intervals, if snapshots come late; and two snapshots.
        kept_s = min(3 * options.snapshot_interval_s, seconds)
        room = int(kept_s * 1e6 * _KEPT_BYTES_PER_EVENT) + options.users * _BYTES_PER_USER
        directory = stack.enter_context(data_directory(options.data_dir, room))
        producers, readers = (stack.enter_context(Generator()) for _ in range(2))
        flags = ["--data-dir", str(directory), "--snapshot-interval-s", str(options.snapshot_interval_s)]
        flags += ["--shards", str(options.shards)] if options.shards else []
        with console.status("starting") as progress:
            child = stack.enter_context(started(serve(SCHEMAS[options.schema], *flags)))
            progress.update(f"an event of each of {options.users:,} users")
            producers.build(options.schema, options.users, options.users, options.batch, seed, every_user=True)
            producers.send(child.address, STREAM, options.producers, _WINDOW)
            progress.update("serialising the load")
            events = max(min(_EVENTS, 10 * options.users) // options.batch, 1) * options.batch
            producers.build(options.schema, events, options.users, options.batch, seed + 1)
            rates = []
            for number in range(_ROUNDS):
                progress.update(f"the highest rate, {number + 1} of {_ROUNDS}")
                producers.renew(number)
                sent = producers.send(child.address, STREAM, options.producers, _WINDOW)
                rates.append(sent.events / sent.seconds)
        before = options.users + events * _ROUNDS
        check_totals(child.address, before, options.users)
        highest = float(np.median(rates))
        rate = options.share * highest
        cpu_before = cpu_seconds(child.process)
        with ResidentMemory(child.process, min(_LOOK_S, seconds / 30)) as memory:
            began = time.monotonic()
            acks = producers.send_steadily(child.address, rate, seconds, options.producers, _ROUNDS)
            reads = readers.read_steadily(child.address, options.users, options.reads, seconds, seed)
            snapshots = _watch(acks, reads, child.address, seconds, rate, console)
            ingested, read = acks.result(), reads.result()
        spent = {name: used - cpu_before.get(name, 0.0) for name, used in cpu_seconds(child.process).items()}
        # Exactly: every event of every batch, and not a user more.
        check_totals(child.address, before + ingested.events, options.users)
    result: dict[str, Any] = {
        "benchmark": "soak",
        "machine": describe_machine(),
        "disk": str(Disk.below(directory)),
        "schema": options.schema,
        "minutes": options.minutes,
        "users": options.users,
        "batch": options.batch,
        "producers": options.producers,
        "seed": seed,
        "highest_events_per_second": highest,
        "events_per_second": rate,
        "reads_per_second": options.reads,
        "snapshot_interval_s": options.snapshot_interval_s,
        "snapshots": snapshots,
        "events": ingested.events,
        "server_cpu_us_per_event_with_reads": sum(spent.values()) / ingested.events * 1e6,
        "acknowledgement": _by_minute(ingested, began, seconds),
        "read": _by_minute(read, began, seconds),
        "memory": _grown(*memory.series(), began, seconds),
        "verified": True,
    }
    result["costs"] = _costs(result)
    return result


def _watch(
    acks: Future[Latencies], reads: Future[Latencies], address: str, seconds: float, rate: float, console: Console
) -> int:
    """Shows how far it is until both are done; returns how many snapshots were published meanwhile."""
    began, published = time.monotonic(), set()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"{rate:,.0f} events/s", total=seconds)
        while not (acks.done() and reads.done()):
            elapsed = time.monotonic() - began
            if elapsed > seconds + _MOST_WAIT_S:
                raise BenchmarkError(f"what was due within {seconds:g} s is not done {_MOST_WAIT_S:g} s later")
            for future in (acks, reads):
                if future.done():
                    _ = future.result()
            found = uvloop.run(status(address))
            published |= {
                (shard.shard_id, shard.snapshot_position) for shard in found.shards if shard.snapshot_position
            }
            bar.update(task, completed=min(elapsed, seconds))
            time.sleep(min(1.0, seconds / 30))
    return len(published)


def _by_minute(seen: Latencies, began: float, seconds: float) -> dict[str, Any]:
    """Quantiles of the whole, and the p99 of each minute, or of each tenth of a run of less than ten."""
    span = min(60.0, seconds / 10)
    number = ((seen.due_s - began) / span).astype(np.int64).clip(0)
    count = int(number.max()) + 1
    p99 = [
        float(np.quantile(seen.latency_s[number == one], 0.99) * 1e3) for one in range(count) if (number == one).any()
    ]
    third = max(len(p99) // 3, 1)
    return {
        "requests": len(seen.latency_s),
        **{f"{name}_ms": value for name, value in seen.quantiles_ms().items()},
        "span_s": span,
        "p99_ms_by_span": p99,
        "p99_ms_first_third": float(np.median(p99[:third])),
        "p99_ms_last_third": float(np.median(p99[-third:])),
    }


def _grown(
    at: NDArray[np.float64], resident: dict[str, NDArray[np.float64]], began: float, seconds: float
) -> dict[str, Any]:
    """Resident memory of each process of the service, and how fast it grew in the second half."""
    late = at >= began + seconds / 2
    answer: dict[str, Any] = {"seconds": (at - began).tolist(), "processes": {}}
    for name, values in resident.items():
        if is_ours(name):
            slope = float(np.polyfit(at[late], values[late], 1)[0]) if late.sum() > 1 else 0.0
            answer["processes"][name] = {
                "resident_bytes": values.tolist(),
                "first_bytes": float(values[0]),
                "half_bytes": float(values[late][0]),
                "last_bytes": float(values[-1]),
                "growth_bytes_per_hour": slope * 3600,
            }
    answer["growth_bytes_per_hour"] = sum(one["growth_bytes_per_hour"] for one in answer["processes"].values())
    return answer


def _costs(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of docs/performance.md."""
    rate, reads = result["events_per_second"], result["reads_per_second"]
    work = f"{result['minutes']:g} min at {rate:,.0f} events/s, {reads:g} reads/s"
    growth = result["memory"]["growth_bytes_per_hour"] / MIB
    rows = [
        cost(
            f"{work}: growth of resident memory in the second half",
            bound="none",
            figure=f"{growth:+,.1f} MiB an hour",
            floor="–",
            ratio=None,
            held=growth <= 0.01 * sum(one["half_bytes"] for one in result["memory"]["processes"].values()) / MIB,
        )
    ]
    for name, title in (("acknowledgement", "acknowledgements"), ("read", "reads")):
        found = result[name]
        first, last = found["p99_ms_first_third"], found["p99_ms_last_third"]
        rows.append(
            cost(
                f"{work}: p99 of {title}, last third of the time",
                bound="no drift",
                figure=f"{last:.1f} ms",
                floor=f"first third {first:.1f} ms",
                ratio=last / first,
                held=last <= 1.2 * first,
            )
        )
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    """The figures as tables."""
    console.print(
        f"{result['events']:,} events at {result['events_per_second']:,.0f}/s, of at most "
        f"{result['highest_events_per_second']:,.0f}/s; {result['snapshots']} snapshots; totals exact"
    )
    memory = Table(title="resident memory, MiB")
    for column in ("", "at first", "half-way", "at the end", "an hour, second half"):
        memory.add_column(column, justify="left" if not column else "right")
    for name, found in result["memory"]["processes"].items():
        sizes = (found["first_bytes"], found["half_bytes"], found["last_bytes"])
        memory.add_row(name, *(f"{size / MIB:,.1f}" for size in sizes), f"{found['growth_bytes_per_hour'] / MIB:+,.1f}")
    console.print(memory)
    table = Table(title="latency, ms")
    for column in ("", "p50", "p99", "p99.9", "max", "p99, first third", "p99, last third"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("acknowledgement", "read"):
        keys = ("p50_ms", "p99_ms", "p99.9_ms", "max_ms", "p99_ms_first_third", "p99_ms_last_third")
        table.add_row(name, *(f"{result[name][key]:.1f}" for key in keys))
    console.print(table)


def draw(result: dict[str, Any]) -> str:
    """Resident memory over time, and below it the p99 of each minute."""
    memory = result["memory"]
    upper = curves(
        f"Resident memory at {result['events_per_second']:,.0f} events/s, {result['users']:,} users",
        memory["seconds"],
        {
            shown: [value / MIB for value in memory["processes"][name]["resident_bytes"]]
            for name, shown in role_names(memory["processes"]).items()
            if not name.startswith(("serve ", "CoordinatorActor "))
        },
        unit="MiB",
    )
    both = {name: result[name]["p99_ms_by_span"] for name in ("acknowledgement", "read")}
    count = min(map(len, both.values()))
    lower = curves(
        "p99 by minute",
        [number * result["read"]["span_s"] for number in range(count)],
        {name: values[:count] for name, values in both.items()},
        unit="ms",
    )
    return below(upper, lower)
