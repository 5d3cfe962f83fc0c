"""Calls through Ray: to the coordinator's actor by its name, where a later one of the same name is found, too; and work
that is done once on a node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAMESPACE = "profile-service"
COORDINATOR_NAME = "coordinator"


class CoordinatorCalls:
    """Calls from within an event loop."""

    def __init__(self) -> None:
        self._handle: ActorHandle[Any] | None = None

    async def call(self, method: str, *arguments: object) -> Any:
        """What the method returns. Raises what Ray raises, ValueError where there is no coordinator."""
        if self._handle is None:
            self._handle = await asyncio.to_thread(find_coordinator)
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except ray.exceptions.ActorDiedError:
            # One that Ray restarts is only away: this one was replaced by another deployment.
            self._handle = None
            raise


def find_coordinator() -> ActorHandle[Any]:
    """The coordinator of the Ray cluster that this process belongs to. Raises ValueError where there is none."""
    handle: ActorHandle[Any] = ray.get_actor(COORDINATOR_NAME, namespace=NAMESPACE)
    return handle


def on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Has Ray place something on this node or nowhere."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def run_on_node(node_id: str, work: Callable[..., Any], *arguments: object) -> Any:
    """Runs `work` once on the node; returns Ray's reference to what it returns."""
    # A process that has our code loaded would be given to an actor later, and may be of before an update then.
    task: Any = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(work)
    return task.options(scheduling_strategy=on_node(node_id)).remote(*arguments)
