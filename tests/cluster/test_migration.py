"""Everything that a service knows comes over, to a store and back to another number of shards: every row to the last
byte, and what makes events count once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from profile_service.clock import system_clock
from profile_service.cluster import migration
from profile_service.cluster.migration import Tally, to_directory, to_store
from profile_service.cluster.ownership import Ownership
from profile_service.domain.schema import Schema, parse_schema
from profile_service.errors import DataLoss, StartupError
from profile_service.shard.shard import Shard
from profile_service.storage.data_directory import DataDirectory, Manifest
from profile_service.storage.fs import RealFileSystem
from profile_service.storage.redis_client import StoreUrl
from profile_service.storage.redis_store import RedisStore
from profile_service.wire.apply_request import ApplyPart
from tests.redis_process import RedisProcess
from tests.shard import shards, stored
from tests.shard.shards import Clock
from tests.shard.test_shard import SCHEMA, part
from userprofile.v1 import event_service_pb2

USERS = [f"u{n}" for n in range(300)]
TTL_NS = 10 * 86_400 * 10**9
OTHER_SCHEMA = parse_schema(SCHEMA.text.replace("size: 3", "size: 4"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path_factory.mktemp("redis")) as process:
        yield process


def now_parts() -> list[ApplyPart]:
    """Events that arrive now, for what they tell is kept for days only."""
    now_ns = system_clock()
    given = [
        part(USERS * 2, producer="p", sequence=1, event_ids=[f"e{n}" for n in range(2 * len(USERS))]),
        part(USERS[:50], producer="p", sequence=2),
        part(USERS[:20], producer="request:r"),
    ]
    return [replace(one, arrival_time_ns=now_ns) for one in given]


async def fill(directory: DataDirectory, given: Sequence[ApplyPart], schema: Schema = SCHEMA) -> None:
    """Has the directory's shards count the events of their users."""
    directory.write_schema(schema.text)
    directory.write_epoch(5)
    for shard_id in range(directory.manifest.shards):
        owned = Ownership.even(directory.manifest.partition_bits, directory.manifest.shards).owned_by(shard_id)
        found = await shards.recovered(
            RealFileSystem(),
            schema,
            directory=directory.shard_directory(shard_id),
            identity=directory.manifest.identity(shard_id),
        )
        shard = shards.make_shard(found, owned=owned, clock=Clock())
        writer = asyncio.create_task(shard.run())
        for one in given:
            await submit_owned(shard, one, set(owned))
        await shard.close()
        await writer
        found.lock.release()
    directory.release()


async def submit_owned(shard: Shard, given: ApplyPart, owned: set[int], epoch: int = 7) -> None:
    request = event_service_pb2.IngestEventsRequest.FromString(bytes(given.events))
    mine = [event for event in request.events if stored.partition_of(event.user_id) in owned]
    kept = event_service_pb2.IngestEventsRequest(events=mine)
    share = replace(given, events=kept.SerializeToString(), event_count=len(mine))
    await shard.submit([share], share.size_bytes, epoch)


class Interruption(Exception):
    """Of a migration, by its own progress."""


def interrupt(what: str, done: int, total: int) -> None:
    """Everything is sent, and nothing is compared."""
    if what == "checking users":
        raise Interruption


def keys_of(server: RedisProcess, prefix: str) -> set[str]:
    """What a store consists of, but for the lease."""
    found = {key.decode().removeprefix(prefix) for key in server.client.keys(f"{prefix}:*")}
    return found - {":lease"}


async def test_all_comes_over_and_back_and_is_counted_once_on_either_side(server: RedisProcess, tmp_path: Path) -> None:
    given = now_parts()
    await fill(DataDirectory.open(RealFileSystem(), tmp_path / "first", Manifest.new(8, 2)), given)
    heard: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        heard.append(f"{what} {done} of {total}")

    urls = [f"{server.url}?prefix={name}" for name in ("one", "two")]
    sent = await to_store(tmp_path / "first", StoreUrl.parse(urls[0]), progress)
    assert (sent.users, sent.events) == (300, 670)
    assert heard[-1] == "checking users 300 of 300"
    back = await to_directory(StoreUrl.parse(urls[0]), tmp_path / "second", 3, progress)
    again = await to_store(tmp_path / "second", StoreUrl.parse(urls[1]), progress)
    assert sent == back == again
    # Whoever starts on either counts nothing again.
    async with stored.running(urls[0], epoch=8) as follower:
        for one in given:
            await follower.submit(one, epoch=8)
        status = follower.shard.status()
        assert (status.event_count, status.user_count, status.duplicate_count) == (670, 300, 670)
        assert await follower.count("u7") == 4
        # By its id alone.
        await follower.submit(
            replace(part(["u3"], event_ids=["e3"]), arrival_time_ns=given[0].arrival_time_ns), epoch=8
        )
        assert follower.shard.status().duplicate_count == 671
    directory = DataDirectory.open_existing(RealFileSystem(), tmp_path / "second")
    assert directory.epoch() >= 5
    await fill(directory, given)
    directory = DataDirectory.open_existing(RealFileSystem(), tmp_path / "second")
    assert (await migration._tally_directory(directory, SCHEMA, 300, progress)).whole() == sent
    directory.release()


