"""Everything that a service knows comes over, to a store and back to another number of shards: every row to the last
byte, and what makes events count once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from profile_service.clock import system_clock
from profile_service.cluster import migration
from profile_service.cluster.migration import Tally, to_directory, to_store
from profile_service.cluster.ownership import Ownership
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


async def fill(directory: DataDirectory, given: Sequence[ApplyPart]) -> None:
    """Has the directory's shards count the events of their users."""
    directory.write_schema(SCHEMA.text)
    directory.write_epoch(5)
    for shard_id in range(directory.manifest.shards):
        owned = Ownership.even(directory.manifest.partition_bits, directory.manifest.shards).owned_by(shard_id)
        found = await shards.recovered(
            RealFileSystem(),
            SCHEMA,
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


async def test_all_comes_over_and_back_and_is_counted_once_on_either_side(server: RedisProcess, tmp_path: Path) -> None:
    given = now_parts()
    await fill(DataDirectory.open(RealFileSystem(), tmp_path / "first", Manifest.new(8, 2)), given)
    heard: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        heard.append(f"{what} {done} of {total}")

    urls = [f"{server.url}?prefix={name}" for name in ("one", "two")]
    sent = await to_store(tmp_path / "first", StoreUrl.parse(urls[0]), progress)
    assert (sent.users, sent.events) == (300, 670)
    assert heard[-1] == "checking 300 of 300"
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
    assert await migration._tally_directory(directory, SCHEMA, 300, progress) == sent
    directory.release()


async def test_what_is_in_use_or_not_empty_is_left_alone(server: RedisProcess, tmp_path: Path) -> None:
    url = StoreUrl.parse(f"{server.url}?prefix=three")
    directory = DataDirectory.open(RealFileSystem(), tmp_path / "data", Manifest.new(8, 1))
    with pytest.raises(StartupError, match="in use by"):
        await to_store(tmp_path / "data", url, lambda *_: None)
    await fill(directory, now_parts())
    await to_store(tmp_path / "data", url, lambda *_: None)
    with pytest.raises(StartupError, match="holds profiles already"):
        await to_store(tmp_path / "data", url, lambda *_: None)
    with pytest.raises(StartupError, match="is there already"):
        await to_directory(url, tmp_path / "data", 1, lambda *_: None)
    with pytest.raises(StartupError, match="holds nothing"):
        await to_directory(StoreUrl.parse(f"{server.url}?prefix=none"), tmp_path / "new", 1, lambda *_: None)


async def test_an_interrupted_migration_is_not_served_and_can_be_begun_again(
    server: RedisProcess, tmp_path: Path
) -> None:
    url = StoreUrl.parse(f"{server.url}?prefix=four")
    await fill(DataDirectory.open(RealFileSystem(), tmp_path / "data", Manifest.new(8, 1)), now_parts())

    class Interruption(Exception):
        pass

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "checking":
            raise Interruption

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
    assert await migration._tally_store(store, SCHEMA, sent.users, lambda *_: None) != sent
    with pytest.raises(DataLoss, match="not to be used"):
        migration._compare(sent, Tally(sent.users, sent.events, sent.digest ^ 1))
    await store.close()
