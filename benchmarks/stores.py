"""Local and external state on the same work, one service after the other.

    local-always, local-never                         shards with a log, synced before each acknowledgement, or never
    redis-everysec, redis-always, redis-none          shards on a Redis of their own that keeps what it answers so

Of each: the rate at which events are taken in, and the CPU of all its processes, Redis among them; at a fixed rate that
all of them can keep up how long acknowledgements and reads wait, and how soon an event can be read; the memory of both
sides; how long after SIGKILL of a shard its users can be read and written again; and what other shards take.

They run one at a time, so that each has the machine; a bare echo is measured beside each, since machines drift. The
totals of each are compared with what was sent.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import echo
from benchmarks.chart import Bar, bars, below
from benchmarks.generator import Generator, Latencies
from benchmarks.load import PREFERENCES, SCHEMAS
from benchmarks.peers.redis_server import Persistence, RedisServer
from benchmarks.processes import (
    BenchmarkError,
    Child,
    Disk,
    cpu_seconds,
    data_directory,
    describe_machine,
    is_ours,
    serve,
    started,
)
from benchmarks.producing import STREAM, check_totals, status
from profile_service.cluster.partitioning import partition_of, user_hash
from userprofile.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    event_service_pb2,
    event_service_pb2_grpc,
    profile_service_pb2,
    profile_service_pb2_grpc,
)

BYTES_PER_EVENT = 2_000
"""Room on disk for an event at most: Redis writes a row for it."""
STEADY_BATCH = 500
PRODUCERS = 2
WINDOW = 4
PROBES_A_SECOND = 20.0
_TIMEOUT_S = 60.0
_SCALE_S = 600.0
_PARTITION_BITS = 8


@dataclass(frozen=True)
class Options:
    """What is measured."""

    events: int
    """A round."""
    users: int
    batch: int
    rounds: int
    rate: float
    """Events a second while waiting times are taken."""
    reads: float
    """A second, meanwhile."""
    steady_s: float
    shards: int
    scaled_shards: int
    stores: tuple[str, ...]
    data_dir: Path | None
    seed: int | None


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measures, and returns everything as one JSON object. `console` hears how far it is."""
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0]) % 10**6
    room = 2 * (options.rounds + 2) * options.events * BYTES_PER_EVENT
    with ExitStack() as stack:
        directory = stack.enter_context(data_directory(options.data_dir, room))
        sender, reader = (stack.enter_context(Generator()) for _ in range(2))
        floor = stack.enter_context(started(["benchmarks.echo"]))
        result: dict[str, Any] = {
            "benchmark": "stores",
            "machine": describe_machine(),
            "disk": str(Disk.below(directory)),
            "events": options.events,
            "users": options.users,
            "batch": options.batch,
            "rate": options.rate,
            "reads": options.reads,
            "shards": options.shards,
            "scaled_shards": options.scaled_shards,
            "seed": seed,
            "stores": {},
        }
        for name in options.stores:
            (directory / name).mkdir()
            bench = _Bench(name, options, directory / name, seed, sender, reader, floor, console)
            result["stores"][name] = found = bench.run()
            console.print(
                f"{name}: {found['events_per_second']:,.0f} events/s, {found['server_cpu_us_per_event']:.1f} µs an "
                f"event, acknowledged after {found['acknowledged_ms']['p50']:.1f} ms",
                highlight=False,
            )
    result["verified"] = True
    return result


