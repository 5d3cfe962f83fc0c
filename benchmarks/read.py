"""How soon a profile is read, how many a second, and what one costs: straight from its owner, through a frontend over
gRPC and REST, and many at once.

    load generator ──▶ bare grpc.aio echo of the same size     ┐
                  ├──▶ the owners                              │  in turns, round by round, 64 at once
                  ├──▶ a frontend over gRPC                    │
                  ├──▶ a frontend over REST                    │
                  └──▶ peer: FastAPI over Redis, the same JSON ┘
    load generator ──▶ echo, owner, frontend, …                  one at a time, in turns, question by question
    load generator ──▶ each                                      at a fixed rate: the quantiles of its answers

Whatever is compared was measured within the same seconds. What is read is checked before: an owner answers what a
frontend does, over gRPC and REST.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import uvloop
from google.protobuf import json_format
from rich.console import Console
from rich.table import Table

from benchmarks import echo
from benchmarks.chart import Bar, bars
from benchmarks.generator import Generator
from benchmarks.load import SCHEMAS
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
from benchmarks.reading import (
    BATCH_GET,
    GET,
    Ask,
    Question,
    as_fast_as_answered,
    at_rate,
    get_request,
    in_turns,
    over_grpc,
    over_http,
)
from benchmarks.report import cost
from profile_service.cluster.partitioning import partition_of, user_hash
from profile_service.sample.shoppers import shopper_id
from userprofile.v1 import admin_service_pb2, admin_service_pb2_grpc, profile_pb2, profile_service_pb2

BOUND_DIRECT = 1.15
"""Of the echo's latency and CPU time."""
BOUND_FRONTEND = 0.6
"""Of the echo's rate."""
BOUND_REST = 2.0
"""Of the peer's rate."""
BOUND_BATCH_MS = 5.0
_FEWER_BATCHES = 10
"""Batches are asked for so many times as seldom as single profiles: often enough for a p99 to mean something."""
BATCH_USERS = 100

FLOOR, DIRECT, FRONTEND, REST, PEER = "bare echo", "owner", "frontend", "frontend, REST", "peer: FastAPI + Redis"
BATCH, DIRECT_BATCH = f"frontend, {BATCH_USERS} profiles", f"owner, {BATCH_USERS} profiles"
FLOOR_BATCH = f"bare echo, bytes of {BATCH_USERS} profiles"

