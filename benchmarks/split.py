"""A load split by the owners of its users, for producers that go straight to them."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from benchmarks.load import SCHEMAS, Load
from profile_service.config import Limits
from profile_service.domain.schema import load_schema
from profile_service.wire.gather import gather, split_by_owner
from profile_service.wire.plan import WirePlan
from profile_service.wire.scan import scan_batch
from userprofile.v1 import admin_service_pb2


def split_load(load: Load, topology: admin_service_pb2.GetTopologyResponse) -> list[tuple[str, Load]]:
    """By shard its address, and what its users do: in their order, and in batches as large as the load's."""
    position = {shard.shard_id: number for number, shard in enumerate(topology.shards)}
    owners = np.empty(topology.partition_count, np.int32)
    for extent in topology.ranges:
        owners[extent.first_partition : extent.last_partition + 1] = position[extent.shard_id]
    runs = [_Run(load.batch_events) for _ in topology.shards]
    schema = load_schema(SCHEMAS[load.schema])
    plan = WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)
    bits = topology.partition_count.bit_length() - 1
    for batch in load.batches:
        scanned = scan_batch(batch, plan, Limits(), time.time_ns())
        order, start = split_by_owner(scanned.user_hash, scanned.status, owners, bits, len(runs))
        for number, run in enumerate(runs):
            theirs = order[start[number] : start[number + 1]]
            while len(theirs):
                taken, theirs = np.split(theirs, [run.room])
                run.add(gather(scanned.buffer, scanned.offset, scanned.length, taken), len(taken))
    return [
        (shard.address, replace(load, batches=run.finish(), events=run.events))
        for shard, run in zip(topology.shards, runs, strict=True)
    ]


class _Run:
    """The events of one owner, put together to batches."""

    def __init__(self, batch_events: int) -> None:
        self.events = 0
        self.room = self._batch_events = batch_events
        """Events that are missing to the next batch."""
        self._batches: list[bytes] = []
        self._waiting: list[memoryview] = []

    def add(self, events: memoryview, count: int) -> None:
        self._waiting.append(events)
        self.events += count
        self.room -= count
        if not self.room:
            self._close()

    def finish(self) -> list[bytes]:
        if self._waiting:
            self._close()
        return self._batches

    def _close(self) -> None:
        self._batches.append(b"".join(self._waiting))
        self._waiting, self.room = [], self._batch_events
