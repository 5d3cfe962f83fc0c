"""Measures the choices of libraries that docs/performance.md records: grpcio as it is pinned against the newest,
grpc.aio against threads, uvloop against asyncio's own loop.

    python scripts/bench_libraries.py [--newest VERSION] [--rounds N] [--turn-s S] [--json]

Each choice is a bare server (benchmarks/echo.py) in a virtual environment of its own, made from the package index below
build/libraries. All get the same load in turns: small calls, 64 at once, with an answer of a profile's size; and two
streams of messages of an ingest batch's size. The client is always this environment's grpc.aio, so what differs is the
server: its CPU time a call or message, and the rate. `--newest` is the version to compare with; by default the newest
that the index has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import uvloop

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "libraries"
UV = ROOT / ".venv" / "bin" / "uv"

sys.path.insert(0, str(ROOT))
from benchmarks import echo, producing  # noqa: E402
from benchmarks.load import Load  # noqa: E402
from benchmarks.processes import Child, cpu_seconds, describe_machine  # noqa: E402
from benchmarks.reading import Question, as_fast_as_answered, over_grpc  # noqa: E402

ANSWER_BYTES, REQUEST_BYTES = 2_600, 20
"""Of a profile of the marketplace schema, and of what asks for it."""
MESSAGE_BYTES, MESSAGES = 576_000, 1_000
"""Of a batch of 4,000 events, and how many of them make a turn."""
AT_ONCE = 64
THREADS = 16


@dataclass(frozen=True)
class Choice:
    """A server."""

    name: str
    grpcio: str
    flags: tuple[str, ...]


def main() -> None:
    """Measures, and prints a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--newest", default="", help="The version of grpcio to compare with.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn-s", type=float, default=2.0, help="Seconds of each turn of small calls.")
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args()
    pinned, loop = metadata.version("grpcio"), metadata.version("uvloop")
    newest, python = _environment(arguments.newest, loop)
    choices = [Choice(f"aio, uvloop, grpcio {version}", version, ()) for version in (pinned, newest)]
    choices += [
        Choice(f"{THREADS} threads, grpcio {version}", version, ("--threads", str(THREADS)))
        for version in (pinned, newest)
    ]
    choices.append(Choice(f"aio, asyncio, grpcio {pinned}", pinned, ("--loop", "asyncio")))
    pythons = {pinned: _environment(pinned, loop)[1], newest: python}
    found = _measure(choices, pythons, arguments.rounds, arguments.turn_s)
    result = {"benchmark": "libraries", "machine": describe_machine(), "choices": found}
    print(json.dumps(result) if arguments.as_json else _table(found))


def _environment(version: str, loop: str) -> tuple[str, Path]:
    """The version that is there and the interpreter of an environment that has it, and uvloop; the newest for ""."""
    directory = BUILD / (f"grpcio-{version}" if version else "grpcio-newest")
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, directory], check=True)
    wanted = [f"grpcio=={version}"] if version else ["--upgrade", "grpcio"]
    subprocess.run([UV, "pip", "install", "--quiet", "--python", python, f"uvloop=={loop}", *wanted], check=True)
    said = subprocess.run(
        [python, "-c", "import grpc; print(grpc.__version__)"], check=True, stdout=subprocess.PIPE, text=True
    )
    return said.stdout.strip(), python


def _measure(
    choices: list[Choice], pythons: dict[str, Path], rounds: int, turn_s: float
) -> dict[str, dict[str, float]]:
    """Medians over the rounds, by the choice's name."""
    rows: dict[str, list[dict[str, float]]] = {choice.name: [] for choice in choices}
    load = Load("", [bytes(MESSAGE_BYTES)] * MESSAGES, MESSAGES, 1)
    with ExitStack() as stack:
        children: dict[str, Child] = {}
        for choice in choices:
            child = Child([str(pythons[choice.grpcio]), str(Path(echo.__file__)), *choice.flags])
            stack.callback(child.kill)
            _ = child.address
            children[choice.name] = child
        for number in range(rounds + 1):
            for name, child in children.items():
                row = uvloop.run(_turn(child, load, turn_s))
                # The first round warms up.
                if number > 0:
                    rows[name].append(row)
            print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
        for child in children.values():
            child.stop()
    return {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]} for name, found in rows.items()
    }


async def _turn(child: Child, load: Load, turn_s: float) -> dict[str, float]:
    """A turn of calls, 64 at once and one at a time, and one of messages on streams."""
    question = Question(child.address, echo.unary_request(ANSWER_BYTES, REQUEST_BYTES))
    async with over_grpc(echo.UNARY, [question]) as ask:
        before = _spent(child)
        calls, seconds = await as_fast_as_answered(ask, AT_ONCE, turn_s)
        call_s = (_spent(child) - before) / calls
        alone, alone_seconds = await as_fast_as_answered(ask, 1, turn_s / 4)
    before = _spent(child)
    stream_seconds = await producing.send(child.address, echo.METHOD, load, 2, 8)
    return {
        "calls_per_second": calls / seconds,
        "server_cpu_us_per_call": call_s * 1e6,
        "one_at_a_time_ms": alone_seconds / alone * 1e3,
        "messages_per_second": MESSAGES / stream_seconds,
        "server_cpu_us_per_message": (_spent(child) - before) / MESSAGES * 1e6,
    }


def _spent(child: Child) -> float:
    return sum(cpu_seconds(child.process).values())


def _table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown, for docs/performance.md."""
    lines = [
        "| server | calls/s, 64 at once | CPU a call | one at a time | messages/s | CPU a message |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {one['calls_per_second']:,.0f} | {one['server_cpu_us_per_call']:.0f} µs "
        f"| {one['one_at_a_time_ms']:.2f} ms | {one['messages_per_second']:,.0f} "
        f"| {one['server_cpu_us_per_message']:,.0f} µs |"
        for name, one in found.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
