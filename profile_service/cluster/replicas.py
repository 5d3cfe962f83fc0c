"""Has each shard's standby built, knows whether it has everything, and promotes it when the owner is away. Without Ray,
as `coordinator.py`, which tells it what it hears.

    no standby ─▶ follow, replicate ─▶ building ─▶ in sync (durable) ─▶ the owner is away ─▶ promote ─▶ homes swapped
                        ▲                             │                                              (durable)
                        └──── released ◀─ (durable) ◀─┴ the owner has lost it, or is a new process

In this order, so that what is acknowledged is always with whoever may be the owner next:

lost        the owner acknowledges nothing until it is durable that the standby is out of sync. Then it is released.
new owner   a process that was started anew ships to nobody: before it gets its first lease its standby is out of sync.
promoted    the standby takes nothing any more, then the homes are swapped, then it gets the lease, without waiting for
            that of the process before: nothing can be acknowledged there without the standby.

A standby that was started anew while it was in sync still has everything: it has answered only what was in its log.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from profile_service.cluster.places import PlaceRegister, Replica
from profile_service.errors import ProfileServiceError
from profile_service.shard.lease import Grant
from profile_service.shard.reports import BUILDING, IN_SYNC, LOST, Shipping

CALL_TIMEOUT_S = 2.0

RETRY_S = 2.0
"""Between two attempts to build a standby."""

MISSING = "missing"

logger = logging.getLogger(__name__)


class Described(Protocol):
    """What a process of a shard says of itself."""

    @property
    def address(self) -> str:
        """host:port."""

    @property
    def state(self) -> str:
        """As in `coordinator.Standing`."""

    @property
    def incarnation(self) -> str:
        """Tells this process from those before it."""

    @property
    def shipping(self) -> Shipping:
        """How its standby does."""


class ReplicaControl(Protocol):
    """The calls to a process of a shard. Each raises whatever the transport raises."""

    async def describe(self, grant: Grant | None) -> Described:
        """Where it is, and how it does."""

    async def follow(self, replication: str, incarnation: str) -> None:
        """It is a standby, and takes this replication."""

    async def promote(self, incarnation: str) -> None:
        """It is a standby no more."""

    async def replicate(self, replication: str, address: str) -> None:
        """As owner: it builds a standby there."""

    async def release(self, replication: str) -> None:
        """As owner: it goes on without that standby."""


@dataclass(frozen=True)
class StandbyStanding:
    """How a shard's standby does."""

    shard_id: int
    state: str
    """ "in sync", "building" or "missing"."""
    node: str
    """Name of the node where it is, or is to be; empty where there is none."""
    message: str = ""
    """Why it is not in sync, for people."""


