"""Settings with their units, frozen. What is fixed when a data directory is made stands apart from what may change."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

KIB = 1024
MIB = 1024 * KIB


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
    data_dir: Path | None = None
    shards: int = field(default_factory=default_shards)
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

    def address(self, port: int) -> str:
        """host:port, with brackets around an IPv6 address.

        >>> Settings(host="::1").address(80)
        '[::1]:80'
        """
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"