class _Bench:
    """One place for the state."""

    def __init__(
        self,
        name: str,
        options: Options,
        directory: Path,
        seed: int,
        sender: Generator,
        reader: Generator,
        floor: Child,
        console: Console,
    ) -> None:
        self._name = name
        self._options = options
        self._directory = directory
        self._seed = seed
        self._sender = sender
        self._reader = reader
        self._floor = floor
        self._console = console
        self._counted = 0
        self._redis: RedisServer | None = None

    def run(self) -> dict[str, Any]:
        """All figures."""
        options = self._options
        kind, _, how = self._name.partition("-")
        found: dict[str, Any] = {}
        with ExitStack() as stack:
            if kind == "redis":
                self._redis = stack.enter_context(RedisServer(cast("Persistence", how), self._directory))
            with self._serving(how) as child:
                self._say("warming up")
                self._fill(child)
                self._build(options.batch, 0)
                self._round(child, 0)
                found |= self._rates(child)
                found |= self._waits(child)
                found["resident_bytes"] = self._memory(child)
                found["recovery"] = self._recover(child)
                users = asyncio.run(status(child.address)).user_count
                check_totals(child.address, self._counted)
                found["scaled"] = self._scaled(child, users)
        return found

    def _say(self, what: str) -> None:
        self._console.print(f"{self._name}: {what}", highlight=False, style="dim")

    @contextmanager
    def _serving(self, how: str) -> Iterator[Child]:
        where = (
            ["--store", self._redis.url]
            if self._redis is not None
            else ["--data-dir", str(self._directory / "data"), "--sync", how]
        )
        shards = self._options.shards
        self._say(f"starting {shards} shards")
        with started(serve(SCHEMAS[PREFERENCES], "--shards", str(shards), *where)) as child:
            yield child

    def _build(self, batch: int, more_seed: int) -> None:
        options = self._options
        self._sender.build(PREFERENCES, options.events, options.users, batch, self._seed + more_seed)

    def _fill(self, child: Child) -> None:
        """An event of every user: each can be read."""
        options = self._options
        batch = min(options.batch, options.users)
        self._sender.build(PREFERENCES, options.users, options.users, batch, self._seed + 3, every_user=True)
        self._counted += self._sender.send(child.address, STREAM, PRODUCERS, WINDOW).events

    def _cpu(self, child: Child) -> dict[str, float]:
        spent = cpu_seconds(child.process)
        if self._redis is not None:
            spent |= cpu_seconds(self._redis.process)
        return spent

    def _round(self, child: Child, number: int) -> dict[str, Any]:
        """Sends the whole load, with ids of its own."""
        self._sender.renew(number)
        before = self._cpu(child)
        sent = self._sender.send(child.address, STREAM, PRODUCERS, WINDOW)
        spent = {name: after - before.get(name, 0.0) for name, after in self._cpu(child).items()}
        self._counted += sent.events
        return {
            "events_per_second": sent.events / sent.seconds,
            "server_cpu_us_per_event": sum(spent.values()) / sent.events * 1e6,
            "redis_cpu_us_per_event": sum(s for n, s in spent.items() if n.startswith("redis")) / sent.events * 1e6,
        }

    def _rates(self, child: Child) -> dict[str, Any]:
        options = self._options
        rounds = []
        for number in range(options.rounds):
            self._say(f"round {number + 1} of {options.rounds}")
            floor = self._sender.send(self._floor.address, echo.METHOD, PRODUCERS, WINDOW)
            one = self._round(child, number + 1)
            rounds.append({**one, "floor_events_per_second": floor.events / floor.seconds})
        medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        return {**medians, "rounds": rounds}

    def _waits(self, child: Child) -> dict[str, Any]:
        """How long acknowledgements and reads take, and how soon an event can be read, at the fixed rate."""
        options = self._options
        self._say(f"{options.steady_s:g} s at {options.rate:,.0f} events/s")
        batch = min(STEADY_BATCH, options.batch, options.events)
        self._build(batch, 1)
        acks = self._sender.send_steadily(child.address, options.rate, options.steady_s, PRODUCERS, 0)
        reads = self._reader.read_steadily(child.address, options.users, options.reads, options.steady_s, self._seed)
        fresh = asyncio.run(_freshness(child.address, max(1, int(options.steady_s * PROBES_A_SECOND))))
        self._counted += acks.result().events + len(fresh)
        return {
            "acknowledged_ms": _quantiles(acks.result()),
            "read_ms": _quantiles(reads.result()),
            "fresh_ms": {"p50": float(np.quantile(fresh, 0.5) * 1e3), "p99": float(np.quantile(fresh, 0.99) * 1e3)},
        }

    def _memory(self, child: Child) -> dict[str, int]:
        ours = {"service": 0, "redis": 0}
        for process in [child.process, *child.process.children(recursive=True)]:
            name = f"{process.cmdline()[0].removeprefix('ray::').split('.')[0]} " if process.cmdline() else ""
            if is_ours(name) or process == child.process:
                ours["service"] += process.memory_info().rss
        if self._redis is not None:
            ours["redis"] = self._redis.process.memory_info().rss
        return ours

    def _recover(self, child: Child) -> dict[str, float]:
        """Kills a shard; returns after how many seconds a user of its can be read, and written."""
        self._say("SIGKILL of a shard")
        victim = asyncio.run(status(child.address)).shards[0]
        owned = (1 << _PARTITION_BITS) // self._options.shards
        ids = (f"killed-{number}" for number in range(10_000))
        user_id = next(u for u in ids if partition_of(user_hash(u), _PARTITION_BITS) < owned)
        asyncio.run(_write_until_acknowledged(child.address, user_id, "before"))
        os.kill(victim.pid, signal.SIGKILL)
        seconds = asyncio.run(_until_back(child.address, user_id))
        self._counted += 2
        return seconds

    def _scaled(self, child: Child, users: int) -> dict[str, Any]:
        """The same service with another number of shards, which share the users while it serves."""
        shards = self._options.scaled_shards
        self._say(f"scaling to {shards} shards")
        began = time.monotonic()
        moved = asyncio.run(_scale(child.address, shards))
        seconds = time.monotonic() - began
        check_totals(child.address, self._counted, users)
        self._build(self._options.batch, 2)
        one = self._round(child, 1)
        check_totals(child.address, self._counted)
        return {**one, "scale_s": seconds, "rows": moved.row_count, "bytes": moved.byte_count}


