"""Where the directories of shards are, their own and their standbys': by names of nodes, which stay with the data.

home           the node of the process that may own partitions
standby        another node, on which the shard has a second process that follows the first
in sync        the standby has everything that is acknowledged, and no more will be without it: it may take the home's
               place, in one write
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Replica:
    """A shard's standby."""

    node: str
    in_sync: bool = False


@dataclass(frozen=True)
class Places:
    """Of all shards, by id."""

    homes: Mapping[int, str] = field(default_factory=dict)
    standbys: Mapping[int, Replica] = field(default_factory=dict)

    def with_home(self, shard_id: int, node: str) -> Places:
        """The shard's directory is on that node."""
        return replace(self, homes={**self.homes, shard_id: node})

    def with_standby(self, shard_id: int, node: str) -> Places:
        """The shard's standby is to be on that node, and has nothing yet."""
        assert node != self.homes[shard_id]
        return replace(self, standbys={**self.standbys, shard_id: Replica(node)})

    def without_standby(self, shard_id: int) -> Places:
        """The shard has none."""
        return replace(self, standbys={known: one for known, one in self.standbys.items() if known != shard_id})

    def with_sync(self, shard_id: int, node: str, in_sync: bool) -> Places:
        """Whether the shard's standby on that node has everything; the same where it is on another one by now."""
        known = self.standbys.get(shard_id)
        if known is None or known.node != node:
            return self
        return replace(self, standbys={**self.standbys, shard_id: Replica(node, in_sync)})

    def promoted(self, shard_id: int) -> Places:
        """The standby's node is the home; the one before is to have a standby, and counts as having nothing."""
        standby = self.standbys[shard_id]
        assert standby.in_sync
        swapped = self.with_home(shard_id, standby.node)
        return swapped.with_standby(shard_id, self.homes[shard_id])

    def without(self, shard_id: int) -> Places:
        """The shard is no more."""
        homes = {known: node for known, node in self.homes.items() if known != shard_id}
        return replace(self.without_standby(shard_id), homes=homes)

    def encode(self) -> dict[str, Any]:
        """As a document."""
        return {
            "homes": {str(shard_id): node for shard_id, node in sorted(self.homes.items())},
            "standbys": {str(shard_id): [one.node, one.in_sync] for shard_id, one in sorted(self.standbys.items())},
        }

    @classmethod
    def decode(cls, fields: Mapping[str, Any]) -> Places:
        """Of a document; one of a version without standbys has none."""
        return cls(
            {int(shard_id): node for shard_id, node in fields["homes"].items()},
            {int(shard_id): Replica(*one) for shard_id, one in fields.get("standbys", {}).items()},
        )


class PlaceRegister:
    """The places of now, each change of them durable before anyone sees it.

    Args:
        write: returns when they are durable, or raises OSError.
    """

    def __init__(self, places: Places, write: Callable[[Places], Awaitable[None]]) -> None:
        self._places = places
        self._write = write
        self._is_known = True
        """Whether what is stored is what `places` says."""
        self._changing = asyncio.Lock()

    @property
    def places(self) -> Places:
        """Of now."""
        return self._places

    async def change(self, change: Callable[[Places], Places]) -> None:
        """Makes a change of the places of then; returns when what comes of it is durable, be it the same as before.

        Raises OSError: whether it is durable is then not known; the next change writes, whatever it changes.
        """
        async with self._changing:
            changed = change(self._places)
            if changed != self._places or not self._is_known:
                self._is_known = False
                await self._write(changed)
                self._places, self._is_known = changed, True
