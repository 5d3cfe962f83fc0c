"""How long a shard is away when its process is killed.

One shard gets users, writes a snapshot of them, and logs events after it; then its process is killed, again and again.
Every time it starts anew, loads the snapshot and replays the same events. What is measured, in seconds:

    kill ─────▶ process ─────▶ code loaded ─▶ kernels ─▶ snapshot ─▶ log replayed ─▶ serving ─────▶ read
                   └────────────────── as the shard says in its log ───────────────────┘              │
                   └──────────────────────── bounded: `BOUND_S` ──────────────────────────────────────┘

The read is a client's, through the frontend, which has to find the shard at its new address first. After each round the
events of the service and of a thousand users are counted.

The floor, once in each round: a process without anything that reads snapshot and log into fresh memory, and ends.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.chart import Stack, stacks
from benchmarks.load import MARKETPLACE, SCHEMAS, build_load
from benchmarks.processes import BenchmarkError, Child, Disk, data_directory, describe_machine, serve, started
from benchmarks.producing import STREAM, check_totals, create_snapshot, send, status
from benchmarks.report import cost
from profile_service.sample.shoppers import shopper_id
from userprofile.v1 import profile_pb2, profile_service_pb2, profile_service_pb2_grpc

BOUND_S = 3.0
"""From the start of the process to the first read, of a shard with a million users and a million logged events."""

PHASES = ("code", "kernels", "snapshot", "log", "serving")
"""As the shard says; what was done beside another phase counts as far as it was waited for."""

RECOVERED = r"shard 0 INFO serving after ([\d.]+) s: (.*)$"

BYTES_PER_USER = 4_000
"""Room on disk: two snapshots, and the log of the user's events."""
BYTES_PER_EVENT = 400

_SAMPLE_USERS = 1_000
_READ_TIMEOUT_S = 10.0
_RECOVERY_TIMEOUT_S = 120.0
_SNAPSHOT_TIMEOUT_S = 300.0
_BARE = """
import mmap, sys
for path, size in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    with open(path, "rb", buffering=0) as file:
        assert file.readinto(mmap.mmap(-1, size)) == size
"""
"""Run with pairs of a path and how much to read of it."""
_NEVER = ("--snapshot-log-bytes", str(1 << 50), "--snapshot-interval-s", "1e9")
"""No snapshot but those that are asked for."""


