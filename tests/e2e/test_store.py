"""A service on Redis, with a password, as its users see it: read while owners are away, and by other programs; and what
it says when Redis pauses or is full, or when somebody else wants the store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import grpc
import psutil
import pytest

from profile_service.stored_rows import StoredRows
from tests.e2e import serving
from tests.e2e.known_load import processes_named, status
from tests.e2e.serving import ServeProcess
from tests.redis_process import RedisProcess
from userprofile.v1 import event_service_pb2, profile_pb2, profile_service_pb2

USERS = [f"shopper-{number}" for number in range(200)]
PATIENCE_S = 30.0
PASSWORD = "dont-tell"  # noqa: S105


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path_factory.mktemp("redis"), password=PASSWORD) as process:
        yield process


@pytest.fixture(scope="module")
def stored(redis: RedisProcess) -> Iterator[ServeProcess]:
    """Two shards, and some events of every user."""
    with ServeProcess("--store", redis.url, "--shards", "2") as service:
        send(service, events())
        yield service
        assert service.stop() == 0, service.output
        assert service.left_over() == []
        assert "Traceback" not in service.output, service.output
        assert PASSWORD not in service.output


def events(rounds: int = 2) -> event_service_pb2.IngestEventsRequest:
    request = event_service_pb2.IngestEventsRequest()
    for number, user_id in enumerate(USERS * rounds):
        event = request.events.add(user_id=user_id, type="view")
        event.time.FromSeconds(1_790_000_000 + number)
        event.attributes.update({"color": "red", "price": 1000.0 + number, "make": f"m{number % 7}"})
    return request


def send(service: ServeProcess, request: event_service_pb2.IngestEventsRequest) -> None:
    with grpc.insecure_channel(service.grpc_address) as channel:
        ingest = channel.unary_unary(
            "/userprofile.v1.EventService/IngestEvents",
            request_serializer=event_service_pb2.IngestEventsRequest.SerializeToString,
            response_deserializer=event_service_pb2.IngestEventsResponse.FromString,
        )
        assert ingest(request, timeout=PATIENCE_S).accepted_count == len(request.events)


def read(service: ServeProcess) -> dict[str, profile_pb2.Profile]:
    """Every user's profile, without what goes by the moment of the read."""
    with grpc.insecure_channel(service.grpc_address) as channel:
        batch = channel.unary_unary(
            "/userprofile.v1.ProfileService/BatchGetProfiles",
            request_serializer=profile_service_pb2.BatchGetProfilesRequest.SerializeToString,
            response_deserializer=profile_service_pb2.BatchGetProfilesResponse.FromString,
        )
        answer = batch(profile_service_pb2.BatchGetProfilesRequest(user_ids=[*USERS, "nobody"]), timeout=PATIENCE_S)
    assert list(answer.missing_user_ids) == ["nobody"]
    return {profile.user_id: lasting(profile) for profile in answer.profiles}


def population(service: ServeProcess) -> profile_pb2.Profile:
    """All users as one profile."""
    with grpc.insecure_channel(service.grpc_address) as channel:
        ask = channel.unary_unary(
            "/userprofile.v1.ProfileService/GetPopulation",
            request_serializer=profile_service_pb2.GetPopulationRequest.SerializeToString,
            response_deserializer=profile_pb2.Profile.FromString,
        )
        answer: profile_pb2.Profile = ask(profile_service_pb2.GetPopulationRequest(), timeout=PATIENCE_S)
        return answer


