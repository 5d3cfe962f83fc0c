"""Profiles straight from the store, while the owner of a user is away: everything that was acknowledged is there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import chain

import xxhash

from profile_service.clock import Clock
from profile_service.domain.packed_profiles import PackedProfiles
from profile_service.domain.population import Population
from profile_service.domain.schema import Schema
from profile_service.errors import DataLoss, Unavailable
from profile_service.shard.row_cache import damaged_row
from profile_service.storage.redis_client import StoreFault
from profile_service.storage.redis_store import RedisStore

POPULATION_AGE_S = 1.0
"""How old the population may be by which likelihoods are told; the contract allows twice as much."""

SLICE_USERS = 128
"""Profiles read before the loop may turn."""


class StoredProfiles:
    """As `rpc.query.Reader`.

    Args:
        store: of which `partition_bits` is right.
    """

    def __init__(self, schema: Schema, store: RedisStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._rows = PackedProfiles(schema, SLICE_USERS)
        self._schema = schema
        self._uses_population = any(
            getattr(feature.options, "prior", "") == "population" for feature in schema.features
        )
        self._population: Population | None = None
        self._population_due_s = 0.0

    async def close(self) -> None:
        """Ends the store's connections."""
        await self._store.close()

    async def read(
        self, user_ids: Sequence[str], features: Sequence[str], deadline_s: float | None = None
    ) -> list[bytes]:
        """Encoded profiles in the order of `user_ids`, empty for users never seen.

        Raises:
            Unavailable: the store does not answer.
            DataLoss: a row is damaged.
        """
        try:
            population = await self._sums() if self._uses_population else None
            rows = await self._fetch([user_id.encode() for user_id in user_ids])
        except StoreFault as fault:
            raise Unavailable(fault.message, retry_after_s=0.5) from fault
        now_ns = self._clock()
        profiles: list[bytes] = []
        for start in range(0, len(user_ids), SLICE_USERS):
            if start:
                await asyncio.sleep(0)
            some = slice(start, start + SLICE_USERS)
            try:
                profiles += self._rows.profiles(user_ids[some], rows[some], now_ns, features, population)
            except DataLoss as loss:
                raise self._damaged(user_ids[some], rows[some], loss) from None
        return profiles

    def _damaged(self, user_ids: Sequence[str], rows: Sequence[bytes | None], loss: DataLoss) -> DataLoss:
        """The same by the name of the user."""
        for user_id, row in zip(user_ids, rows, strict=True):
            try:
                self._rows.profiles([user_id], [row], 0)
            except DataLoss:
                encoded = user_id.encode()
                key = self._store.keys.row(self._group_of(encoded), self._schema.fingerprint, encoded)
                return damaged_row(encoded, key, self._store.url.shown)
        return loss

    async def population(self, features: Sequence[str], deadline_s: float | None = None) -> bytes:
        """All users as one encoded profile. Raises Unavailable."""
        try:
            return (await self._sums()).profile(self._clock(), features)
        except StoreFault as fault:
            raise Unavailable(fault.message, retry_after_s=0.5) from fault

    def _group_of(self, user_id: bytes) -> int:
        keys = self._store.keys
        return keys.group_of(xxhash.xxh64_intdigest(user_id) >> (64 - keys.partition_bits))

    async def _fetch(self, user_ids: Sequence[bytes]) -> list[bytes | None]:
        by_group: dict[int, list[int]] = {}
        for place, user_id in enumerate(user_ids):
            by_group.setdefault(self._group_of(user_id), []).append(place)
        answers = await asyncio.gather(
            *(
                self._store.fetch(group, self._schema.fingerprint, [user_ids[place] for place in places])
                for group, places in by_group.items()
            )
        )
        rows = dict(zip(chain(*by_group.values()), chain(*answers), strict=True))
        return [rows[place] for place in range(len(user_ids))]

    async def _sums(self) -> Population:
        now_s = asyncio.get_running_loop().time()
        if self._population is None or now_s >= self._population_due_s:
            groups = range(self._store.keys.groups)
            held = await asyncio.gather(
                *(self._store.read_population(group, self._schema.fingerprint) for group in groups)
            )
            self._population = self._rows.population(packed for sums in held for packed in sums.values())
            self._population_due_s = now_s + POPULATION_AGE_S
        return self._population
