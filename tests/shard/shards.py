"""A whole shard on a simulated disk, in the test's own event loop: no Ray, no gRPC, no thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from profile_service.config import Capacity
from profile_service.domain.schema import Schema
from profile_service.shard.health import Health
from profile_service.shard.lease import Grant, Lease
from profile_service.shard.recovery import Recovered, recover
from profile_service.shard.replication import ReplicatedLog
from profile_service.shard.shard import Shard
from profile_service.shard.snapshotter import Snapshotter
from profile_service.shard.state import ShardState
from profile_service.storage.crashing_fs import CrashingFileSystem
from profile_service.storage.fs import FileSystem
from profile_service.storage.wal import LogOptions

DIRECTORY = Path("/data/shard-3")
IDENTITY = bytes(range(16))
NOW_NS = 1_790_000_000 * 10**9


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_ns = NOW_NS

    def __call__(self) -> int:
        return self.now_ns


class Gate:
    """A Runner that works at once while it is open, and else waits; it counts what went through."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.opened.set()
        self.waiting = asyncio.Event()
        self.passed = 0

    async def __call__(self, work: Callable[[], Any], /) -> Any:
        if not self.opened.is_set():
            self.waiting.set()
            await self.opened.wait()
        self.passed += 1
        return work()

    def close(self) -> None:
        self.opened.clear()
        self.waiting.clear()

    def open(self) -> None:
        self.opened.set()


async def recovered(
    fs: FileSystem,
    schema: Schema,
    *,
    gate: Gate | None = None,
    capacity: Capacity | None = None,
    reset_features: Sequence[str] = (),
    partition_bits: int = 8,
    options: LogOptions = LogOptions(1 << 16),  # noqa: B008  # frozen
    directory: Path = DIRECTORY,
    identity: bytes = IDENTITY,
) -> Recovered:
    """What `fs` holds of the shard; small tables, so that a test can make many."""
    capacity = capacity or Capacity(event_ids_per_shard=1024)
    run = gate or Gate()
    return await recover(
        fs,
        directory,
        schema,
        identity=identity,
        holder="a test",
        reset_features=reset_features,
        partition_bits=partition_bits,
        capacity=capacity,
        options=options,
        run=run,
        run_snapshots=run,
        new_state=lambda schema: ShardState(
            schema, partitions=1 << partition_bits, capacity=capacity, most_users=100_000, most_texts=100_000
        ),
    )


def make_shard(
    found: Recovered,
    *,
    owned: Sequence[int] = range(256),
    epoch: int = 7,
    capacity: Capacity | None = None,
    clock: Callable[[], int] | None = None,
    health: Health | None = None,
    partition_bits: int = 8,
    shard_id: int = 3,
    snapshot_log_bytes: int = 1 << 40,
    lease: Lease | None = None,
) -> Shard:
    """The shard that goes on from there."""
    clock = clock or Clock()
    health = health or Health()
    health.serving()
    return Shard(
        shard_id,
        partition_bits=partition_bits,
        owned=owned,
        epoch=epoch,
        state=found.state,
        log=ReplicatedLog(found.log),
        snapshotter=Snapshotter(
            found.snapshots,
            found.state,
            found.log,
            clock=clock,
            last=found.snapshot,
            log_bytes=snapshot_log_bytes,
            interval_s=1e9,
        ),
        capacity=capacity or Capacity(event_ids_per_shard=1024),
        clock=clock,
        health=health,
        lease=lease or endless_lease(),
    )


def endless_lease() -> Lease:
    """A lease that nobody needs to renew."""
    lease = Lease(lambda: 0, "a test")
    lease.take(Grant("a test", 0, 1))
    return lease


@asynccontextmanager
async def running(
    schema: Schema,
    fs: FileSystem | None = None,
    *,
    gate: Gate | None = None,
    clock: Callable[[], int] | None = None,
    owned: Sequence[int] = range(256),
    health: Health | None = None,
    lease: Lease | None = None,
    directory: Path = DIRECTORY,
    identity: bytes = IDENTITY,
    **capacity: int,
) -> AsyncIterator[Shard]:
    """A shard that serves; at the end it is closed, if it has not failed."""
    bounds = Capacity(**{"event_ids_per_shard": 1024, **capacity})
    found = await recovered(
        fs or CrashingFileSystem(), schema, gate=gate, capacity=bounds, directory=directory, identity=identity
    )
    shard = make_shard(found, owned=owned, capacity=bounds, clock=clock, health=health, lease=lease)
    writer = asyncio.create_task(shard.run())
    try:
        yield shard
    finally:
        await shard.close()
        await asyncio.wait([writer])
        found.lock.release()
