"""How many events a second go in, what each costs, how soon they are acknowledged, and what durability costs.

    load generator ──▶ service, sync always     ┐
                  ├──▶ the same, past the frontend, straight to the owners
                  ├──▶ service, sync never      │  in turns, round by round: what slows the machine down meanwhile
                  ├──▶ bare grpc.aio echo       │  slows all of them
    peers, from their own memory                ┘
    load generator ──▶ service, sync always        afterwards, at a fixed rate: the time of an acknowledgement

The load is serialised beforehand and held by a process of its own, so what sending costs is told apart. Producers send
it through StreamEvents with a window of unacknowledged batches and wait for the last acknowledgement. For those that go
straight to the owners it is split beforehand, and a service of its own counts it. Before anything
is timed everybody has had the whole load once. The totals are compared with GetStatus afterwards, and what peers know
of some users with their profiles.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import grpc
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import echo
from benchmarks.chart import Bar, bars
from benchmarks.generator import Generator, Sent
from benchmarks.load import PREFERENCES, SCHEMAS
from benchmarks.peers.consumer import PEERS, Consumer
from benchmarks.processes import (
    BenchmarkError,
    Disk,
    cpu_seconds,
    data_directory,
    describe_machine,
    serve,
    started,
)
from benchmarks.producing import STREAM, check_totals
from benchmarks.report import cost
from profile_service.config import SyncMode, default_shards
from profile_service.sample.shoppers import shopper_id
from userprofile.v1 import profile_service_pb2, profile_service_pb2_grpc

BYTES_PER_EVENT = 400
"""Room that an event takes on disk at most: its record, and its share of segments made ahead."""
BOUND_EVENTS_PER_SECOND = 1_000_000
BOUND_CPU_US = 1.0
BOUND_DIRECT_EVENTS_PER_SECOND = 1_500_000
BOUND_DIRECT_CPU_US = 0.75
BOUND_KERNELS_US = 0.25
"""Decode and apply, at 100 thousand users."""

_FLOOR = "bare echo"
_DIRECT = "direct"
_FIGURES = ("events_per_second", "server_cpu_us_per_event", "load_generator_cpu_us_per_event")
_COMPARED_USERS = 200


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
    share: float
    """The fixed rate at which acknowledgements are timed, as a share of the measured one."""
    steady_s: float
    """How long."""
    peers: bool
    """Whether the peers are measured beside it."""
    shards: int | None
    data_dir: Path | None
    seed: int | None


@dataclass(frozen=True)
class _Server:
    """Something that takes the load over the network."""

    root: psutil.Process
    address: str
    method: str
    direct: bool = False
    """Whether the load goes straight to its shards."""
    shards: int = 1

    def _send(self, generator: Generator, options: Options) -> Sent:
        if not self.direct:
            return generator.send(self.address, self.method, options.producers, options.window)
        # As many streams in all, or one to each shard.
        return generator.send_directly(max(1, options.producers // self.shards), options.window)

    def turn(self, generator: Generator, options: Options) -> dict[str, Any]:
        """One round: rate, and CPU time an event of each process."""
        before = cpu_seconds(self.root)
        sent = self._send(generator, options)
        spent = {name: after - before.get(name, 0.0) for name, after in cpu_seconds(self.root).items()}
        return {
            "events_per_second": sent.events / sent.seconds,
            "server_cpu_us_per_event": sum(spent.values()) / sent.events * 1e6,
            "load_generator_cpu_us_per_event": sent.cpu_s / sent.events * 1e6,
            "cpu_us_per_event_by_process": {
                name: used / sent.events * 1e6 for name, used in spent.items() if used / sent.events > 1e-9
            },
        }


@dataclass(frozen=True)
class _Peer:
    """Something that has the load already."""

    consumer: Consumer

    def turn(self, generator: Generator, options: Options) -> dict[str, Any]:
        """One round: rate, and CPU time an event of consumer and server together."""
        seconds, cpu_s = self.consumer.consume()
        return {
            "events_per_second": options.events / seconds,
            "server_cpu_us_per_event": cpu_s / options.events * 1e6,
        }


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measures, and returns everything as one JSON object. `console` hears how far it is."""
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0]) % 10**6
    batch = min(options.batch, options.events)
    if options.peers and options.schema != PREFERENCES:
        raise BenchmarkError(f"the peers do the work of --schema {PREFERENCES} only")
    total = options.events * (options.rounds + 1)
    with ExitStack() as stack:
        room = total * (len(options.sync) + 2) * BYTES_PER_EVENT
        directory = stack.enter_context(data_directory(options.data_dir, room))
        generator = stack.enter_context(Generator())
        with console.status(f"serialising {options.events:,} events of {options.users:,} users"):
            bytes_per_event = generator.build(options.schema, options.events, options.users, batch, seed)
        result: dict[str, Any] = {
            "benchmark": "ingest",
            "machine": describe_machine(),
            "disk": str(Disk.below(directory)),
            "schema": options.schema,
            "events": options.events,
            "users": options.users,
            "bytes_per_event": bytes_per_event,
            "batch": batch,
            "producers": options.producers,
            "window": options.window,
            "seed": seed,
        }
        with console.status("measuring the kernels alone"):
            result["kernels_us_per_event"] = generator.measure_kernels()
        servers, consumers = _start(stack, options, directory, console)
        for number, consumer in enumerate(consumers):
            with console.status(f"serialising the load of peer {number + 1} of {len(consumers)}"):
                consumer.build(options.events, options.users, batch, seed)
        with console.status("splitting the load by owners"):
            generator.split(servers[_DIRECT].address)
        targets: dict[str, _Server | _Peer] = {**servers, **{peer.name: _Peer(peer) for peer in consumers}}
        rounds = _take_turns(targets, generator, options, console)
        counted = {mode: check_totals(servers[mode].address, total).event_count for mode in options.sync}
        counted[_DIRECT] = check_totals(servers[_DIRECT].address, total).event_count
        first = servers[options.sync[0]]
        if consumers:
            result["users_compared"] = _compare(first.address, consumers, options.users, seed)
        _summarise(result, rounds, options.sync)
        result["peers"] = {
            peer.name: {**_medians(rounds[peer.name]), "durability": peer.durability, "rounds": rounds[peer.name]}
            for peer in consumers
        }
        rate = options.share * result["events_per_second"]
        with console.status(f"{options.steady_s:g} s at {rate:,.0f} events/s"):
            steady = generator.send_steadily(
                first.address, rate, options.steady_s, options.producers, options.rounds + 1
            ).result()
        check_totals(first.address, total + steady.events)
        result["acknowledgement"] = {
            "events_per_second": rate,
            "seconds": options.steady_s,
            "batches": len(steady.latency_s),
            **{f"{name}_ms": value for name, value in steady.quantiles_ms().items()},
        }
    result["counted_events"] = counted
    result["costs"] = _costs(result)
    result["verified"] = True
    return result


