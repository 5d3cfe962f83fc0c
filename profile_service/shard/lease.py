"""The lease of a shard's process: until when it may acknowledge what it is sent. The coordinator gives leases, one
process of a shard at a time (`cluster.leases`).

    process                                   coordinator
      │── "I ask, at 17.0 by my clock" ─────────▶│ heard at 93.2 by its clock: unless the lease is renewed it has
      │◀────────── grant: asked at 17.0, 10 s ───│ run out at 103.2, whatever became of the answer
      └ holds until 27.0 by its clock

A grant counts from when the process asked, not from when it comes: a process that was stopped, or a message that was
held up on its way, finds a lease that has run out. The clock goes on while a process is stopped. Two clocks need to
agree on how long a second is, and on nothing else.

A lease is asked of writes alone. What a process that was replaced still answers to reads may be old, never wrong.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from profile_service.clock import Clock
from profile_service.errors import Unavailable

RETRY_S = 0.1

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Grant:
    """A lease, as the coordinator gives it."""

    incarnation: str
    """The process that it is for."""
    asked_ns: int
    """When that process asked, by its own clock."""
    duration_ns: int


class Lease:
    """What one process holds; nothing at first.

    Args:
        clock: `boot_clock`, or a test's: nanoseconds from some moment on.
    """

    def __init__(self, clock: Clock, incarnation: str | None = None) -> None:
        self.incarnation = incarnation or uuid.uuid4().hex
        """Tells this process from those before and after it."""
        self._clock = clock
        self._until_ns: int | None = None

    def ask(self) -> int:
        """The moment of asking, for `Grant.asked_ns`."""
        return self._clock()

    def take(self, grant: Grant) -> None:
        """Takes a grant; one for another process changes nothing, nor does one that ends before the lease in hand."""
        until_ns = grant.asked_ns + grant.duration_ns
        if grant.incarnation == self.incarnation and (self._until_ns is None or until_ns > self._until_ns):
            self._until_ns = until_ns

    @property
    def was_held(self) -> bool:
        """Whether the process has ever had one."""
        return self._until_ns is not None

    @property
    def is_held(self) -> bool:
        """Whether the process may acknowledge."""
        return self._until_ns is not None and self._clock() < self._until_ns

    def check(self, shard_id: int) -> None:
        """Raises Unavailable where it is not held."""
        if not self.is_held:
            raise Unavailable(f"shard {shard_id} has no lease from the coordinator just now", RETRY_S)


def lock_identity(path: Path) -> str:
    """Names a lock file so that two processes that both hold "the" lock of one name cannot be: of this name a kernel
    knows only one file. Whoever holds it knows that every other holder of it, on whichever machine, has ended."""
    found = path.stat()
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else os.uname().nodename
    return f"{boot}:{found.st_dev}:{found.st_ino}"
