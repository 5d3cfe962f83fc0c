"""Whether an event, a read, or a user costs more when there are more users.

    a bare table    in a process of its own grows from size to size: decode and apply, a read, bytes a user
    a service       in the same steps: the CPU time of all its processes, an event and a read, and bytes a user

At every size all users are there before anything is timed. Then a load whose users are drawn from all of them by Zipf's
law is counted in rounds. What caches explain is measured, too: the lines of the rows of the same users, in the order of
the events, are touched and nothing else is done with them.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.chart import below, steps
from benchmarks.crowd import FIRST_USER, Crowd
from benchmarks.generator import Generator
from benchmarks.kernels import BareTable, resident_bytes
from benchmarks.load import SCHEMAS, build_load
from benchmarks.memory import check_memory
from benchmarks.processes import (
    BenchmarkError,
    Child,
    Disk,
    cpu_seconds,
    data_directory,
    describe_machine,
    serve,
    started,
)
from benchmarks.producing import STREAM, check_totals
from benchmarks.reading import GET, Question, as_fast_as_answered, get_request, over_grpc
from benchmarks.report import cost
from benchmarks.views import draw_views
from profile_service.domain.layout import Layout
from profile_service.domain.schema import load_schema
from profile_service.sample.shoppers import shopper_id

BOUNDS_US = {100_000: 0.25, 10_000_000: 0.5}
"""Of decode and apply inside a shard, by users."""
SLACK = 0.1
"""By how much of its cost at the smallest size an event may cost more at the largest than caches explain."""

_READ_USERS = 2_000
_TOUCHED = 200_000
_AT_ONCE = 64
_PRODUCERS, _WINDOW = 2, 8
_BYTES_PER_EVENT = 400
"""On disk."""


@dataclass(frozen=True)
class Options:
    """What is measured."""

    schema: str
    """A key of `SCHEMAS`."""
    users: tuple[int, ...]
    """The sizes."""
    events: int
    """A round."""
    batch: int
    rounds: int
    turn_s: float
    """Of reads."""
    shards: int | None
    data_dir: Path | None
    seed: int | None


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measures, and returns everything as one JSON object. `console` hears how far it is."""
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0]) % 10**6
    sizes = sorted(set(options.users))
    check_memory(sizes[-1], Layout.compile(load_schema(SCHEMAS[options.schema])).row_bytes)
    events = options.events // options.batch * options.batch or options.batch
    with ExitStack() as stack:
        total = sizes[-1] + len(sizes) * (options.rounds + 1) * events
        directory = stack.enter_context(data_directory(options.data_dir, total * _BYTES_PER_EVENT + (1 << 30)))
        found: list[dict[str, Any]] = [{"users": users} for users in sizes]
        with _process() as table:
            before = 0
            table.submit(_start, options.schema, options.batch, seed).result()
            for one in found:
                users = one["users"]
                with console.status(f"a bare table of {users:,} users"):
                    one["table"] = table.submit(_measure, before, users, events, options.batch, options.rounds).result()
                before = users
        for one in found:
            console.print(_said(one["users"], one["table"]), highlight=False)
        _measure_service(options, found, events, directory, seed, console)
        result: dict[str, Any] = {
            "benchmark": "growth",
            "machine": describe_machine(),
            "disk": str(Disk.below(directory)),
            "schema": options.schema,
            "events": events,
            "batch": options.batch,
            "rounds": options.rounds,
            "seed": seed,
            "sizes": found,
        }
    result["costs"] = _costs(result)
    result["verified"] = True
    return result


# --- a bare table ---


@contextmanager
def _process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


_table: BareTable
_crowd: Crowd
_schema: str
_seed: int


def _start(schema: str, batch: int, seed: int) -> None:
    global _table, _crowd, _schema, _seed  # noqa: PLW0603  the process is for this
    _schema, _seed = schema, seed
    _crowd = Crowd(schema, batch, seed)
    # The code is loaded, and whatever keeps space has it, before anything is measured.
    BareTable(schema).count_all(_crowd.batches(0, batch))
    _table = BareTable(schema)