_BYTES_PER_EVENT = 800
"""Room on disk: the log, and snapshots."""
_ASKED_USERS = 4_096
_BATCHES = 64
_SETTLE_S = 20.0
_QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    schema: str
    """A key of `SCHEMAS`."""
    users: int
    history: int
    """Events of each of them."""
    at_once: int
    turn_s: float
    """Seconds a turn."""
    rounds: int
    rate: float
    """Profiles a second while quantiles are taken."""
    steady_s: float
    """How long."""
    peer: bool
    shards: int | None
    data_dir: Path | None
    seed: int | None


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measures, and returns everything as one JSON object. `console` hears how far it is."""
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0]) % 10**6
    events = options.users * options.history
    result: dict[str, Any] = {
        "benchmark": "read",
        "machine": describe_machine(),
        "schema": options.schema,
        "users": options.users,
        "events": events,
        "at_once": options.at_once,
        "seed": seed,
    }
    with ExitStack() as stack:
        directory = stack.enter_context(data_directory(options.data_dir, events * _BYTES_PER_EVENT))
        result["disk"] = str(Disk.below(directory))
        with console.status("starting") as progress:
            bare = stack.enter_context(started(["benchmarks.echo"]))
            flags = ["--data-dir", str(directory)]
            flags += ["--shards", str(options.shards)] if options.shards else []
            service = stack.enter_context(started(serve(SCHEMAS[options.schema], *flags)))
            progress.update(f"sending {events:,} events of {options.users:,} users")
            with Generator() as generator:
                generator.build(options.schema, events, options.users, 4_000, seed, every_user=True)
                generator.send(service.address, STREAM, 2, 8)
            check_totals(service.address, events, options.users)
            drawn = np.random.default_rng(seed).integers(0, options.users, _ASKED_USERS).tolist()
            progress.update("comparing what is answered")
            bodies = _compare(service.address, service.rest_address, drawn[:BATCH_USERS])
            result["profile_bytes"] = int(statistics.mean(len(body) for body, _ in bodies))
            result["json_bytes"] = int(statistics.mean(len(body) for _, body in bodies))
            roots = {FLOOR: [bare.process], **{name: [service.process] for name in (DIRECT, FRONTEND, REST)}}
            peer = ""
            if options.peer:
                # It comes with the development environment alone.
                from benchmarks.peers.redis_server import RedisServer

                progress.update("starting the peer")
                redis = RedisServer()
                stack.callback(redis.close)
                for number, user in enumerate(drawn):
                    redis.client.set(shopper_id(user), bodies[number % len(bodies)][1])
                child = stack.enter_context(started(["benchmarks.peers.fastapi_redis", redis.socket]))
                roots[PEER], peer = [child.process, redis.process], child.address
        work = _Work(options, console, roots, drawn, result["profile_bytes"])
        measured = uvloop.run(work.measure(bare.address, service.address, service.rest_address, peer))
    result.update(measured)
    result["costs"] = _costs(result, options)
    result["verified"] = True
    return result


def _owners(address: str) -> tuple[dict[int, str], int]:
    """Addresses of the owners by partition, and how many bits a partition has."""
    with grpc.insecure_channel(address) as channel:
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        topology = stub.GetTopology(admin_service_pb2.GetTopologyRequest(), timeout=60)
    shards = {shard.shard_id: shard.address for shard in topology.shards}
    owners = {
        partition: shards[extent.shard_id]
        for extent in topology.ranges
        for partition in range(extent.first_partition, extent.last_partition + 1)
    }
    return owners, topology.partition_count.bit_length() - 1


def _owner(user: int, owners: dict[int, str], bits: int) -> str:
    return owners[partition_of(user_hash(shopper_id(user)), bits)]


def _compare(address: str, rest_address: str, users: Sequence[int]) -> list[tuple[bytes, bytes]]:
    """Encoded profiles and their JSON. Raises BenchmarkError unless owner, frontend and REST say the same."""
    owners, bits = _owners(address)
    bodies = []
    with httpx.Client(base_url=f"http://{rest_address}", timeout=60) as http, ExitStack() as stack:
        channels = {each: stack.enter_context(grpc.insecure_channel(each)) for each in {address, *owners.values()}}
        stubs: dict[str, Any] = {each: channel.unary_unary(GET) for each, channel in channels.items()}
        deadline = time.monotonic() + _SETTLE_S
        for user in users:
            while True:
                said = [stubs[each](get_request(user), timeout=60) for each in (address, _owner(user, owners, bits))]
                text = http.get(f"/v1/profiles/{shopper_id(user)}").raise_for_status().content
                read = [*map(profile_pb2.Profile.FromString, said), json_format.Parse(text, profile_pb2.Profile())]
                if _alike(read):
                    break
                # The population, which shows in likelihoods, follows what was sent within two seconds.
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"owner, frontend and REST differ about {shopper_id(user)}")
                time.sleep(0.1)
            bodies.append((said[0], text))
    return bodies


def _alike(profiles: Sequence[profile_pb2.Profile]) -> bool:
    """Whether the profiles agree, but for when they were read and for what decays meanwhile."""
    for profile in profiles:
        profile.ClearField("read_time")
    first, *others = map(json_format.MessageToDict, profiles)
    return all(_near(first, other) for other in others)


def _near(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_near(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_near, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.isclose(one, other, rtol=1e-4, atol=1e-6))
    return bool(one == other)


class _Work:
    """What is done in the event loop."""

    def __init__(
        self,
        options: Options,
        console: Console,
        roots: dict[str, list[psutil.Process]],
        users: Sequence[int],
        answer_bytes: int,
    ) -> None:
        self._options = options
        self._console = console
        self._roots = roots
        self._users = users
        self._answer_bytes = answer_bytes

    async def measure(self, bare: str, address: str, rest_address: str, peer: str) -> dict[str, Any]:
        """Everything that is timed."""
        owners, bits = _owners(address)
        requests = [get_request(user) for user in self._users]
        paths = [f"/v1/profiles/{shopper_id(user)}" for user in self._users]
        bare_request = echo.unary_request(self._answer_bytes, len(requests[0]))
        direct = [
            Question(_owner(user, owners, bits), request) for user, request in zip(self._users, requests, strict=True)
        ]
        async with AsyncExitStack() as stack:
            asks = {
                FLOOR: await stack.enter_async_context(over_grpc(echo.UNARY, [Question(bare, bare_request)])),
                DIRECT: await stack.enter_async_context(over_grpc(GET, direct)),
                FRONTEND: await stack.enter_async_context(
                    over_grpc(GET, [Question(address, request) for request in requests])
                ),
                REST: await stack.enter_async_context(over_http(rest_address, paths, self._options.at_once)),
            }
            if peer:
                asks[PEER] = await stack.enter_async_context(over_http(peer, paths, self._options.at_once))
            many_bytes = echo.unary_request(BATCH_USERS * self._answer_bytes, BATCH_USERS * len(requests[0]))
            many = {
                FLOOR_BATCH: await stack.enter_async_context(over_grpc(echo.UNARY, [Question(bare, many_bytes)])),
                BATCH: await stack.enter_async_context(over_grpc(BATCH_GET, self._batches(address, None, bits))),
                DIRECT_BATCH: await stack.enter_async_context(
                    over_grpc(BATCH_GET, self._batches(address, owners, bits))
                ),
            }
            for name, ask in {**asks, **many}.items():
                # Few batches at once: after a flood of them a connection that TCP paces sends slowly for long.
                at_once = 2 if name in many else self._options.at_once
                await as_fast_as_answered(ask, at_once, min(1.0, self._options.turn_s))
            rounds, alone = await self._rounds(asks)
            steady = await self._steady(asks, many)
        return {**_summary(rounds, alone), "steady": steady}

    def _batches(self, address: str, owners: dict[int, str] | None, bits: int) -> list[Question]:
        """Batches of users of one owner, or of any."""
        held: dict[str, list[int]] = {}
        questions = []
        for user in itertools.islice(itertools.cycle(self._users), 8 * _BATCHES * BATCH_USERS):
            place = address if owners is None else _owner(user, owners, bits)
            batch = held.setdefault(place, [])
            batch.append(user)
            if len(batch) == BATCH_USERS:
                ids = [shopper_id(each) for each in batch]
                request = profile_service_pb2.BatchGetProfilesRequest(user_ids=ids).SerializeToString()
                questions.append(Question(place, request))
                batch.clear()
            if len(questions) == _BATCHES:
                break
        return questions

    async def _rounds(
        self, asks: dict[str, Ask]
    ) -> tuple[dict[str, list[dict[str, float]]], dict[str, list[list[float]]]]:
        """By who is asked: rate and CPU time in every round, and the time of every answer when one is asked for at a
        time."""
        options = self._options
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in asks}
        alone: dict[str, list[list[float]]] = {name: [] for name in asks}
        for number in range(options.rounds):
            for name, ask in asks.items():
                with self._console.status(f"round {number + 1} of {options.rounds}: {name}"):
                    before = self._cpu_s(name)
                    count, seconds = await as_fast_as_answered(ask, options.at_once, options.turn_s)
                    spent = self._cpu_s(name) - before
                rounds[name].append({"reads_per_second": count / seconds, "server_cpu_us": spent / count * 1e6})
            with self._console.status(f"round {number + 1} of {options.rounds}: one at a time"):
                for name, taken in (await in_turns(asks, max(20, int(200 * options.turn_s)))).items():
                    alone[name].append(taken.tolist())
            rates = ", ".join(f"{name} {found[-1]['reads_per_second']:,.0f}" for name, found in rounds.items())
            self._console.print(f"round {number + 1} of {options.rounds}, reads/s: {rates}", highlight=False)
        return rounds, alone

    async def _steady(self, asks: dict[str, Ask], many: dict[str, Ask]) -> dict[str, dict[str, float]]:
        """Quantiles of the answers at a fixed rate, in milliseconds."""
        found = {}
        for name, ask in {**asks, **many}.items():
            rate = self._options.rate / (_FEWER_BATCHES if name in many else 1)
            with self._console.status(f"{self._options.steady_s:g} s at {rate:g} reads/s: {name}"):
                _, latency = await at_rate(ask, rate, self._options.steady_s)
            found[name] = {
                "reads_per_second": rate,
                **{f"{key}_ms": float(np.quantile(latency, q)) * 1e3 for key, q in _QUANTILES.items()},
            }
        return found

    def _cpu_s(self, name: str) -> float:
        return sum(sum(cpu_seconds(root).values()) for root in self._roots[name])


def _summary(rounds: dict[str, list[dict[str, float]]], alone: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Medians over the rounds, and ratios of what was measured in the same round."""
    by_name = {
        name: {
            "reads_per_second": statistics.median(one["reads_per_second"] for one in found),
            "server_cpu_us": statistics.median(one["server_cpu_us"] for one in found),
            "latency_ms": statistics.median(statistics.median(taken) for taken in alone[name]) * 1e3,
            "rounds": found,
        }
        for name, found in rounds.items()
    }

    def ratio(key: str, name: str, to: str) -> float:
        return statistics.median(one[key] / other[key] for one, other in zip(rounds[name], rounds[to], strict=True))

    def latency_ratio(name: str) -> float:
        pairs = zip(alone[name], alone[FLOOR], strict=True)
        return statistics.median(statistics.median(one) / statistics.median(other) for one, other in pairs)

    summary: dict[str, Any] = {
        "targets": by_name,
        "direct_latency_ratio_to_echo": latency_ratio(DIRECT),
        "direct_cpu_ratio_to_echo": ratio("server_cpu_us", DIRECT, FLOOR),
        "direct_rate_ratio_to_echo": ratio("reads_per_second", DIRECT, FLOOR),
        "frontend_rate_ratio_to_echo": ratio("reads_per_second", FRONTEND, FLOOR),
        "frontend_latency_ratio_to_echo": latency_ratio(FRONTEND),
    }
    if PEER in rounds:
        summary["rest_rate_ratio_to_fastapi_redis"] = ratio("reads_per_second", REST, PEER)
        summary["rest_cpu_ratio_to_fastapi_redis"] = ratio("server_cpu_us", REST, PEER)
    return summary


