"""One service at a time has a store, and its processes pass the lease on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from profile_service.cluster.store_lease import StoreLease
from profile_service.errors import StartupError
from profile_service.storage.redis_client import StoreUrl
from profile_service.storage.redis_store import RedisStore
from tests.redis_process import RedisProcess


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path_factory.mktemp("redis")) as process:
        yield process


@pytest.fixture
async def store(redis: RedisProcess) -> AsyncIterator[RedisStore]:
    redis.client.flushall()
    store = RedisStore(StoreUrl.parse(redis.url))
    yield store
    await store.close()


async def take(lease: StoreLease, store: RedisStore, *, stopped: bool = False) -> bool:
    return await lease.take(store, lambda message: None, lambda: stopped)


async def test_who_is_told_to_stop_while_another_has_the_store_does_not_go_on(store: RedisStore) -> None:
    first = StoreLease(store.url)
    assert not await take(first, store)
    with pytest.raises(StartupError, match=r"stopped while redis://.* was in use by process"):
        await take(StoreLease(store.url), store, stopped=True)
    await asyncio.to_thread(first.release)
    second = StoreLease(store.url)
    assert not await take(second, store)
    await asyncio.to_thread(second.release)


async def test_a_deployment_passes_its_lease_on_and_nobody_comes_between(store: RedisStore) -> None:
    first = StoreLease.of_deployment(store.url, "5f0c")
    await take(first, store)
    await asyncio.to_thread(first.pass_on)
    with pytest.raises(StartupError, match="in use by the service 5f0c on a Ray cluster"):
        await take(StoreLease(store.url), store, stopped=True)
    following = StoreLease.of_deployment(store.url, "5f0c")
    assert not await take(following, store)
    await asyncio.to_thread(following.release)
    other = StoreLease.of_deployment(store.url, "77aa")
    assert not await take(other, store)
    await asyncio.to_thread(other.release)