def _start(
    stack: ExitStack, options: Options, directory: Path, console: Console
) -> tuple[dict[str, _Server], list[Consumer]]:
    """The echo, a service for each sync mode, one more of the first for those who go straight, and the peers."""
    with console.status("starting") as progress:
        child = stack.enter_context(started(["benchmarks.echo"]))
        servers = {_FLOOR: _Server(child.process, child.address, echo.METHOD)}
        for name in (*options.sync, _DIRECT):
            mode = options.sync[0] if name == _DIRECT else name
            progress.update(f"starting the service with --sync {mode}")
            flags = ["--sync", mode, "--data-dir", str(directory / name)]
            flags += ["--shards", str(options.shards)] if options.shards else []
            child = stack.enter_context(started(serve(SCHEMAS[options.schema], *flags)))
            servers[name] = _Server(
                child.process,
                child.address,
                STREAM,
                direct=name == _DIRECT,
                shards=options.shards or default_shards(),
            )
        progress.update("starting the peers")
        return servers, [stack.enter_context(Consumer(name)) for name in (PEERS if options.peers else ())]


def _take_turns(
    targets: dict[str, _Server | _Peer], generator: Generator, options: Options, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """Rounds by target; in every round each of them has a turn."""
    for name, target in targets.items():
        with console.status(f"warming up: {_title(name)}"):
            target.turn(generator, options)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in targets}
    for number in range(options.rounds):
        rates = []
        generator.renew(number + 1)
        for name, target in targets.items():
            with console.status(f"round {number + 1} of {options.rounds}: {_title(name)}"):
                rounds[name].append(target.turn(generator, options))
            rates.append(f"{_title(name)} {rounds[name][-1]['events_per_second']:,.0f}")
        console.print(f"round {number + 1} of {options.rounds}, events/s: {', '.join(rates)}", highlight=False)
    return rounds


