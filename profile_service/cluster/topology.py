"""Who owns which partition, at one epoch. A topology is a value: each change makes a new one with a higher epoch.

starts      0 ──────────── 128 ─────────── 192 ───── 256      first partition of each range (a SortedDict)
owner       shard 0        shard 1         shard 2
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sortedcontainers import SortedDict

from profile_service.cluster.partitioning import MAX_PARTITION_BITS


@dataclass(frozen=True)
class ShardLocation:
    """Where a shard is."""

    shard_id: int
    address: str
    """host:port of its gRPC server; empty while it starts."""
    node: str = ""


@dataclass(frozen=True)
class PartitionRange:
    """Partitions `first` to `last`, both included, with one owner."""

    first: int
    last: int
    shard_id: int


@dataclass(frozen=True)
class Topology:
    """Ranges of partitions and their owners.

    >>> topology = Topology.even(8, [ShardLocation(0, "127.0.0.1:1"), ShardLocation(1, "127.0.0.1:2")])
    >>> topology.owner_of(127), topology.owner_of(128)
    (0, 1)
    """

    epoch: int
    """Rises with each change, a shard's new address included."""
    partition_bits: int
    shards: tuple[ShardLocation, ...]
    """By shard id."""
    starts: SortedDict[int, int]
    """First partition of each range -> shard id. Never changed after construction."""

    @classmethod
    def even(cls, partition_bits: int, shards: Iterable[ShardLocation], epoch: int = 1) -> Topology:
        """Partitions spread evenly over the shards, in their order."""
        located = tuple(sorted(shards, key=lambda shard: shard.shard_id))
        count = 1 << partition_bits
        starts: SortedDict[int, int] = SortedDict()
        for position, shard in enumerate(located):
            first, following = (count * position // len(located), count * (position + 1) // len(located))
            if following > first:
                starts[first] = shard.shard_id
        return cls(epoch, partition_bits, located, starts).validated()

    @classmethod
    def of_owners(
        cls, partition_bits: int, shards: Iterable[ShardLocation], owners: Sequence[int], epoch: int = 1
    ) -> Topology:
        """Of each partition's owner, (partition_count,) shard ids."""
        starts: SortedDict[int, int] = SortedDict()
        for partition, owner in enumerate(owners):
            if not partition or owners[partition - 1] != owner:
                starts[partition] = owner
        located = tuple(sorted(shards, key=lambda shard: shard.shard_id))
        return cls(epoch, partition_bits, located, starts).validated()

    @property
    def partition_count(self) -> int:
        """Partitions in all."""
        return 1 << self.partition_bits

    def owner_of(self, partition: int) -> int:
        """Id of the shard that owns a partition."""
        return self.starts.peekitem(self.starts.bisect_right(partition) - 1)[1]

    def ranges(self) -> list[PartitionRange]:
        """The ranges in order; together they cover every partition once."""
        firsts = [*self.starts, self.partition_count]
        return [
            PartitionRange(first, following - 1, shard_id)
            for (first, shard_id), following in zip(self.starts.items(), firsts[1:], strict=True)
        ]

    def owned_by(self, shard_id: int) -> list[int]:
        """The partitions of one shard, ascending."""
        return [
            partition
            for owned in self.ranges()
            if owned.shard_id == shard_id
            for partition in range(owned.first, owned.last + 1)
        ]

    def owner_table(self) -> NDArray[np.int32]:
        """(partition_count,) each partition's owner as a position in `shards`, for the kernel that splits batches."""
        position_of = {shard.shard_id: position for position, shard in enumerate(self.shards)}
        table = np.empty(self.partition_count, dtype=np.int32)
        for owned in self.ranges():
            table[owned.first : owned.last + 1] = position_of[owned.shard_id]
        return table

    def same_owners(self, other: Topology) -> bool:
        """Whether every partition has the same owner in both, wherever the owners are."""
        mine = [shard.shard_id for shard in self.shards]
        return mine == [shard.shard_id for shard in other.shards] and self.ranges() == other.ranges()

    def losers_since(self, before: Topology) -> set[int]:
        """Shards that owned a partition before and do not own it any more."""
        return {old for old, new in zip(before.owners(), self.owners(), strict=True) if old != new}

    def with_shards(self, shards: Mapping[int, ShardLocation]) -> Topology:
        """The same owners at other places, one epoch later."""
        moved = tuple(shards.get(shard.shard_id, shard) for shard in self.shards)
        return replace(self, epoch=self.epoch + 1, shards=moved).validated()

    def owners(self) -> list[int]:
        """(partition_count,) each partition's owner."""
        return [owned.shard_id for owned in self.ranges() for _ in range(owned.first, owned.last + 1)]

    def with_owner(self, partitions: Iterable[int], shard_id: int) -> Topology:
        """The partitions given to a shard, one epoch later."""
        owners = self.owners()
        for partition in partitions:
            owners[partition] = shard_id
        return Topology.of_owners(self.partition_bits, self.shards, owners, self.epoch + 1)

    def with_members(self, shard_ids: Iterable[int]) -> Topology:
        """These shards, of which those that are new own nothing and those that go must not, one epoch later."""
        known = {shard.shard_id: shard for shard in self.shards}
        members = [known.get(shard_id, ShardLocation(shard_id, "")) for shard_id in shard_ids]
        return Topology.of_owners(self.partition_bits, members, self.owners(), self.epoch + 1)

    def validate(self) -> list[str]:
        """Everything that is wrong with it, for people; empty when nothing is."""
        faults = []
        if self.epoch < 1:
            faults.append(f"epoch: must be 1 or more, is {self.epoch}")
        if not 0 <= self.partition_bits <= MAX_PARTITION_BITS:
            faults.append(f"partition_bits: must be 0 to {MAX_PARTITION_BITS}, is {self.partition_bits}")
            return faults
        if not self.shards:
            faults.append("shards: there is none")
        ids = [shard.shard_id for shard in self.shards]
        if ids != sorted(set(ids)):
            faults.append(f"shards: ids must ascend without a repetition, are {ids}")
        addresses = [shard.address for shard in self.shards if shard.address]
        repeated = sorted({address for address in addresses if addresses.count(address) > 1})
        faults += [f"shards: {address} is given to more than one" for address in repeated]
        if not self.starts or self.starts.peekitem(0)[0] != 0:
            faults.append("starts: no range begins at partition 0")
        for first, shard_id in self.starts.items():
            if not 0 <= first < self.partition_count:
                faults.append(f"starts: {first} is not a partition; there are {self.partition_count}")
            if shard_id not in ids:
                faults.append(f"starts: the range at {first} belongs to shard {shard_id}, which is not listed")
        return faults

    def validated(self) -> Topology:
        """Itself. Raises ValueError with every fault."""
        faults = self.validate()
        if faults:
            raise ValueError("; ".join(faults))
        return self
