"""What is to run, and where: values that the launcher makes and the coordinator keeps true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from profile_service.cluster.coordinator import Standing
from profile_service.cluster.places import Places
from profile_service.cluster.replicas import StandbyStanding
from profile_service.config import Settings
from profile_service.storage.data_directory import Manifest


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, and what it has for the service."""

    node_id: str
    """Ray's id: another one each time Ray is started there."""
    name: str
    """Of its data directory, where it is kept: the same for as long as the data is there."""
    address: str
    """By which the other nodes reach it, without a port."""
    data_dir: Path
    cpus: float
    """As Ray counts them."""
    share: float
    """How much of the service it can take, beside the others; 0 takes a frontend only."""
    grpc_port: int
    http_port: int
    shards: frozenset[int] = frozenset()
    """Those whose directories are here."""
    fault: str = ""
    """Why no shard can be here, for people; empty where nothing is wrong."""

    def settings(self, common: Settings) -> Settings:
        """The service's settings, as they are on this node."""
        return replace(
            common,
            host=self.address,
            grpc_port=self.grpc_port,
            http_port=self.http_port,
            storage=replace(common.storage, data_dir=self.data_dir),
        )


@dataclass(frozen=True)
class Plan:
    """What is to run."""

    schema: str
    """The schema file's text."""
    settings: Settings
    manifest: Manifest
    frontend: type
    """The frontends' actor, which this package may not know."""
    generation: str
    """Another one with each deployment: a process of another generation is replaced."""
    node: Node | None = None
    """The only node; None takes all of the Ray cluster, as they come and go."""
    first_epoch: int = 0
    """No epoch before it is given out: a store may know of later ones than the data directory does."""
    resource: str = "CPU"
    """Ray's resource by which shards are spread: a node with twice as much takes twice as many."""


@dataclass(frozen=True)
class FrontendDescription:
    """How a frontend does."""

    grpc_address: str = ""
    http_address: str = ""
    ready: bool = False
    """Whether every shard is connected and answers."""
    fault: str = ""
    """Why it cannot start."""


@dataclass(frozen=True)
class Progress:
    """How far a start or an update is."""

    shards: Mapping[int, Standing]
    nodes: tuple[NodeStanding, ...]
    outdated: int
    """Processes that are still to be replaced."""
    fault: str
    """Why no more are replaced; empty where they are."""

    @property
    def done(self) -> bool:
        """Whether all that can serve does, and as deployed."""
        serving = self.nodes and all(node.state == "serving" for node in self.nodes)
        return bool(serving) and not self.outdated and all(shard.reads for shard in self.shards.values())


@dataclass(frozen=True)
class NodeStanding:
    """How a node does, and what is on it."""

    name: str
    node_id: str
    """Empty where the node is away."""
    address: str
    state: str
    """ "serving", "starting", "faulty" (its frontend or its data directory cannot be used) or "away"."""
    shard_ids: tuple[int, ...]
    """Those that are here, or whose data is, ascending."""
    grpc_address: str = ""
    http_address: str = ""
    data_dir: str = ""
    message: str = ""
    """What the state is about, for people."""
    standby_ids: tuple[int, ...] = ()
    """The shards whose standbys are here, ascending."""


@dataclass(frozen=True)
class Layout:
    """What runs where, for people."""

    nodes: tuple[NodeStanding, ...] = ()
    standbys: Mapping[int, StandbyStanding] = field(default_factory=dict)
    """By shard; empty where none is asked for."""


def home_of_new_shard(nodes: Iterable[Node], places: Places) -> Node | None:
    """The node that takes a shard which has no data yet: the one that is then the least laden for what it has. None
    where no node can take one.

    Args:
        nodes: those that are there.
        places: where the data of shards is.
    """
    return _least_laden(nodes, Counter(places.homes.values()))


def home_of_standby(nodes: Iterable[Node], places: Places, shard_id: int) -> Node | None:
    """The node that takes the standby of a shard: not the shard's own. None where no other can take one."""
    laden = Counter(places.homes.values())
    laden.update(standby.node for standby in places.standbys.values())
    return _least_laden((node for node in nodes if node.name != places.homes[shard_id]), laden)


def _least_laden(nodes: Iterable[Node], laden: Counter[str]) -> Node | None:
    able = [node for node in nodes if node.share > 0 and not node.fault]
    return min(able, key=lambda node: ((laden[node.name] + 1) / node.share, node.address, node.name), default=None)