def _costs(result: dict[str, Any], options: Options) -> list[dict[str, Any]]:
    """Rows of docs/performance.md."""
    targets, steady = result["targets"], result["steady"]
    floor, direct, frontend = targets[FLOOR], targets[DIRECT], targets[FRONTEND]
    rows = [
        cost(
            "read straight from the owner: latency, one at a time",
            bound=f"{BOUND_DIRECT:g} × echo",
            figure=f"{direct['latency_ms']:.2f} ms",
            floor=f"bare echo {floor['latency_ms']:.2f} ms",
            ratio=result["direct_latency_ratio_to_echo"],
            held=result["direct_latency_ratio_to_echo"] <= BOUND_DIRECT,
        ),
        cost(
            f"read straight from the owner: CPU, {options.at_once} at once",
            bound=f"{BOUND_DIRECT:g} × echo",
            figure=f"{direct['server_cpu_us']:.0f} µs",
            floor=f"bare echo {floor['server_cpu_us']:.0f} µs",
            ratio=result["direct_cpu_ratio_to_echo"],
            held=result["direct_cpu_ratio_to_echo"] <= BOUND_DIRECT,
        ),
        cost(
            f"read through a frontend, {options.at_once} at once",
            bound=f"{BOUND_FRONTEND:g} × echo's rate",
            figure=f"{frontend['reads_per_second']:,.0f}/s",
            floor=f"bare echo {floor['reads_per_second']:,.0f}/s",
            ratio=result["frontend_rate_ratio_to_echo"],
            held=result["frontend_rate_ratio_to_echo"] >= BOUND_FRONTEND,
        ),
    ]
    if PEER in targets:
        rows.append(
            cost(
                f"REST read through a frontend, {options.at_once} at once",
                bound=f"{BOUND_REST:g} × FastAPI + Redis",
                figure=f"{targets[REST]['reads_per_second']:,.0f}/s",
                floor=f"FastAPI + Redis {targets[PEER]['reads_per_second']:,.0f}/s",
                ratio=result["rest_rate_ratio_to_fastapi_redis"],
                held=result["rest_rate_ratio_to_fastapi_redis"] >= BOUND_REST,
            )
        )
    batch = steady[BATCH]
    rows.append(
        cost(
            f"batch read of {BATCH_USERS} profiles with every feature, {batch['reads_per_second']:g}/s: p99",
            bound=f"{BOUND_BATCH_MS:g} ms",
            figure=f"{batch['p99_ms']:.1f} ms",
            floor=f"bare echo of as many bytes {steady[FLOOR_BATCH]['p99_ms']:.1f} ms",
            ratio=batch["p99_ms"] / steady[FLOOR_BATCH]["p99_ms"],
            held=batch["p99_ms"] <= BOUND_BATCH_MS,
        )
    )
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    """The figures as tables."""
    table = Table(
        title=f"{result['users']:,} users of {result['schema']}: {result['profile_bytes']:,} bytes a profile, "
        f"{result['json_bytes']:,} of JSON"
    )
    for column in ("", f"reads/s, {result['at_once']} at once", "server CPU, µs a read", "one at a time, ms"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in result["targets"].items():
        figures = (f"{found['reads_per_second']:,.0f}", f"{found['server_cpu_us']:.0f}", f"{found['latency_ms']:.2f}")
        table.add_row(name, *figures)
    console.print(table)
    steady = Table(title="at a fixed rate, ms")
    for column in ("", "reads/s", *_QUANTILES):
        steady.add_column(column, justify="left" if not column else "right")
    for name, found in result["steady"].items():
        steady.add_row(name, f"{found['reads_per_second']:g}", *(f"{found[f'{key}_ms']:.2f}" for key in _QUANTILES))
    console.print(steady)


def draw(result: dict[str, Any]) -> str:
    """The rates as a drawing: a bar for the median, a dot for every round."""
    rows = [
        Bar(name, found["reads_per_second"], [one["reads_per_second"] for one in found["rounds"]])
        for name, found in result["targets"].items()
    ]
    title = f"Profiles read a second, {result['at_once']} at once, {result['machine']['processor']}"
    return bars(title, rows, unit="thousand reads/s", scale=1e-3)
