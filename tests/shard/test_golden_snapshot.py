"""A snapshot of each format that ever was, with every kind of feature and of block, must load for ever.

    snapshot-v1             the first
    snapshot-v1-rows-v2     rows without the byte behind the registers of a `distinct`
    snapshot-v1-partitions  says of which partitions event ids are, where that is known

A change of the format, or of what rows look like, gets a directory of its own beside them, and these stay: what
`python -m tests.shard.test_golden_snapshot DIRECTORY` writes is what the first one holds, as this version would say it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict

from profile_service.domain.features import KINDS
from profile_service.domain.population import Population
from profile_service.domain.schema import parse_schema
from profile_service.shard.state import ShardState
from profile_service.storage.fs import RealFileSystem
from profile_service.storage.snapshot import SnapshotStore
from tests.domain.test_profile_table import NOW_NS
from tests.shard.test_state import PARTITIONS, new_state
from userprofile.v1 import profile_pb2

T = TypeVar("T")
DIRECTORY = Path(__file__).parents[1] / "storage" / "golden"
EARLIER = [DIRECTORY / "snapshot-v1", DIRECTORY / "snapshot-v1-rows-v2"]
GOLDEN = DIRECTORY / "snapshot-v1-partitions"
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
        "event_ids": [f"{key:016x}" for key in state.event_ids.copy(*state.event_ids.held).keys.tolist()],
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


def load(golden: Path = GOLDEN) -> ShardState:
    (info,) = store(golden).list()
    assert (info.damage, info.replay_position, info.created_ns) == ("", 4096, NOW_NS)
    state = ShardState.load(store(golden).blocks(info), new_state)
    state.finish_replay()
    return state


@pytest.mark.parametrize("golden", [*EARLIER, GOLDEN], ids=lambda golden: golden.name)
def test_golden_snapshots_load(golden: Path) -> None:
    state = load(golden)
    state.check_invariants()
    assert state.schema.fingerprint == SCHEMA.fingerprint
    assert readable(state) == json.loads((golden / PROFILES).read_text())


@pytest.mark.parametrize("golden", EARLIER, ids=lambda golden: golden.name)
async def test_what_an_earlier_version_wrote_becomes_what_this_one_writes(golden: Path, tmp_path: Path) -> None:
    assert (golden / SNAPSHOT).read_bytes() != (GOLDEN / SNAPSHOT).read_bytes()
    await write(load(golden), tmp_path)
    for name in (SNAPSHOT, PROFILES):
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()


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
    asyncio.run(write(load(EARLIER[0]), Path(sys.argv[1])))
