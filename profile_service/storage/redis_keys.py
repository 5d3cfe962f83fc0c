"""Where things are in Redis or Valkey.

    P:meta                               hash: what the store was made with, and the schemas that its rows are of
    P:epoch   P:lease                    the highest epoch given out; which service has the store
    P:event-ids                          list of chunks that were brought from elsewhere, for every owner; expires

    for each partition group, its partitions being neighbours; they share the hash tag {g}, and so a node of a cluster:

    P:{g}:owners                         hash: partition -> epoch:token of its owner; writes:S -> writes since it came
    P:{g}:counters                       hash: users:S -> users made; how many requests and event ids are listed
    P:{g}:FINGERPRINT:population         hash: S -> sums over the events of an owner
    P:{g}:FINGERPRINT:u:USER             a user's row, which expires with the schema's TTL
    P:{g}:producer:PRODUCER              hash: partition -> last sequence; ack, used; expires when idle
    P:{g}:requests   P:{g}:event-ids     lists of chunks, the oldest first

P is the prefix of the store's URL. S, a segment, is the lowest of the partitions that an owner has in the group: what
cannot be split by partition is written under it, and belongs to whoever owns that partition next. Rows have the
schema's fingerprint in their key: two schemas never meet in one row.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUPS = 16
"""Partition groups of a store: so many nodes of a cluster can share the work, and so many scripts write a group of
events whose users are everywhere."""


@dataclass(frozen=True)
class Keys:
    """The names of one store's keys."""

    prefix: str
    partition_bits: int

    @property
    def groups(self) -> int:
        """How many partition groups there are."""
        return min(GROUPS, 1 << self.partition_bits)

    def group_of(self, partition: int) -> int:
        """The group of a partition."""
        return partition * self.groups >> self.partition_bits

    @property
    def meta(self) -> bytes:
        return f"{self.prefix}:meta".encode()

    @property
    def epoch(self) -> bytes:
        return f"{self.prefix}:epoch".encode()

    @property
    def lease(self) -> bytes:
        return f"{self.prefix}:lease".encode()

    @property
    def carried_event_ids(self) -> bytes:
        return f"{self.prefix}:event-ids".encode()

    def of_group(self, group: int, name: str) -> bytes:
        """`owners`, `counters`, `requests` or `event-ids` of a group."""
        return f"{self.prefix}:{{g{group:02d}}}:{name}".encode()

    def population(self, group: int, fingerprint: str) -> bytes:
        return self.of_group(group, f"{fingerprint}:population")

    def producer(self, group: int, producer_id: str) -> bytes:
        return self.of_group(group, f"producer:{producer_id}")

    def rows(self, group: int, fingerprint: str) -> bytes:
        """What stands before a user's id in the key of its row."""
        return self.of_group(group, f"{fingerprint}:u:")

    def row(self, group: int, fingerprint: str, user_id: bytes) -> bytes:
        """The key of a user's row."""
        return self.rows(group, fingerprint) + user_id
