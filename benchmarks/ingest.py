"""How many events a second go in, what each costs, and what durability costs.

The load is serialised beforehand.
Producers send it through StreamEvents with a window of unacknowledged batches and wait for the last acknowledgement;
the totals are compared with GetStatus afterwards. A service for each sync mode and, as a floor, a bare grpc.aio echo of
the same bytes run side by side and are measured in turns, round by round: what slows the machine down meanwhile slows
all of them.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import echo
from benchmarks.chart import Bar, bars
from benchmarks.load import SCHEMAS, Load, build_load
from benchmarks.processes import Disk, cpu_seconds, data_directory, describe_machine, serve, started
from benchmarks.producing import STREAM, check_totals, send

BYTES_PER_EVENT = 400
"""Room that an event takes on disk at most: its record, and its share of segments made ahead."""

_FLOOR = "bare echo"
_FIGURES = ("events_per_second", "server_cpu_us_per_event", "load_generator_cpu_us_per_event")


@dataclass(frozen=True)
class Options:
    """What is measured."""

    schema: str
    """A key of `SCHEMAS`."""
    events: int
    """A round."""
    users: int
    batch: int
    """Events a batch."""
    producers: int
    """Streams at once."""
    window: int
    """Unacknowledged batches a stream."""
    rounds: int
    sync: tuple[str, ...]
    """Sync modes to compare; the figures at the top of the result are the first one's."""
    shards: int | None
    data_dir: Path | None
    seed: int | None


