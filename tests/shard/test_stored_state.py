"""A shard whose state is in Redis: what is answered is stored and counted once, whoever dies; nobody reads what is not
stored; who is no longer the owner writes nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random

import pytest

from profile_service.domain.index import Strings
from profile_service.domain.population import Population
from profile_service.domain.schema import parse_schema
from profile_service.errors import Unavailable
from profile_service.shard.health import SERVING, STALLED
from profile_service.shard.shard import Shard
from profile_service.shard.stored_schema import prepare
from profile_service.storage.redis_client import StoreUrl
from profile_service.storage.redis_store import RedisStore
from tests.redis_process import RedisProcess
from tests.shard.shards import NOW_NS, Clock
from tests.shard.stored import Held, Stored, partition_of, running
from tests.shard.test_shard import SCHEMA, part
from userprofile.v1 import profile_pb2


async def test_what_is_answered_is_stored_and_counted_once_by_whoever_owns_it_next(url: str) -> None:
    batch = part([f"u{n % 50}" for n in range(400)], producer="p", sequence=1, event_ids=[f"e{n}" for n in range(400)])
    async with running(url) as first:
        await first.submit(batch)
        await first.submit(batch)
        await first.submit(part(["u1"], producer="request:r", sequence=0))
        await first.submit(part([], producer="p"))
        assert await first.count("u1") == 9
        before = first.shard.status()
        assert (before.user_count, before.event_count, before.duplicate_count) == (50, 401, 400)
        sums = everyone(first.shard)
    async with running(url, epoch=8) as second:
        # By sequence, by request id, by event id.
        await second.submit(batch, epoch=8)
        await second.submit(part(["u1"], producer="request:r", sequence=0), epoch=8)
        await second.submit(part(["u2"], event_ids=["e2"]), epoch=8)
        after = second.shard.status()
        assert (after.user_count, after.event_count, after.duplicate_count) == (50, 401, 402)
        await second.shard.bring(["u1"])
        profile = second.shard.read(["u1"], [])[0]
        assert profile == first.shard.read(["u1"], [])[0]
        # Added up in another order.
        assert everyone(second.shard) == pytest.approx(sums)
        await second.submit(part(["u1"], producer="p", sequence=2), epoch=8)
        assert await second.count("u1") == 10


def everyone(shard: Shard) -> dict[str, float]:
    profile = profile_pb2.Profile.FromString(Population.merge(SCHEMA, [shard.population_state()]).profile(NOW_NS))
    color, price = profile.features["color"].categorical, profile.features["price"].distribution
    return {
        **{value.value: value.weight for value in color.values},
        "events": profile.event_count,
        "price": price.weight,
        "mean": price.mean,
        "stddev": price.stddev,
    }


async def test_a_producer_hears_from_the_next_owner_up_to_where_it_is_acknowledged(url: str) -> None:
    async with running(url) as first:
        await first.submit(replace(part(["u1"], producer="p", sequence=5), acknowledged_sequence=4))
        await first.submit(replace(part([], producer="p"), acknowledged_sequence=5))
    async with running(url, epoch=8) as second:
        await second.until(lambda: second.state._owner != "")
        await second.shard.bring(producer_ids=["p", "nobody"])
        assert second.shard.acknowledged("p") == 5
        assert second.shard.acknowledged("nobody") == 0


async def test_an_owner_of_nothing_takes_what_producers_say_and_goes_on(url: str) -> None:
    """As a new shard is before its first move, and one that goes after its last."""
    async with running(url, owned=()) as stored:
        await stored.submit(replace(part([], producer="p"), acknowledged_sequence=4))
        stored.shard.update_topology(8, range(256))
        await stored.submit(part(["u1"], producer="p", sequence=1), epoch=8)
        assert await stored.count("u1") == 1


async def test_who_was_followed_by_another_owner_writes_nothing(url: str) -> None:
    async with running(url) as old:
        await old.submit(part(["u1"], producer="p", sequence=1))
        async with running(url, epoch=8) as new:
            await new.submit(part(["u1"], producer="p", sequence=2), epoch=8)
            with pytest.raises(Unavailable, match="belong to"):
                await old.submit(part(["u1", "u2"], producer="p", sequence=3))
            assert await new.count("u1") == 2
            assert await new.count("u2") == 0
            await old.until(lambda: old.health.state == STALLED and "epoch 8" in old.health.message)
            # It comes back as the owner of a later epoch, and counts from what the other left.
            old.shard.update_topology(9, range(256))
            await old.until(lambda: old.health.state == SERVING)
            await old.submit(part(["u1", "u2"], producer="p", sequence=3), epoch=9)
            assert await old.count("u1") == 3
            with pytest.raises(Unavailable):
                await new.submit(part(["u1"], producer="p", sequence=4), epoch=8)


async def test_two_owners_of_one_partition_group_keep_out_of_each_others_way(url: str, seed: int) -> None:
    drawn = Random(seed)
    users = [f"u{n}" for n in range(300)]
    async with running(url, owned=range(0, 256, 2)) as even, running(url, owned=range(1, 256, 2)) as odd:
        sent: dict[str, int] = {}
        for sequence in range(1, 11):
            for owner in (even, odd):
                mine = [user for user in users if owner.shard._owned[partition_of(user)]]
                chosen = [drawn.choice(mine) for _ in range(40)]
                for user in chosen:
                    sent[user] = sent.get(user, 0) + 1
                last = part(chosen, producer="p", sequence=sequence)
                await owner.submit(last)
        assert even.shard.status().event_count + odd.shard.status().event_count == sum(sent.values())
    # One owner of all of it takes over what both left.
    async with running(url, epoch=8) as whole:
        await whole.submit(last, epoch=8)
        status = whole.shard.status()
        assert (status.event_count, status.user_count) == (sum(sent.values()), len(sent))
        assert {user: await whole.count(user) for user in sent} == sent


async def test_a_profile_is_forgotten_at_its_ttl_by_the_store_and_near_it(url: str, server: RedisProcess) -> None:
    clock = Clock()
    async with running(url, clock=clock) as stored:
        await stored.submit(part(["u1"]))
        (key,) = server.client.keys(f"{StoreUrl.parse(url).prefix}:*:u:u1")
        assert 9.9 * 86_400 < server.client.ttl(key) <= 10 * 86_400
        clock.now_ns = NOW_NS + 11 * 86_400 * 10**9
        assert await stored.count("u1") == 0
        await stored.submit(replace(part(["u1"]), arrival_time_ns=clock.now_ns))
        assert await stored.count("u1") == 1


async def test_a_small_cache_gives_what_a_large_one_gives(url: str, seed: int) -> None:
    drawn = Random(seed)
    sent: dict[str, int] = {}
    async with running(url, cached_users_per_shard=20) as stored:
        for sequence in range(1, 41):
            users = [f"u{drawn.randrange(200)}" for _ in range(30)]
            for user in users:
                sent[user] = sent.get(user, 0) + 1
            await stored.submit(part(users, producer="p", sequence=sequence))
            chosen = drawn.choice(users)
            assert await stored.count(chosen) == sent[chosen]
            assert len(stored.state.table) <= 20 + 2 * 30
        assert {user: await stored.count(user) for user in sent} == sent
        assert stored.state._cache.generation > 10
        stored.state.table.check_invariants()


async def test_reads_between_writes_never_bring_back_what_was_before(url: str, seed: int) -> None:
    """With a cache that holds next to nothing, every read and every group goes to the store."""
    drawn = Random(seed)
    async with running(url, cached_users_per_shard=2) as stored:
        await stored.submit(part(["u0"]))
        counted = 0

        async def read_all_the_time() -> None:
            seen = 0
            while counted < 60:
                now = await stored.count("u0")
                assert seen <= now
                seen = now
                await stored.count(f"v{drawn.randrange(50)}")

        reader = asyncio.create_task(read_all_the_time())
        for sequence in range(1, 61):
            await stored.submit(part(["u0", f"v{sequence % 50}"], producer="p", sequence=sequence))
            counted = sequence
            assert await stored.count("u0") == 1 + sequence
        await reader


async def read_together(stored: Stored, users: list[str]) -> list[int]:
    """Event counts as one read gives them; 0 for a user who was not found."""
    await stored.shard.bring(users)
    profiles = map(profile_pb2.Profile.FromString, stored.shard.read(users, []))
    return [profile.event_count for profile in profiles]


@pytest.mark.parametrize("befalls", ["turn", "two turns", "clear"])
async def test_a_read_finds_everyone_whatever_befalls_the_cache_while_the_store_answers(url: str, befalls: str) -> None:
    async with running(url) as stored:
        cache = stored.state._cache
        # One store has all of the cases.
        near, far = f"near: {befalls}", f"far: {befalls}"
        await stored.submit(part([near, far]))
        cache.drop(Strings.join([far.encode()]))
        with Held(stored.store, "fetch") as held:
            reading = asyncio.create_task(read_together(stored, [near, "nobody", far]))
            await held.answered()
            for _ in range(2 if befalls == "two turns" else 1):
                cache.clear() if befalls == "clear" else cache.turn()
            held.release()
            assert await reading == [1, 0, 1]


async def test_a_read_finds_everyone_though_the_cache_turns_for_those_who_come(url: str) -> None:
    async with running(url, cached_users_per_shard=2) as stored:
        for user in ("far", "another", "near"):
            await stored.submit(part([user]))
        assert await read_together(stored, ["near", "far"]) == [1, 1]
        users = [f"u{n}" for n in range(10)]
        for n, user in enumerate(users):
            await stored.submit(part([user]))
            assert await read_together(stored, users[: n + 1]) == [1] * (n + 1)


async def test_a_user_who_is_new_while_the_store_answers_is_found_though_the_cache_turns(url: str) -> None:
    async with running(url) as stored:
        await stored.submit(part(["u1"]))
        with Held(stored.store, "fetch") as held:
            reading = asyncio.create_task(read_together(stored, ["u1", "new"]))
            await held.answered()
            await stored.submit(part(["new"]))
            stored.state._cache.turn()
            held.release()
            assert await reading == [1, 1]


async def test_a_row_that_was_read_before_a_claim_is_not_counted_on_after_it(url: str) -> None:
    async with running(url) as stored:
        await stored.submit(part(["u1"]))
        stored.state._cache.drop(Strings.join([b"u1"]))
        with Held(stored.store, "fetch") as held:
            reading = asyncio.create_task(read_together(stored, ["u1"]))
            await held.answered()
            await stored.submit(part(["u1"]))
            await claim_anew(stored)
            held.release()
            assert await reading == [2]
        await stored.submit(part(["u1"]))
        assert await stored.count("u1") == 3


async def test_what_was_read_of_a_producer_before_a_claim_does_not_count_its_batch_again(url: str) -> None:
    async with running(url) as first:
        await first.submit(part(["u1"], producer="p", sequence=1))
    async with running(url, epoch=8) as stored:
        await stored.submit(part(["u2"]), epoch=8)
        with Held(stored.store, "read_producers") as held:
            asking = asyncio.create_task(stored.shard.bring(producer_ids=["p"]))
            await held.answered()
            await stored.submit(part(["u1"], producer="p", sequence=2), epoch=8)
            await claim_anew(stored, epoch=8)
            held.release()
            await asking
        await stored.submit(part(["u1"], producer="p", sequence=2), epoch=8)
        assert await stored.count("u1") == 2


async def claim_anew(stored: Stored, epoch: int = 7) -> None:
    """As after a fault."""
    stored.state._lost = True
    await stored.submit(part(["another"]), epoch)
    assert not stored.state._lost


async def test_rows_follow_a_changed_schema_even_when_that_was_interrupted(url: str) -> None:
    users = [f"u{n}" for n in range(300)]
    async with running(url) as stored:
        await stored.submit(part([*users, *users]))
    changed = parse_schema(
        SCHEMA.text.replace("size: 3", "size: 2").replace("features:", "features:\n  likes: {kind: counter}")
    )

    class Interruption(Exception):
        pass

    def interrupt(message: str) -> None:
        raise Interruption

    store = RedisStore(StoreUrl.parse(url))
    with pytest.raises(Interruption):
        await prepare(store, changed, reset_features=(), partition_bits=8, progress=interrupt)
    await store.close()
    async with running(url, schema=changed, epoch=8) as stored:
        await stored.submit(part(["new"]), epoch=8)
        assert {await stored.count(user) for user in users} == {2}
        assert stored.shard.status().event_count == 601
        profile = read_any(stored.shard, "u7")
        assert len(profile.features["items"].recent.entries) == 2
        assert profile.features["likes"].counter.value == 0


def read_any(shard: Shard, user: str) -> profile_pb2.Profile:
    return profile_pb2.Profile.FromString(shard.read([user], [])[0])
