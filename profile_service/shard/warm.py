"""Compiles every kernel that a schema needs into the cache, once, before the processes that share it start."""

from __future__ import annotations

import asyncio

from profile_service.clock import system_clock
from profile_service.config import Capacity
from profile_service.domain.schema import Schema
from profile_service.domain.table import ProfileTable
from profile_service.shard.shard import Shard
from profile_service.storage.log import MemoryLog
from profile_service.wire.warm import compile_kernels
from userprofile.internal.v1 import shard_pb2
from userprofile.v1 import event_service_pb2


def warm_kernels(schema: Schema) -> None:
    """Takes a few events through the wire, and of every type through a shard of its own: decode, apply, read."""
    compile_kernels()
    asyncio.run(_warm(schema))


async def _warm(schema: Schema) -> None:
    now_ns = system_clock()
    message = event_service_pb2.IngestEventsRequest()
    for number, event_type in enumerate([*schema.event_types, *schema.event_types]):
        event = message.events.add(user_id=f"u{number}", type=event_type.name, event_id=f"e{number}")
        event.time.FromNanoseconds(now_ns - number)
        for name in schema.text_attributes:
            event.attributes[name] = "text"
        for name in schema.number_attributes:
            event.attributes[name] = 1.0
    events = message.SerializeToString()
    shard = Shard(
        0,
        schema,
        partition_bits=8,
        owned=range(256),
        epoch=1,
        log=MemoryLog(),
        capacity=Capacity(event_ids_per_shard=1024),
        clock=system_clock,
        table=ProfileTable(schema, most_users=1024, most_texts=1024),
    )
    writer = asyncio.create_task(shard.run())
    part = shard_pb2.ApplyRequest.Part(
        producer_id="warm", sequence=1, arrival_time_ns=now_ns, events=events, event_count=len(message.events)
    )
    await shard.submit([part], len(events), 1)
    part.sequence = 2
    # The same event ids again: the way of duplicates.
    await shard.submit([part], len(events), 1)
    shard.set_population([shard.population_state()])
    shard.read(["u0", "nobody"], [], 1)
    await shard.close()
    await writer