def _measure(before: int, users: int, events: int, batch: int, rounds: int) -> dict[str, Any]:
    """Lets the table grow from `before` to `users` users, and counts rounds of a load by all of them."""
    gc.collect()
    resident = resident_bytes()
    _table.count_all(_crowd.batches(before, users))
    growth = resident_bytes() - resident
    if len(_table) != users:
        raise BenchmarkError(f"events of {users:,} users were counted, the table holds {len(_table):,}")
    load = build_load(_schema, events, users, batch, _seed + 1, first_user=FIRST_USER)
    counted = [_table.count_all(load.batches) for _ in range(rounds + 1)][1:]
    drawn = _drawn(users, _TOUCHED)
    ids = [shopper_id(user) for user in drawn]
    touched = [_table.touch(ids) for _ in range(rounds + 1)][1:]
    read = [_table.read(ids[:_READ_USERS]) for _ in range(rounds + 1)][1:]
    return {
        "decode_us_per_event": statistics.median(one["decode"] for one in counted),
        "apply_us_per_event": statistics.median(one["apply"] for one in counted),
        "cpu_us_per_event": statistics.median(sum(one.values()) for one in counted),
        "touch_us_per_event": statistics.median(touched),
        "read_cpu_us": statistics.median(read),
        "resident_growth_bytes": growth,
        "bytes_per_user": growth / (users - before),
        "state_bytes_per_user": _table.state_bytes / users,
        "rounds": counted,
    }


def _drawn(users: int, count: int) -> list[int]:
    """Numbers of a crowd's users, as a load draws them."""
    drawn: list[int] = draw_views(count, users, 1, 0, first_user=FIRST_USER).user.tolist()
    return drawn


# --- a service ---


def _measure_service(
    options: Options, found: list[dict[str, Any]], events: int, directory: Path, seed: int, console: Console
) -> None:
    """Adds to every size what a service costs that has grown to it."""
    # A snapshot costs what `bench snapshot` says, and would come at some sizes and not at others.
    flags = ["--data-dir", str(directory / "data"), "--snapshot-interval-s", "36000"]
    flags += ["--snapshot-log-bytes", str(1 << 40)]
    flags += ["--shards", str(options.shards)] if options.shards else []
    with ExitStack() as stack:
        generator = stack.enter_context(Generator())
        progress = stack.enter_context(console.status("starting the service"))
        child = stack.enter_context(started(serve(SCHEMAS[options.schema], *flags)))
        before = total = 0
        for number, one in enumerate(found):
            users = one["users"]
            progress.update(f"a service of {users:,} users")
            resident = sum(shard.resident_bytes for shard in check_totals(child.address, total, before).shards)
            generator.fill(child.address, options.schema, before, users, options.batch, seed)
            total += users - before
            status = check_totals(child.address, total, users)
            growth = sum(shard.resident_bytes for shard in status.shards) - resident
            generator.build(options.schema, events, users, options.batch, seed + 1 + number, first_user=FIRST_USER)
            counted = []
            for turn in range(options.rounds + 1):
                generator.renew(turn)
                spent = _spent(child)
                sent = generator.send(child.address, STREAM, _PRODUCERS, _WINDOW)
                counted.append((sent.events / sent.seconds, (_spent(child) - spent) / sent.events * 1e6))
                total += sent.events
            check_totals(child.address, total, users)
            one["service"] = {
                "events_per_second": statistics.median(rate for rate, _ in counted[1:]),
                "server_cpu_us_per_event": statistics.median(cpu for _, cpu in counted[1:]),
                "resident_growth_bytes": growth,
                "resident_bytes_per_user": growth / (users - before),
                "status_bytes_per_user": status.bytes_per_user,
                "rounds": [{"events_per_second": rate, "server_cpu_us_per_event": cpu} for rate, cpu in counted[1:]],
                **uvloop.run(_read(child, users, options)),
            }
            before = users
            console.print(_said(users, one["service"]), highlight=False)


def _spent(child: Child) -> float:
    return sum(cpu_seconds(child.process).values())


async def _read(child: Child, users: int, options: Options) -> dict[str, float]:
    """What a read through a frontend costs, 64 at once."""
    questions = [Question(child.address, get_request(user)) for user in _drawn(users, _READ_USERS)]
    async with over_grpc(GET, questions) as ask:
        await as_fast_as_answered(ask, _AT_ONCE, options.turn_s / 4)
        found = []
        for _ in range(options.rounds):
            spent = _spent(child)
            answered, seconds = await as_fast_as_answered(ask, _AT_ONCE, options.turn_s)
            found.append((answered / seconds, (_spent(child) - spent) / answered * 1e6))
    return {
        "reads_per_second": statistics.median(rate for rate, _ in found),
        "server_cpu_us_per_read": statistics.median(cpu for _, cpu in found),
    }


# --- what is said of it ---


