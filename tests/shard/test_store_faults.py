"""A shard whose store is away, slow, full, empty, or another than before: waits are bounded, what is answered is stored
and counted once, and it goes on by itself."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from profile_service.domain.index import Strings
from profile_service.errors import DataLoss, ProfileServiceError, StorageFull, Unavailable
from profile_service.shard import stored_state
from profile_service.shard.health import FULL, SERVING, STALLED
from profile_service.shard.shard import AfterRefusal, Sender
from profile_service.shard.stored_profiles import StoredProfiles
from profile_service.wire.apply_request import ApplyPart
from tests.redis_process import RedisProcess
from tests.shard.shards import Clock
from tests.shard.stored import PATIENCE_S, Stored, partition_of, running
from tests.shard.test_shard import SCHEMA, part

TIMEOUT_S = 2.0
"""Where nobody is to wait for longer."""

SLOW_S = 0.5
"""Where that is waited for."""


async def test_nothing_can_be_read_before_it_is_stored(url: str, server: RedisProcess) -> None:
    async with running(url) as stored:
        await stored.submit(part(["u1"]))
        server.pause()
        try:
            second = asyncio.create_task(stored.submit(part(["u1", "u2"])))
            await asyncio.sleep(0.2)
            assert not second.done()
            assert await stored.count("u1") == 1
            server.resume()
            await second
            assert await stored.count("u1") == 2
        finally:
            server.resume()


async def test_a_store_that_pauses_longer_than_anyone_waits_is_told_of_and_counted_once(
    url: str, server: RedisProcess
) -> None:
    async with running(url, timeout_s=TIMEOUT_S) as stored:
        await stored.submit(part(["u1"], producer="p", sequence=1))
        server.pause()
        try:
            with pytest.raises(Unavailable, match="does not answer"):
                await stored.submit(part(["u1"], producer="p", sequence=2))
            assert stored.health.state == STALLED
            with pytest.raises(Unavailable):
                await stored.submit(part(["u1"], producer="p", sequence=2))
        finally:
            server.resume()
        await stored.until(lambda: stored.health.state == SERVING)
        # The pause over, Redis has run what it was sent.
        await stored.submit(part(["u1"], producer="p", sequence=2))
        assert await stored.count("u1") == 2
        assert stored.shard.status().event_count == 2


async def test_a_full_store_refuses_writes_serves_reads_and_goes_on_by_itself(url: str, server: RedisProcess) -> None:
    async with running(url) as stored:
        await stored.submit(part(["u1"], producer="p", sequence=1))
        server.client.config_set("maxmemory", 1)
        try:
            with pytest.raises(StorageFull, match="no memory"):
                await stored.submit(part(["u1"], producer="p", sequence=2))
            assert stored.health.state == FULL
            assert "maxmemory" in stored.health.message
            assert await stored.count("u1") == 1
        finally:
            server.client.config_set("maxmemory", 0)
        await stored.until(lambda: stored.health.state == SERVING)
        await stored.submit(part(["u1"], producer="p", sequence=2))
        assert await stored.count("u1") == 2


async def test_of_a_group_that_fills_the_store_what_is_stored_is_never_said_to_be_refused(
    url: str, server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_state, "RUN_EVENTS", 2)
    async with running(url) as stored:
        await stored.submit(part(["another"]))
        write, writes = stored.store.write, 0

        async def fill_up_after_two(*arguments: Any) -> None:
            nonlocal writes
            await write(*arguments)
            writes += 1
            if writes == 2:
                server.client.config_set("maxmemory", 1)

        monkeypatch.setattr(stored.store, "write", fill_up_after_two)
        try:
            whole, divided, refused = await asyncio.gather(
                stored.submit(part(["u1", "u1"])),
                stored.shard.submit([part(["u1"]), part(["u1", "u1"])], 100, 7),
                stored.submit(part(["u1"])),
                return_exceptions=True,
            )
        finally:
            server.client.config_set("maxmemory", 0)
        assert whole is None
        assert isinstance(divided, Unavailable)
        assert isinstance(refused, StorageFull)
        # Whoever was refused may send it again, and it counts once.
        await repeat(stored, part(["u1"]))
        assert await stored.count("u1") == 4
        assert stored.shard.status().event_count == 5


async def test_a_slow_store_holds_answers_up_and_fails_nothing(url: str, server: RedisProcess) -> None:
    async with running(url) as stored:
        for sequence in range(1, 4):
            began = time.monotonic()
            server.client.client_pause(int(SLOW_S * 1000))
            await stored.submit(part(["u1", f"v{sequence}"], producer="p", sequence=sequence))
            assert time.monotonic() - began > SLOW_S / 2
            assert stored.health.state == SERVING
        assert await stored.count("u1") == 3
        assert stored.shard.status().event_count == 6


async def test_a_damaged_row_stops_what_touches_its_user_and_nothing_else(url: str, server: RedisProcess) -> None:
    async with running(url) as stored:
        await stored.submit(part(["u1", "u2"], producer="p", sequence=1))
        stored.state._cache.drop(Strings.join([b"u1", b"u2"]))
        (key,) = server.client.keys(f"{stored.store.url.prefix}:*:u:u1")
        row = server.client.get(key)
        server.client.set(key, row[:-1])
        with pytest.raises(DataLoss, match=rf"'u1' is damaged.*{re.escape(key.decode())}.*delete"):
            await stored.count("u1")
        straight = StoredProfiles(SCHEMA, stored.store, Clock())
        with pytest.raises(DataLoss, match="'u1' is damaged"):
            await straight.read(["u2", "u1"], [])
        assert await stored.count("u2") == 1
        stored.state._cache.drop(Strings.join([b"u2"]))
        # All of these are one group; a sender's later batches wait for the one that is refused.
        sender = Sender()
        damaged, behind, other, single = await asyncio.gather(
            stored.shard.submit([part(["u2", "u1"], producer="p", sequence=2)], 100, 7, sender),
            stored.shard.submit([part(["u2"], producer="p", sequence=3)], 100, 7, sender),
            stored.submit(part(["u2"], producer="q", sequence=1)),
            stored.submit(part(["u2"])),
            return_exceptions=True,
        )
        assert isinstance(damaged, DataLoss)
        assert isinstance(behind, AfterRefusal)
        assert other is single is None
        assert await stored.count("u2") == 3
        # Again, as senders repeat, and beside others.
        with pytest.raises(DataLoss):
            await stored.submit(part(["u2", "u1"], producer="p", sequence=2))
        await stored.submit(part(["u2"], producer="q", sequence=1))
        assert stored.health.state == SERVING
        assert await stored.count("u2") == 3
        server.client.set(key, row)
        await stored.submit(part(["u2", "u1"], producer="p", sequence=2))
        await stored.submit(part(["u2"], producer="p", sequence=3))
        assert [await stored.count(user) for user in ("u1", "u2")] == [2, 5]
        assert stored.shard.status().event_count == 7


async def test_a_store_that_comes_back_empty_is_told_of_and_used(own_server: RedisProcess) -> None:
    async with running(own_server.url) as stored:
        await stored.submit(part(["u1"], producer="p", sequence=1))
        own_server.empty()
        own_server.start()
        with pytest.raises(Unavailable):
            await stored.submit(part(["u1"], producer="p", sequence=2))
        await stored.until(lambda: stored.health.state == SERVING)
        assert "empty" in stored.health.message
        await stored.submit(part(["u1"], producer="p", sequence=2))
        assert await stored.count("u1") == 1
        assert stored.shard.status().event_count == 1


async def test_two_shards_make_an_emptied_store_anew_at_once(
    own_server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        running(own_server.url, owned=range(0, 256, 2)) as even,
        running(own_server.url, owned=range(1, 256, 2)) as odd,
    ):
        users = {
            owner: next(user for user in map(str, range(99)) if owner.shard.owns([partition_of(user)])[0])
            for owner in (even, odd)
        }
        own_server.empty()
        own_server.start()
        meta, other_is_done, call = even.store.keys.meta, asyncio.Event(), even.store._client.call

        async def held_back(*command: Any) -> Any:
            answer = await call(*command)
            if own_server.client.exists(meta):
                # The other comes between the first step of making it and the next.
                await other_is_done.wait()
            return answer

        monkeypatch.setattr(even.store._client, "call", held_back)
        first = asyncio.create_task(repeat(even, part([users[even]])))
        try:
            await even.until(lambda: own_server.client.exists(meta))
            await repeat(odd, part([users[odd]]))
        finally:
            other_is_done.set()
        await first
        for owner, user in users.items():
            assert owner.health.state == SERVING
            assert await owner.count(user) == 1


async def kill_soon(server: RedisProcess, drawn: Random) -> None:
    """At any moment of what goes on, and starts it again."""
    await asyncio.sleep(drawn.uniform(0, 0.01))
    server.kill()
    await asyncio.to_thread(server.start)


async def test_killed_and_started_again_it_has_every_answer(own_server: RedisProcess, seed: int) -> None:
    drawn = Random(seed)
    async with running(own_server.url) as stored:
        sent = 0
        for sequence in range(1, 31):
            batch = part([f"u{drawn.randrange(100)}" for _ in range(50)], producer="p", sequence=sequence)
            kill = asyncio.create_task(kill_soon(own_server, drawn)) if sequence % 10 == 0 else None
            await repeat(stored, batch)
            sent += 50
            if kill is not None:
                # It may come after the answer.
                await kill
        counts = [await count_again(stored, f"u{n}") for n in range(100)]
        assert sum(counts) == sent == stored.shard.status().event_count


async def repeat(stored: Stored, batch: ApplyPart) -> None:
    """Sends it until it is answered, as senders do."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await stored.submit(batch)
            except ProfileServiceError:
                await asyncio.sleep(0.05)
            else:
                return


