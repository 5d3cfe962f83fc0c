"""What frontends ask of the coordinator for people, and how it says what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from profile_service.cluster.plan import NodeStanding
from profile_service.errors import InvalidArgument, Unavailable


class Changes(Protocol):
    """What runs where, and changes of owners. Those return when everything is done, however long that takes."""

    async def nodes(self) -> Sequence[NodeStanding]:
        """The nodes, and what is on each."""

    async def move(self, partitions: Sequence[int], target_id: int) -> Changed:
        """Gives the partitions to a shard."""

    async def scale(self, shard_count: int) -> Changed:
        """Has so many shards share the partitions."""

    async def drain_node(self, node: str) -> Changed:
        """Moves everything away from a node."""


@dataclass(frozen=True)
class Changed:
    """How a change ended that was asked for. Not an exception: Ray would wrap it."""

    epoch: int
    """Of now."""
    field: str = ""
    """The argument that is wrong, where one is."""
    reason: str = ""
    """Why it was not done, or not all of it; empty where it was."""

    def raise_fault(self) -> int:
        """The epoch. Raises InvalidArgument or Unavailable where it was not done."""
        if self.field:
            raise InvalidArgument(self.field, self.reason)
        if self.reason:
            raise Unavailable(self.reason, retry_after_s=1.0)
        return self.epoch
