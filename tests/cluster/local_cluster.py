"""Shards in the test's own event loop, each behind its gRPC server, and a topology that the test changes. No Ray."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from sortedcontainers import SortedDict

from profile_service.clock import system_clock
from profile_service.cluster.changes import Changed
from profile_service.cluster.plan import Layout, NodeStanding
from profile_service.cluster.router import Router
from profile_service.cluster.topology import ShardLocation, Topology
from profile_service.config import Capacity, Limits, Settings
from profile_service.domain.schema import parse_schema
from profile_service.shard.health import Health
from profile_service.shard.service import ShardServer
from profile_service.shard.shard import Shard, ShardCounters
from profile_service.shard.warm import warm_kernels
from profile_service.storage.crashing_fs import CrashingFileSystem
from profile_service.wire.apply_request import ApplyPart
from profile_service.wire.plan import WirePlan
from profile_service.wire.scan import ScannedBatch, scan_batch
from profile_service.wire.warm import warm_scanning
from tests.shard.shards import make_shard, recovered
from userprofile.v1 import event_service_pb2

SCHEMA = parse_schema(
    """
name: test
events: {view: {weight: 1}, contact: {weight: 8}}
half_life: none
features:
  color: {kind: categorical, attribute: color, values: [red, blue], prior: population, prior_strength: 2}
  views: {kind: counter, events: [view]}
  contacts: {kind: counter, events: [contact]}
"""
)
PLAN = WirePlan.compile(SCHEMA.event_type_names, SCHEMA.text_attributes, SCHEMA.number_attributes)
PARTITION_BITS = 4


def encode(user_ids: Iterable[str], *, event_type: str = "view", **fields: Any) -> bytes:
    """A StreamEventsRequest or IngestEventsRequest (their `events` are the same) with one event a user."""
    message: Any = (event_service_pb2.IngestEventsRequest if "request_id" in fields else None) or (
        event_service_pb2.StreamEventsRequest
    )
    request = message(**fields)
    for user_id in user_ids:
        request.events.add(user_id=user_id, type=event_type)
    return cast(bytes, request.SerializeToString())


def scan(message: bytes | memoryview, now_ns: int | None = None) -> ScannedBatch:
    return scan_batch(message, PLAN, Limits(), system_clock() if now_ns is None else now_ns)


class LocalCluster:
    """Shards and who owns what.

    Args:
        make_shard: (shard id, epoch, owned partitions) -> what serves; a real Shard where it is not given.
    """

    def __init__(
        self, shards: int, capacity: Capacity, make_shard: Callable[[int, int, list[int]], Any] | None = None
    ) -> None:
        self.capacity = capacity
        self.settings = Settings(capacity=capacity)
        self._make = make_shard
        self.shards: dict[int, Any] = {}
        self.disks: dict[int, CrashingFileSystem] = {}
        """Of the real shards."""
        self.healths: dict[int, Health] = {}
        """What the shards say of themselves; a test may say something else."""
        self._servers: dict[int, ShardServer] = {}
        self._writers: dict[int, asyncio.Task[None]] = {}
        self.topology = Topology.even(PARTITION_BITS, [ShardLocation(number, "") for number in range(shards)])
        self.asked = 0
        """How often the topology was asked for."""

    async def source(self) -> Topology:
        self.asked += 1
        return self.topology

    async def layout(self) -> Layout:
        """One machine with everything on it."""
        shard_ids = tuple(shard.shard_id for shard in self.topology.shards)
        return Layout((NodeStanding("here", "node", "127.0.0.1", "serving", shard_ids),))

    async def start(self) -> None:
        # A kernel that has to be compiled first would hold the loop for seconds.
        await asyncio.to_thread(_warm)
        for location in self.topology.shards:
            await self._begin(location.shard_id)
        await self.serve(*self.shards)

    async def _begin(self, shard_id: int) -> None:
        owned = self.topology.owned_by(shard_id)
        if self._make is not None:
            self.shards[shard_id] = self._make(shard_id, self.topology.epoch, owned)
        else:
            self.shards[shard_id] = shard = await self._real_shard(shard_id, self.topology.epoch, owned)
            self._writers[shard_id] = asyncio.create_task(shard.run())

    async def serve(self, *shard_ids: int) -> None:
        """These shards begin to serve, at new addresses; all shards hear of the new epoch before the router does."""
        places = {}
        for shard_id in shard_ids:
            health = self.healths.setdefault(shard_id, Health("serving"))
            self._servers[shard_id] = ShardServer(self.shards[shard_id], self.settings, health)
            places[shard_id] = ShardLocation(shard_id, await self._servers[shard_id].start())
        self.publish(self.topology.with_shards(places))

    async def cut(self, shard_id: int) -> None:
        """The shard's server ends at once, with every connection to it; the shard's state stays."""
        await self._servers.pop(shard_id).stop(0)

    async def kill(self, shard_id: int) -> None:
        """A real shard's process ends as by SIGKILL, at whatever it is doing: what it had written is left."""
        self.disks[shard_id] = self.disks[shard_id].kill()
        await self.cut(shard_id)
        writer = self._writers.pop(shard_id)
        writer.cancel()
        await asyncio.wait([writer])

    async def restart(self, shard_id: int) -> None:
        """The shard recovers from its disk and serves again, at another address."""
        await self._begin(shard_id)
        await self.serve(shard_id)

    def publish(self, topology: Topology) -> None:
        for shard_id, shard in self.shards.items():
            shard.update_topology(topology.epoch, topology.owned_by(shard_id))
        self.topology = topology

    def give(self, owners: Mapping[int, int]) -> None:
        """Range starts -> shards, from the next epoch on."""
        topology = self.topology
        self.publish(
            Topology(topology.epoch + 1, topology.partition_bits, topology.shards, SortedDict(owners)).validated()
        )

    async def move(self, partitions: Sequence[int], target_id: int) -> Changed:
        """Other owners, by name only: nothing that a shard holds goes with them."""
        if target_id not in self.shards:
            return Changed(self.topology.epoch, "target_shard_id", f"there is no shard {target_id}")
        self.publish(self.topology.with_owner(partitions, target_id))
        return Changed(self.topology.epoch)

    async def scale(self, shard_count: int) -> Changed:
        return Changed(self.topology.epoch, reason=f"there cannot be {shard_count} shards just now")

    async def drain_node(self, node: str) -> Changed:
        return Changed(self.topology.epoch, "node", f"no shard is on node {node!r}")

    async def stop(self) -> None:
        for server in self._servers.values():
            await server.stop(0)
        for shard in self.shards.values():
            await shard.close()
        if self._writers:
            await asyncio.wait(self._writers.values())

    async def _real_shard(self, shard_id: int, epoch: int, owned: list[int]) -> Shard:
        """The shard of the cluster's directory for it; a new one the first time."""
        found = await recovered(
            self.disks.setdefault(shard_id, CrashingFileSystem()),
            SCHEMA,
            capacity=self.capacity,
            partition_bits=PARTITION_BITS,
        )
        return make_shard(
            found,
            shard_id=shard_id,
            owned=owned,
            epoch=epoch,
            capacity=self.capacity,
            clock=system_clock,
            partition_bits=PARTITION_BITS,
        )