async def count_again(stored: Stored, user: str) -> int:
    """Asks until it is answered, as frontends do: a connection may be one to a server that is no more."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await stored.count(user)
            except Unavailable:
                await asyncio.sleep(0.05)


class Front:
    """One address for a server and its replica, as a failover has: whoever is the primary is behind it."""

    def __init__(self, primary: RedisProcess, replica: RedisProcess) -> None:
        self.primary = primary
        self.replica = replica
        self._writers: set[asyncio.StreamWriter] = set()
        self.url = ""

    async def __aenter__(self) -> Front:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        self.replica.client.replicaof("127.0.0.1", self.primary.port)
        async with asyncio.timeout(PATIENCE_S):
            while self.replica.client.info("replication")["master_link_status"] != "up":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._cut()
        self._server.close()
        await self._server.wait_closed()

    def replicated(self) -> None:
        """Returns when the replica has all that the primary has."""
        # WAIT is for what its own connection has written, and for all before that.
        self.primary.client.set("a probe", 1)
        assert self.primary.client.wait(1, int(PATIENCE_S * 1000)) == 1

    def separate(self) -> None:
        """From now on the replica hears nothing more, and is a primary, which nobody asks yet."""
        self.replica.client.replicaof("NO", "ONE")

    def fail_over(self) -> None:
        """The primary is lost with its connections; the other has its place."""
        self.primary.kill()
        self.primary, self.replica = self.replica, self.primary
        self._cut()

    def _cut(self) -> None:
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            behind, to = await asyncio.open_connection("127.0.0.1", self.primary.port)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, to}
        await asyncio.gather(_pass(reader, to), _pass(behind, writer))
        self._writers -= {writer, to}


async def _pass(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
    target.close()


@pytest.fixture
async def front(program: str, tmp_path: Path) -> AsyncIterator[Front]:
    with (
        # A primary would wait some seconds for more replicas.
        RedisProcess(tmp_path / "first", "--repl-diskless-sync-delay", "0", server=program) as first,
        RedisProcess(tmp_path / "second", server=program) as second,
    ):
        async with Front(first, second) as front:
            yield front


async def test_a_replica_that_has_everything_goes_on_where_the_primary_was(front: Front) -> None:
    async with running(front.url) as stored:
        batch = part([f"u{n % 20}" for n in range(60)], producer="p", sequence=1)
        await stored.submit(batch)
        front.replicated()
        front.separate()
        front.fail_over()
        await repeat(stored, batch)
        await repeat(stored, part(["u1", "new"], producer="p", sequence=2))
        assert stored.health.state == SERVING
        assert not stored.health.message
        assert [await stored.count(user) for user in ("u1", "u2", "new")] == [4, 3, 1]
        assert stored.shard.status().event_count == 62


async def test_a_replica_that_lacks_the_last_writes_is_noticed_and_used(front: Front) -> None:
    async with running(front.url) as stored:
        await stored.submit(part(["u1"], producer="p", sequence=1))
        front.replicated()
        front.separate()
        await stored.submit(part(["u1", "u2"], producer="p", sequence=2))
        front.fail_over()
        with pytest.raises(Unavailable):
            await stored.submit(part(["u1"], producer="p", sequence=3))
        await stored.until(lambda: stored.health.state == SERVING)
        assert "lost its last writes" in stored.health.message
        assert (await stored.count("u1"), await stored.count("u2")) == (1, 0)
        # What was lost may be sent again by whoever has it; what was not is known.
        await stored.submit(part(["u1"], producer="p", sequence=1))
        await stored.submit(part(["u1", "u2"], producer="p", sequence=2))
        assert (await stored.count("u1"), await stored.count("u2")) == (2, 1)


async def test_a_primary_that_becomes_a_replica_is_written_to_again_when_it_is_the_primary_again(front: Front) -> None:
    async with running(front.url) as stored:
        await stored.submit(part(["u1"], producer="p", sequence=1))
        front.replicated()
        front.separate()
        front.primary.client.replicaof("127.0.0.1", front.replica.port)
        with pytest.raises(Unavailable, match="replica"):
            await stored.submit(part(["u1"], producer="p", sequence=2))
        assert stored.health.state == STALLED
        front.primary.client.replicaof("NO", "ONE")
        await stored.until(lambda: stored.health.state == SERVING)
        await stored.submit(part(["u1"], producer="p", sequence=2))
        assert await stored.count("u1") == 2