@dataclass(frozen=True)
class Options:
    """What is measured."""

    users: int
    history: int
    """Events of each user in the snapshot."""
    events: int
    """Logged after the snapshot."""
    batch: int
    rounds: int
    cold: bool
    """Whether the page cache is dropped before each kill."""
    data_dir: Path | None
    seed: int | None


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measures, and returns everything as one JSON object. `console` hears how far it is."""
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0]) % 10**6
    result: dict[str, Any] = {
        "benchmark": "recovery",
        "machine": describe_machine(),
        "users": options.users,
        "events_per_user_in_snapshot": options.history,
        "logged_events": options.events,
        "seed": seed,
        "bound_s": BOUND_S,
    }
    before = options.users * options.history
    room = options.users * BYTES_PER_USER + (before + options.events) * BYTES_PER_EVENT
    with data_directory(options.data_dir, room) as directory:
        result["disk"] = str(Disk.below(directory))
        with (
            console.status("starting") as progress,
            started(serve(SCHEMAS[MARKETPLACE], "--shards", "1", "--data-dir", str(directory), *_NEVER)) as child,
        ):
            address = child.address
            fill(address, options.users, options.history, options.batch, seed, progress.update)
            progress.update("writing a snapshot")
            uvloop.run(create_snapshot(address, _SNAPSHOT_TIMEOUT_S))
            progress.update("logging the events that are to be replayed")
            load = build_load(
                MARKETPLACE, options.events, options.users, options.batch, seed + options.history, every_user=True
            )
            uvloop.run(send(address, STREAM, load, producers=1, window=8))
            total = before + options.events
            found = check_totals(address, total, options.users).shards[0]
            result["snapshot_bytes"] = newest_snapshot(directory).stat().st_size
            result["replayed_bytes"] = found.log_position - found.snapshot_position
            result["state_bytes"] = found.state_bytes
            sample = np.random.default_rng(seed).integers(0, options.users, _SAMPLE_USERS)
            users = sorted({shopper_id(int(user)) for user in sample})
            expected = _counts(address, users)
            rounds: list[dict[str, Any]] = []
            for number in range(options.rounds):
                progress.update(f"round {number + 1} of {options.rounds}")
                os.sync()
                result["page_cache"] = _drop_caches(directory) if options.cold else "warm"
                bare_s = _read_bare(directory, result["replayed_bytes"])
                rounds.append({**_kill(child, address, users[0]), "bare_read_s": bare_s})
                check_totals(address, total, options.users)
                if _counts(address, users) != expected:
                    raise BenchmarkError("a user's events are not what they were before the kill")
                console.print(
                    f"round {number + 1} of {options.rounds}: a read {rounds[-1]['process_to_read_s']:.2f} s after the "
                    f"start of the process, {rounds[-1]['kill_to_read_s']:.2f} s after the kill",
                    highlight=False,
                )
    for key in ("kill_to_process_s", "process_to_serving_s", "process_to_read_s", "kill_to_read_s", "bare_read_s"):
        result[key] = statistics.median(one[key] for one in rounds)
    result["phases_s"] = {phase: statistics.median(one["phases_s"][phase] for one in rounds) for phase in PHASES}
    result["slowest_process_to_read_s"] = max(one["process_to_read_s"] for one in rounds)
    result["within_bound"] = result["process_to_read_s"] <= BOUND_S
    result["rounds"] = rounds
    result["costs"] = [
        cost(
            f"recovery of a shard with {options.users:,} users and {options.events:,} logged events, page cache "
            f"{result.get('page_cache', 'warm')}: process start to a read",
            bound=f"{BOUND_S:g} s",
            figure=f"{result['process_to_read_s']:.2f} s, slowest {result['slowest_process_to_read_s']:.2f} s",
            floor=f"a bare process that only reads the same files {result['bare_read_s']:.2f} s",
            ratio=result["process_to_read_s"] / result["bare_read_s"],
            held=result["within_bound"],
        )
    ]
    result["verified"] = True
    return result


def fill(address: str, users: int, history: int, batch: int, seed: int, tell: Any) -> None:
    """Sends `history` events of each of the users."""
    for number in range(history):
        tell(f"making events of {users:,} users, {number + 1} of {history}")
        load = build_load(MARKETPLACE, users, users, batch, seed + number, every_user=True)
        tell(f"sending events of {users:,} users, {number + 1} of {history}")
        uvloop.run(send(address, STREAM, load, producers=1, window=8))


def newest_snapshot(directory: Path) -> Path:
    """The file of the newest snapshot of shard 0."""
    return max(directory.glob("shard-0/snapshots/*.snapshot"))


def _read_bare(directory: Path, log_bytes: int) -> float:
    """Seconds that a new process takes for nothing but what a recovery reads: the newest snapshot, and the last
    `log_bytes` or so of the log."""
    snapshot = newest_snapshot(directory)
    sizes = {str(snapshot): snapshot.stat().st_size}
    for segment in sorted(directory.glob("shard-0/log/*"), reverse=True):
        sizes[str(segment)] = min(segment.stat().st_size, log_bytes)
        log_bytes -= sizes[str(segment)]
    arguments = [str(one) for path, size in sizes.items() if size for one in (path, size)]
    begun_at = time.perf_counter()
    subprocess.run([sys.executable, "-I", "-S", "-c", _BARE, *arguments], check=True)
    return time.perf_counter() - begun_at


def _kill(child: Child, address: str, user_id: str) -> dict[str, Any]:
    """One round: SIGKILL, then reads until one is answered."""
    before = uvloop.run(status(address)).shards[0].pid
    printed = len(child.output)
    with grpc.insecure_channel(address) as channel:
        stub = profile_service_pb2_grpc.ProfileServiceStub(channel)
        request = profile_service_pb2.GetProfileRequest(user_id=user_id)
        stub.GetProfile(request, timeout=_READ_TIMEOUT_S)
        killed_at = time.clock_gettime(time.CLOCK_BOOTTIME)
        os.kill(before, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(before)] if psutil.pid_exists(before) else [], timeout=_READ_TIMEOUT_S)
        _read(stub, request)
        read_at = time.clock_gettime(time.CLOCK_BOOTTIME)
    after = uvloop.run(status(address)).shards[0].pid
    if after == before:
        raise BenchmarkError(f"process {before} of the shard was killed and still answers")
    # A process may have waited for work before the kill: then it counts from there.
    process_at = max(_started_at(after), killed_at)
    said = child.wait_for(RECOVERED, _RECOVERY_TIMEOUT_S, printed)
    phases = {name: float(seconds) for name, seconds in re.findall(r"(\w+) ([\d.]+)", said[2])}
    return {
        "kill_to_process_s": process_at - killed_at,
        "process_to_serving_s": float(said[1]),
        "process_to_read_s": read_at - process_at,
        "kill_to_read_s": read_at - killed_at,
        "phases_s": {phase: phases[phase] for phase in PHASES},
    }


def _read(stub: profile_service_pb2_grpc.ProfileServiceStub, request: profile_service_pb2.GetProfileRequest) -> None:
    """Returns when a read is answered; a client that was told "unavailable" asks again at once."""
    deadline = time.monotonic() + _RECOVERY_TIMEOUT_S
    while True:
        try:
            profile: profile_pb2.Profile = stub.GetProfile(request, timeout=_READ_TIMEOUT_S)
        except grpc.RpcError as error:
            again = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            if not isinstance(error, grpc.Call) or error.code() not in again or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            assert profile.event_count > 0
            return


def _started_at(pid: int) -> float:
    """When a process started, in seconds of CLOCK_BOOTTIME, to a hundredth.

    psutil adds the time of the boot, which the kernel tells in whole seconds.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _counts(address: str, users: list[str]) -> dict[str, int]:
    """The events of each of the users."""
    with grpc.insecure_channel(address) as channel:
        stub = profile_service_pb2_grpc.ProfileServiceStub(channel)
        request = profile_service_pb2.BatchGetProfilesRequest(user_ids=users, features=["contacts"])
        answer = stub.BatchGetProfiles(request, timeout=_READ_TIMEOUT_S)
    return {profile.user_id: profile.event_count for profile in answer.profiles}