@dataclass(frozen=True)
class _Target:
    """Something that takes the load."""

    root: psutil.Process
    address: str
    method: str


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measures, and returns everything as one JSON object. `console` hears how far it is."""
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0]) % 10**6
    with console.status(f"serialising {options.events:,} events of {options.users:,} users"):
        load = build_load(options.schema, options.events, options.users, options.batch, seed)
        warm = build_load(options.schema, min(options.events, 100_000), options.users, options.batch, seed + 1)
    total = warm.events + load.events * options.rounds
    result: dict[str, Any] = {
        "benchmark": "ingest",
        "machine": describe_machine(),
        "schema": options.schema,
        "events": load.events,
        "users": options.users,
        "bytes_per_event": sum(map(len, load.batches)) / load.events,
        "batch": options.batch,
        "producers": options.producers,
        "seed": seed,
        "kernels_us_per_event": load.measure_kernels(),
    }
    with ExitStack() as stack:
        room = total * len(options.sync) * BYTES_PER_EVENT
        directory = stack.enter_context(data_directory(options.data_dir, room))
        result["disk"] = str(Disk.below(directory))
        with console.status("starting") as progress:
            child = stack.enter_context(started(["benchmarks.echo"]))
            targets = {_FLOOR: _Target(child.process, child.address, echo.METHOD)}
            for mode in options.sync:
                progress.update(f"starting the service with --sync {mode}")
                flags = ["--sync", mode, "--data-dir", str(directory / mode)]
                flags += ["--shards", str(options.shards)] if options.shards else []
                child = stack.enter_context(started(serve(SCHEMAS[options.schema], *flags)))
                targets[mode] = _Target(child.process, child.address, STREAM)
        rounds = _take_turns(targets, warm, seed, options, console)
        counted = {mode: check_totals(targets[mode].address, total).event_count for mode in options.sync}
    _summarise(result, rounds, options.sync)
    result["counted_events"] = counted
    result["verified"] = True
    return result


def _take_turns(
    targets: dict[str, _Target], warm: Load, seed: int, options: Options, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """Rounds by target; in every round each of them has a turn."""
    for target in targets.values():
        uvloop.run(send(target.address, target.method, warm, options.producers, options.window))
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in targets}
    for number in range(options.rounds):
        rates = []
        # Events of their own for each round: what was counted once is not counted again.
        with console.status(f"round {number + 1} of {options.rounds}: serialising"):
            load = build_load(options.schema, options.events, options.users, options.batch, seed + 2 + number)
        for name, target in targets.items():
            with console.status(f"round {number + 1} of {options.rounds}: {_title(name)}"):
                rounds[name].append(_measure(target, load, options))
            rates.append(f"{_title(name)} {rounds[name][-1]['events_per_second']:,.0f}")
        console.print(f"round {number + 1} of {options.rounds}, events/s: {', '.join(rates)}", highlight=False)
    return rounds


def _measure(target: _Target, load: Load, options: Options) -> dict[str, Any]:
    """One round: rate, and CPU time an event of each process."""
    cpu_before, own_before = cpu_seconds(target.root), time.process_time()
    seconds = uvloop.run(send(target.address, target.method, load, options.producers, options.window))
    own = time.process_time() - own_before
    spent = {name: after - cpu_before.get(name, 0.0) for name, after in cpu_seconds(target.root).items()}
    return {
        "events_per_second": load.events / seconds,
        "server_cpu_us_per_event": sum(spent.values()) / load.events * 1e6,
        "load_generator_cpu_us_per_event": own / load.events * 1e6,
        "cpu_us_per_event_by_process": {
            name: used / load.events * 1e6 for name, used in spent.items() if used / load.events > 1e-9
        },
    }


def _summarise(result: dict[str, Any], rounds: dict[str, list[dict[str, Any]]], modes: tuple[str, ...]) -> None:
    """Adds the medians over the rounds, and the ratios of what was measured in the same round."""
    floor = rounds[_FLOOR]
    result["floor_events_per_second"] = _median(floor, "events_per_second")
    result["floor_server_cpu_us_per_event"] = _median(floor, "server_cpu_us_per_event")
    result["sync"] = {}
    for mode in modes:
        middle = sorted(rounds[mode], key=lambda one: float(one["events_per_second"]))[len(rounds[mode]) // 2]
        result["sync"][mode] = {
            **{key: _median(rounds[mode], key) for key in _FIGURES},
            "rate_ratio_to_floor": _ratio(rounds[mode], floor, "events_per_second"),
            "cpu_us_per_event_by_process": middle["cpu_us_per_event_by_process"],
            "rounds": rounds[mode],
        }
    result.update({key: value for key, value in result["sync"][modes[0]].items() if key != "rounds"})
    if {"always", "never"} <= set(modes):
        always, never = rounds["always"], rounds["never"]
        result["durability"] = {
            "rate_ratio": _ratio(always, never, "events_per_second"),
            "server_cpu_ratio": _ratio(always, never, "server_cpu_us_per_event"),
        }


def _median(rounds: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(one[key] for one in rounds))


def _ratio(rounds: list[dict[str, Any]], to: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(one[key] / other[key] for one, other in zip(rounds, to, strict=True)))


def _title(name: str) -> str:
    return name if name == _FLOOR else f"sync {name}"


def show(result: dict[str, Any], console: Console) -> None:
    """The figures as tables."""
    table = Table(
        title=f"{result['events']:,} events of {result['bytes_per_event']:.0f} bytes, {result['users']:,} users"
    )
    for column in ("", "events/s", "to the floor", "server CPU, µs an event"):
        table.add_column(column, justify="left" if not column else "right")
    for mode, found in result["sync"].items():
        table.add_row(
            f"service, sync {mode}",
            f"{found['events_per_second']:,.0f}",
            f"{found['rate_ratio_to_floor']:.2f}",
            f"{found['server_cpu_us_per_event']:.2f}",
        )
    table.add_row(
        "floor: bare echo",
        f"{result['floor_events_per_second']:,.0f}",
        "1.00",
        f"{result['floor_server_cpu_us_per_event']:.2f}",
    )
    console.print(table)
    if "durability" in result:
        cost = result["durability"]
        console.print(
            f"durability: {cost['rate_ratio']:.2f} of the rate without it, {cost['server_cpu_ratio']:.2f} of the CPU"
        )
    first = next(iter(result["sync"]))
    parts = Table(title=f"CPU time, µs an event, sync {first}")
    parts.add_column("where")
    parts.add_column("µs", justify="right")
    for name, used in sorted(result["cpu_us_per_event_by_process"].items(), key=lambda item: -item[1]):
        parts.add_row(name, f"{used:.3f}")
    parts.add_row("load generator", f"{result['load_generator_cpu_us_per_event']:.3f}")
    for name, used in result["kernels_us_per_event"].items():
        parts.add_row(f"kernels alone, one core: {name}", f"{used:.3f}")
    console.print(parts)


def draw(result: dict[str, Any]) -> str:
    """The rates as a drawing: a bar for the median, a dot for every round."""
    rows = [
        Bar(f"sync {mode}", found["events_per_second"], [one["events_per_second"] for one in found["rounds"]])
        for mode, found in result["sync"].items()
    ]
    rows.append(Bar(_FLOOR, result["floor_events_per_second"], []))
    title = f"Events a second through StreamEvents, {result['machine']['processor']}"
    return bars(title, rows, unit="million events/s", scale=1e-6)
