"""Settings with their units, frozen. What is fixed when a data directory is made stands apart from what may change."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

SEGMENT_GRAIN_BYTES = 4 * KIB
"""What disks and page caches deal in."""

SMALLEST_SEGMENT_BYTES = 64 * KIB
LARGEST_SEGMENT_BYTES = 4 * GIB


MOST_MESSAGE_BYTES = 22 * MIB
"""No limit of a message may be larger: its events and what is noted beside them must fit into one record of the log."""

STREAM_LOOKAHEAD_BYTES = 4 * MIB
"""What the transport takes in of a stream that is not read just now: 100 MB/s from a producer 40 ms away."""


@dataclass(frozen=True)
class Limits:
    """What one caller may send or ask for; beyond it the answer is INVALID_ARGUMENT with the field's name."""

    user_id_bytes: int = 256
    event_id_bytes: int = 256
    producer_id_bytes: int = 256
    attributes_per_event: int = 64
    attribute_bytes: int = KIB
    message_bytes: int = 16 * MIB
    events_per_batch: int = 10_000
    users_per_read: int = 1_000
    future_s: float = 300.0
    """How far in the future an event's time may be."""


@dataclass(frozen=True)
class Capacity:
    """Bounds of queues and memory; beyond them the answer is RESOURCE_EXHAUSTED, or the stream is not read."""

    shard_queue_bytes: int = 64 * MIB
    """Event bytes that wait in a shard to be logged and applied."""
    stream_window_bytes: int = 32 * MIB
    """Event bytes of one producer's stream that wait for their acknowledgement."""
    owner_window_bytes: int = 32 * MIB
    """Event bytes that a frontend has sent to one shard and not yet seen acknowledged."""
    event_ids_per_shard: int = 2_000_000
    """Event ids a shard remembers; the oldest are forgotten first."""
    event_id_window_s: float = 24 * 3600.0
    """How long an event id is remembered."""
    producer_window_s: float = 7 * 24 * 3600.0
    """How long an idle producer's sequences are remembered."""
    cached_users_per_shard: int = 500_000
    """Rows of an external store that a shard keeps near, about; those that were used lately."""


LOCAL = "local"
"""The store that is none: profiles live in the shards and their data directory."""

SyncMode = Literal["always", "interval", "never"]
"""When the log reaches the disk: before each acknowledgement; every `sync_interval_s`; when the operating system likes.
Whichever it is, what is acknowledged was given to the operating system and outlasts the process."""


@dataclass(frozen=True)
class Storage:
    """Where events and profiles are kept, and how soon. All of it may change at a restart."""

    store: str = LOCAL
    """Where profiles live: `local`, in the shards and their data directory; or the URL of a Redis or Valkey."""
    data_dir: Path | None = None
    """Directory of log and snapshots; None takes a temporary one, which is gone after a clean stop. With a store it
    holds who owns what, and nothing of a profile."""
    sync: SyncMode = "always"
    sync_interval_s: float = 1.0
    """With `interval`: a power failure loses at most so many seconds of acknowledged events."""
    segment_bytes: int = 64 * MIB
    """Size of a log file. Space is taken and given back in such pieces, so each shard takes two of them when it
    starts."""
    snapshot_log_bytes: int = 512 * MIB
    """Bytes of log after which a shard writes a snapshot. A recovery replays about so many, and what was logged while
    the snapshot was written: at about 150 bytes and 1 µs an event that is 3.6 million events in 3.6 s. A quarter of it
    would replay in a second, and write four times as many snapshots, each as large as all profiles of the shard."""
    snapshot_interval_s: float = 600.0
    """Seconds after which a shard writes a snapshot, if anything was logged."""
    replicas: int = 0
    """Standbys of each shard, on other nodes: 0 or 1. With one, what is acknowledged is on two disks."""
    reset_features: tuple[str, ...] = ()
    """Features that start empty where the schema's change would otherwise be refused."""

    @property
    def is_local(self) -> bool:
        """Whether profiles live in the shards."""
        return self.store == LOCAL

    def validate(self) -> list[str]:
        """Everything that is wrong with it, for people, by flag; empty when nothing is."""
        faults = []
        if self.replicas not in (0, 1):
            faults.append(f"--replicas: must be 0 or 1, is {self.replicas}")
        elif self.replicas and not self.is_local:
            faults.append(
                "--replicas: with --store profiles are in the store, which has replicas of its own; leave it out"
            )
        if self.sync not in get_args(SyncMode):
            faults.append(f"--sync: must be one of {', '.join(get_args(SyncMode))}, is {self.sync}")
        if not 0 < self.sync_interval_s <= 3600:
            faults.append(f"--sync-interval-s: must be more than 0 and at most 3600, is {self.sync_interval_s:g}")
        if not SMALLEST_SEGMENT_BYTES <= self.segment_bytes <= LARGEST_SEGMENT_BYTES:
            faults.append(
                f"--segment-bytes: must be {SMALLEST_SEGMENT_BYTES} to {LARGEST_SEGMENT_BYTES}, is {self.segment_bytes}"
            )
        elif self.segment_bytes % SEGMENT_GRAIN_BYTES:
            faults.append(f"--segment-bytes: must be a multiple of {SEGMENT_GRAIN_BYTES}, is {self.segment_bytes}")
        if self.snapshot_log_bytes < MIB:
            faults.append(f"--snapshot-log-bytes: must be {MIB} or more, is {self.snapshot_log_bytes}")
        if not self.snapshot_interval_s > 0:
            faults.append(f"--snapshot-interval-s: must be more than 0, is {self.snapshot_interval_s:g}")
        repeated = sorted({name for name in self.reset_features if self.reset_features.count(name) > 1})
        faults += [f"--reset-feature: {name} is given more than once" for name in repeated]
        return faults


@dataclass(frozen=True)
class Fixed:
    """What is fixed when a data directory is made."""

    partition_bits: int = 8
    """2**partition_bits partitions; 1 to 16."""

    def __post_init__(self) -> None:
        if not 1 <= self.partition_bits <= 16:
            raise ValueError(f"partition_bits must be 1 to 16, is {self.partition_bits}")


def default_shards() -> int:
    """Three for every four cores, at least one: a shard does about three times a frontend's work on an event."""
    return max(1, round(0.75 * (os.cpu_count() or 1)))


@dataclass(frozen=True)
class Settings:
    """Everything that `serve` needs to know."""

    schema_path: Path | None = None
    """Schema file; None takes the shipped `marketplace`."""
    storage: Storage = field(default_factory=Storage)
    shards: int | None = None
    """None takes the number that the data directory was made with, and `default_shards()` for a new one."""
    host: str = "127.0.0.1"
    grpc_port: int = 50051
    """0 takes a free port."""
    http_port: int = 8080
    """0 takes a free port."""
    limits: Limits = field(default_factory=Limits)
    capacity: Capacity = field(default_factory=Capacity)
    fixed: Fixed = field(default_factory=Fixed)
    population_interval_s: float = 0.5
    """How often the population is gathered from the shards; the contract allows it to be 2 s old."""
    drain_timeout_s: float = 30.0
    lease_s: float = 10.0
    """How long a shard goes on acknowledging without hearing from the coordinator: longer than that takes to start
    again, for until then nothing shows. And how long a process that another one is to replace is waited for, where
    nothing proves that it has ended."""

    @property
    def shard_count(self) -> int:
        """How many shards there are."""
        return self.shards if self.shards is not None else default_shards()

    def address(self, port: int) -> str:
        """host:port, with brackets around an IPv6 address.

        >>> Settings(host="::1").address(80)
        '[::1]:80'
        """
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"