def _quantiles(latencies: Latencies) -> dict[str, float]:
    found = latencies.quantiles_ms()
    return {name: found[name] for name in ("p50", "p99")}


async def _scale(address: str, shards: int) -> admin_service_pb2.MovedState:
    """Returns what was moved, when there are so many."""
    async with grpc.aio.insecure_channel(address) as channel:
        admin: Any = admin_service_pb2_grpc.AdminServiceStub(channel)
        answer = await admin.ScaleShards(admin_service_pb2.ScaleShardsRequest(shard_count=shards), timeout=_SCALE_S)
        moved: admin_service_pb2.MovedState = answer.moved
        return moved


async def _freshness(address: str, probes: int) -> list[float]:
    """From when an event is sent until a read shows it, in seconds; reads follow each other without a pause."""
    async with grpc.aio.insecure_channel(address) as channel:
        events: Any = event_service_pb2_grpc.EventServiceStub(channel)
        profiles: Any = profile_service_pb2_grpc.ProfileServiceStub(channel)
        taken: list[float] = []
        begun = time.monotonic()
        for number in range(probes):
            await asyncio.sleep(max(0.0, begun + number / PROBES_A_SECOND - time.monotonic()))
            sent_at = time.monotonic()
            sending = asyncio.ensure_future(events.IngestEvents(_probe("fresh", ""), timeout=_TIMEOUT_S))
            question = profile_service_pb2.BatchGetProfilesRequest(user_ids=["fresh"])
            while True:
                answer = await profiles.BatchGetProfiles(question, timeout=_TIMEOUT_S)
                if sum(profile.event_count for profile in answer.profiles) > number:
                    break
                if sending.done():
                    # One that failed will never show.
                    sending.result()
            taken.append(time.monotonic() - sent_at)
            await sending
        return taken


async def _until_back(address: str, user_id: str) -> dict[str, float]:
    began = time.monotonic()

    async def reading() -> float:
        async with grpc.aio.insecure_channel(address) as channel:
            profiles: Any = profile_service_pb2_grpc.ProfileServiceStub(channel)
            question = profile_service_pb2.GetProfileRequest(user_id=user_id)
            while True:
                try:
                    await profiles.GetProfile(question, timeout=_TIMEOUT_S)
                except grpc.aio.AioRpcError as error:
                    _check(error, began)
                    await asyncio.sleep(0.01)
                else:
                    return time.monotonic() - began

    async def writing() -> float:
        await _write_until_acknowledged(address, user_id, "after")
        return time.monotonic() - began

    read_s, written_s = await asyncio.gather(reading(), writing())
    return {"read_s": read_s, "written_s": written_s}


