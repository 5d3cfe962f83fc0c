"""What callers notice while shards become more, and fewer.

A service of many users gets batches at a fixed rate, and is asked for profiles at another. Meanwhile it is told to have
other numbers of shards, one after the other. Acknowledgements and reads count from when they were due, whatever held
them up, and are told apart by when that was:

    ──── quiet ────┬──── 2 → 4 shards ────┬──── 4 → 3 shards ────┬─ stop

Any error that a caller sees ends the benchmark. The totals are compared with what was sent.
"""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.chart import Span, curves
from benchmarks.generator import Generator
from benchmarks.load import SCHEMAS, build_load
from benchmarks.processes import BenchmarkError, Disk, cpu_seconds, data_directory, describe_machine, serve, started
from benchmarks.producing import STREAM, SteadyProducer, check_totals
from benchmarks.reading import GET, Question, at_rate, get_request, over_grpc
from benchmarks.report import cost
from userprofile.v1 import admin_service_pb2, admin_service_pb2_grpc

BOUND_MS = 100.0
"""The longest that a write or a read may wait while shards become more or fewer."""

QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
WRITE, READ = "write", "read"

_BYTES_PER_EVENT = 400
_BYTES_PER_USER = 4_000
_WINDOW = 8
_EVENTS = 400_000
"""Of the load that is sent again and again, each time with new ids."""
_SETTLE_S = 2.0
_MOST_S = 1_800.0
_BUCKET_S = 0.25
_DRAWN = 20_000
"""Users who are read, one after the other."""


@dataclass(frozen=True)
class Options:
    """What is measured."""

    schema: str
    """A key of `SCHEMAS`."""
    users: int
    rate: int
    """Events a second."""
    batch: int
    """Events a batch."""
    producers: int
    reads: float
    """A second."""
    shards: tuple[int, ...]
    """How many there are at first, and then, one after the other."""
    quiet_s: float
    data_dir: Path | None
    seed: int | None


@dataclass(frozen=True)
class _Change:
    """From one number of shards to another; seconds of `time.monotonic`."""

    before: int
    after: int
    began: float
    ended: float
    moved: admin_service_pb2.MovedState


@dataclass(frozen=True)
class _Seen:
    """When each was due (`time.monotonic`) and how long after that it was answered, in seconds."""

    due: NDArray[np.float64]
    latency: NDArray[np.float64]

    def between(self, start: float, stop: float) -> dict[str, float]:
        """Milliseconds of those that were due then."""
        taken = self.latency[(self.due >= start) & (self.due < stop)] * 1e3
        return {f"{name}_ms": float(np.quantile(taken, q)) for name, q in QUANTILES.items()} if len(taken) else {}


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measures, and returns everything as one JSON object. `console` hears how far it is."""
    if len(options.shards) < 2:
        raise BenchmarkError("name at least two numbers of shards: --shards 2 --shards 4")
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0]) % 10**6
    room = options.users * _BYTES_PER_USER + int(120 * options.rate * _BYTES_PER_EVENT)
    with data_directory(options.data_dir, room) as directory, console.status("starting") as progress:
        flags = ["--shards", str(options.shards[0]), "--data-dir", str(directory)]
        with started(serve(SCHEMAS[options.schema], *flags)) as child:
            progress.update(f"an event of each of {options.users:,} users")
            with Generator() as generator:
                generator.build(options.schema, options.users, options.users, 4_000, seed, every_user=True)
                filled = generator.send(child.address, STREAM, options.producers, _WINDOW).events
            progress.update("serialising the load")
            events = max(min(_EVENTS, options.users) // options.batch, options.producers) * options.batch
            load = build_load(options.schema, events, options.users, options.batch, seed + 1)
            work = _Work(options, child.address, seed)
            cpu_before, began = cpu_seconds(child.process), time.monotonic()
            writes, reads = uvloop.run(work.run(load, progress.update))
            seconds = time.monotonic() - began
            spent = {name: used - cpu_before.get(name, 0.0) for name, used in cpu_seconds(child.process).items()}
            check_totals(child.address, filled + len(writes.due) * options.batch, options.users)
    result: dict[str, Any] = {
        "benchmark": "scale",
        "machine": describe_machine(),
        "disk": str(Disk.below(directory)),
        "schema": options.schema,
        "users": options.users,
        "events_per_second": options.rate,
        "batch": options.batch,
        "reads_per_second": options.reads,
        "seed": seed,
        "bound_ms": BOUND_MS,
        "cpu_share_by_process": {name: used / seconds for name, used in spent.items() if used / seconds > 0.002},
        "verified": True,
    }
    _summarise(result, work, writes, reads)
    return result


class _Work:
    """A service's callers, and what it is told meanwhile."""

    def __init__(self, options: Options, address: str, seed: int) -> None:
        self._options = options
        self._address = address
        self._seed = seed
        self.quiet = (0.0, 0.0)
        self.changes: list[_Change] = []

    async def run(self, load: Any, tell: Any) -> tuple[_Seen, _Seen]:
        """What callers saw of writes and of reads."""
        options = self._options
        # A collection of this process's garbage is no wait of the service's.
        gc.collect()
        gc.freeze()
        gc.disable()
        interval_s = options.batch * options.producers / options.rate
        most = int(_MOST_S / interval_s)
        streams = [
            SteadyProducer(self._address, load, interval_s, most, first=number * most)
            for number in range(options.producers)
        ]
        stop = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as tasks:
                begin = time.monotonic() + 0.5
                for number, stream in enumerate(streams):
                    tasks.create_task(stream.run(begin + number * interval_s / len(streams)))
                reading = tasks.create_task(self._read(stop))
                await self._change(tell)
                stop.set()
                for stream in streams:
                    stream.stop()
        finally:
            gc.enable()
            gc.unfreeze()
        due, latency = zip(*(stream.latencies() for stream in streams), strict=True)
        order = np.argsort(np.concatenate(due), kind="stable")
        return _Seen(np.concatenate(due)[order], np.concatenate(latency)[order]), _Seen(*reading.result())

    async def _read(self, stop: asyncio.Event) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        drawn = np.random.default_rng(self._seed).integers(0, self._options.users, _DRAWN).tolist()
        async with over_grpc(GET, [Question(self._address, get_request(user)) for user in drawn]) as ask:
            return await at_rate(ask, self._options.reads, _MOST_S, stop)

    async def _change(self, tell: Any) -> None:
        tell("settling")
        await asyncio.sleep(_SETTLE_S)
        tell(f"{self._options.quiet_s:g} s without a change")
        began = time.monotonic()
        await asyncio.sleep(self._options.quiet_s)
        self.quiet = (began, time.monotonic())
        async with grpc.aio.insecure_channel(self._address) as channel:
            admin: Any = admin_service_pb2_grpc.AdminServiceStub(channel)
            before = self._options.shards[0]
            for after in self._options.shards[1:]:
                tell(f"from {before} to {after} shards")
                began = time.monotonic()
                request = admin_service_pb2.ScaleShardsRequest(shard_count=after)
                answer = await admin.ScaleShards(request, timeout=_MOST_S)
                self.changes.append(_Change(before, after, began, time.monotonic(), answer.moved))
                before = after


