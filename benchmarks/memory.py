"""How many bytes a user takes, all told: by how much the resident memory of a process grows.

    a bare table in a process of its own      row, index, id and texts; as many users as there is memory for
    a shard's process, in a running service   the same with all that a shard has beside it
    peers on the work of `preferences`        Python dicts, and rows in Redis: consumer and server together

The first users are counted before anything is measured, so that code is loaded and buffers have their size. Every user
has an id of 16 bytes.
"""

from __future__ import annotations

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.chart import Bar, bars
from benchmarks.crowd import Crowd
from benchmarks.generator import Generator
from benchmarks.kernels import BareTable, resident_bytes
from benchmarks.load import MARKETPLACE, PREFERENCES, SCHEMAS
from benchmarks.peers.consumer import PEERS, Consumer
from benchmarks.processes import BenchmarkError, Disk, data_directory, describe_machine, serve, started
from benchmarks.producing import check_totals
from benchmarks.report import cost

BOUND_BYTES = 1_200
"""A user of the marketplace schema."""
FLINK_MB = {100_000: 71, 1_000_000: 760}
"""Live heap of Flink 2.3 with heap state, by users, on the work of `preferences`: measured once on a machine of this
kind (2 cores, 24 GB), and quoted here, not measured beside the others."""

_ROOM_BYTES = 1 << 30
"""Left to everything else."""
_MOST_WARM = 50_000
_BYTES_PER_EVENT = 400
"""On disk."""


@dataclass(frozen=True)
class Options:
    """What is measured."""

    users: tuple[int, ...]
    """Of the marketplace schema, in a bare table each."""
    service_users: int
    """Of the marketplace schema, in a shard of a running service; 0 leaves it out."""
    peer_users: tuple[int, ...]
    """Of the schema `preferences`, in a bare table and in each peer."""
    history: int
    """Events of each user there."""
    peers: bool
    batch: int
    data_dir: Path | None
    seed: int | None


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measures, and returns everything as one JSON object. `console` hears how far it is."""
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0]) % 10**6
    with ExitStack() as stack:
        directory = stack.enter_context(
            data_directory(options.data_dir, options.service_users * _BYTES_PER_EVENT + (1 << 30))
        )
        result: dict[str, Any] = {
            "benchmark": "memory",
            "machine": describe_machine(),
            "disk": str(Disk.below(directory)),
            "seed": seed,
            "history": options.history,
            MARKETPLACE: [],
            PREFERENCES: [],
        }
        for users in options.users:
            with console.status(f"a bare table of {users:,} users of {MARKETPLACE}"):
                result[MARKETPLACE].append(_in_a_process(MARKETPLACE, users, 1, options.batch, seed))
        if options.service_users:
            result["service"] = _in_a_service(options, directory, seed, console)
        for users in options.peer_users:
            with console.status(f"a bare table of {users:,} users of {PREFERENCES}"):
                found = _in_a_process(PREFERENCES, users, options.history, options.batch, seed)
            found["peers"] = {}
            for name in PEERS if options.peers else ():
                with console.status(f"{users:,} users of {PREFERENCES}: {name}"), Consumer(name) as peer:
                    before, after, counted = peer.grow(users, _warm(users), options.history, options.batch, seed)
                    found["peers"][peer.name] = _growth(before, after, counted)
            if users in FLINK_MB:
                found["quoted_flink_live_heap_bytes_per_user"] = FLINK_MB[users] * 1e6 / users
            result[PREFERENCES].append(found)
    result["bytes_per_user"] = {str(one["users"]): one["bytes_per_user"] for one in result[MARKETPLACE]}
    result["costs"] = _costs(result)
    result["verified"] = True
    return result


def _warm(users: int) -> int:
    """How many users are counted before anything is measured."""
    return min(users // 5, _MOST_WARM)


def _growth(before: int, after: int, users: int) -> dict[str, Any]:
    return {
        "resident_growth_bytes": after - before,
        "grown_by_users": users,
        "bytes_per_user": (after - before) / users,
    }


def _in_a_process(schema: str, users: int, history: int, batch: int, seed: int) -> dict[str, Any]:
    """What `_fill` says, in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_fill, schema, users, history, batch, seed).result()


def _fill(schema: str, users: int, history: int, batch: int, seed: int) -> dict[str, Any]:
    """Gives every user so many events; the growth of this process meanwhile."""
    table = BareTable(schema)
    check_memory(users, table.row_bytes)
    crowds = [Crowd(schema, batch, seed + number) for number in range(history)]
    warm = _warm(users)
    for crowd in crowds:
        table.count_all(crowd.batches(0, warm))
    gc.collect()
    before = resident_bytes()
    for crowd in crowds:
        table.count_all(crowd.batches(warm, users))
    gc.collect()
    after = resident_bytes()
    if len(table) != users:
        raise BenchmarkError(f"events of {users:,} users were counted, the table holds {len(table):,}")
    return {
        "users": users,
        "row_bytes": table.row_bytes,
        "state_bytes_per_user": table.state_bytes / users,
        **_growth(before, after, users - warm),
    }