async def test_what_is_in_use_or_not_empty_is_left_alone(server: RedisProcess, tmp_path: Path) -> None:
    url = StoreUrl.parse(f"{server.url}?prefix=three")
    directory = DataDirectory.open(RealFileSystem(), tmp_path / "data", Manifest.new(8, 1))
    with pytest.raises(StartupError, match="in use by"):
        await to_store(tmp_path / "data", url, lambda *_: None)
    await fill(directory, now_parts())
    await to_store(tmp_path / "data", url, lambda *_: None)
    held = keys_of(server, "three")
    with pytest.raises(StartupError, match="holds profiles already"):
        await to_store(tmp_path / "data", url, lambda *_: None)
    assert keys_of(server, "three") == held
    with pytest.raises(StartupError, match="is there already"):
        await to_directory(url, tmp_path / "data", 1, lambda *_: None)
    with pytest.raises(StartupError, match="holds nothing"):
        await to_directory(StoreUrl.parse(f"{server.url}?prefix=none"), tmp_path / "new", 1, lambda *_: None)


async def test_an_interrupted_migration_is_not_served_and_can_be_begun_again(
    server: RedisProcess, tmp_path: Path
) -> None:
    url = StoreUrl.parse(f"{server.url}?prefix=four")
    await fill(DataDirectory.open(RealFileSystem(), tmp_path / "data", Manifest.new(8, 1)), now_parts())
    with pytest.raises(Interruption):
        await to_store(tmp_path / "data", url, interrupt)
    store = RedisStore(url, 8)
    with pytest.raises(StartupError, match="was interrupted"):
        await store.read_meta()
    # A row that is not what was sent is found.
    (first, *_) = server.client.keys("four:*:u:u1")
    sent = await to_store(tmp_path / "data", url, lambda *_: None)
    held = server.client.get(first)
    other = next(key for key in server.client.keys("four:*:u:*") if server.client.get(key) != held)
    server.client.set(first, server.client.get(other))
    assert (await migration._tally_store(store, SCHEMA, sent.users, lambda *_: None)).whole() != sent
    with pytest.raises(DataLoss, match="not to be used"):
        migration._compare(sent, Tally(sent.users, sent.events, sent.digest ^ 1))
    await store.close()


@pytest.mark.parametrize(("schema", "shard_count"), [(OTHER_SCHEMA, 2), (SCHEMA, 3)], ids=["schema", "shards"])
async def test_what_an_interrupted_migration_wrote_is_gone_when_its_source_has_changed_meanwhile(
    server: RedisProcess, tmp_path: Path, schema: Schema, shard_count: int
) -> None:
    given, prefix = now_parts(), f"changed{shard_count}"
    urls = [f"{server.url}?prefix={name}" for name in (prefix, f"fresh{shard_count}")]
    await fill(DataDirectory.open(RealFileSystem(), tmp_path / "before", Manifest.new(8, 2)), given)
    await fill(
        DataDirectory.open(RealFileSystem(), tmp_path / "after", Manifest.new(8, shard_count)), given[1:], schema
    )
    with pytest.raises(Interruption):
        await to_store(tmp_path / "before", StoreUrl.parse(urls[0]), interrupt)
    removed: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("removing"):
            removed.append(done)

    left = len(keys_of(server, prefix))
    again = await to_store(tmp_path / "after", StoreUrl.parse(urls[0]), progress)
    assert again == await to_store(tmp_path / "after", StoreUrl.parse(urls[1]), progress)
    assert (again.users, again.events) == (50, 70)
    assert keys_of(server, prefix) == keys_of(server, f"fresh{shard_count}")
    store = RedisStore(StoreUrl.parse(urls[0]))
    meta = await store.read_meta()
    await store.close()
    assert meta is not None
    assert list(meta.schemas) == list(meta.layouts) == [schema.fingerprint]
    async with stored.running(urls[0], schema=schema, epoch=8) as follower:
        await follower.submit(given[1], epoch=8)
        status = follower.shard.status()
        assert (status.event_count, status.user_count) == (70, 50)
        assert await follower.count(USERS[49]) == 1
        assert await follower.count(USERS[50]) == 0
    # All but the meta, the epoch, and what is carried for every owner.
    assert removed[-1] == left - 3


