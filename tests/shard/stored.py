"""A shard on a store, in the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import xxhash

from profile_service.config import Capacity
from profile_service.domain.schema import Schema
from profile_service.shard.health import Health
from profile_service.shard.keeping import NoSnapshots
from profile_service.shard.shard import Shard
from profile_service.shard.stored_schema import prepare
from profile_service.shard.stored_state import StoredState
from profile_service.storage.redis_client import StoreUrl
from profile_service.storage.redis_store import RedisStore
from profile_service.wire.apply_request import ApplyPart
from tests.shard.shards import Clock, endless_lease
from tests.shard.test_shard import SCHEMA
from userprofile.v1 import profile_pb2

PATIENCE_S = 30.0


class Stored:
    """A shard on a store, and how it does."""

    def __init__(self, shard: Shard, state: StoredState, store: RedisStore, health: Health) -> None:
        self.shard = shard
        self.state = state
        self.store = store
        self.health = health

    async def submit(self, given: ApplyPart, epoch: int = 7) -> None:
        await self.shard.submit([given], 100, epoch)

    async def count(self, user: str) -> int:
        await self.shard.bring([user])
        profile = self.shard.read([user], [])[0]
        return profile_pb2.Profile.FromString(profile).event_count if profile else 0

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not what():  # noqa: ASYNC110  what is waited for has no event
                await asyncio.sleep(0.02)


class Held:
    """Holds back what a store answers to the first calls of one of its methods, as if these answers came late."""

    def __init__(self, store: RedisStore, name: str) -> None:
        self._store = store
        self._name = name
        self._call = getattr(store, name)
        self._holding = True
        self._asked = 0
        self._all_answered = asyncio.Event()
        self._released = asyncio.Event()

    def __enter__(self) -> Held:
        setattr(self._store, self._name, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        setattr(self._store, self._name, self._call)

    async def _ask(self, *arguments: Any) -> Any:
        if not self._holding:
            return await self._call(*arguments)
        self._asked += 1
        answer = await self._call(*arguments)
        self._asked -= 1
        if not self._asked:
            self._all_answered.set()
        await self._released.wait()
        return answer

    async def answered(self) -> None:
        """Returns when the store has answered; later calls are not held."""
        async with asyncio.timeout(PATIENCE_S):
            await self._all_answered.wait()
        self._holding = False

    def release(self) -> None:
        """Lets the answers through."""
        self._released.set()


@asynccontextmanager
async def running(
    url: str,
    *,
    schema: Schema = SCHEMA,
    owned: Sequence[int] = range(256),
    epoch: int = 7,
    clock: Clock | None = None,
    reset_features: Sequence[str] = (),
    timeout_s: float = PATIENCE_S,
    **capacity: int,
) -> AsyncIterator[Stored]:
    bounds = Capacity(**{"event_ids_per_shard": 1024, **capacity})
    store = RedisStore(StoreUrl.parse(url), timeout_s=timeout_s)
    meta = await prepare(store, schema, reset_features=reset_features, partition_bits=8)
    health, clock = Health(), clock or Clock()
    health.serving()
    state = StoredState(schema, store, meta, capacity=bounds, clock=clock)
    shard = Shard(
        3,
        partition_bits=8,
        owned=owned,
        epoch=epoch,
        state=state,
        log=state,
        snapshotter=NoSnapshots(),
        capacity=bounds,
        clock=clock,
        health=health,
        lease=endless_lease(),
    )
    writer = asyncio.create_task(shard.run())
    try:
        yield Stored(shard, state, store, health)
    finally:
        await shard.close()
        await writer


def partition_of(user: str) -> int:
    """Of 256."""
    return int(xxhash.xxh64_intdigest(user.encode()) >> 56)
