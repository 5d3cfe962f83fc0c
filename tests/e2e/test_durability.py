"""What outlives a service: profiles to the last byte, through stops, kills and snapshots, and through a change of the
schema where it allows it.

One service a directory, damage and salvage are in test_data_directory.py, files in test_ingest_resume.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

import pytest

from tests.e2e import serving
from tests.e2e.calls import Failure, GrpcCaller, delimited
from tests.e2e.serving import ServeProcess
from tests.e2e.stores import STORES, stored_in
from userprofile.v1 import event_service_pb2, profile_pb2

# Each starts a service several times, which on a fresh machine compiles its kernels first.
pytestmark = pytest.mark.timeout(600)

USERS = [f"user-{number}" for number in range(40)]

# Nothing decays, so that a profile is the same whenever it is read.
SCHEMA = """
name: kept
events: {view: {weight: 1}, contact: {weight: 8}}
half_life: none
ttl: 30d
features:
  color:    {kind: categorical, attribute: color, values: [red, green, blue]}
  make:     {kind: top_k, attribute: make, k: 3}
  price:    {kind: distribution, attribute: price, bins: {scale: linear, min: 0, max: 100, count: 10}}
  contacts: {kind: counter, events: [contact]}
  query:    {kind: latest, attribute: make}
  items:    {kind: recent, attribute: item, size: 15}
  distinct: {kind: distinct, attribute: item}
"""
KEPT = ("color", "make", "contacts", "query", "items", "distinct")


def schema_file(directory: Path, text: str) -> str:
    path = directory / "kept.yaml"
    path.write_text(text)
    return str(path)


def send(service: ServeProcess, random: Random, batches: int) -> None:
    """Events of all kinds to all users."""
    with GrpcCaller(service.grpc_address) as rpc:
        for _ in range(batches):
            request = event_service_pb2.IngestEventsRequest()
            for _ in range(200):
                event = request.events.add(user_id=random.choice(USERS), type=random.choice(("view", "contact")))
                event.time.FromNanoseconds(time.time_ns() - random.randrange(10**13))
                event.attributes["color"] = random.choice(("red", "green", "blue", "pink"))
                event.attributes["make"] = f"make-{int(random.paretovariate(1))}"
                event.attributes["price"] = round(random.uniform(-5, 120), 2)
                event.attributes["item"] = f"item-{random.randrange(500)}"
            answer = rpc.ingest(request.SerializeToString())
            assert not isinstance(answer, Failure), answer


def profiles(service: ServeProcess) -> dict[str, bytes]:
    """Every user's profile as it came over the wire, without the time of reading."""
    found = {}
    with GrpcCaller(service.grpc_address) as rpc:
        for user in USERS:
            encoded = rpc.call("ProfileService/GetProfile", delimited(1, user.encode()))
            assert isinstance(encoded, bytes), encoded
            profile = profile_pb2.Profile.FromString(encoded)
            profile.ClearField("read_time")
            found[user] = profile.SerializeToString(deterministic=True)
    return found


def features(encoded: dict[str, bytes], *names: str) -> dict[str, dict[str, profile_pb2.Feature]]:
    """Some features of every user."""
    parsed = {user: profile_pb2.Profile.FromString(profile) for user, profile in encoded.items()}
    return {user: {name: profile.features[name] for name in names} for user, profile in parsed.items()}


@pytest.mark.parametrize("store", STORES)
def test_profiles_are_the_same_to_the_last_byte_through_kills_stops_and_a_changed_schema(
    seed: int, tmp_path: Path, store: str
) -> None:
    with stored_in(store, tmp_path) as where:
        check_that_profiles_last(Random(seed), tmp_path, *where, "--schema", schema_file(tmp_path, SCHEMA))


def check_that_profiles_last(random: Random, directory: Path, *flags: str) -> None:
    with ServeProcess(*flags, "--shards", "2") as service:
        send(service, random, 3)
        snapshot = serving.run("snapshot", "--address", service.grpc_address)
        assert snapshot.returncode == 0, snapshot.stderr
        send(service, random, 2)
        before = profiles(service)
        service.kill()

    otherwise = SCHEMA.replace("count: 10", "count: 20").replace("  color: ", "  likes: {kind: counter}\n  color: ")
    schema_file(directory, otherwise)
    refused = serving.run("serve", *flags, "--grpc-port", "0", "--http-port", "0")
    assert refused.returncode == 1
    assert "price" in refused.stderr
    assert "--reset-feature price" in refused.stderr
    assert "Traceback" not in refused.stderr

    # Local, from a snapshot and the log behind it.
    with ServeProcess(*flags, "--reset-feature", "price") as service:
        after = profiles(service)
        assert features(after, *KEPT) == features(before, *KEPT)
        anew = features(after, "price", "likes")
        assert {feature["price"].distribution.weight for feature in anew.values()} == {0}
        assert {feature["likes"].counter.value for feature in anew.values()} == {0}
        send(service, random, 1)
        after = profiles(service)
        service.kill()
    # Started again with the same flags it starts nothing anew; the schema changes where it stands in the log.
    with ServeProcess(*flags, "--reset-feature", "price") as service:
        assert profiles(service) == after
        assert any(feature["price"].distribution.weight for feature in features(after, "price").values())
