"""How long `serve` takes until it is ready, beside what `ray.init` alone takes.

Both in turns, each in a new process, with the same arguments for Ray; kernels are compiled before. What is bounded is
the difference: from the start of the process of `serve` to its line `ready: …`, less the call of `ray.init` in a
process that does nothing else.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.chart import Stack, stacks
from benchmarks.load import MARKETPLACE, SCHEMAS
from benchmarks.processes import START_TIMEOUT_S, Child, Disk, data_directory, describe_machine, serve
from benchmarks.report import cost
from profile_service.launcher import RAY_WORKERS

BOUND_S = 2.0
"""How much longer than `ray.init` a start may take."""

_DISK_BYTES = 1 << 28


@dataclass(frozen=True)
class Options:
    """What is measured."""

    shards: int
    rounds: int
    data_dir: Path | None


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measures, and returns everything as one JSON object. `console` hears how far it is."""
    result: dict[str, Any] = {
        "benchmark": "startup",
        "machine": describe_machine(),
        "shards": options.shards,
        "bound_s": BOUND_S,
    }
    rounds: list[dict[str, float]] = []
    with data_directory(options.data_dir, _DISK_BYTES) as directory, console.status("starting") as progress:
        result["disk"] = str(Disk.below(directory))
        flags = ("--shards", str(options.shards))
        # The first start may have kernels to compile, and finds nothing in the page cache.
        _start([*serve(SCHEMAS[MARKETPLACE], *flags, "--data-dir", str(directory / "first"))])
        for number in range(options.rounds):
            progress.update(f"round {number + 1} of {options.rounds}")
            said, process_s = _start(["benchmarks.bare_ray", str(options.shards + RAY_WORKERS)])
            _, serve_s = _start(serve(SCHEMAS[MARKETPLACE], *flags, "--data-dir", str(directory / str(number))))
            ray_s = float(said.split()[3])
            rounds.append(
                {
                    "ray_init_s": ray_s,
                    "ray_process_s": process_s,
                    "serve_to_ready_s": serve_s,
                    "beyond_ray_init_s": serve_s - ray_s,
                }
            )
    for key in rounds[0]:
        result[key] = statistics.median(one[key] for one in rounds)
    result["within_bound"] = result["beyond_ray_init_s"] <= BOUND_S
    result["rounds"] = rounds
    result["costs"] = [
        cost(
            f"start with {options.shards} shards, kernels compiled: from `serve` to ready",
            bound=f"{BOUND_S:g} s beyond `ray.init`",
            figure=f"{result['beyond_ray_init_s']:.2f} s beyond",
            floor=f"`ray.init` alone {result['ray_init_s']:.2f} s",
            ratio=result["serve_to_ready_s"] / result["ray_init_s"],
            held=result["within_bound"],
        )
    ]
    result["verified"] = True
    return result


def _start(arguments: list[str]) -> tuple[str, float]:
    """What a process says when it is ready, and how many seconds after its start; then it is stopped."""
    began = time.monotonic()
    child = Child([sys.executable, "-m", *arguments])
    try:
        said = child.wait_for(r"^ready: .*$", START_TIMEOUT_S)[0]
        took_s = time.monotonic() - began
    except BaseException:
        child.kill()
        raise
    child.stop()
    return said, took_s


def show(result: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    table = Table(title=f"A start with {result['shards']} shards, kernels compiled")
    table.add_column("seconds")
    for number in range(len(result["rounds"])):
        table.add_column(f"round {number + 1}", justify="right")
    table.add_column("median", justify="right")
    for key, title in (
        ("ray_init_s", "ray.init alone"),
        ("ray_process_s", "a process that imports Ray and calls it"),
        ("serve_to_ready_s", "serve to ready"),
        ("beyond_ray_init_s", "serve beyond ray.init"),
    ):
        found = [one[key] for one in result["rounds"]]
        table.add_row(title, *(f"{one:.2f}" for one in [*found, statistics.median(found)]))
    console.print(table)
    held = "held" if result["within_bound"] else "MISSED"
    console.print(f"bound, at most {BOUND_S:g} s beyond ray.init in the median: {held}")


def draw(result: dict[str, Any]) -> str:
    """Ray's part and ours as a drawing, a bar for each round."""
    rows = [
        Stack(f"round {number + 1}", [one["ray_init_s"], one["beyond_ray_init_s"]])
        for number, one in enumerate(result["rounds"])
    ]
    title = f"From serve to ready, {result['shards']} shards"
    bound = result["ray_init_s"] + BOUND_S
    return stacks(
        title, ["ray.init alone", "beyond it"], rows, unit="seconds from the start of the process", bound=bound
    )
