"""Who owns which users, and which owners are worth a call of their own.

    topology ─▶ partition = xxh64(user_id) >> (64 - bits) ─▶ owner's address ─▶ call it ─▶ answered
                                                                │ avoided: it did not answer      │ "not mine", or away
                                                                ▼                                 ▼
                                                          a frontend                   a frontend, and a new topology

A frontend always knows better: whatever an owner does not answer is asked of a frontend. An owner that does not answer
is avoided for a time that doubles, so that one that cannot be reached from here costs next to nothing.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xxhash

from userprofile.v1 import admin_service_pb2

FIRST_TRY_S = 0.25
"""How long an owner that has never answered is waited for,"""
TRY_S = 1.0
"""and one that has."""
ASK_AGAIN_S = 0.2
"""How soon the topology is asked for again."""
FIRST_AVOIDANCE_S = 0.5
LONGEST_AVOIDANCE_S = 60.0


@dataclass
class Owner:
    """Where a shard's server listens, and how it has answered."""

    address: str
    answered: bool = False
    failures: int = 0
    """Since it last answered."""
    avoided_until_s: float = 0.0

    def try_s(self, left_s: float) -> float:
        """How long to wait for its answer where the call has so long: half is left to a frontend."""
        return min(TRY_S if self.answered else FIRST_TRY_S, 0.5 * left_s)


@dataclass(frozen=True)
class OwnerAccess:
    """What a producer needs to go straight to the owners; its client's."""

    owners: Owners
    learn: Callable[[float], Any]
    """Asks for the topology if that is due; takes the seconds it may use."""
    channel_of: Callable[[Owner], Any]


class Owners:
    """What is known of the owners. It does not call anyone; times are seconds of any one clock.

    Args:
        frontend: address of the frontend that tells the topology.

    >>> owners = Owners("localhost:50051")
    >>> owners.wants_topology(now_s=0.0), owners.of("u1", now_s=0.0)
    (True, None)
    """

    def __init__(self, frontend: str) -> None:
        self._is_local = _is_loopback(frontend)
        self._shift = 64
        self._by_partition: list[Owner | None] = []
        self._by_address: dict[str, Owner] = {}
        self._stale = True
        self._ask_at_s = float("-inf")

    def wants_topology(self, now_s: float) -> bool:
        """Whether the topology should be asked for now; says so once in ASK_AGAIN_S."""
        if not self._stale or now_s < self._ask_at_s:
            return False
        self._ask_at_s = now_s + ASK_AGAIN_S
        return True

    def topology_failed(self, now_s: float, *, for_good: bool) -> None:
        """It could not be told; `for_good` where who was asked does not know such a thing."""
        self._ask_at_s = now_s + (LONGEST_AVOIDANCE_S if for_good else ASK_AGAIN_S)

    def install(self, topology: admin_service_pb2.GetTopologyResponse) -> set[str]:
        """Takes a topology; returns the addresses that no shard has any more."""
        count = topology.partition_count
        known = self._by_address
        shards = {
            shard.shard_id: known.get(shard.address) or Owner(shard.address)
            for shard in topology.shards
            if self._is_reachable(shard.address)
        }
        by_partition: list[Owner | None] = [None] * count
        for extent in topology.ranges:
            size = extent.last_partition + 1 - extent.first_partition
            by_partition[extent.first_partition : extent.last_partition + 1] = [shards.get(extent.shard_id)] * size
        self._by_address = {owner.address: owner for owner in shards.values()}
        # The shift first: another thread may be in `of`, and reads the list last.
        self._shift = 65 - count.bit_length()
        self._by_partition = by_partition
        self._stale = False
        return set(known) - set(self._by_address)

    def of(self, user_id: str, now_s: float) -> Owner | None:
        """The owner to call for a user; None where a frontend is to be called."""
        by_partition = self._by_partition
        if not by_partition:
            return None
        partition = xxhash.xxh64_intdigest(user_id.encode("utf-8", "surrogatepass")) >> self._shift
        owner = by_partition[partition] if partition < len(by_partition) else None
        return owner if owner is not None and now_s >= owner.avoided_until_s else None

    def by_partition(self, now_s: float) -> tuple[list[Owner | None], int]:
        """The owner to call by partition, None where a frontend is to be called, and by how many bits a user's hash is
        more than the partition."""
        owners = [
            owner if owner is not None and now_s >= owner.avoided_until_s else None for owner in self._by_partition
        ]
        return owners, self._shift

    def next_try_s(self, now_s: float) -> float:
        """When an owner that is avoided just now, or was not answered when it was tried, may be called again, or the
        topology asked for; infinite where there is nothing to wait for."""
        avoided = [owner.avoided_until_s for owner in self._by_address.values() if owner.avoided_until_s > now_s]
        return min([*avoided, *([max(now_s, self._ask_at_s)] if self._stale else [])], default=float("inf"))

    def answered(self, owner: Owner) -> None:
        """The owner answered, whatever it said."""
        owner.answered, owner.failures = True, 0

    def not_mine(self) -> None:
        """An owner answered that the user is not its own."""
        self._stale = True

    def failed(self, owner: Owner, now_s: float) -> None:
        """The owner did not answer: it is avoided for a while, and may be elsewhere by now."""
        wait_s = FIRST_AVOIDANCE_S * 2.0 ** min(owner.failures, 50)
        owner.avoided_until_s = now_s + min(LONGEST_AVOIDANCE_S, wait_s)
        owner.failures += 1
        self._stale = True

    def _is_reachable(self, address: str) -> bool:
        """A server that listens on its own machine only is not the one that listens there on this machine."""
        return bool(address) and (self._is_local or not _is_loopback(address))


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if host in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
