"""Every shard has a process where it is to be, whatever becomes of other nodes. Ray is made up: nodes come and go,
surveys fail or hang, and processes are names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from profile_service.cluster import fleet as fleet_module
from profile_service.cluster.fleet import Fleet
from profile_service.cluster.places import PlaceRegister, Places
from profile_service.cluster.plan import FrontendDescription, Node, Plan
from profile_service.cluster.processes import Process
from profile_service.cluster.survey import Survey, make_shard_directory, survey
from profile_service.config import Settings, Storage
from profile_service.storage.data_directory import Manifest
from tests.cluster.local_cluster import until

REDIS = "redis://cache:6379/0"


@dataclass(frozen=True)
class Description(FrontendDescription):
    """A frontend's, and a shard's."""

    state: str = "serving"


class Handle:
    """An actor, which does at once what it is asked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.describe = self.drain = self

    async def remote(self, *_: object) -> Description:
        return Description("host:1", "host:2", ready=True)


class Cluster:
    """Nodes by id, what is on their disks, and what runs."""

    def __init__(self) -> None:
        self.alive: set[str] = set()
        self.directories: dict[str, set[int]] = {}
        self.broken: set[str] = set()
        """Nodes on which every call fails."""
        self.hanging: set[str] = set()
        self.full: set[str] = set()
        """Nodes on which no directory can be made."""
        self.killed: list[str] = []
        self.surveys: list[str] = []

    def nodes(self) -> dict[str, Any]:
        return {
            node_id: {"NodeID": node_id, "NodeManagerAddress": f"address of {node_id}", "Resources": {"CPU": 1.0}}
            for node_id in sorted(self.alive)
        }

    async def run(self, node_id: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if node_id in self.hanging:
            await asyncio.Event().wait()
        if node_id in self.broken:
            raise ConnectionError("broken")
        if call is survey:
            self.surveys.append(node_id)
            held = self.directories.setdefault(node_id, set())
            return Survey(f"name of {node_id}", Path(f"/{node_id}"), 1, 2, frozenset(held))
        assert call is make_shard_directory
        if node_id in self.full:
            raise OSError("no room")
        self.directories[node_id].add(arguments[1])
        return None


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(fleet_module, "_alive_nodes", cluster.nodes)
    monkeypatch.setattr(fleet_module, "run_on_node", cluster.run)
    monkeypatch.setattr(fleet_module, "find_processes", list)
    monkeypatch.setattr("ray.kill", lambda handle: cluster.killed.append(handle.name))
    monkeypatch.setattr(fleet_module, "SURVEY_PATIENCE_S", 0.05)

    def create(role: str, node: Node) -> Process:
        name: Any = Handle(f"{role} on {node.node_id}")
        return Process(role, node.node_id, "", name)

    monkeypatch.setattr(fleet_module, "create_shard", lambda plan, shard_id, node: create(f"shard-{shard_id}", node))
    monkeypatch.setattr(fleet_module, "create_frontend", lambda plan, node: create("frontend", node))
    return cluster


def fleet_of(store: str = "local", shards: int = 2, places: Places | None = None) -> tuple[Fleet, PlaceRegister]:
    async def write(_: Places) -> None:
        pass

    register = PlaceRegister(places or Places(), write)
    settings = Settings(storage=Storage(store=store, data_dir=Path("/data")))
    plan = Plan("", settings, Manifest.new(8, shards), object, "")
    return Fleet(plan, register, range(shards)), register


def where(fleet: Fleet, shard_id: int) -> str:
    """The process of the shard."""
    handle: Any = fleet.shard(shard_id)
    name: str = handle.name
    return name.partition(" on ")[2]


async def test_shards_are_spread_and_stay(cluster: Cluster) -> None:
    cluster.alive = {"a", "b"}
    fleet, register = fleet_of()
    await fleet.adopt()
    assert [where(fleet, shard_id) for shard_id in (0, 1)] == ["a", "b"]
    await fleet.look()
    assert register.places.homes == {0: "name of a", 1: "name of b"}
    assert not cluster.killed


@pytest.mark.parametrize("store", ["local", REDIS])
async def test_a_shard_whose_node_is_lost_goes_elsewhere_if_its_profiles_are_in_a_store(
    cluster: Cluster, store: str
) -> None:
    cluster.alive = {"a", "b"}
    fleet, register = fleet_of(store)
    await fleet.adopt()
    cluster.alive = {"a"}
    await fleet.look()
    if store == REDIS:
        assert where(fleet, 1) == "a"
        cluster.alive = {"a", "b"}
        await fleet.look()
        # It stays, and what the node had is not started a second time.
        assert where(fleet, 1) == "a"
        assert "shard-1 on a" not in cluster.killed
        assert not any(cluster.directories.values()), "nothing of a shard is on a node"
    else:
        with pytest.raises(fleet_module.Away, match="not part of the cluster now"):
            fleet.shard(1)
        assert register.places.homes[1] == "name of b"


async def test_a_node_that_cannot_be_surveyed_keeps_its_processes_and_is_looked_at_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.alive = {"a", "b"}
    await fleet_of()[0].adopt()
    homes = Places({0: "name of a", 1: "name of b"})
    running = [
        Process("shard-0", "a", "", Handle("shard-0 on a")),
        Process("shard-1", "b", "", Handle("shard-1 on b")),
    ]
    monkeypatch.setattr(fleet_module, "find_processes", lambda: running)
    for store in ("local", REDIS):
        # As a coordinator that has just started finds it.
        cluster.broken = {"b"}
        fleet, register = fleet_of(store, places=homes)
        await fleet.adopt()
        assert where(fleet, 0) == "a"
        assert register.places == homes
        assert [standing.state for standing in fleet.standings() if standing.node_id == "b"] == ["faulty"]
        assert not cluster.killed
        cluster.broken = set()
        await fleet.look()
        with pytest.raises(fleet_module.Away):
            fleet.shard(1)
        monkeypatch.setattr(fleet_module, "RESURVEY_S", 0.0)
        await fleet.look()
        assert where(fleet, 1) == "b"
        assert not cluster.killed
        monkeypatch.setattr(fleet_module, "RESURVEY_S", 10.0)


async def test_a_node_that_does_not_answer_holds_up_none_of_the_others(cluster: Cluster) -> None:
    cluster.alive = {"a", "b", "silent"}
    cluster.hanging = {"silent"}
    homes = Places({0: "name of a", 1: "name of b"})
    for name, shard_id in (("a", 0), ("b", 1)):
        cluster.directories[name] = {shard_id}
    fleet, register = fleet_of(places=homes, shards=3)
    await asyncio.wait_for(fleet.adopt(), 2.0)
    assert [where(fleet, shard_id) for shard_id in (0, 1)] == ["a", "b"]
    # A new shard waits: the node may have its directory.
    assert 2 not in register.places.homes
    cluster.alive = {"a", "b"}
    await fleet.look()
    assert where(fleet, 2) in ("a", "b")


async def test_a_disk_without_room_keeps_no_shard_from_starting_elsewhere_nor_one_that_is_there_from_being_found(
    cluster: Cluster,
) -> None:
    cluster.alive = {"a", "b"}
    cluster.full = {"a"}
    cluster.directories = {"a": {0}}
    fleet, register = fleet_of(shards=4, places=Places({0: "name of a"}))
    for _ in range(2):
        await fleet.adopt()
    assert register.places.homes == {0: "name of a", 1: "name of b", 2: "name of b", 3: "name of b"}
    assert where(fleet, 0) == "a"
    assert not cluster.killed


async def test_an_update_replaces_what_is_on_a_node_that_is_surveyed_late(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.alive = {"a", "b"}
    cluster.hanging = {"b"}
    cluster.directories = {"a": {0}, "b": {1}}
    handles: list[Any] = [Handle(f"{what} before on {node}") for node in "ab" for what in ("frontend", "shard")]
    before = [
        Process("frontend", "a", "before", handles[0]),
        Process("shard-0", "a", "before", handles[1]),
        Process("frontend", "b", "before", handles[2]),
        Process("shard-1", "b", "before", handles[3]),
    ]
    monkeypatch.setattr(fleet_module, "find_processes", lambda: before)
    fleet, _ = fleet_of(places=Places({0: "name of a", 1: "name of b"}))
    await fleet.adopt()
    following, updating = asyncio.create_task(fleet.follow()), asyncio.create_task(fleet.update())
    await until(lambda: len(cluster.killed) == 2)
    assert fleet.outdated == 2
    assert not updating.done()
    cluster.hanging = set()
    # Ray has given the call up that hangs.
    for task in fleet._surveying.values():
        task.cancel()
    fleet._surveying.clear()
    await updating
    assert sorted(cluster.killed) == sorted(handle.name for handle in handles)
    assert fleet.outdated == 0
    following.cancel()
