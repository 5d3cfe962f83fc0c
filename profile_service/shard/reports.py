"""What a shard tells the coordinator of its moves and its standby; the coordinator imports little else of a shard."""

from __future__ import annotations

from dataclasses import dataclass

BUILDING, IN_SYNC, LOST = "building", "in sync", "lost"
"""States of a replication, as `replication.py` has them."""


@dataclass(frozen=True)
class Departed:
    """What a departure has sent so far."""

    rows: int
    """Each as often as it was sent."""
    size_bytes: int


@dataclass(frozen=True)
class Shipping:
    """How a replication does, as the coordinator hears it."""

    replication: str = ""
    """Its name; empty where there is none."""
    state: str = ""
    """One of those above; empty where there is none."""
    message: str = ""
    """Why the last one was lost, for people."""