def lasting(profile: profile_pb2.Profile) -> profile_pb2.Profile:
    """What does not decay, of a profile."""
    kept = profile_pb2.Profile(user_id=profile.user_id, event_count=profile.event_count)
    kept.last_seen_time.CopyFrom(profile.last_seen_time)
    price = profile.features["price"].distribution
    kept.features["price"].distribution.min, kept.features["price"].distribution.max = price.min, price.max
    for entry in profile.features["make"].top_k.entries:
        kept.features["make"].top_k.entries.add(value=entry.value)
    return kept


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_profiles_are_read_from_the_store_while_their_owners_are_away(stored: ServeProcess) -> None:
    expected = read(stored)
    assert len(expected) == len(USERS)
    owners = [psutil.Process(pid) for pid in processes_named(stored, "ShardActor")]
    assert len(owners) == 2
    for owner in owners:
        owner.suspend()
    try:
        began = time.monotonic()
        assert read(stored) == expected
        assert population(stored).event_count >= 2 * len(USERS)
        assert time.monotonic() - began < 10.0
    finally:
        for owner in owners:
            owner.resume()
    for owner in owners:
        owner.kill()
    # Dead now, and not yet back.
    assert read(stored) == expected
    until(lambda: all(shard.state == "serving" for shard in status(stored.grpc_address).shards))
    send(stored, events(1))
    assert {profile.event_count for profile in read(stored).values()} == {3}


def test_another_program_decodes_what_the_service_answers(stored: ServeProcess, redis: RedisProcess) -> None:
    rows = StoredRows.of(redis.client.hgetall("profiles:meta"))
    answered = read(stored)
    for user_id in USERS[:20]:
        profile = rows.decode(user_id, redis.client.get(rows.key(user_id)))
        assert profile is not None
        assert lasting(profile) == answered[user_id]
    assert rows.decode("nobody", redis.client.get(rows.key("nobody"))) is None
    sums = [packed for key in rows.population_keys() for packed in redis.client.hvals(key)]
    with_sums = rows.decode(USERS[0], redis.client.get(rows.key(USERS[0])), sums=sums)
    without = rows.decode(USERS[0], redis.client.get(rows.key(USERS[0])))
    assert with_sums is not None
    assert without is not None
    # Everybody likes red: so then is this user more likely to.
    red = [
        next(value for value in profile.features["color"].categorical.values if value.value == "red").likelihood
        for profile in (with_sums, without)
    ]
    assert red[0] > red[1]


def test_status_says_where_profiles_live_and_what_a_pause_does(stored: ServeProcess, redis: RedisProcess) -> None:
    done = serving.run("status", "--address", stored.grpc_address)
    assert done.returncode == 0, done.stderr
    assert f"redis://127.0.0.1:{redis.port}/0" in done.stdout
    assert PASSWORD not in done.stdout
    assert "appendfsync always" in done.stdout
    assert json.loads(serving.run("status", "--address", stored.grpc_address, "--json").stdout)["dataDir"] == ""
    redis.pause()
    try:
        with pytest.raises(grpc.RpcError) as refused:
            send(stored, events(1))
        assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        said = status(stored.grpc_address).shards
        assert {shard.state for shard in said} == {"stalled"}
        assert all("does not answer" in shard.message for shard in said)
    finally:
        redis.resume()
    until(lambda: all(shard.state == "serving" for shard in status(stored.grpc_address).shards))


def test_a_full_store_refuses_writes_and_serves_reads_and_status_says_so(
    stored: ServeProcess, redis: RedisProcess
) -> None:
    before = read(stored)
    redis.client.config_set("maxmemory", 1)
    try:
        with pytest.raises(grpc.RpcError) as refused:
            send(stored, events(1))
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        until(lambda: {shard.state for shard in status(stored.grpc_address).shards} == {"full"})
        assert all("maxmemory" in shard.message for shard in status(stored.grpc_address).shards)
        assert read(stored) == before
    finally:
        redis.client.config_set("maxmemory", 0)
    until(lambda: all(shard.state == "serving" for shard in status(stored.grpc_address).shards))
    send(stored, events(1))
    after = read(stored)
    assert [profile.event_count for profile in after.values()] == [p.event_count + 1 for p in before.values()]


def test_a_second_service_is_not_started_on_the_same_store(stored: ServeProcess, redis: RedisProcess) -> None:
    done = serving.run("serve", "--store", redis.url, "--grpc-port", "0", "--http-port", "0")
    assert done.returncode == 1
    assert "is in use by process" in done.stderr
    assert "prefix" in done.stderr
    assert "Traceback" not in done.stderr
