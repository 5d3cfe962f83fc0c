"""How long `profile-service migrate` takes with many users: from a data directory to a Redis of its own, and back to
another number of shards.

    .venv/bin/python scripts/measure_migration.py [--users 1000000] [--json]

A service with the schema `marketplace` counts an event of each user into a new data directory and is stopped; then the
command is run twice, as a user runs it, and timed from its start to its end, with its own comparison. The two digests
over all rows have to be equal, and users and events those that were sent; exit status 1 otherwise. Everything is
below a temporary directory, which is removed at the end. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]

sys.path.insert(0, str(ROOT))
from benchmarks.generator import Generator  # noqa: E402
from benchmarks.load import MARKETPLACE, SCHEMAS  # noqa: E402
from benchmarks.memory import check_memory  # noqa: E402
from benchmarks.peers.redis_server import RedisServer  # noqa: E402
from benchmarks.processes import (  # noqa: E402
    BenchmarkError,
    Disk,
    data_directory,
    describe_machine,
    serve,
    started,
)
from benchmarks.producing import check_totals  # noqa: E402

BATCH = 1_000
FILLED_AT_ONCE = 100_000
DISK_BYTES_A_USER = 8_000
"""Two directories with log and snapshots, and the log of Redis."""
MEMORY_BYTES_A_USER = 4_000
"""Redis, and beside it the shard that is read or written."""


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=2, help="Of the directory that is migrated from.")
    parser.add_argument("--shards-back", type=int, default=3, help="Of the directory that is migrated to.")
    parser.add_argument("--redis", choices=("always", "everysec", "none"), default="everysec", help="What Redis keeps.")
    parser.add_argument("--data-dir", type=Path, help="Where the temporary directory is made (default: here).")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="JSON for machines.")
    options = parser.parse_args()
    console = Console(stderr=True, highlight=False)
    try:
        result = measure(options, console)
    except BenchmarkError as error:
        sys.exit(f"error: {error.message}")
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        Console(highlight=False).print(as_table(result))


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything that was measured, as one JSON object."""
    users: int = options.users
    check_memory(users, MEMORY_BYTES_A_USER)
    with data_directory(options.data_dir, users * DISK_BYTES_A_USER + (1 << 30)) as directory:
        first, second = directory / "first", directory / "second"
        fill(first, options, console)
        with RedisServer(options.redis, directory) as redis:
            server: Any = redis.client
            empty = server.info("memory")["used_memory"]
            there = migrate(console, "to Redis", str(first), redis.url)
            held = server.info("memory")["used_memory"] - empty
            back = migrate(console, "back", redis.url, str(second), "--shards", str(options.shards_back))
            version = server.info("server")["redis_version"]
        disk = str(Disk.below(directory))
    result = {
        "benchmark": "migration",
        "machine": describe_machine(),
        "disk": disk,
        "schema": MARKETPLACE,
        "users": users,
        "shards": options.shards,
        "shards_back": options.shards_back,
        "seed": options.seed,
        "redis": {"version": version, "persistence": options.redis, "bytes": held, "bytes_per_user": held / users},
        "to_redis": there,
        "back": back,
    }
    for name, said in (("to Redis", there), ("back", back)):
        if (said["users"], said["events"], said["expiring"]) != (users, users, 0):
            raise BenchmarkError(f"{users:,} users with an event each were sent; {name}: {said}")
    if there["digest"] != back["digest"]:
        raise BenchmarkError(f"the digest of all rows was {there['digest']} in Redis, and is {back['digest']}")
    return {**result, "digest": there["digest"], "verified": True}


def fill(directory: Path, options: argparse.Namespace, console: Console) -> None:
    """Makes a data directory in which every user has one event."""
    flags = ("--shards", str(options.shards), "--data-dir", str(directory))
    with (
        console.status("starting a service") as shown,
        Generator() as generator,
        started(serve(SCHEMAS[MARKETPLACE], *flags)) as child,
    ):
        for start in range(0, options.users, FILLED_AT_ONCE):
            shown.update(f"sending events: {start:,} of {options.users:,} users")
            stop = min(start + FILLED_AT_ONCE, options.users)
            generator.fill(child.address, MARKETPLACE, start, stop, BATCH, options.seed)
        check_totals(child.address, options.users, options.users)
        shown.update("stopping the service")
    console.print(f"{options.users:,} users in {options.shards} shards", highlight=False)


def migrate(console: Console, name: str, *arguments: str) -> dict[str, Any]:
    """Runs the command, whose own progress is shown; what it says, and how long it took with its start."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PROFILE_SERVICE_", "RAY_"))}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "profile_service", "migrate", *arguments, "--json"],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=kept,
    )
    seconds = time.monotonic() - began
    if done.returncode:
        raise BenchmarkError(f"migrate ended with exit status {done.returncode}; what it said is above")
    said: dict[str, Any] = json.loads(done.stdout)
    console.print(f"{name}: {seconds:.1f} s, digest {said['digest']}")
    return {**said, "seconds": seconds, "users_per_second": said["users"] / seconds}


def as_table(result: dict[str, Any]) -> Table:
    """The figures for people."""
    held = result["redis"]
    table = Table(title=f"migrate, {result['users']:,} users of {result['schema']}")
    for column in ("shards", "seconds", "users/s", "digest"):
        table.add_column(column, justify="right" if column in ("seconds", "users/s") else "left")
    for name, key in (
        (f"directory of {result['shards']} to Redis ({held['persistence']})", "to_redis"),
        (f"Redis to directory of {result['shards_back']}", "back"),
    ):
        one = result[key]
        table.add_row(name, f"{one['seconds']:,.1f}", f"{one['users_per_second']:,.0f}", one["digest"])
    table.caption = f"in Redis {held['bytes'] / 1e6:,.0f} MB, {held['bytes_per_user']:,.0f} bytes a user"
    return table


if __name__ == "__main__":
    main()
