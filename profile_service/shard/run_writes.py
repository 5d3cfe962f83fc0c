"""What a run of parts changes in a store, by partition group: begun here with what makes its events count once, and
completed by `StoredState` with rows and sums.

    producers    by partition the sequence that is counted, and up to where the producer is acknowledged
    requests     ids of requests, each with the partitions that have counted it
    event ids    hashes, each with the time at which it came
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from profile_service.config import Capacity
from profile_service.domain.columns import EventColumns
from profile_service.domain.decay import NS
from profile_service.domain.schema import Schema
from profile_service.shard.dedupe import MOST_REQUESTS
from profile_service.shard.store_records import encode_event_ids, encode_requests
from profile_service.storage.redis_store import Chunk, GroupWrite
from profile_service.wire.apply_request import REQUEST_PREFIX, ApplyPart

ACKNOWLEDGED, USED = "ack", "used"
"""Fields of a producer, beside those named by a partition."""


@dataclass
class OwnedGroup:
    """What is known of a partition group that this shard has a part of."""

    number: int
    partitions: list[int]
    packed: bytes = b""
    """The sums that this owner writes, as last written."""
    writes: int = 0

    @property
    def segment(self) -> int:
        """The name of what cannot be split by partition."""
        return self.partitions[0]


@dataclass
class RunEvents:
    """Events of a run, those of a partition group together; by event: its part, partition, group and arrival."""

    columns: EventColumns
    part: NDArray[np.int64]
    partition: NDArray[np.int64]
    group: NDArray[np.int64]
    received_ns: NDArray[np.int64]


class RunWrites:
    """The writes of one run: `by_group`, by the number of the partition group.

    Args:
        groups: those that the shard has a part of.
        group_of: by partition, its group.
        schema: what rows are of.
        capacity: bounds of what is kept to count once.
        acknowledged: up to where a producer is acknowledged, as far as is known.
    """

    def __init__(
        self,
        groups: Mapping[int, OwnedGroup],
        group_of: NDArray[np.int64],
        schema: Schema,
        capacity: Capacity,
        acknowledged: Callable[[str], int],
    ) -> None:
        self.by_group: dict[int, GroupWrite] = {}
        self._groups = groups
        self._group_of = group_of
        self._shift = 64 - (len(group_of) - 1).bit_length()
        self._schema = schema
        self._capacity = capacity
        self._acknowledged = acknowledged

    def of(self, number: int) -> GroupWrite:
        """What is written to a group, begun where nothing is yet."""
        if number not in self.by_group:
            group = self._groups[number]
            ttl_s = self._schema.ttl_s
            self.by_group[number] = GroupWrite(
                group=number,
                partitions=group.partitions,
                segment=group.segment,
                writes=group.writes,
                fingerprint=self._schema.fingerprint,
                row_ms=0 if ttl_s is None else max(1, int(ttl_s * 1000)),
                producer_ms=max(1, int(self._capacity.producer_window_s * 1000)),
            )
        return self.by_group[number]

    def note_acknowledged(self, part: ApplyPart) -> None:
        """Notes up to where a producer is acknowledged, in the group that has its name, or in any."""
        number = int(self._group_of[xxhash.xxh64_intdigest(part.producer_id.encode()) >> self._shift])
        write = self.of(number if number in self._groups else min(self._groups))
        self._fields_of(write, part)

    def note_admitted(self, parts: Sequence[ApplyPart], events: RunEvents, now_ns: int) -> None:
        """Adds to the writes what makes the events count once."""
        bounds, owned = self._capacity, len(self._groups)
        requests: dict[int, list[tuple[str, list[int], int]]] = {}
        pairs = np.unique(events.part * len(self._group_of) + events.partition)
        for number, pair in zip(*(array.tolist() for array in np.divmod(pairs, len(self._group_of))), strict=True):
            part, group = parts[number], int(self._group_of[pair])
            if part.producer_id.startswith(REQUEST_PREFIX):
                listed = requests.setdefault(group, [])
                if not listed or listed[-1][0] != part.producer_id:
                    listed.append((part.producer_id, [], part.arrival_time_ns))
                listed[-1][1].append(pair)
            elif part.producer_id:
                fields = self._fields_of(self.by_group[group], part)
                fields[str(pair)] = max(part.sequence, fields.get(str(pair), 0))
        now_s = now_ns // NS
        for group, listed in requests.items():
            data, oldest_s = encode_requests(listed), now_s - int(bounds.producer_window_s)
            self.by_group[group].requests = Chunk(data, len(listed), MOST_REQUESTS // owned, max(0, oldest_s))
        keys = events.columns.event_id_hash
        for place in np.unique(events.group[keys != 0]).tolist():
            chosen = (events.group == place) & (keys != 0)
            data, count = encode_event_ids(keys[chosen], events.received_ns[chosen]), int(chosen.sum())
            most, oldest_s = max(1, bounds.event_ids_per_shard // owned), now_s - int(bounds.event_id_window_s)
            self.by_group[place].event_ids = Chunk(data, count, most, max(0, oldest_s))

    def _fields_of(self, write: GroupWrite, part: ApplyPart) -> dict[str, int]:
        fields = write.producers.setdefault(part.producer_id, {})
        fields[ACKNOWLEDGED] = max(part.acknowledged_sequence, self._acknowledged(part.producer_id))
        fields[USED] = max(part.arrival_time_ns, fields.get(USED, 0))
        return fields