async def _write_until_acknowledged(address: str, user_id: str, request_id: str) -> None:
    began = time.monotonic()
    async with grpc.aio.insecure_channel(address) as channel:
        events: Any = event_service_pb2_grpc.EventServiceStub(channel)
        while True:
            try:
                await events.IngestEvents(_probe(user_id, f"{user_id} {request_id}"), timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                _check(error, began)
                await asyncio.sleep(0.01)
            else:
                return


def _check(error: grpc.aio.AioRpcError, began: float) -> None:
    if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() - began > _TIMEOUT_S:
        raise BenchmarkError(f"{error.code().name}: {error.details()}")


def _probe(user_id: str, request_id: str) -> event_service_pb2.IngestEventsRequest:
    request = event_service_pb2.IngestEventsRequest(request_id=request_id)
    request.events.add(user_id=user_id, type="view").attributes.update({"color": "red", "price": 10_000.0})
    return request


_ROWS: tuple[tuple[str, Any], ...] = (
    ("events/s", lambda found: f"{found['events_per_second']:,.0f}"),
    ("of a bare echo's rate", lambda found: f"{found['events_per_second'] / found['floor_events_per_second']:.2f}"),
    ("CPU of all processes, µs an event", lambda found: f"{found['server_cpu_us_per_event']:.2f}"),
    ("  of it Redis", lambda found: f"{found['redis_cpu_us_per_event']:.2f}"),
    ("acknowledged, ms: p50 / p99", lambda found: _pair(found["acknowledged_ms"])),
    ("readable after it was sent, ms: p50 / p99", lambda found: _pair(found["fresh_ms"])),
    ("read through a frontend, ms: p50 / p99", lambda found: _pair(found["read_ms"])),
    ("resident, MB: service", lambda found: f"{found['resident_bytes']['service'] / 1e6:,.0f}"),
    ("resident, MB: Redis", lambda found: f"{found['resident_bytes']['redis'] / 1e6:,.0f}"),
    ("read again after SIGKILL of a shard, s", lambda found: f"{found['recovery']['read_s']:.2f}"),
    ("written again after it, s", lambda found: f"{found['recovery']['written_s']:.2f}"),
)


def _pair(found: dict[str, float]) -> str:
    return f"{found['p50']:.1f} / {found['p99']:.1f}"


def show(result: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    table = Table(
        title=f"{result['events']:,} events a round by {result['users']:,} users, {result['shards']} shards; waits at "
        f"{result['rate']:,.0f} events/s and {result['reads']:,.0f} reads/s"
    )
    table.add_column("")
    for name in result["stores"]:
        table.add_column(name, justify="right")
    for title, figure in _ROWS:
        table.add_row(title, *(figure(found) for found in result["stores"].values()))
    scaled = result["scaled_shards"]
    table.add_row(
        f"events/s with {scaled} shards",
        *(f"{found['scaled']['events_per_second']:,.0f}" for found in result["stores"].values()),
    )
    table.add_row(
        f"from {result['shards']} to {scaled} shards",
        *(
            f"{found['scaled']['scale_s']:.1f} s, {found['scaled']['bytes'] / 1e6:,.0f} MB"
            for found in result["stores"].values()
        ),
    )
    console.print(table)


def draw(result: dict[str, Any]) -> str:
    """Rates and CPU as drawings: a bar for the median, a dot for every round."""
    stores = result["stores"].items()

    def rows(key: str) -> list[Bar]:
        return [Bar(name, found[key], [one[key] for one in found["rounds"]]) for name, found in stores]

    title = f"Events a second by where state lives, {result['machine']['processor']}"
    rates = bars(title, rows("events_per_second"), unit="thousand events/s", scale=1e-3)
    cpu = bars("CPU of all processes, Redis among them", rows("server_cpu_us_per_event"), unit="µs an event")
    return below(rates, cpu)
