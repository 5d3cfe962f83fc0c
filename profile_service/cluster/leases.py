"""Who holds the lease of each shard, as its coordinator knows: at most one process of a shard at a time (the holder's
side is in `shard.lease`).

    nobody ──first to ask──▶ held by X ──another asks──▶ waits ──X's last lease has run out──▶ held by the other
                                  │                                                               ▲
                                  ├── the other has the lock on the directory that X had ─────────┤
                                  └── the other was X's standby, and was promoted ────────────────┘

The lock proves that X has ended: the kernel gives it to one process of one file, and back when that one ends. A standby
that was promoted takes nothing of X any more, and X acknowledges nothing that it has not taken. Neither proves anything
of a process with another file, on another machine or of another copy; for that one there is only waiting.

The holders are durable before they hold anything. A new coordinator takes it that each was given a lease a moment ago.
No I/O here, and time comes in: a simulation runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from profile_service.clock import Clock
from profile_service.shard.lease import Grant

DRIFT = 0.01
"""By how much two machines' clocks may differ in the length of a second: a hundred times what is usual."""


@dataclass(frozen=True)
class Holder:
    """A process of a shard."""

    incarnation: str
    lock: str
    """Of its directory, as `shard.lease.lock_identity` names it; empty before it has it."""


class Leases:
    """The leases of a service's shards.

    Args:
        duration_s: of a lease.
        clock: nanoseconds from some moment on, by a clock that is never set.
        holders: by shard id, as the coordinator before left them.
    """

    def __init__(self, duration_s: float, clock: Clock, holders: Mapping[int, Holder]) -> None:
        self._duration_ns = int(duration_s * 1e9)
        self._longest_ns = int(duration_s * 1e9 * (1 + DRIFT))
        self._clock = clock
        self._holders = dict(holders)
        self._until_ns = dict.fromkeys(self._holders, clock() + self._longest_ns)
        """By shard id: when every lease that was given has run out."""
        self._asked: dict[int, tuple[int, int]] = {}
        """By shard id: when its holder asked last, by its clock, and when that was heard, by ours."""

    @property
    def duration_s(self) -> float:
        """Of a lease."""
        return self._duration_ns / 1e9

    @property
    def holders(self) -> dict[int, Holder]:
        """By shard id."""
        return dict(self._holders)

    def may_hold(self, shard_id: int, asking: Holder, *, promoted: bool = False) -> bool:
        """Whether this process may be the shard's holder from now on; a `promoted` one was the holder's standby."""
        held = self._holders.get(shard_id)
        if (
            promoted
            or held is None
            or held.incarnation == asking.incarnation
            or self._clock() >= self._until_ns[shard_id]
        ):
            return True
        return bool(asking.lock) and asking.lock == held.lock

    def hold(self, shard_id: int, holder: Holder) -> None:
        """From now on it is the shard's holder; that is durable, and `may_hold` said so."""
        held = self._holders.get(shard_id)
        if held is None or held.incarnation != holder.incarnation:
            self._asked.pop(shard_id, None)
            # Of a holder that has ended, or can acknowledge nothing, no lease counts any more.
            self._until_ns[shard_id] = self._clock()
        self._holders[shard_id] = holder

    def heard(self, shard_id: int, asking: Holder, asked_ns: int) -> None:
        """The process has asked, at `asked_ns` by its own clock."""
        held = self._holders.get(shard_id)
        if held is not None and held.incarnation == asking.incarnation:
            self._asked[shard_id] = asked_ns, self._clock()

    def grant(self, shard_id: int) -> Grant | None:
        """A lease for the shard's holder, which counts from now on as given; None before it has asked."""
        if shard_id not in self._asked:
            return None
        asked_ns, heard_ns = self._asked[shard_id]
        self._until_ns[shard_id] = max(self._until_ns[shard_id], heard_ns + self._longest_ns)
        return Grant(self._holders[shard_id].incarnation, asked_ns, self._duration_ns)

    def forget(self, shard_id: int) -> None:
        """The shard is no more."""
        for known in (self._holders, self._until_ns, self._asked):
            known.pop(shard_id, None)

    def check_invariants(self) -> None:
        """For tests."""
        assert self._holders.keys() == self._until_ns.keys()
        assert self._asked.keys() <= self._holders.keys()
