from __future__ import annotations

import pickle

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from sortedcontainers import SortedDict

from profile_service.cluster.partitioning import partition_of, user_hash
from profile_service.cluster.topology import ShardLocation, Topology


def places(count: int) -> list[ShardLocation]:
    return [ShardLocation(number, f"127.0.0.1:{1000 + number}", "n") for number in range(count)]


@given(st.text(min_size=1), st.integers(0, 16))
@settings(max_examples=100, deadline=None)
def test_a_partition_is_the_top_bits_of_xxh64(user_id: str, bits: int) -> None:
    partition = partition_of(user_hash(user_id), bits)
    assert 0 <= partition < 1 << bits
    assert partition == xxhash.xxh64(user_id.encode(), seed=0).intdigest() * (1 << bits) // (1 << 64)


@given(st.integers(0, 10), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_an_even_topology_gives_each_partition_one_owner_and_spreads_them(bits: int, shards: int) -> None:
    topology = Topology.even(bits, places(shards))
    owned = [topology.owned_by(number) for number in range(shards)]
    assert sorted(partition for one in owned for partition in one) == list(range(1 << bits))
    sizes = [len(one) for one in owned]
    assert max(sizes) - min(sizes) <= 1
    table = topology.owner_table()
    for number, one in enumerate(owned):
        for partition in one:
            assert topology.owner_of(partition) == number
            assert topology.shards[table[partition]].shard_id == number


def test_every_fault_is_listed() -> None:
    twice = [ShardLocation(1, "a:1"), ShardLocation(1, "a:1")]
    faults = Topology(0, 4, tuple(twice), SortedDict({3: 7, 99: 1})).validate()
    for expected in ("epoch", "ascend", "a:1", "partition 0", "99", "shard 7"):
        assert any(expected in fault for fault in faults), (expected, faults)
    with pytest.raises(ValueError, match="there is none"):
        Topology.even(4, [])
    with pytest.raises(ValueError, match="partition_bits"):
        Topology(1, 17, tuple(places(1)), SortedDict({0: 0})).validated()


def test_a_new_place_is_a_new_epoch_with_the_same_owners() -> None:
    before = Topology.even(4, places(3))
    after = before.with_shards({1: ShardLocation(1, "127.0.0.1:9", "m")})
    assert after.epoch == before.epoch + 1
    assert after.shards[1].address == "127.0.0.1:9"
    assert after.same_owners(before)
    moved = Topology(9, 4, before.shards, SortedDict({0: 2, 4: 0, 8: 1}))
    assert not moved.same_owners(before)
    assert pickle.loads(pickle.dumps(moved)) == moved  # noqa: S301