def _compare(address: str, consumers: Sequence[Consumer], users: int, seed: int) -> int:
    """Compares what the peers know of some users, of whatever activity, with what the service says; returns how many
    they were.

    Raises:
        BenchmarkError: they differ.
    """
    drawn = np.random.default_rng(seed).permutation(users)[:_COMPARED_USERS]
    request = profile_service_pb2.BatchGetProfilesRequest(user_ids=[shopper_id(user) for user in drawn.tolist()])
    with grpc.insecure_channel(address) as channel:
        answer = profile_service_pb2_grpc.ProfileServiceStub(channel).BatchGetProfiles(request, timeout=60)
    profiles = {profile.user_id: profile for profile in answer.profiles}
    for consumer in consumers:
        for user_id, theirs in zip(profiles, consumer.profiles(list(profiles)), strict=True):
            if (difference := theirs.differs_from(profiles[user_id])) is not None:
                raise BenchmarkError(f"{consumer.name} and the service differ about {user_id}: {difference}")
    return len(profiles)


def _summarise(result: dict[str, Any], rounds: dict[str, list[dict[str, Any]]], modes: tuple[str, ...]) -> None:
    """Adds the medians over the rounds, and the ratios of what was measured in the same round."""
    floor = rounds[_FLOOR]
    result.update({f"floor_{key}": value for key, value in _medians(floor).items()})
    result["sync"] = {mode: _against(rounds[mode], floor) for mode in modes}
    result[_DIRECT] = _against(rounds[_DIRECT], floor)
    result.update({key: value for key, value in result["sync"][modes[0]].items() if key != "rounds"})
    if {"always", "never"} <= set(modes):
        always, never = rounds["always"], rounds["never"]
        result["durability"] = {
            "rate_ratio": _ratio(always, never, "events_per_second"),
            "server_cpu_ratio": _ratio(always, never, "server_cpu_us_per_event"),
        }