def check_memory(users: int, row_bytes: int) -> None:
    """Raises BenchmarkError where so many rows do not fit into the machine's free memory."""
    free, needed = psutil.virtual_memory().available, int(users * (row_bytes + 64) + _ROOM_BYTES)
    if free < needed:
        raise BenchmarkError(
            f"{users:,} users take {needed / 1e9:.1f} GB with what is around them, {free / 1e9:.1f} GB are free: "
            "name fewer with --users"
        )


def _in_a_service(options: Options, directory: Path, seed: int, console: Console) -> dict[str, Any]:
    """The growth of the one shard of a running service."""
    users, warm = options.service_users, _warm(options.service_users)
    # A snapshot is written from buffers of its own, which come and go.
    flags = ["--shards", "1", "--data-dir", str(directory / "data"), "--snapshot-interval-s", "36000"]
    flags += ["--snapshot-log-bytes", str(1 << 40)]
    with ExitStack() as stack:
        stack.enter_context(console.status(f"a shard of {users:,} users of {MARKETPLACE}"))
        generator = stack.enter_context(Generator())
        child = stack.enter_context(started(serve(SCHEMAS[MARKETPLACE], *flags)))
        generator.fill(child.address, MARKETPLACE, 0, warm, options.batch, seed)
        (before,) = check_totals(child.address, warm, warm).shards
        generator.fill(child.address, MARKETPLACE, warm, users, options.batch, seed)
        status = check_totals(child.address, users, users)
        (after,) = status.shards
    return {
        "users": users,
        "status_bytes_per_user": status.bytes_per_user,
        **_growth(before.resident_bytes, after.resident_bytes, users - warm),
    }


def _costs(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of docs/performance.md."""
    rows = [
        cost(
            f"memory of a user of {MARKETPLACE}, {one['users']:,} users: growth of the resident memory",
            bound=f"{BOUND_BYTES:,} bytes",
            figure=f"{one['bytes_per_user']:,.0f} bytes",
            floor=f"the row alone {one['row_bytes']:,} bytes",
            ratio=one["bytes_per_user"] / one["row_bytes"],
            held=one["bytes_per_user"] <= BOUND_BYTES,
        )
        for one in result[MARKETPLACE]
    ]
    for one in result[PREFERENCES]:
        heap_mb = FLINK_MB.get(one["users"])
        held_mb = one["bytes_per_user"] * one["users"] / 1e6
        beside = {name: found["bytes_per_user"] * one["users"] / 1e6 for name, found in one["peers"].items()}
        least = min(beside.values(), default=None)
        rows.append(
            cost(
                f"memory of {one['users']:,} users of {PREFERENCES}",
                bound="–" if heap_mb is None else f"Flink's live heap, {heap_mb} MB (quoted)",
                figure=f"{held_mb:,.0f} MB",
                floor=", ".join(f"{name} {size:,.0f} MB" for name, size in beside.items()) or "–",
                ratio=None if least is None else held_mb / least,
                held=heap_mb is None or held_mb <= heap_mb,
            )
        )
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    """The figures as tables."""
    table = Table(title="bytes a user, as the growth of resident memory")
    for column in ("", "users", "bytes a user", "of them the row"):
        table.add_column(column, justify="left" if not column else "right")
    for schema in (MARKETPLACE, PREFERENCES):
        for one in result[schema]:
            table.add_row(
                f"{schema}, bare table", f"{one['users']:,}", f"{one['bytes_per_user']:,.1f}", f"{one['row_bytes']:,}"
            )
            for name, found in one.get("peers", {}).items():
                table.add_row(f"{schema}, {name}", f"{one['users']:,}", f"{found['bytes_per_user']:,.1f}", "")
            if "quoted_flink_live_heap_bytes_per_user" in one:
                quoted = one["quoted_flink_live_heap_bytes_per_user"]
                table.add_row(f"{schema}, Flink's live heap, quoted", f"{one['users']:,}", f"{quoted:,.1f}", "")
    if "service" in result:
        one = result["service"]
        table.add_row(f"{MARKETPLACE}, a shard's process", f"{one['users']:,}", f"{one['bytes_per_user']:,.1f}", "")
    console.print(table)


def draw(result: dict[str, Any]) -> str:
    """The bytes a user as a drawing."""
    rows = []
    for schema in (MARKETPLACE, PREFERENCES):
        for one in result[schema]:
            rows.append(Bar(f"{schema}, {_short(one['users'])}", one["bytes_per_user"], []))
            rows += [
                Bar(f"{name}, {_short(one['users'])}", found["bytes_per_user"], [])
                for name, found in one.get("peers", {}).items()
            ]
    return bars("Resident memory, bytes a user", rows, unit="bytes")


def _short(users: int) -> str:
    """10 M, 100 k."""
    for size, unit in ((10**6, " M"), (10**3, " k")):
        if users >= size:
            return f"{users / size:g}{unit}"
    return str(users)