class Replicas:
    """The standbys of one coordinator's shards.

    Args:
        register: where they are.
        standby: gives the process of a shard's standby; raises where there is none.
    """

    def __init__(self, register: PlaceRegister, standby: Callable[[int], ReplicaControl]) -> None:
        self._register = register
        self._standby = standby
        self._standings: dict[int, StandbyStanding] = {}
        self._retry_at: dict[int, float] = {}

    def standing(self, shard_id: int) -> StandbyStanding:
        """How the shard's standby does, as last heard."""
        known = self._register.places.standbys.get(shard_id)
        if known is None:
            return StandbyStanding(shard_id, MISSING, "")
        found = self._standings.get(shard_id)
        if found is None or found.node != known.node:
            return StandbyStanding(shard_id, MISSING, known.node)
        return found

    async def heard(self, shard_id: int, owner: ReplicaControl, described: Described) -> None:
        """The process that has the shard's lease has said how it does."""
        replica, shipping = self._register.places.standbys.get(shard_id), described.shipping
        is_meant = replica is not None and shipping.replication.startswith(f"{replica.node}/")
        in_sync = is_meant and shipping.state == IN_SYNC
        try:
            if replica is not None:
                await self._set_sync(shard_id, replica, in_sync)
            if shipping.replication and (not is_meant or shipping.state == LOST):
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await owner.release(shipping.replication)
            elif replica is not None and not shipping.replication:
                await self._build(shard_id, owner, replica, shipping.message)
            elif replica is not None:
                self._stand(StandbyStanding(shard_id, IN_SYNC if in_sync else BUILDING, replica.node))
        except Exception as error:  # noqa: BLE001  # The calls are remote: whatever it is, it is tried again.
            if replica is not None:
                self._stand(StandbyStanding(shard_id, MISSING, replica.node, _reason(error)))

    async def new_owner(self, shard_id: int) -> None:
        """Another process than before is about to get the shard's lease: returns when it is durable that its standby is
        not in sync. Raises OSError."""
        replica = self._register.places.standbys.get(shard_id)
        if replica is not None:
            await self._set_sync(shard_id, replica, in_sync=False)

    def may_promote(self, shard_id: int) -> bool:
        """Whether the shard has a standby that has everything."""
        replica = self._register.places.standbys.get(shard_id)
        return replica is not None and replica.in_sync

    async def promote(self, shard_id: int) -> bool:
        """The owner is away: has the standby take its place, if it can; returns whether it has."""
        replica = self._register.places.standbys.get(shard_id)
        if replica is None or not replica.in_sync:
            return False
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                standby = self._standby(shard_id)
                described = await standby.describe(None)
                if described.state not in ("serving", "full"):
                    return False
                await standby.promote(described.incarnation)
            await self._register.change(lambda places: places.promoted(shard_id))
        except Exception as error:  # noqa: BLE001  # The calls are remote: whatever it is, it is tried again.
            logger.warning("the standby of shard %d cannot be promoted yet: %s", shard_id, _reason(error))
            return False
        logger.warning("shard %d is away: its standby on node %s takes its place", shard_id, replica.node)
        self._standings.pop(shard_id, None)
        return True

    def forget(self, shard_id: int) -> None:
        """The shard is no more."""
        self._standings.pop(shard_id, None)
        self._retry_at.pop(shard_id, None)

    async def _set_sync(self, shard_id: int, replica: Replica, in_sync: bool) -> None:
        await self._register.change(lambda places: places.with_sync(shard_id, replica.node, in_sync))
        if replica.in_sync and not in_sync:
            logger.warning("the standby of shard %d is out of sync: it is not counted on any more", shard_id)

    async def _build(self, shard_id: int, owner: ReplicaControl, replica: Replica, message: str) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s < self._retry_at.get(shard_id, now_s):
            return
        self._retry_at[shard_id] = now_s + RETRY_S
        if message and self.standing(shard_id).state != MISSING:
            self._stand(StandbyStanding(shard_id, MISSING, replica.node, message))
        async with asyncio.timeout(CALL_TIMEOUT_S):
            standby = self._standby(shard_id)
            described = await standby.describe(None)
            if described.state != "serving":
                self._stand(StandbyStanding(shard_id, MISSING, replica.node, f"it is {described.state}"))
                return
            # The name says where it is: it is known for what it is by a coordinator that has not given it.
            replication = f"{replica.node}/{uuid.uuid4().hex}"
            await standby.follow(replication, described.incarnation)
            await owner.replicate(replication, described.address)

    def _stand(self, standing: StandbyStanding) -> None:
        before = self._standings.get(standing.shard_id)
        if before is None or (before.state, before.message) != (standing.state, standing.message):
            level = logging.WARNING if standing.state == MISSING else logging.INFO
            said = standing.message and f": {standing.message}"
            logger.log(level, "the standby of shard %d is %s%s", standing.shard_id, standing.state, said)
        self._standings[standing.shard_id] = standing


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer"
    if isinstance(error, ProfileServiceError):
        return error.message
    return str(error).strip().split("\n")[0] or type(error).__name__
