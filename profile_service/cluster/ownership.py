"""Which shards there are and who owns which partition, as it outlasts the coordinator; and what has been begun and not
been brought to its end. A value: each change makes a new one.

    move     leftovers of the target ──▶ owners, leftovers of the source ──▶ cleaned
    retire   retiring ──▶ one shard less

Whoever finds it after a crash: what is left over somewhere is cleaned away, and a shard that retires, retires. A move
that was not decided has not been.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from profile_service.cluster.topology import ShardLocation, Topology

MOVED_AT_ONCE = 8
"""Partitions of a move: the fewer, the shorter writes to them wait; the more, the fewer epochs."""


@dataclass(frozen=True)
class Retirement:
    """A shard that owns nothing any more goes, and another one takes its sums."""

    shard_id: int
    heir_id: int


@dataclass(frozen=True)
class Ownership:
    """Owners, and what is under way."""

    owners: tuple[int, ...]
    """Each partition's shard."""
    shard_ids: tuple[int, ...]
    """Ascending."""
    next_shard_id: int
    """No shard ever had it: directories of shards that are no more may still be there."""
    leftovers: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """By shard: partitions that are others', and of which it may hold something."""
    retiring: Retirement | None = None

    @classmethod
    def even(cls, partition_bits: int, shards: int) -> Ownership:
        """Of a new service."""
        places = [ShardLocation(shard_id, "") for shard_id in range(shards)]
        return cls(tuple(Topology.even(partition_bits, places).owners()), tuple(range(shards)), shards)

    def topology(self, partition_bits: int, epoch: int) -> Topology:
        """The same with an epoch, and no places yet."""
        places = [ShardLocation(shard_id, "") for shard_id in self.shard_ids]
        return Topology.of_owners(partition_bits, places, self.owners, epoch)

    def owned_by(self, shard_id: int) -> list[int]:
        """The partitions of a shard, ascending."""
        return [partition for partition, owner in enumerate(self.owners) if owner == shard_id]

    def expecting(self, shard_id: int, partitions: Iterable[int]) -> Ownership:
        """The shard may hold something of these soon, and they are not its own yet."""
        held = self.leftovers.get(shard_id, frozenset()) | frozenset(partitions)
        return replace(self, leftovers={**self.leftovers, shard_id: held})

    def moved(self, partitions: Sequence[int], source_id: int, target_id: int) -> Ownership:
        """The target owns the partitions, and what the source holds of them is left over."""
        owners = list(self.owners)
        for partition in partitions:
            assert owners[partition] == source_id
            owners[partition] = target_id
        changed = replace(self, owners=tuple(owners)).expecting(source_id, partitions)
        return changed.cleaned(target_id, partitions)

    def cleaned(self, shard_id: int, partitions: Iterable[int]) -> Ownership:
        """The shard holds nothing of these, or it is all its own."""
        held = self.leftovers.get(shard_id, frozenset()) - frozenset(partitions)
        others = {other: left for other, left in self.leftovers.items() if other != shard_id}
        return replace(self, leftovers={**others, shard_id: held} if held else others)

    def joined(self, count: int) -> Ownership:
        """So many new shards, which own nothing."""
        new = range(self.next_shard_id, self.next_shard_id + count)
        return replace(self, shard_ids=(*self.shard_ids, *new), next_shard_id=self.next_shard_id + count)

    def retired(self) -> Ownership:
        """The shard that retires is gone."""
        assert self.retiring is not None
        gone = self.retiring.shard_id
        assert gone not in self.owners
        return replace(
            self,
            shard_ids=tuple(shard_id for shard_id in self.shard_ids if shard_id != gone),
            leftovers={shard_id: left for shard_id, left in self.leftovers.items() if shard_id != gone},
            retiring=None,
        )

    def encode(self) -> dict[str, Any]:
        """As a document."""
        return {
            "owners": list(self.owners),
            "shards": list(self.shard_ids),
            "next_shard": self.next_shard_id,
            "leftovers": {str(shard_id): sorted(left) for shard_id, left in sorted(self.leftovers.items())},
            "retiring": None if self.retiring is None else [self.retiring.shard_id, self.retiring.heir_id],
        }

    @classmethod
    def decode(cls, fields: Mapping[str, Any]) -> Ownership:
        """Of a document."""
        return cls(
            tuple(fields["owners"]),
            tuple(fields["shards"]),
            fields["next_shard"],
            {int(shard_id): frozenset(left) for shard_id, left in fields["leftovers"].items()},
            None if fields["retiring"] is None else Retirement(*fields["retiring"]),
        )

    def check_invariants(self) -> None:
        """For tests."""
        assert set(self.owners) <= set(self.shard_ids)
        assert list(self.shard_ids) == sorted(set(self.shard_ids))
        assert all(shard_id < self.next_shard_id for shard_id in self.shard_ids)
        for shard_id, left in self.leftovers.items():
            assert left
            assert not left & set(self.owned_by(shard_id))


@dataclass(frozen=True)
class Move:
    """Some partitions on their way from one shard to another."""

    partitions: tuple[int, ...]
    source_id: int
    target_id: int


def next_moves(owners: Sequence[int], shard_ids: Sequence[int]) -> list[Move]:
    """The moves after which these shards, and no others, own as many partitions each as can be; as few partitions as
    possible move.

    >>> next_moves([0, 0, 0, 0], [0, 1])
    [Move(partitions=(2, 3), source_id=0, target_id=1)]
    """
    held: dict[int, list[int]] = {shard_id: [] for shard_id in shard_ids}
    homeless: list[tuple[int, int]] = []
    for partition, owner in enumerate(owners):
        if owner in held:
            held[owner].append(partition)
        else:
            homeless.append((partition, owner))
    share, rest = divmod(len(owners), len(shard_ids))
    # Those who have most keep the ones that do not divide evenly.
    order = sorted(shard_ids, key=lambda shard_id: (-len(held[shard_id]), shard_id))
    due = {shard_id: share + (position < rest) for position, shard_id in enumerate(order)}
    for shard_id in order:
        homeless += [(partition, shard_id) for partition in held[shard_id][due[shard_id] :]]
    homeless.sort()
    moves: dict[tuple[int, int], list[int]] = {}
    for shard_id in sorted(order):
        for _ in range(due[shard_id] - len(held[shard_id])):
            partition, source_id = homeless.pop(0)
            moves.setdefault((source_id, shard_id), []).append(partition)
    return [
        Move(tuple(partitions[at : at + MOVED_AT_ONCE]), source_id, target_id)
        for (source_id, target_id), partitions in moves.items()
        for at in range(0, len(partitions), MOVED_AT_ONCE)
    ]