def _summarise(result: dict[str, Any], work: _Work, writes: _Seen, reads: _Seen) -> None:
    origin = float(min(writes.due[0], reads.due[0]))
    result["quiet"] = {WRITE: writes.between(*work.quiet), READ: reads.between(*work.quiet)}
    result["changes"] = [
        {
            "from": change.before,
            "to": change.after,
            "start_s": change.began - origin,
            "seconds": change.ended - change.began,
            "partitions": change.moved.partition_count,
            "rows": change.moved.row_count,
            "bytes": change.moved.byte_count,
            WRITE: writes.between(change.began, change.ended),
            READ: reads.between(change.began, change.ended),
        }
        for change in work.changes
    ]
    worst = {name: max(change[name].get("max_ms", 0.0) for change in result["changes"]) for name in (WRITE, READ)}
    result["worst_ms"] = worst
    result["within_bound"] = max(worst.values()) <= BOUND_MS
    result["timeline"] = {
        "seconds": [number * _BUCKET_S for number in range(int((writes.due[-1] - origin) / _BUCKET_S) + 1)],
    }
    for name, seen in ((WRITE, writes), (READ, reads)):
        bucket = ((seen.due - origin) / _BUCKET_S).astype(np.int64)
        slowest: NDArray[np.float64] = np.zeros(len(result["timeline"]["seconds"]))
        kept = bucket < len(slowest)
        np.maximum.at(slowest, bucket[kept], seen.latency[kept] * 1e3)
        result["timeline"][f"{name}_max_ms"] = slowest.tolist()
    path = " → ".join(map(str, (work.changes[0].before, *(change.after for change in work.changes))))
    result["costs"] = [
        cost(
            f"{path} shards, {result['users']:,} users, {result['events_per_second']:,} events/s, "
            f"{result['reads_per_second']:g} reads/s: the longest wait of a {name}",
            bound=f"{BOUND_MS:g} ms",
            figure=f"{worst[name]:.0f} ms",
            floor=f"without a change {result['quiet'][name]['max_ms']:.0f} ms",
            ratio=worst[name] / result["quiet"][name]["max_ms"],
            held=worst[name] <= BOUND_MS,
        )
        for name in (WRITE, READ)
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    table = Table(
        title=f"{result['users']:,} users, {result['events_per_second']:,} events/s in batches of {result['batch']}, "
        f"{result['reads_per_second']:g} reads/s: waits, ms"
    )
    for number, title in enumerate(("shards", "seconds", "rows", "MB", "", *QUANTILES)):
        table.add_column(title, justify="left" if number in (0, 4) else "right")
    for change in [None, *result["changes"]]:
        found = result["quiet"] if change is None else change
        title = "none" if change is None else f"{change['from']} → {change['to']}"
        sizes = ("", "", "")
        if change is not None:
            sizes = (f"{change['seconds']:.1f}", f"{change['rows']:,}", f"{change['bytes'] / 1e6:,.0f}")
        for name in (WRITE, READ):
            figures = (f"{found[name][f'{each}_ms']:.1f}" if found[name] else "–" for each in QUANTILES)
            table.add_row(title, *sizes, name, *figures)
            title, sizes = "", ("", "", "")
    console.print(table)
    used = ", ".join(f"{name} {share:.2f}" for name, share in result["cpu_share_by_process"].items())
    console.print(f"cores used: {used}")
    held = "held" if result["within_bound"] else "MISSED"
    waits = " and ".join(f"a {name} {wait:.0f} ms" for name, wait in result["worst_ms"].items())
    console.print(f"no caller saw an error; totals exact; at most {waits}; bound {result['bound_ms']:g} ms: {held}")


def draw(result: dict[str, Any]) -> str:
    """The longest waits over the run, with the changes marked."""
    timeline = result["timeline"]
    return curves(
        f"The longest waits while shards become more and fewer, {result['users']:,} users",
        timeline["seconds"],
        {name: timeline[f"{name}_max_ms"] for name in (WRITE, READ)},
        unit="ms",
        spans=[Span(change["start_s"], change["start_s"] + change["seconds"]) for change in result["changes"]],
        spans_are="users move",
    )
