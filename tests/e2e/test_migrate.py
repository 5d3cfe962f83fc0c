"""`migrate`, as its users run it: a service goes from a data directory to Redis and back to another number of shards,
and nobody who reads or sends can tell."""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.e2e import serving
from tests.e2e.calls import Failure, GrpcCaller, delimited
from tests.e2e.known_load import status
from tests.e2e.serving import ServeProcess
from tests.redis_process import RedisProcess
from userprofile.v1 import event_pb2, event_service_pb2, profile_pb2

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

USERS = [f"user-{number}" for number in range(150)]
BATCH_EVENTS = 200
PATIENCE_S = 30.0

# Nothing decays, so that a profile is the same whenever it is read.
SCHEMA = """
name: migrated
events: {view: {weight: 1}, contact: {weight: 8}}
half_life: none
ttl: 30d
features:
  color:    {kind: categorical, attribute: color, values: [red, green, blue]}
  make:     {kind: top_k, attribute: make, k: 20}
  price:    {kind: distribution, attribute: price, bins: {scale: linear, min: 0, max: 100, count: 10}}
  contacts: {kind: counter, events: [contact]}
  query:    {kind: latest, attribute: make}
  items:    {kind: recent, attribute: item, size: 15}
  distinct: {kind: distinct, attribute: item}
"""


class Senders:
    """A caller with request ids, a producer, and events with ids of their own; all that they sent is kept."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.requests: list[event_service_pb2.IngestEventsRequest] = []
        self.batches: list[event_service_pb2.StreamEventsRequest] = []
        self.single: list[event_pb2.Event] = []

    @property
    def events(self) -> int:
        """How many were sent, each counted once."""
        called, streamed = (len(one.events) for one in self.requests), (len(one.events) for one in self.batches)
        return sum(called) + sum(streamed) + len(self.single)

    def send(self, service: ServeProcess, batches: int) -> None:
        """Sends so many batches more in each way but the last, and some single events."""
        first = len(self.requests)
        for number in range(first, first + batches):
            self.requests.append(
                event_service_pb2.IngestEventsRequest(request_id=f"request-{number}", events=self._draw(BATCH_EVENTS))
            )
            self.batches.append(
                event_service_pb2.StreamEventsRequest(sequence=number + 1, events=self._draw(BATCH_EVENTS))
            )
        for event in self._draw(20):
            event.event_id = f"event-{len(self.single)}"
            self.single.append(event)
        with GrpcCaller(service.grpc_address) as rpc:
            self._call(rpc, self.requests[first:])
            assert self._stream(rpc, self.batches[first:]) == first
            self._call(rpc, [event_service_pb2.IngestEventsRequest(events=self.single[-20:])])

    def repeat(self, service: ServeProcess) -> None:
        """Sends everything once more, as somebody who never heard an answer."""
        with GrpcCaller(service.grpc_address) as rpc:
            self._call(rpc, self.requests)
            # A producer is told where it was; one that does not listen changes nothing.
            assert self._stream(rpc, self.batches) == len(self.batches)
            self._call(rpc, [event_service_pb2.IngestEventsRequest(events=self.single)])

    def _draw(self, count: int) -> list[event_pb2.Event]:
        events = []
        for _ in range(count):
            event = event_pb2.Event(user_id=self.random.choice(USERS), type=self.random.choice(("view", "contact")))
            event.time.FromNanoseconds(time.time_ns() - self.random.randrange(10**13))
            event.attributes["color"] = self.random.choice(("red", "green", "blue", "pink"))
            event.attributes["make"] = f"make-{self.random.randrange(15)}"
            event.attributes["price"] = self.random.randrange(-5, 120)
            event.attributes["item"] = f"item-{self.random.randrange(500)}"
            events.append(event)
        return events

    def _call(self, rpc: GrpcCaller, requests: list[event_service_pb2.IngestEventsRequest]) -> None:
        for request in requests:
            answer = rpc.ingest(request.SerializeToString())
            assert not isinstance(answer, Failure), answer
            assert answer.accepted_count == len(request.events)

    def _stream(self, rpc: GrpcCaller, batches: list[event_service_pb2.StreamEventsRequest]) -> int:
        """Returns up to which batch the service says to have everything before it gets these."""
        stream = rpc.stream()
        known = stream.begin("the producer")
        for batch in batches:
            stream.send(batch)
        stream.receive_until(batches[-1].sequence)
        stream.end()
        return known


def read(service: ServeProcess, events: int) -> dict[str, bytes]:
    """Every user's profile and the population's, under "", as they came over the wire, but for the time of reading."""
    deadline = time.monotonic() + PATIENCE_S
    with GrpcCaller(service.grpc_address) as rpc:
        # Frontends ask for the population now and then.
        while (population := _answer(rpc, "GetPopulation", b"")).event_count != events:
            assert time.monotonic() < deadline, f"{population.event_count} events of {events}"
            time.sleep(0.1)
        found = {user: _answer(rpc, "GetProfile", delimited(1, user.encode())) for user in USERS}
    # In which order shards are added up shows in the last digit, and among values of the same weight.
    makes = population.features["make"].top_k.entries
    makes.sort(key=lambda entry: (-entry.weight, entry.value))
    price = population.features["price"].distribution
    price.mean, price.stddev = round(price.mean, 9), round(price.stddev, 9)
    return {user: profile.SerializeToString(deterministic=True) for user, profile in {**found, "": population}.items()}


def _answer(rpc: GrpcCaller, method: str, request: bytes) -> profile_pb2.Profile:
    encoded = rpc.call(f"ProfileService/{method}", request)
    assert isinstance(encoded, bytes), encoded
    profile = profile_pb2.Profile.FromString(encoded)
    profile.ClearField("read_time")
    return profile


def stop(service: ServeProcess) -> None:
    assert service.stop() == 0, service.output
    assert "Traceback" not in service.output, service.output


def migrate(*arguments: str) -> dict[str, Any]:
    """What the command says of it."""
    done = serving.run("migrate", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_a_service_goes_to_redis_and_back_to_other_shards_with_all_it_knows(seed: int, tmp_path: Path) -> None:
    schema = tmp_path / "migrated.yaml"
    schema.write_text(SCHEMA)
    senders = Senders(Random(seed))
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    with RedisProcess(tmp_path / "redis") as redis:
        with ServeProcess("--schema", str(schema), "--data-dir", first, "--shards", "2") as service:
            senders.send(service, 6)
            before = read(service, senders.events)
            refused = serving.run("migrate", first, redis.url)
            assert (refused.returncode, "in use by" in refused.stderr) == (1, True), refused.stderr
            stop(service)
        there = migrate(first, redis.url)
        assert (there["users"], there["events"], there["expiring"]) == (len(USERS), senders.events, 0)

        with ServeProcess("--schema", str(schema), "--store", redis.url, "--shards", "3") as service:
            assert read(service, senders.events) == before
            senders.repeat(service)
            assert status(service.grpc_address).event_count == senders.events
            assert read(service, senders.events) == before
            senders.send(service, 3)
            before = read(service, senders.events)
            stop(service)
        back = migrate(redis.url, second, "--shards", "5")
        assert (back["users"], back["events"]) == (len(USERS), senders.events)
        assert back["digest"] != there["digest"]

    # Redis is gone.
    with ServeProcess("--schema", str(schema), "--data-dir", second) as service:
        assert len(status(service.grpc_address).shards) == 5
        assert read(service, senders.events) == before
        senders.repeat(service)
        assert status(service.grpc_address).event_count == senders.events
        assert read(service, senders.events) == before
        senders.send(service, 1)
        assert read(service, senders.events) != before
        stop(service)