@asynccontextmanager
async def running(
    shards: int = 2,
    capacity: Capacity | None = None,
    make_shard: Callable[[int, int, list[int]], Any] | None = None,
) -> AsyncIterator[tuple[LocalCluster, Router]]:
    """A cluster and a router to it."""
    cluster = LocalCluster(shards, capacity or Capacity(event_ids_per_shard=1024), make_shard)
    await cluster.start()
    router = Router(cluster.source, scan, cluster.capacity)
    await router.start()
    try:
        yield cluster, router
    finally:
        await router.close()
        await cluster.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds; the test's timeout ends it otherwise."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.002)


class FakeShard:
    """The part of Shard that the server calls, scripted: subclasses override `submit` or `read`."""

    is_remote = False

    def __init__(self, shard_id: int, epoch: int, owned: list[int]) -> None:
        self.shard_id = shard_id
        self.epoch = self.oldest_epoch = epoch
        self.owned = set(owned)
        self.requests: list[list[ApplyPart]] = []
        """Parts of each request that was taken."""

    async def submit(self, parts: Sequence[ApplyPart], size_bytes: int, epoch: int, *rest: object) -> None:
        self.requests.append(list(parts))

    def read(self, user_ids: Sequence[str], features: Sequence[str], epoch: int | None = None) -> list[bytes]:
        return [user_id.encode() for user_id in user_ids]

    def acknowledged(self, producer_id: str) -> int:
        return 0

    async def create_snapshot(self) -> int:
        return 8

    def status(self) -> ShardCounters:
        return ShardCounters(0, 0, 0, 0, 0, 0, 0, "always", 0, 0, 0)

    def update_topology(self, epoch: int, owned: Iterable[int]) -> None:
        before, self.owned = self.owned, set(owned)
        self.epoch = epoch
        if before - self.owned:
            self.oldest_epoch = epoch

    async def close(self) -> None:
        pass


@functools.cache
def _warm() -> None:
    warm_kernels(SCHEMA)
    warm_scanning()
