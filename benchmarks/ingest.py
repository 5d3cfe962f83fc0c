"""How many events a second go in, and what each costs: `python -m benchmarks.ingest`.

The load is serialised beforehand: shoppers over car listings, four to six attributes an event, as the demo's sample.
Producers send it through StreamEvents with a window of unacknowledged batches and wait for the last acknowledgement;
the totals are compared with GetStatus afterwards. In the same run, as floors: the same bytes through a bare grpc.aio
echo, and the kernels alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import echo
from benchmarks.load import Load, build_load
from benchmarks.processes import cpu_seconds, describe_machine, serve, started
from userprofile.v1 import admin_service_pb2, event_service_pb2

STREAM = "/userprofile.v1.EventService/StreamEvents"
STATUS = "/userprofile.v1.AdminService/GetStatus"


async def send(address: str, method: str, load: Load, producers: int, window: int) -> float:
    """Sends every batch over so many streams at once, each with at most `window` unanswered; returns the seconds it
    took."""
    async with grpc.aio.insecure_channel(address, options=echo.OPTIONS) as channel:
        await channel.channel_ready()
        started_at = time.perf_counter()
        await asyncio.gather(
            *(_produce(channel, method, load.batches[number::producers], window) for number in range(producers))
        )
        return time.perf_counter() - started_at


async def _produce(channel: grpc.aio.Channel, method: str, batches: list[bytes], window: int) -> None:
    room = asyncio.Semaphore(window)
    named = event_service_pb2.StreamEventsRequest(producer_id=uuid.uuid4().hex).SerializeToString()

    async def requests() -> AsyncIterator[bytes]:
        yield named
        for number, batch in enumerate(batches, start=1):
            await room.acquire()
            # Fields of a message may come in pieces: the batch's events, then its sequence.
            yield batch + event_service_pb2.StreamEventsRequest(sequence=number).SerializeToString()

    stream: Any = channel.stream_stream(method)
    call = stream(requests())
    answered = -1 if method == echo.METHOD else 0
    async for message in call:
        before = answered
        if method == echo.METHOD:
            answered += 1
        else:
            response = event_service_pb2.StreamEventsResponse.FromString(message)
            if response.rejected:
                raise RuntimeError(f"refused: {response.rejected[0]}")
            answered = max(answered, response.sequence)
        for _ in range(max(answered, 0) - max(before, 0)):
            room.release()
        if answered >= len(batches):
            break
    call.cancel()


async def counted(address: str) -> int:
    """Events that the service says it has counted."""
    async with grpc.aio.insecure_channel(address) as channel:
        ask: Any = channel.unary_unary(STATUS)
        answer = await ask(b"", timeout=10)
        return int(admin_service_pb2.GetStatusResponse.FromString(answer).event_count)


def measure(root: psutil.Process, address: str, method: str, load: Load, options: argparse.Namespace) -> dict[str, Any]:
    """One round: rate, and CPU time an event of each process."""
    cpu_before, own_before = cpu_seconds(root), time.process_time()
    seconds = uvloop.run(send(address, method, load, options.producers, options.window))
    own = time.process_time() - own_before
    spent = {name: after - cpu_before.get(name, 0.0) for name, after in cpu_seconds(root).items()}
    return {
        "events_per_second": load.events / seconds,
        "server_cpu_us_per_event": sum(spent.values()) / load.events * 1e6,
        "load_generator_cpu_us_per_event": own / load.events * 1e6,
        "cpu_us_per_event_by_process": {
            name: used / load.events * 1e6 for name, used in spent.items() if used / load.events > 1e-9
        },
    }


def median(rounds: list[dict[str, Any]], key: str) -> float:
    """The median of one figure over the rounds."""
    return float(statistics.median(round_[key] for round_ in rounds))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every measurement, as one JSON object."""
    console = Console(stderr=True)
    with console.status(f"serialising {options.events:,} events of {options.users:,} users"):
        load = build_load(options.events, options.users, options.batch, options.seed)
        warm = build_load(min(options.events, 100_000), options.users, options.batch, options.seed + 1)
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "events": load.events,
        "users": options.users,
        "bytes_per_event": sum(map(len, load.batches)) / load.events,
        "batch": options.batch,
        "producers": options.producers,
        "seed": options.seed,
        "kernels_us_per_event": load.measure_kernels(),
    }
    with started([sys.executable, "-m", "benchmarks.echo"]) as (root, line):
        floor = _rounds(console, "bare echo", root, _address(line), echo.METHOD, warm, load, options)
    with started(serve("marketplace", options.shards)) as (root, line):
        address = _address(line)
        ours = _rounds(console, "service", root, address, STREAM, warm, load, options)
        total = asyncio.run(counted(address))
    expected = warm.events + load.events * options.rounds
    if total != expected:
        raise RuntimeError(f"sent {expected} events, the service counted {total}")
    result["floor_events_per_second"] = median(floor, "events_per_second")
    result["floor_server_cpu_us_per_event"] = median(floor, "server_cpu_us_per_event")
    for key in ("events_per_second", "server_cpu_us_per_event", "load_generator_cpu_us_per_event"):
        result[key] = median(ours, key)
    result["rate_ratio_to_floor"] = result["events_per_second"] / result["floor_events_per_second"]
    middle = sorted(ours, key=lambda round_: round_["events_per_second"])[len(ours) // 2]
    result["cpu_us_per_event_by_process"] = middle["cpu_us_per_event_by_process"]
    result["rounds"] = ours
    result["counted_events"] = total
    return result


def _rounds(
    console: Console,
    name: str,
    root: psutil.Process,
    address: str,
    method: str,
    warm: Load,
    load: Load,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    uvloop.run(send(address, method, warm, options.producers, options.window))
    rounds = []
    for number in range(options.rounds):
        rounds.append(measure(root, address, method, load, options))
        rate = rounds[-1]["events_per_second"]
        console.print(f"{name}, round {number + 1} of {options.rounds}: {rate:,.0f} events/s")
    return rounds


def _address(line: str) -> str:
    found = re.search(r"gRPC (\S+?:\d+)", line)
    assert found, line
    return found.group(1)


def show(result: dict[str, Any]) -> None:
    """The figures as tables."""
    console = Console()
    for name, value in result["machine"].items():
        console.print(f"{name}: {value}", highlight=False)
    table = Table(
        title=f"{result['events']:,} events of {result['bytes_per_event']:.0f} bytes, {result['users']:,} users"
    )
    for column in ("", "events/s", "server CPU, µs an event"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("service", f"{result['events_per_second']:,.0f}", f"{result['server_cpu_us_per_event']:.2f}")
    table.add_row(
        "floor: bare echo",
        f"{result['floor_events_per_second']:,.0f}",
        f"{result['floor_server_cpu_us_per_event']:.2f}",
    )
    table.add_row("ratio to the floor", f"{result['rate_ratio_to_floor']:.2f}", "")
    console.print(table)
    parts = Table(title="CPU time, µs an event")
    parts.add_column("where")
    parts.add_column("µs", justify="right")
    for name, used in sorted(result["cpu_us_per_event_by_process"].items(), key=lambda item: -item[1]):
        parts.add_row(name, f"{used:.3f}")
    parts.add_row("load generator", f"{result['load_generator_cpu_us_per_event']:.3f}")
    for name, used in result["kernels_us_per_event"].items():
        parts.add_row(f"kernels alone, one core: {name}", f"{used:.3f}")
    console.print(parts)


def main() -> None:
    """Parses the flags, measures, and prints tables or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=4_000, help="events a batch")
    parser.add_argument("--producers", type=int, default=2, help="streams at once")
    parser.add_argument("--window", type=int, default=8, help="unacknowledged batches a stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=None)
    parser.add_argument("--seed", type=int, default=int(np.random.SeedSequence().generate_state(1)[0]) % 10**6)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    result = run(options)
    if options.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
