"""What stands in for a shard while it recovers, or when it cannot: it knows who it is and refuses everything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

from profile_service.errors import Unavailable
from profile_service.shard.following import Taken
from profile_service.shard.health import FAILED, Health
from profile_service.shard.shard import Sender, ShardCounters
from profile_service.wire.apply_request import ApplyPart
from profile_service.wire.plan import WirePlan

RECOVERING_RETRY_S = 0.5
FAILED_RETRY_S = 10.0


class AbsentShard:
    """A shard without state.

    Args:
        epoch, owned: as of its start; `update_topology` may say more before the shard itself is there.
        health: why it is absent.
    """

    def __init__(self, shard_id: int, epoch: int, owned: Iterable[int], sync_mode: str, health: Health) -> None:
        self.shard_id = shard_id
        self.epoch = epoch
        self.owned = list(owned)
        self._sync_mode = sync_mode
        self._health = health

    is_remote = False

    async def bring(self, user_ids: Sequence[str] = (), producer_ids: Sequence[str] = ()) -> None:
        """There is nothing."""

    @property
    def plan(self) -> WirePlan:
        """Raises Unavailable."""
        self._refuse()

    async def submit(
        self, parts: Sequence[ApplyPart], size_bytes: int, epoch: int, sender: Sender | None = None
    ) -> None:
        """Raises Unavailable."""
        self._refuse()

    def read(self, user_ids: Sequence[str], features: Sequence[str], epoch: int | None = None) -> list[bytes]:
        """Raises Unavailable."""
        self._refuse()

    def acknowledged(self, producer_id: str) -> int:
        """Raises Unavailable."""
        self._refuse()

    def population_state(self) -> bytes:
        """Raises Unavailable."""
        self._refuse()

    def population_profile(self, features: Sequence[str]) -> bytes:
        """Raises Unavailable."""
        self._refuse()

    def set_population(self, states: Sequence[bytes]) -> None:
        """Nothing needs it yet."""

    async def receive(self, move_id: str, piece: bytes) -> None:
        """Raises Unavailable."""
        self._refuse()

    async def take(self, replication: str, number: int, records: Sequence[Taken]) -> None:
        """Raises Unavailable."""
        self._refuse()

    async def create_snapshot(self) -> int:
        """Raises Unavailable."""
        self._refuse()

    def update_topology(self, epoch: int, owned: Iterable[int]) -> None:
        """Remembers a newer topology for the shard to come; older ones are ignored."""
        if epoch > self.epoch:
            self.epoch = epoch
            self.owned = list(owned)

    def status(self) -> ShardCounters:
        """Nothing but how its log is synced."""
        return ShardCounters(0, 0, 0, 0, 0, 0, 0, self._sync_mode, 0, 0, 0)

    def _refuse(self) -> NoReturn:
        if self._health.state == FAILED:
            raise Unavailable(f"shard {self.shard_id} cannot recover: {self._health.message}", FAILED_RETRY_S)
        done = f"{self._health.progress:.0%} done"
        raise Unavailable(f"shard {self.shard_id} recovers ({done}: {self._health.message})", RECOVERING_RETRY_S)