def _against(rounds: list[dict[str, Any]], floor: list[dict[str, Any]]) -> dict[str, Any]:
    middle = sorted(rounds, key=lambda one: float(one["events_per_second"]))[len(rounds) // 2]
    return {
        **_medians(rounds),
        "rate_ratio_to_floor": _ratio(rounds, floor, "events_per_second"),
        "cpu_ratio_to_floor": _ratio(rounds, floor, "server_cpu_us_per_event"),
        "cpu_us_per_event_by_process": middle["cpu_us_per_event_by_process"],
        "rounds": rounds,
    }


def _medians(rounds: list[dict[str, Any]]) -> dict[str, float]:
    return {key: float(statistics.median(one[key] for one in rounds)) for key in _FIGURES if key in rounds[0]}


def _ratio(rounds: list[dict[str, Any]], to: list[dict[str, Any]], key: str) -> float:
    # A process that is idle may spend less than the clock of its CPU time can tell.
    least = 1e-9
    return float(statistics.median(one[key] / max(other[key], least) for one, other in zip(rounds, to, strict=True)))


def _costs(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of docs/performance.md."""
    kernels = result["kernels_us_per_event"]
    both = kernels["decode"] + kernels["apply"]
    rate, cpu = result["events_per_second"], result["server_cpu_us_per_event"]
    least = result["floor_server_cpu_us_per_event"] + sum(kernels.values())
    first = next(iter(result["sync"]))
    through = f"ingest through the frontend, sync {first}, {result['users']:,} users"
    straight = f"ingest straight to the owners, sync {first}, {result['users']:,} users"
    direct = result[_DIRECT]
    direct_cpu = direct["server_cpu_us_per_event"]
    direct_least = least - kernels["gather"]
    return [
        cost(
            f"{through}: rate",
            bound=f"{BOUND_EVENTS_PER_SECOND:,} events/s",
            figure=f"{rate:,.0f} events/s",
            floor=f"bare echo {result['floor_events_per_second']:,.0f} events/s",
            ratio=result["rate_ratio_to_floor"],
            held=rate >= BOUND_EVENTS_PER_SECOND,
        ),
        cost(
            f"{through}: CPU of all server processes",
            bound=f"{BOUND_CPU_US:g} µs an event",
            figure=f"{cpu:.2f} µs",
            floor=f"bare echo and kernels {least:.2f} µs",
            ratio=cpu / least,
            held=cpu <= BOUND_CPU_US,
        ),
        cost(
            f"{straight}: rate",
            bound=f"{BOUND_DIRECT_EVENTS_PER_SECOND:,} events/s",
            figure=f"{direct['events_per_second']:,.0f} events/s",
            floor=f"bare echo {result['floor_events_per_second']:,.0f} events/s",
            ratio=direct["rate_ratio_to_floor"],
            held=direct["events_per_second"] >= BOUND_DIRECT_EVENTS_PER_SECOND,
        ),
        cost(
            f"{straight}: CPU of all server processes",
            bound=f"{BOUND_DIRECT_CPU_US:g} µs an event",
            figure=f"{direct_cpu:.2f} µs",
            floor=f"bare echo and kernels {direct_least:.2f} µs",
            ratio=direct_cpu / direct_least,
            held=direct_cpu <= BOUND_DIRECT_CPU_US,
        ),
        cost(
            f"decode and apply, {result['users']:,} users",
            bound=f"{BOUND_KERNELS_US:g} µs an event",
            figure=f"{both:.2f} µs",
            floor="–",
            ratio=None,
            held=both <= BOUND_KERNELS_US,
        ),
    ]


def _title(name: str) -> str:
    return f"sync {name}" if name in get_args(SyncMode) else name


def show(result: dict[str, Any], console: Console) -> None:
    """The figures as tables."""
    table = Table(
        title=f"{result['events']:,} events of {result['bytes_per_event']:.0f} bytes, {result['users']:,} users"
    )
    for column in ("", "events/s", "to the floor", "server CPU, µs an event"):
        table.add_column(column, justify="left" if not column else "right")
    floor = result["floor_events_per_second"]
    first = next(iter(result["sync"]))
    rows = [(f"service, sync {mode}", found) for mode, found in result["sync"].items()]
    rows.append((f"service, sync {first}, straight to the owners", result[_DIRECT]))
    rows.append(
        (
            "floor: bare echo",
            {"events_per_second": floor, "server_cpu_us_per_event": result["floor_server_cpu_us_per_event"]},
        )
    )
    rows += [(f"peer, from memory: {name}", found) for name, found in result["peers"].items()]
    for name, found in rows:
        table.add_row(
            name,
            f"{found['events_per_second']:,.0f}",
            f"{found.get('rate_ratio_to_floor', found['events_per_second'] / floor):.2f}",
            f"{found['server_cpu_us_per_event']:.2f}",
        )
    console.print(table)
    for name, found in result["peers"].items():
        console.print(f"{name}: {found['durability']}")
    if "durability" in result:
        spent = result["durability"]
        console.print(
            f"durability: {spent['rate_ratio']:.2f} of the rate without it, {spent['server_cpu_ratio']:.2f} of the CPU"
        )
    steady = result["acknowledgement"]
    console.print(
        f"acknowledgement of {result['batch']:,} events at {steady['events_per_second']:,.0f} events/s, sync {first}: "
        + ", ".join(f"{name} {steady[f'{name}_ms']:.1f} ms" for name in ("p50", "p99", "p99.9", "max"))
    )
    parts = Table(title=f"CPU time, µs an event, sync {first}")
    parts.add_column("where")
    parts.add_column("µs", justify="right")
    for name, used in sorted(result["cpu_us_per_event_by_process"].items(), key=lambda item: -item[1]):
        parts.add_row(name, f"{used:.3f}")
    for name, used in sorted(result[_DIRECT]["cpu_us_per_event_by_process"].items(), key=lambda item: -item[1]):
        parts.add_row(f"straight to the owners: {name}", f"{used:.3f}")
    parts.add_row("load generator", f"{result['load_generator_cpu_us_per_event']:.3f}")
    for name, used in result["kernels_us_per_event"].items():
        parts.add_row(f"kernels alone, one core: {name}", f"{used:.3f}")
    console.print(parts)


def draw(result: dict[str, Any]) -> str:
    """The rates as a drawing: a bar for the median, a dot for every round."""
    rows = [
        Bar(name, found["events_per_second"], [one["events_per_second"] for one in found["rounds"]])
        for name, found in [
            *((f"sync {mode}", found) for mode, found in result["sync"].items()),
            ("straight to the owners", result[_DIRECT]),
            *result["peers"].items(),
        ]
    ]
    rows.append(Bar(_FLOOR, result["floor_events_per_second"], []))
    title = f"Events a second through StreamEvents, {result['machine']['processor']}"
    return bars(title, rows, unit="million events/s", scale=1e-6)
