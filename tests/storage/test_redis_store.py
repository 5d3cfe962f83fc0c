"""What is told of a store's URL, how its keys are named, how it is reached: by TLS, with a password, on a cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from profile_service.errors import StartupError
from profile_service.storage.redis_client import CONNECT_TIMEOUT_S, CONNECTIONS, StoreAway, StoreUrl
from profile_service.storage.redis_keys import GROUPS, Keys
from profile_service.storage.redis_store import GroupWrite, Meta, RedisStore
from tests.redis_process import SERVERS, RedisProcess, Tls, free_port


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://cache", "redis://cache"),
        ("rediss://me:secret@cache:6380/1?prefix=shop", "rediss://cache:6380/1?prefix=shop"),
        ("redis://:secr%2Fet@[::1]:6379?password=secret&cluster=true", "redis://[::1]:6379?cluster=true"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    parsed = StoreUrl.parse(url)
    assert parsed.shown == shown
    assert "prefix" not in parsed.url
    assert "cluster=" not in parsed.url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("mongodb://cache", "must be local, or begin with"),
        ("redis:///0", "names no host"),
        ("redis://cache?prefix=", "prefix must not be empty"),
        ("redis://cache?prefix={a}", "no braces"),
        ("redis://cache?cluster=maybe", "cluster must be"),
        ("redis://cache:seven", "Port"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(StartupError, match=reason):
        StoreUrl.parse(url)


@pytest.mark.parametrize("bits", [1, 3, 4, 8, 16])
def test_every_partition_has_one_group_and_neighbours_share_it(bits: int) -> None:
    keys = Keys("p", bits)
    groups = [keys.group_of(partition) for partition in range(1 << bits)]
    assert groups == sorted(groups)
    assert set(groups) == set(range(keys.groups))
    assert keys.groups == min(GROUPS, 1 << bits)


def test_all_keys_of_a_group_have_one_hash_tag_whatever_the_user_is_called() -> None:
    keys = Keys("p", 8)
    names = [
        keys.row(3, "f", b"{g04}"),
        keys.row(3, "f", "ü{}".encode()),
        keys.producer(3, "{x}"),
        keys.population(3, "f"),
        keys.of_group(3, "owners"),
    ]
    assert {name[name.index(b"{") : name.index(b"}") + 1] for name in names} == {b"{g03}"}


async def test_it_speaks_tls_and_gives_the_password(tmp_path: Path) -> None:
    tls = Tls.make(tmp_path)
    with RedisProcess(tmp_path / "redis", *tls.flags, password="secret"):  # noqa: S106
        url = f"rediss://:secret@localhost:{tls.port}/0?ssl_ca_certs={tls.authority}"
        store = RedisStore(StoreUrl.parse(url), 8)
        assert await store.read_meta() is None
        assert await store.sync_mode() == "always"
        await use(store, 3)
        await store.close()
        for wrong in (url.replace("secret", "guess"), f"rediss://:secret@localhost:{tls.port}/0"):
            store = RedisStore(StoreUrl.parse(wrong), 8)
            with pytest.raises(StoreAway, match=r"password|certificate") as refused:
                await store.read_meta()
            assert "guess" not in refused.value.message
            await store.close()


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with RedisProcess(tmp_path / "redis") as server:
        yield server.url


META = Meta("mine", 8, {"f": "a schema"}, {"f": "a layout"})


async def test_whoever_looks_while_a_store_is_made_sees_none_or_all_of_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker, other = RedisStore(StoreUrl.parse(url), 8), RedisStore(StoreUrl.parse(url), 8)
    call = maker._client.call

    async def slowly(*command: Any) -> Any:
        answer = await call(*command)
        await asyncio.sleep(0.05)
        return answer

    monkeypatch.setattr(maker._client, "call", slowly)
    making = asyncio.create_task(maker.make_meta(META))
    seen = []
    while not making.done():
        seen.append(await other.read_meta())
    assert await making
    assert all(meta in (None, META) for meta in seen)
    assert await other.read_meta() == META
    assert not await other.make_meta(replace(META, store_id="another"))
    assert await other.read_meta() == META
    for store in (maker, other):
        await store.close()


async def test_a_store_that_an_earlier_version_died_in_making_is_made(url: str) -> None:
    store = RedisStore(StoreUrl.parse(url), 8)
    await store._client.call("HSETNX", store.keys.meta, "id", "half")
    assert await store.read_meta() is None
    assert await store.make_meta(META)
    assert await store.read_meta() == META
    await store.close()


async def test_an_import_that_is_under_way_is_not_made_a_store(url: str) -> None:
    store = RedisStore(StoreUrl.parse(url), 8)
    await store.begin_import(META)
    assert not await store.make_meta(replace(META, store_id="another"))
    with pytest.raises(StartupError, match="migration"):
        await store.read_meta()
    await store.close()


async def use(store: RedisStore, group: int) -> None:
    """Everything that is done with a group."""
    partitions = [p for p in range(256) if store.keys.group_of(p) == group]
    await store.claim(group, partitions, partitions[0], "3:me")
    users = [f"{group}-{n}".encode() for n in range(50)]
    await store.write(
        "3:me",
        GroupWrite(
            group=group,
            partitions=partitions,
            segment=partitions[0],
            writes=0,
            fingerprint="f",
            row_ms=60_000,
            producer_ms=60_000,
            population=b"sums",
            new_users=50,
            producers={"p": {str(partitions[0]): 7}},
            user_ids=users,
            rows=[b"row " + user for user in users],
        ),
    )
    assert await store.written(group, partitions[0]) == ("3:me", 1)
    assert await store.written(group, 999) == ("", 0)
    assert await store.fetch(group, "f", [*users, b"nobody"]) == [*(b"row " + user for user in users), None]
    assert await store.read_producers(group, ["p", "q"]) == [{str(partitions[0]): 7}, {}]
    held = await store.read_group(group, "f")
    assert (held.population, held.users) == ({partitions[0]: b"sums"}, {partitions[0]: 50})
    seen = [user async for piece in store.scan_rows(group, "f") for user in piece]
    assert sorted(set(seen)) == sorted(users)
    (left, gone) = await store.times_left(group, "f", [users[0], b"nobody"])
    assert left is not None
    assert (0 < left <= 60_000, gone) == (True, None)
    await store.move_rows(group, "f", "g", users, [b"new"] * 50, [0] * 50)
    assert await store.times_left(group, "g", users[:1]) == [0]
    assert await store.fetch(group, "g", users[:1]) == [b"new"]
    assert await store.fetch(group, "f", users) == [None] * 50
    await store.move_population(group, "f", "g", {partitions[0]: b"sums of g"})
    assert await store.read_population(group, "f") == {}
    assert await store.read_population(group, "g") == {partitions[0]: b"sums of g"}


@contextmanager
def cluster(directory: Path, program: str = "redis") -> Iterator[tuple[RedisProcess, RedisProcess]]:
    """Of two nodes; returns when both have it whole."""
    # A bus of its own choice would be 10,000 above its port, which may be none.
    buses = [free_port(), free_port()]
    flags = [("--cluster-enabled", "yes", "--cluster-port", str(bus)) for bus in buses]
    with (
        RedisProcess(directory / "a", *flags[0], server=program) as first,
        RedisProcess(directory / "b", *flags[1], server=program) as second,
    ):
        first.client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
        second.client.execute_command("CLUSTER", "ADDSLOTSRANGE", 8192, 16383)
        first.client.execute_command("CLUSTER", "MEET", "127.0.0.1", second.port, buses[1])
        deadline = time.monotonic() + 20.0
        while any(b"state:ok" not in _cluster_info(node) for node in (first, second)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield first, second


@pytest.mark.parametrize("program", SERVERS)
async def test_it_keeps_to_one_node_of_a_cluster_for_each_group(tmp_path: Path, program: str) -> None:
    with cluster(tmp_path, program) as (first, second):
        store = RedisStore(StoreUrl.parse(f"redis://127.0.0.1:{first.port}/0?cluster=true"), 8)
        for group in range(store.keys.groups):
            await use(store, group)
        await store.raise_epoch(9)
        assert await store.epoch() == 9
        await store.close()
        # Both have had their share.
        assert all(node.client.dbsize() > 100 for node in (first, second))


async def test_more_requests_than_connections_wait_in_line_for_a_node_of_a_cluster(tmp_path: Path) -> None:
    with cluster(tmp_path) as (first, _):
        store = RedisStore(StoreUrl.parse(f"redis://127.0.0.1:{first.port}/0?cluster=true"), 8)
        answers = await asyncio.gather(*(store.fetch(3, "f", [b"nobody"]) for _ in range(10 * CONNECTIONS)))
        assert answers == [[None]] * (10 * CONNECTIONS)
        await store.close()


async def test_who_waits_in_line_for_a_cluster_that_does_not_answer_waits_no_longer_than_others(
    tmp_path: Path,
) -> None:
    with cluster(tmp_path) as nodes:
        store = RedisStore(StoreUrl.parse(f"redis://127.0.0.1:{nodes[0].port}/0?cluster=true"), 8, timeout_s=1.0)
        await store.read_meta()
        for node in nodes:
            node.pause()
        began = time.monotonic()
        requests = (store.fetch(3, "f", [b"nobody"]) for _ in range(10 * CONNECTIONS))
        answers = await asyncio.gather(*requests, return_exceptions=True)
        assert all(isinstance(answer, StoreAway) for answer in answers)
        assert time.monotonic() - began < 1.0 + CONNECT_TIMEOUT_S + 1.0
        for node in nodes:
            node.resume()
        assert await store.fetch(3, "f", [b"nobody"]) == [None]
        await store.close()


async def test_a_cluster_that_is_away_is_a_store_that_is_away(tmp_path: Path) -> None:
    away = f"redis://127.0.0.1:{free_port()}/0?cluster=true"
    store = RedisStore(StoreUrl.parse(away), 8)
    with pytest.raises(StoreAway, match="cannot be reached"):
        await store.read_meta()
    with pytest.raises(StoreAway, match="cannot be reached"):
        await store.move_rows(3, "f", "g", [b"u"], [b"row"], [0])
    with pytest.raises(StoreAway, match="cannot be reached"):
        await anext(store.scan_rows(3, "f"))
    await store.close()
    with cluster(tmp_path) as nodes:
        store = RedisStore(StoreUrl.parse(f"redis://127.0.0.1:{nodes[0].port}/0?cluster=true"), 8)
        await store.read_meta()
        for node in nodes:
            node.kill()
        for _ in range(3):
            with pytest.raises(StoreAway):
                await store.fetch(3, "f", [b"nobody"])
        await store.close()


async def test_a_node_that_dies_under_many_requests_is_a_store_that_is_away_until_it_is_back(tmp_path: Path) -> None:
    with cluster(tmp_path) as nodes:
        store = RedisStore(StoreUrl.parse(f"redis://127.0.0.1:{nodes[0].port}/0?cluster=true"), 8)
        over = asyncio.Event()

        async def ask(group: int) -> None:
            while not over.is_set():
                try:
                    await store.fetch(group, "f", [b"nobody"])
                except StoreAway:
                    await asyncio.sleep(0.01)

        asking = [asyncio.create_task(ask(n % store.keys.groups)) for n in range(100)]
        for node in (*nodes, *nodes):
            await asyncio.sleep(0.2)
            node.kill()
            await asyncio.sleep(0.2)
            await asyncio.to_thread(node.start)
        over.set()
        await asyncio.gather(*asking)
        async with asyncio.timeout(20.0):
            while not await _answers(store):  # noqa: ASYNC110  what is waited for has no event
                await asyncio.sleep(0.05)
        await store.close()


async def _answers(store: RedisStore) -> bool:
    try:
        await asyncio.gather(*(store.fetch(group, "f", [b"nobody"]) for group in range(store.keys.groups)))
    except StoreAway:
        return False
    return True


def _cluster_info(node: RedisProcess) -> bytes:
    return repr(node.client.execute_command("CLUSTER", "INFO")).replace("': '", ":").encode()
