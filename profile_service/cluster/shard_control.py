"""What the coordinator asks of a shard's process, and what that says of itself: `actor.py` carries it over Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from profile_service.cluster.replicas import ReplicaControl
from profile_service.shard.lease import Grant
from profile_service.shard.reports import Departed, Shipping


class ShardDead(Exception):
    """The shard is away, and will not be back by itself."""


class Located(Protocol):
    """What a shard says of itself."""

    @property
    def address(self) -> str:
        """host:port; empty until it listens."""

    @property
    def node(self) -> str:
        """Node it runs on."""

    @property
    def epoch(self) -> int:
        """The epoch that it goes by."""

    @property
    def state(self) -> str:
        """As in `Standing`."""

    @property
    def progress(self) -> float:
        """As in `Standing`."""

    @property
    def message(self) -> str:
        """As in `Standing`."""

    @property
    def incarnation(self) -> str:
        """Tells this process from those before it."""

    @property
    def lock(self) -> str:
        """Identity of the lock that it has on its directory; empty before it has it."""

    @property
    def asked_ns(self) -> int:
        """When it asked for a lease, by its own clock."""

    @property
    def shipping(self) -> Shipping:
        """How its standby does."""

    @property
    def promoted(self) -> bool:
        """Whether it was a standby, and takes nothing as one any more."""


class ShardControl(ReplicaControl, Protocol):
    """The calls that the coordinator makes to one shard. Each raises whatever the transport raises where the shard is
    away, and ShardDead where it stays so."""

    async def describe(self, grant: Grant | None) -> Located:
        """Where it is, and how it does; `grant` is its lease."""

    async def update_topology(self, epoch: int, owned: Sequence[int]) -> None:
        """Tells it what it owns."""

    async def expect(self, move_id: str, epoch: int, partitions: Sequence[int]) -> None:
        """As shard.Moves.expect."""

    async def depart(self, move_id: str, epoch: int, partitions: Sequence[int], address: str) -> Departed:
        """As shard.Moves.depart, to the shard at that address."""

    async def finish(self, move_id: str) -> Departed:
        """As shard.Moves.finish."""

    async def clean(self, partitions: Sequence[int]) -> None:
        """As shard.Moves.clean."""

    async def sums(self) -> bytes:
        """As shard.Moves.sums."""

    async def adopt(self, sums: bytes) -> None:
        """As shard.Moves.adopt."""

    async def population_state(self) -> bytes:
        """Its sums."""

    async def set_population(self, states: Sequence[bytes]) -> None:
        """Gives it the sums of all."""
