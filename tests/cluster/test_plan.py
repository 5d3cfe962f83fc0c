"""A new shard goes where the most is left for it, and nowhere where nothing is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from profile_service.cluster.places import Places
from profile_service.cluster.plan import Node, home_of_new_shard, home_of_standby


def node(name: str, share: float, fault: str = "") -> Node:
    return Node(
        node_id=f"id of {name}",
        name=name,
        address=name,
        data_dir=Path("/data"),
        cpus=share,
        share=share,
        grpc_port=1,
        http_port=2,
        fault=fault,
    )


def spread(nodes: list[Node], shards: int) -> Counter[str]:
    places = Places()
    for shard_id in range(shards):
        home = home_of_new_shard(nodes, places)
        assert home is not None
        places = places.with_home(shard_id, home.name)
    return Counter(places.homes.values())


@pytest.mark.parametrize(
    ("shares", "shards", "expected"),
    [
        ({"a": 4, "b": 4}, 6, {"a": 3, "b": 3}),
        ({"a": 4, "b": 8}, 6, {"a": 2, "b": 4}),
        ({"head": 0, "a": 1, "b": 1}, 5, {"a": 3, "b": 2}),
        ({"a": 2, "b": 1, "c": 1}, 4, {"a": 2, "b": 1, "c": 1}),
    ],
)
def test_shards_are_spread_by_what_nodes_have(shares: dict[str, float], shards: int, expected: dict[str, int]) -> None:
    assert spread([node(name, share) for name, share in shares.items()], shards) == expected


def test_a_shard_that_has_a_home_counts_there() -> None:
    nodes = [node("a", 1), node("b", 1)]
    home = home_of_new_shard(nodes, Places({0: "a", 1: "a", 2: "away"}))
    assert home is not None
    assert home.name == "b"


def test_without_a_node_that_can_take_it_there_is_no_home() -> None:
    assert home_of_new_shard([node("head", 0), node("broken", 4, fault="its disk is full")], Places()) is None


def test_a_standby_goes_to_another_node_where_the_least_is() -> None:
    nodes = [node("a", 1), node("b", 1), node("c", 1)]
    places = Places({0: "a", 1: "b", 2: "c"}).with_standby(1, "c")
    chosen = home_of_standby(nodes, places, 0)
    assert chosen is not None
    assert chosen.name == "b"
    assert home_of_standby(nodes[:1], places, 0) is None