def _costs(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of docs/performance.md."""
    sizes = result["sizes"]
    least, most = sizes[0], sizes[-1]
    rows = []
    for one in sizes:
        if one["users"] in BOUNDS_US:
            bound, figure = BOUNDS_US[one["users"]], one["table"]["cpu_us_per_event"]
            base = least["table"]["cpu_us_per_event"]
            rows.append(
                cost(
                    f"decode and apply inside a shard, {one['users']:,} users, all of them there",
                    bound=f"{bound:g} µs an event",
                    figure=f"{figure:.2f} µs",
                    floor=f"with {least['users']:,} users {base:.2f} µs",
                    ratio=figure / base,
                    held=figure <= bound,
                )
            )
    cpu = [one["service"]["server_cpu_us_per_event"] for one in (least, most)]
    caches = most["table"]["touch_us_per_event"] - least["table"]["touch_us_per_event"]
    rows.append(
        cost(
            f"growth: CPU of all server processes, an event, from {least['users']:,} to {most['users']:,} users",
            bound="flat, but for caches",
            figure=f"{cpu[0]:.2f} to {cpu[1]:.2f} µs",
            floor=f"touching the rows alone {caches:.2f} µs more",
            ratio=cpu[1] / cpu[0],
            held=cpu[1] - cpu[0] <= max(caches, 0.0) + SLACK * cpu[0],
        )
    )
    reads = [one["service"]["server_cpu_us_per_read"] for one in (least, most)]
    rows.append(
        cost(
            f"growth: CPU of all server processes, a read, from {least['users']:,} to {most['users']:,} users",
            bound="flat, but for caches",
            figure=f"{reads[0]:.0f} to {reads[1]:.0f} µs",
            floor=f"in a bare table {most['table']['read_cpu_us'] - least['table']['read_cpu_us']:.1f} µs more",
            ratio=reads[1] / reads[0],
            held=reads[1] - reads[0]
            <= max(most["table"]["read_cpu_us"] - least["table"]["read_cpu_us"], 0.0) + SLACK * reads[0],
        )
    )
    return rows


def _said(users: int, found: dict[str, Any]) -> str:
    """One line about a size."""
    cpu = found.get("cpu_us_per_event", found.get("server_cpu_us_per_event"))
    size = found.get("bytes_per_user", found.get("resident_bytes_per_user"))
    return f"{users:,} users: {cpu:.3f} µs an event, {size:,.0f} bytes a user"


def show(result: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    table = Table(title=f"{result['events']:,} events a round, {result['schema']}; µs are CPU time")
    for column in ("users", "decode", "apply", "rows touched", "read", "bytes a user"):
        table.add_column(column, justify="right")
    for one in result["sizes"]:
        found = one["table"]
        table.add_row(
            f"{one['users']:,}",
            *(f"{found[f'{name}_us_per_event']:.3f} µs" for name in ("decode", "apply", "touch")),
            f"{found['read_cpu_us']:.1f} µs",
            f"{found['bytes_per_user']:,.0f}",
        )
    console.print(table)
    service = Table(title="all processes of a service")
    for column in ("users", "events/s", "an event", "reads/s", "a read", "bytes a user"):
        service.add_column(column, justify="right")
    for one in result["sizes"]:
        found = one["service"]
        service.add_row(
            f"{one['users']:,}",
            f"{found['events_per_second']:,.0f}",
            f"{found['server_cpu_us_per_event']:.2f} µs",
            f"{found['reads_per_second']:,.0f}",
            f"{found['server_cpu_us_per_read']:.0f} µs",
            f"{found['status_bytes_per_user']:,.0f}",
        )
    console.print(service)


def draw(result: dict[str, Any]) -> str:
    """Events, reads and bytes over the sizes."""
    sizes = result["sizes"]
    at = [f"{one['users']:,} users" for one in sizes]

    def of(part: str, key: str) -> list[float]:
        return [one[part][key] for one in sizes]

    events = {
        "all processes": of("service", "server_cpu_us_per_event"),
        "decode and apply alone": of("table", "cpu_us_per_event"),
        "rows touched alone": of("table", "touch_us_per_event"),
    }
    reads = {"all processes": of("service", "server_cpu_us_per_read"), "in a bare table": of("table", "read_cpu_us")}
    sizes_of = {
        "GetStatus": of("service", "status_bytes_per_user"),
        "a bare table": of("table", "state_bytes_per_user"),
    }
    drawing = steps("What an event costs, by the number of users", at, events, unit="µs of CPU")
    drawing = below(drawing, steps("What a read costs, 64 at once", at, reads, unit="µs of CPU"))
    return below(drawing, steps("What a user takes", at, sizes_of, unit="bytes"))