async def test_only_keys_of_the_interrupted_migration_itself_are_removed(server: RedisProcess, tmp_path: Path) -> None:
    neighbours = {
        f"{prefix}:{name}": prefix for prefix in ("seven", "sevn", "se*n:eu") for name in ("{g00}:f:u:1", "epoch")
    }
    for key, value in neighbours.items():
        server.client.set(key, value)
    # A pattern, to SCAN.
    url = StoreUrl.parse(f"{server.url}?prefix=se%2An")
    await fill(DataDirectory.open(RealFileSystem(), tmp_path / "data", Manifest.new(8, 1)), now_parts())
    with pytest.raises(Interruption):
        await to_store(tmp_path / "data", url, interrupt)
    await to_store(tmp_path / "data", url, lambda *_: None)
    assert {key: server.client.get(key).decode() for key in neighbours} == neighbours


async def test_a_store_that_was_served_and_lost_its_meta_is_not_taken_for_an_empty_one(
    server: RedisProcess, tmp_path: Path
) -> None:
    await fill(DataDirectory.open(RealFileSystem(), tmp_path / "data", Manifest.new(8, 1)), now_parts())
    url = f"{server.url}?prefix=served"
    async with stored.running(url) as shard:
        await shard.submit(part(["somebody"]))
    server.client.delete("served:meta")
    held = keys_of(server, "served")
    for _ in range(2):
        with pytest.raises(StartupError, match="has lost its meta"):
            await to_store(tmp_path / "data", StoreUrl.parse(url), lambda *_: None)
    assert keys_of(server, "served") == held


async def test_users_who_expire_before_the_comparison_ends_are_left_out_of_both_sides(
    server: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = system_clock()
    monkeypatch.setattr(migration, "system_clock", lambda: now_ns)
    leaving = replace(part(USERS[:40]), arrival_time_ns=now_ns - TTL_NS + 10**9)
    staying = replace(part(USERS[40:]), arrival_time_ns=now_ns)
    directory = DataDirectory.open(RealFileSystem(), tmp_path / "data", Manifest.new(8, 1))
    await fill(directory, [leaving, staying])
    heard: list[str] = []

    def wait(what: str, done: int, total: int) -> None:
        nonlocal now_ns
        if what == "checking users" and what not in heard:
            # Those of one partition group are tallied by now, those of the others expire before they can be.
            while len(server.client.keys("expiring:*:u:*")) > 260:
                time.sleep(0.01)
            now_ns += 2 * 10**9
        heard.append(what)

    sent = await to_store(tmp_path / "data", StoreUrl.parse(f"{server.url}?prefix=expiring"), wait)
    assert (sent.users, sent.expiring, sent.events) == (260, 40, 300)
    assert len(server.client.keys("expiring:*:u:*")) == 260
    assert str(sent).endswith("and 40 whose time is up")

    def lose(what: str, done: int, total: int) -> None:
        if what == "sending users":
            (row,) = server.client.keys("lost:*:u:u200")
            server.client.delete(row)

    with pytest.raises(DataLoss, match="259 users"):
        await to_store(tmp_path / "data", StoreUrl.parse(f"{server.url}?prefix=lost"), lose)


async def test_users_who_expire_while_a_store_is_read_are_in_the_directory_and_its_tally_or_in_neither(
    server: RedisProcess, tmp_path: Path
) -> None:
    url = StoreUrl.parse(f"{server.url}?prefix=leaving")
    await fill(DataDirectory.open(RealFileSystem(), tmp_path / "data", Manifest.new(8, 1)), now_parts())
    await to_store(tmp_path / "data", url, lambda *_: None)
    waited = False

    def wait(what: str, done: int, total: int) -> None:
        nonlocal waited
        if what == "reading users" and not waited:
            for row in server.client.keys("leaving:*:u:u1?"):
                server.client.pexpire(row, 1)
            while server.client.keys("leaving:*:u:u1?"):
                time.sleep(0.001)
            waited = True

    read = await to_directory(url, tmp_path / "back", 2, wait)
    assert 290 <= read.users < 300
    assert read.events == 670


async def test_a_row_that_a_scan_names_twice_counts_once(
    server: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = RedisStore.scan_rows

    async def scan_twice(store: RedisStore, group: int, fingerprint: str) -> AsyncIterator[list[bytes]]:
        for _ in range(2):
            async for found in scan(store, group, fingerprint):
                yield found

    monkeypatch.setattr(RedisStore, "scan_rows", scan_twice)
    url = StoreUrl.parse(f"{server.url}?prefix=twice")
    await fill(DataDirectory.open(RealFileSystem(), tmp_path / "data", Manifest.new(8, 1)), now_parts())
    sent = await to_store(tmp_path / "data", url, lambda *_: None)
    assert sent.users == 300
    assert await to_directory(url, tmp_path / "back", 2, lambda *_: None) == sent
