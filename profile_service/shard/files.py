"""The names in a shard's directory."""

from __future__ import annotations

LOG_DIRECTORY = "log"
SNAPSHOT_DIRECTORY = "snapshots"
LOCK_FILE = "LOCK"
