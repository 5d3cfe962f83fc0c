"""The service's processes as Ray's actors: how each is created, and found again by its name. All are detached, and
started again by Ray for ever.

A process's name says what it is, where and of which generation: `shard-3@NODE_ID#GENERATION`. So a coordinator that
has just started finds what its predecessor left. Which of a shard's two processes is the standby is not in the name.

Ray's node affinity is hard: a shard on another node than its data would be an empty one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from profile_service.cluster.calls import COORDINATOR_NAME, NAMESPACE, on_node
from profile_service.cluster.plan import Node, Plan
from profile_service.shard.actor import ShardActor
from profile_service.storage.data_directory import shard_directory

ACTOR_CPUS = 0.001
"""Ray places actors by it. The machine's cores are shared by all of them, so each asks for next to nothing; it is more
than nothing, or else an autoscaler would take the node for an idle one."""


@dataclass(frozen=True)
class Process:
    """An actor of the service."""

    role: str
    """ "frontend", or "shard-" and its id."""
    node_id: str
    generation: str
    handle: ActorHandle[Any]

    @property
    def name(self) -> str:
        """By which Ray knows it."""
        return _name(self.role, self.node_id, self.generation)


def create_coordinator(actor_class: type, plan: Plan, head_cpus: float) -> ActorHandle[Any]:
    """The coordinator, on the head node: it keeps what it knows in that node's data directory. Found, where there is
    one."""
    options = {"num_cpus": _cpus(head_cpus), "resources": {"node:__internal_head__": ACTOR_CPUS}}
    return _create(actor_class, COORDINATOR_NAME, options, plan)


def create_frontend(plan: Plan, node: Node) -> Process:
    """A node's frontend: created, or found where there is one."""
    return _create_on(node, plan, "frontend", plan.frontend, plan.schema, node.settings(plan.settings))


def create_shard(plan: Plan, shard_id: int, node: Node) -> Process:
    """A shard on the node that has its directory: created, or found where there is one."""
    return _create_on(
        node,
        plan,
        f"shard-{shard_id}",
        ShardActor,
        shard_id,
        plan.schema,
        node.settings(plan.settings),
        # It owns nothing until the coordinator says so. A restart gets these arguments again, however old they are.
        0,
        (),
        plan.manifest.identity(shard_id),
        shard_directory(node.data_dir, shard_id),
    )


def find_processes() -> list[Process]:
    """All of the service that Ray knows of and has not given up, but for the coordinator."""
    found = []
    for listed in ray.util.list_named_actors(all_namespaces=True):
        role, at, rest = listed["name"].partition("@")
        node_id, _, generation = rest.partition("#")
        if listed["namespace"] == NAMESPACE and at:
            handle = ray.get_actor(listed["name"], namespace=NAMESPACE)
            found.append(Process(role, node_id, generation, handle))
    return found


def _create_on(node: Node, plan: Plan, role: str, actor_class: type, *arguments: object) -> Process:
    options = {"num_cpus": _cpus(node.cpus), "scheduling_strategy": on_node(node.node_id)}
    name = _name(role, node.node_id, plan.generation)
    return Process(role, node.node_id, plan.generation, _create(actor_class, name, options, *arguments))


def _create(actor_class: type, name: str, options: Mapping[str, Any], *arguments: object) -> ActorHandle[Any]:
    """The actor of this name in the service's namespace: created, or found where there is one. Ray restarts it for
    ever."""
    remote_class: Any = ray.remote(actor_class)
    handle: ActorHandle[Any] = remote_class.options(
        name=name, namespace=NAMESPACE, get_if_exists=True, lifetime="detached", max_restarts=-1, **options
    ).remote(*arguments)
    return handle


def _cpus(of_node: float) -> float:
    """A head is often given no CPU, to keep work away from it: it can take a frontend all the same."""
    return ACTOR_CPUS if of_node else 0.0


def _name(role: str, node_id: str, generation: str) -> str:
    return f"{role}@{node_id}#{generation}"