def _drop_caches(directory: Path) -> str:
    """Takes out of the page cache what is read at a start; says how much of it that is."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except PermissionError:
        for path in directory.rglob("*.*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "data files dropped"
    return "dropped"


def show(result: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    table = Table(
        title=f"{result['users']:,} users in {result['snapshot_bytes'] / 1e6:,.0f} MB of snapshot, "
        f"{result['logged_events']:,} events in {result['replayed_bytes'] / 1e6:,.0f} MB of log, "
        f"page cache {result['page_cache']}"
    )
    table.add_column("seconds")
    for number in range(len(result["rounds"])):
        table.add_column(f"round {number + 1}", justify="right")
    table.add_column("median", justify="right")
    for phase in PHASES:
        found = [one["phases_s"][phase] for one in result["rounds"]]
        table.add_row(f"  {phase}", *(f"{one:.2f}" for one in [*found, statistics.median(found)]))
    for key, title in (
        ("process_to_serving_s", "process to serving"),
        ("process_to_read_s", "process to a client's read"),
        ("kill_to_read_s", "kill to a client's read"),
        ("bare_read_s", "floor: a bare process that only reads the files"),
    ):
        found = [one[key] for one in result["rounds"]]
        table.add_row(title, *(f"{one:.2f}" for one in [*found, statistics.median(found)]))
    console.print(table)
    held = "held" if result["within_bound"] else "MISSED"
    console.print(f"bound, process to a client's read at most {result['bound_s']:g} s in the median: {held}")


def draw(result: dict[str, Any]) -> str:
    """The phases as a drawing, a bar for each round."""
    rows = [
        Stack(
            f"round {number + 1}",
            [*(one["phases_s"][phase] for phase in PHASES), one["process_to_read_s"] - one["process_to_serving_s"]],
        )
        for number, one in enumerate(result["rounds"])
    ]
    title = (
        f"A shard's restart: {result['users']:,} users, {result['logged_events']:,} logged events, "
        f"page cache {result['page_cache']}"
    )
    return stacks(title, [*PHASES, "read"], rows, unit="seconds from the start of the process", bound=result["bound_s"])
