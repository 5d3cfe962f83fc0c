"""A snapshot of the first format, with every kind of feature and of block, must load for ever.

`tests/storage/golden/snapshot-v1` was written by `python -m tests.shard.test_golden_snapshot DIRECTORY`. A change of
the format gets a directory of its own beside it, and this one stays.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import numpy as np
from google.protobuf.json_format import MessageToDict

from profile_service.domain.features import KINDS
from profile_service.domain.population import Population
from profile_service.domain.schema import parse_schema
from profile_service.shard.state import ShardState
from profile_service.storage.fs import RealFileSystem
from profile_service.storage.snapshot import SnapshotStore
from tests.domain.test_profile_table import NOW_NS
from tests.shard.test_state import PARTITIONS, Batch, Straight, draw_batch, new_state
from userprofile.v1 import profile_pb2

T = TypeVar("T")
GOLDEN = Path(__file__).parents[1] / "storage" / "golden" / "snapshot-v1"
SNAPSHOT = "0000000001.snapshot"
PROFILES = "profiles.json"
IDENTITY = b"golden snapshot."
READ_NS = NOW_NS + 3600 * 10**9

SCHEMA = parse_schema(
    """
name: golden
events: {view: {weight: 1}, buy: {weight: 7.5}}
half_life: 30d
features:
  color:    {kind: categorical, attribute: color, values: [red, blue, "no"], prior: population, prior_strength: 3}
  make:     {kind: top_k, attribute: make, k: 4}
  price:    {kind: distribution, attribute: price, bins: {scale: log, min: 1, max: 1000, count: 7}}
  buys:     {kind: counter, events: [buy], half_life: none}
  activity: {kind: counter, half_life: 12h}
  day:      {kind: window_count, window: 24h, bucket: 1h}
  last:     {kind: latest, attribute: make}
  items:    {kind: recent, attribute: item, size: 4}
  makes:    {kind: distinct, attribute: make, precision: 5}
"""
)


async def inline(work: Callable[[], T]) -> T:
    return work()


def store(directory: Path) -> SnapshotStore:
    return SnapshotStore(RealFileSystem(), directory, IDENTITY, inline)


def golden_state() -> ShardState:
    rng = Random(20261122)
    straight = Straight(SCHEMA, new_state(SCHEMA))
    for sequence in range(40):
        batch = draw_batch(SCHEMA, rng)
        event_ids = batch.event_ids or [f"golden-{sequence}-{n}" for n in range(len(batch.events))]
        straight.commit(Batch(batch.events, event_ids, batch.producer_id, sequence + 1))
    straight.forget(["u3", "u5"])
    return straight.state


async def write(state: ShardState, directory: Path) -> None:
    """Writes the snapshot and what is to be read from it."""
    writer = await store(directory).begin(4096, NOW_NS)
    copy = state.copy_blocks()
    space = np.zeros(copy.space_bytes, np.uint8)
    stamp = 4096
    while (block := copy.step(space)) is not None:
        await writer.write(block[0], stamp, [block[1]])
        stamp += 8
    state.finish_copy()
    await writer.publish()
    (directory / PROFILES).write_text(json.dumps(readable(state), indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def readable(state: ShardState) -> dict[str, Any]:
    """Everything that callers can learn of the state."""
    population = Population.merge(state.schema, [state.table.population.to_state(state.table.texts)])
    users = sorted(state.table.users.bytes_of(int(row)).decode() for row in state.table.users.numbers())
    partitions = np.arange(PARTITIONS, dtype=np.int64)
    return {
        "event_count": state.event_count,
        "duplicate_count": state.duplicate_count,
        "event_ids": [f"{key:016x}" for key in state.event_ids.copy(*state.event_ids.held)[0].tolist()],
        "profiles": {user: _to_dict(state.table.profile(user, READ_NS, population=population)) for user in users},
        "population": _to_dict(population.profile(READ_NS)),
        "acknowledged": {producer: state.producers.acknowledged(producer) for producer in ("p1", "p2")},
        "p1 has not applied 20": _answer(state, "p1", 20, partitions),
        "request:a has not reached": _answer(state, "request:a", 1, partitions),
    }


def _to_dict(encoded: bytes) -> dict[str, Any]:
    return MessageToDict(profile_pb2.Profile.FromString(encoded))


def _answer(state: ShardState, producer_id: str, sequence: int, partitions: np.ndarray[Any, Any]) -> list[int]:
    fresh = state.producers.fresh(producer_id, sequence, partitions, NOW_NS)
    return partitions.tolist() if fresh is None else np.flatnonzero(fresh).tolist()


def load() -> ShardState:
    (info,) = store(GOLDEN).list()
    assert (info.damage, info.replay_position, info.created_ns) == ("", 4096, NOW_NS)
    state = ShardState.load(store(GOLDEN).blocks(info), new_state)
    state.finish_replay()
    return state


def test_the_golden_snapshot_loads() -> None:
    state = load()
    state.check_invariants()
    assert state.schema.fingerprint == SCHEMA.fingerprint
    assert readable(state) == json.loads((GOLDEN / PROFILES).read_text())


async def test_this_version_writes_the_same(tmp_path: Path) -> None:
    """Where this fails, the format has changed: then it needs a version of its own, and a golden snapshot of it."""
    await write(load(), tmp_path)
    for name in (SNAPSHOT, PROFILES):
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_every_kind_of_feature_and_of_block_is_in_it() -> None:
    assert {feature.kind for feature in SCHEMA.features} == set(KINDS)
    (info,) = store(GOLDEN).list()
    assert {block.kind for block in store(GOLDEN).blocks(info)} == set(range(1, 11))


if __name__ == "__main__":
    asyncio.run(write(golden_state(), Path(sys.argv[1])))
