"""Compiles every kernel that a shard runs, once before the processes start; each shard then loads what that left."""

from __future__ import annotations

import numpy as np

from profile_service.clock import system_clock
from profile_service.config import Capacity
from profile_service.domain.index import Strings
from profile_service.domain.packed_profiles import PackedProfiles
from profile_service.domain.population import Population
from profile_service.domain.schema import Schema
from profile_service.shard.row_cache import RowCache
from profile_service.shard.state import ShardState
from profile_service.shard.transfer import Departure, Transfer, check, check_room, receive
from profile_service.storage.snapshot import Block
from profile_service.wire.decode import decode_events
from profile_service.wire.plan import WirePlan
from profile_service.wire.warm import warm_decoding
from userprofile.v1 import event_service_pb2


def warm_kernels(schema: Schema) -> None:
    """Takes a few events through the wire, and of every type through a state of its own: decode, admit, apply, read,
    copy, load, replay."""
    warm_decoding()
    now_ns = system_clock()
    message = event_service_pb2.IngestEventsRequest()
    for number, event_type in enumerate([*schema.event_types, *schema.event_types]):
        event = message.events.add(user_id=f"u{number}", type=event_type.name, event_id=f"e{number}")
        event.time.FromNanoseconds(now_ns - number)
        for name in schema.text_attributes:
            event.attributes[name] = "text"
        for name in schema.number_attributes:
            event.attributes[name] = 1.0
    plan = WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)
    columns = decode_events(message.SerializeToString(), plan, now_ns)
    state = _small_state(schema)
    # The same event ids twice: the way of duplicates, too.
    for sequence in (1, 2):
        partitions = np.zeros(columns.count, np.int64)
        state.admit("warm", sequence, 0, partitions, columns.event_id_hash[: columns.count], now_ns)
        state.apply(columns, 0, columns.count, now_ns)
    population = Population.merge(schema, [state.table.population.to_state(state.table.texts)])
    for user_id in ("u0", "nobody"):
        state.table.profile(user_id, now_ns, (), population)
    population.profile(now_ns)
    copy = state.copy_blocks()
    space = np.empty(copy.space_bytes, np.uint8)
    blocks = []
    while (step := copy.step(space)) is not None:
        blocks.append(Block(step[0], 1, memoryview(bytes(step[1]))))
        # What is applied meanwhile does a little more.
        state.apply(columns, 0, columns.count, now_ns)
    state.finish_copy()
    _warm_transfer(state)
    state.forget([b"u0"])
    recovered = ShardState.load(blocks, _small_state)
    for position in (0, 1):
        recovered.note("warm", 3, 0, columns.user_hash, columns.event_id_hash, now_ns)
        recovered.replay(columns, np.full(columns.count, position), np.full(columns.count, now_ns))
    recovered.finish_replay()


def warm_stored_kernels(schema: Schema) -> None:
    """What is needed where rows live in a store, by shards beside `warm_kernels` and by frontends: stage, pack, unpack,
    read."""
    now_ns = system_clock()
    cache = RowCache(schema, most_users=1024, most_run_users=1024)
    for packed in (b"", cache.table.population.pack(cache.table.texts)):
        stage = cache.begin(Strings.join([b"u0", b"u1"]))
        cache.fill(stage, now_ns)
        rows = cache.pack(stage, 0, len(stage))
        cache.publish(stage, rows)
        if packed:
            cache.turn()
            cache.find(stage.users)
            cache.put(stage.users, rows)
            reader = PackedProfiles(schema, 2)
            reader.profiles(["u0", "u1"], rows, now_ns, (), reader.population([packed]))


def _warm_transfer(state: ShardState) -> None:
    """Takes everything that there is from one state to another."""
    departure, other = Departure(state, range(256)), _small_state(state.schema)
    while not departure.is_caught_up:
        piece = Transfer.FromString(departure.step())
        rows = check(other, piece)
        check_room(other, rows)
        receive(other, piece, rows)


def _small_state(schema: Schema) -> ShardState:
    return ShardState(
        schema, partitions=256, capacity=Capacity(event_ids_per_shard=1024), most_users=1024, most_texts=1024
    )
