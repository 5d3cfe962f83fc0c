"""What frontends ask of the coordinator for people, and how it says what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from profile_service.cluster.plan import Layout
from profile_service.errors import InvalidArgument, Unavailable


class Changes(Protocol):
    """What runs where, and changes of owners. Those return when everything is done, however long that takes."""

    async def layout(self) -> Layout:
        """The nodes, what is on each, and how standbys do."""

    async def move(self, partitions: Sequence[int], target_id: int) -> Changed:
        """Gives the partitions to a shard."""

    async def scale(self, shard_count: int) -> Changed:
        """Has so many shards share the partitions."""

    async def drain_node(self, node: str) -> Changed:
        """Moves everything away from a node."""


@dataclass
class Moved:
    """What moves have cost."""

    partitions: int = 0
    rows: int = 0
    """Each as often as it was sent."""
    size_bytes: int = 0
    attempts: int = 0

    def since(self, before: Moved) -> Moved:
        """What was added since."""
        return Moved(
            self.partitions - before.partitions,
            self.rows - before.rows,
            self.size_bytes - before.size_bytes,
            self.attempts - before.attempts,
        )


@dataclass(frozen=True)
class Changed:
    """How a change ended that was asked for. Not an exception: Ray would wrap it."""

    epoch: int
    """Of now."""
    wrong_field: str = ""
    """The argument that is wrong, where one is."""
    reason: str = ""
    """Why it was not done, or not all of it; empty where it was."""

    moved: Moved = field(default_factory=Moved)
    """What was sent for it."""

    def raise_fault(self) -> None:
        """Raises InvalidArgument or Unavailable where it was not done."""
        if self.wrong_field:
            raise InvalidArgument(self.wrong_field, self.reason)
        if self.reason:
            raise Unavailable(self.reason, retry_after_s=1.0)
