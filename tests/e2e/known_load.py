"""A load of which every event is known, so that afterwards what was counted can be told event by event.

    ProducerSource    the client's producer: numbered batches, sent again by itself; every tenth event goes twice, with
                      one event id
    RequestSource     IngestEvents with a request id, sent until it is answered, and now and then once more
    PlainSource       IngestEvents without any id: what was not answered may be counted, once, whole

Every event has a number of its own. A user's `recent` feature names each event that was counted, the counter and the
distribution tell of each how often.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import grpc

from profile_client import ProducerOptions, ProfileClient
from tests.e2e.calls import failure_of
from tests.e2e.serving import ServeProcess
from userprofile.v1 import admin_service_pb2, event_pb2, event_service_pb2, profile_pb2, profile_service_pb2

Ingest = Callable[..., event_service_pb2.IngestEventsResponse]

SCHEMA = """
name: known
events: {view: {weight: 1}, contact: {weight: 1}}
half_life: none
features:
  items: {kind: recent, attribute: item, size: 500}
  contacts: {kind: counter, events: [contact]}
  amount: {kind: distribution, attribute: amount, bins: {scale: linear, min: 0, max: 100, count: 4}}
"""
EVENTS_A_USER = 400
USERS_AT_ONCE = 10
FIRST_EVENT_S = 1_790_000_000
PATIENCE_S = 120.0
"""How long anything may take to come back."""
READ_USERS = 50


def known_event(source: str, number: int, user_id: str, event_id: str = "") -> event_pb2.Event:
    """The event of this number."""
    event = event_pb2.Event(user_id=user_id, type="contact" if number % 3 == 0 else "view", event_id=event_id)
    event.time.seconds = FIRST_EVENT_S + number
    event.attributes["item"] = f"{source}-{number}"
    event.attributes["amount"] = number % 97
    return event


@dataclass
class Pause:
    """A time without any acknowledgement, though something was sent."""

    began: float
    ended: float

    @property
    def length_s(self) -> float:
        """How long it was."""
        return self.ended - self.began


class Source(ABC):
    """A thread that sends events of its own users."""

    def __init__(self, name: str, address: str, seed: int) -> None:
        self.name = name
        self.address = address
        self.random = Random(f"{name} {seed}")
        self.failure: BaseException | None = None
        self.acknowledged = 0
        """Events, as far as it was told."""
        self.pauses: list[Pause] = []
        self.stopping = threading.Event()
        self._going = threading.Event()
        self._going.set()
        self._held = threading.Event()
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run_guarded, name=name, daemon=True)

    def start(self) -> None:
        """Begins to send."""
        self._thread.start()

    def join(self) -> None:
        """Sends no more, and returns when everything is acknowledged. Raises what the source failed with."""
        self.stopping.set()
        self._thread.join(2 * PATIENCE_S)
        assert not self._thread.is_alive(), f"{self.name} does not come to its end"
        if self.failure is not None:
            raise self.failure

    def check_alive(self) -> None:
        """Raises what the source failed with."""
        if self.failure is not None:
            raise self.failure

    def hold(self) -> None:
        """Returns when everything is acknowledged, and nothing more is sent."""
        self._going.clear()
        give_up_at = time.monotonic() + PATIENCE_S
        while not self._held.wait(0.1):
            self.check_alive()
            assert time.monotonic() < give_up_at, f"{self.name} does not come to rest"

    def go_on(self) -> None:
        """Sends again."""
        self._held.clear()
        self._last_progress = time.monotonic()
        self._going.set()

    def rest_if_told(self) -> None:
        """For the source itself, whenever all is acknowledged: waits while it is held."""
        while not self._going.is_set():
            self._held.set()
            self._going.wait(0.05)

    @property
    def is_held(self) -> bool:
        """Whether it is to come to rest."""
        return not self._going.is_set()

    @abstractmethod
    def expected(self) -> dict[str, tuple[list[int], list[list[int]]]]:
        """By user: the numbers of events that are counted, and groups that are counted whole or not at all."""

    @abstractmethod
    def run(self) -> None:
        """Sends until `stopping`."""

    def progressed(self, events: int) -> None:
        """So many events more were acknowledged."""
        now = time.monotonic()
        self.pauses.append(Pause(self._last_progress, now))
        self._last_progress = now
        self.acknowledged += events

    def longest_pause_s(self, began: float, ended: float) -> float:
        """The longest pause that touches this stretch of time."""
        # A copy: the source goes on.
        touching = [pause for pause in list(self.pauses) if pause.ended >= began and pause.began <= ended]
        return max((pause.length_s for pause in touching), default=0.0)

    def user_of(self, number: int) -> str:
        """Whose event it is: a user gets EVENTS_A_USER, then it is another's turn."""
        return f"{self.name}-{number // (EVENTS_A_USER * USERS_AT_ONCE)}-{number % USERS_AT_ONCE}"

    def _run_guarded(self) -> None:
        try:
            self.run()
        except BaseException as error:  # noqa: BLE001  the test raises it
            self.failure = error


class ProducerSource(Source):
    """The client's producer."""

    RATE = 800
    """Events a second."""

    def __init__(self, name: str, address: str, seed: int) -> None:
        super().__init__(name, address, seed)
        self.sent = 0

    def run(self) -> None:
        options = ProducerOptions(
            batch_events=self.random.choice((10, 50, 200)), linger_s=0.01, give_up_s=PATIENCE_S, buffer_bytes=1 << 20
        )
        with ProfileClient(self.address) as client, client.producer(self.name, options) as producer:
            watcher = threading.Thread(target=self._watch, args=(producer,), daemon=True)
            watcher.start()
            began = time.monotonic()
            while not self.stopping.is_set():
                if self.is_held:
                    producer.flush(PATIENCE_S)
                    self.rest_if_told()
                number = self.sent
                event_id = f"{self.name}-{number}" if number % 10 == 0 else ""
                event = known_event(self.name, number, self.user_of(number), event_id).SerializeToString()
                producer.send_serialized(event)
                if event_id:
                    producer.send_serialized(event)
                self.sent += 1
                # A producer that was held up does not make up for it all at once.
                ahead_s = self.sent / self.RATE - (time.monotonic() - began)
                if ahead_s > 0.005:
                    time.sleep(ahead_s)
                elif ahead_s < -0.5:
                    began -= ahead_s
            producer.flush(PATIENCE_S)
            watcher.join()

    def _watch(self, producer: object) -> None:
        while True:
            known: int = producer.acknowledged_events  # type: ignore[attr-defined]
            if known > self.acknowledged:
                self.progressed(known - self.acknowledged)
            elif self.stopping.is_set() and known == producer.sent_events:  # type: ignore[attr-defined]
                return
            if self.failure is not None:
                return
            time.sleep(0.005)

    def expected(self) -> dict[str, tuple[list[int], list[list[int]]]]:
        users: dict[str, tuple[list[int], list[list[int]]]] = {}
        for number in range(self.sent):
            users.setdefault(self.user_of(number), ([], []))[0].append(number)
        return users


class CallSource(Source):
    """Single calls, one after the other."""

    def __init__(self, name: str, address: str, seed: int) -> None:
        super().__init__(name, address, seed)
        self.calls: list[tuple[list[int], bool]] = []
        """Numbers of the events of each call, and whether it was acknowledged."""
        self.codes: dict[str, int] = {}
        """Errors seen, by their status."""

    def run(self) -> None:
        following = 0
        with grpc.insecure_channel(self.address, [("grpc.max_reconnect_backoff_ms", 500)]) as channel:
            ingest = channel.unary_unary(
                "/userprofile.v1.EventService/IngestEvents",
                request_serializer=event_service_pb2.IngestEventsRequest.SerializeToString,
                response_deserializer=event_service_pb2.IngestEventsResponse.FromString,
            )
            while not self.stopping.is_set():
                self.rest_if_told()
                count = self.random.choice((1, 1, 5, 20))
                numbers = list(range(following, following + count))
                following += count
                # Noted before it is sent: it counts as sent, whatever happens.
                self.calls.append((numbers, False))
                answered = self.call(ingest, numbers)
                self.calls[-1] = numbers, answered
                if answered:
                    self.progressed(count)
                time.sleep(self.random.random() * 0.01)

    @abstractmethod
    def call(
        self,
        ingest: Ingest,
        numbers: Sequence[int],
    ) -> bool:
        """Sends them; returns whether they were acknowledged."""

    def attempt(
        self,
        ingest: Ingest,
        request: event_service_pb2.IngestEventsRequest,
    ) -> bool:
        """One call."""
        try:
            answer = ingest(request, timeout=self.random.choice((2.0, 10.0)))
        except grpc.RpcError as error:
            code = failure_of(error).code
            self.codes[code] = self.codes.get(code, 0) + 1
            if code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CANCELLED"):
                raise
            return False
        assert answer.accepted_count == len(request.events), answer
        return True


class RequestSource(CallSource):
    """Each call has a request id, and is made until it is answered."""

    def call(
        self,
        ingest: Ingest,
        numbers: Sequence[int],
    ) -> bool:
        request = event_service_pb2.IngestEventsRequest(
            request_id=f"{self.name}-{numbers[0]}",
            events=[known_event(self.name, number, self.user_of(number)) for number in numbers],
        )
        give_up_at = time.monotonic() + PATIENCE_S
        while not self.attempt(ingest, request):
            assert time.monotonic() < give_up_at, f"{self.name}: no answer for {PATIENCE_S:g} s, only {self.codes}"
            time.sleep(0.05)
        if self.random.random() < 0.1:
            self.attempt(ingest, request)
        return True

    def expected(self) -> dict[str, tuple[list[int], list[list[int]]]]:
        users: dict[str, tuple[list[int], list[list[int]]]] = {}
        for numbers, _ in self.calls:
            for number in numbers:
                users.setdefault(self.user_of(number), ([], []))[0].append(number)
        return users


class PlainSource(CallSource):
    """Calls without ids, each of one user's events."""

    def call(
        self,
        ingest: Ingest,
        numbers: Sequence[int],
    ) -> bool:
        user_id = self._user(numbers)
        events = [known_event(self.name, number, user_id) for number in numbers]
        answered = self.attempt(ingest, event_service_pb2.IngestEventsRequest(events=events))
        if not answered:
            time.sleep(0.05)
        return answered

    def expected(self) -> dict[str, tuple[list[int], list[list[int]]]]:
        users: dict[str, tuple[list[int], list[list[int]]]] = {}
        for numbers, answered in self.calls:
            sure, doubtful = users.setdefault(self._user(numbers), ([], []))
            if answered:
                sure.extend(numbers)
            else:
                doubtful.append(list(numbers))
        return users

    def _user(self, numbers: Sequence[int]) -> str:
        return f"{self.name}-{numbers[0] // (EVENTS_A_USER - 20)}"


@dataclass
class KnownLoad:
    """Several sources at once. On one service each load needs a `name` of its own: its users and producers are called
    by it."""

    address: str
    seed: int
    name: str = ""
    sources: list[Source] = field(default_factory=list)

    def start(self) -> None:
        """Begins to send."""
        self.sources = [
            *(ProducerSource(f"{self.name}producer{number}", self.address, self.seed) for number in range(3)),
            RequestSource(f"{self.name}request", self.address, self.seed),
            PlainSource(f"{self.name}plain", self.address, self.seed),
        ]
        for source in self.sources:
            source.start()

    def check_alive(self) -> None:
        """Raises what a source failed with."""
        for source in self.sources:
            source.check_alive()

    def wait_for_progress(self, events: int = 20) -> None:
        """Returns when every source has had so many events more acknowledged."""
        targets = [source.acknowledged + events for source in self.sources]
        give_up_at = time.monotonic() + PATIENCE_S
        while any(source.acknowledged < target for source, target in zip(self.sources, targets, strict=True)):
            self.check_alive()
            late = [s.name for s, target in zip(self.sources, targets, strict=True) if s.acknowledged < target]
            assert time.monotonic() < give_up_at, f"nothing is acknowledged to {late} for {PATIENCE_S:g} s"
            time.sleep(0.01)

    def pause_and_check(self) -> Counted:
        """Holds all sources until everything is acknowledged, compares all totals, and lets them go on."""
        for source in self.sources:
            source.hold()
        try:
            return self.check()
        finally:
            for source in self.sources:
                source.go_on()

    def finish(self) -> None:
        """Sends no more, and returns when all is acknowledged."""
        for source in self.sources:
            source.stopping.set()
        for source in self.sources:
            source.join()

    def check(self) -> Counted:
        """Compares every user's profile with what was sent. Raises AssertionError with every difference."""
        faults: list[str] = []
        counted = Counted()
        with grpc.insecure_channel(self.address, [("grpc.max_receive_message_length", -1)]) as channel:
            for source in self.sources:
                expected = source.expected()
                for user_id, profile in _profiles(channel, list(expected)):
                    sure, doubtful = expected[user_id]
                    fault = _compare(source.name, user_id, profile, sure, doubtful, counted)
                    if fault:
                        faults.append(fault)
        assert not faults, f"{len(faults)} users differ:\n" + "\n".join(faults[:20])
        return counted


@dataclass
class Counted:
    """What was found to be right."""

    users: int = 0
    events: int = 0
    doubtful: int = 0
    """Groups of events that nobody was told of."""
    doubtful_counted: int = 0
    """Of them, those that were counted."""


def _profiles(channel: grpc.Channel, user_ids: Sequence[str]) -> Iterator[tuple[str, profile_pb2.Profile | None]]:
    read = channel.unary_unary(
        "/userprofile.v1.ProfileService/BatchGetProfiles",
        request_serializer=profile_service_pb2.BatchGetProfilesRequest.SerializeToString,
        response_deserializer=profile_service_pb2.BatchGetProfilesResponse.FromString,
    )
    for start in range(0, len(user_ids), READ_USERS):
        asked = user_ids[start : start + READ_USERS]
        answer = read(
            profile_service_pb2.BatchGetProfilesRequest(user_ids=asked), timeout=PATIENCE_S, wait_for_ready=True
        )
        found = {profile.user_id: profile for profile in answer.profiles}
        for user_id in asked:
            yield user_id, found.get(user_id)


def _compare(
    source: str,
    user_id: str,
    profile: profile_pb2.Profile | None,
    sure: list[int],
    doubtful: list[list[int]],
    counted: Counted,
) -> str:
    """What is wrong with the profile; empty where nothing is."""
    entries = [] if profile is None else [entry.value for entry in profile.features["items"].recent.entries]
    shown = [int(item.rpartition("-")[2]) for item in entries]
    named = set(shown)
    kept = [group for group in doubtful if named & set(group)]
    counted.users += 1
    counted.events += len(shown)
    counted.doubtful += len(doubtful)
    counted.doubtful_counted += len(kept)
    numbers = sorted([*sure, *itertools.chain.from_iterable(kept)], reverse=True)
    if profile is None:
        return f"{user_id}: no profile, expected {len(sure)} events" if sure else ""
    if shown != numbers:
        missing, added = sorted(set(numbers) - named), sorted(named - set(numbers))
        return f"{user_id}: missing {missing[:30]} ({len(missing)}), not expected {added[:30]} ({len(added)})"
    if profile.event_count != len(numbers):
        return f"{user_id}: {profile.event_count} events counted, {len(numbers)} sent ({source})"
    contacts = sum(1 for number in numbers if number % 3 == 0)
    if profile.features["contacts"].counter.value != contacts:
        return f"{user_id}: {profile.features['contacts'].counter.value} contacts, expected {contacts}"
    amount = profile.features["amount"].distribution
    total = sum(number % 97 for number in numbers)
    if amount.weight != len(numbers) or abs(amount.weight * amount.mean - total) > 1e-3 * max(1, total):
        return (
            f"{user_id}: amounts of {amount.weight} events, {amount.mean} on average; expected {total}/{len(numbers)}"
        )
    return ""


def status(address: str, timeout_s: float = 5.0) -> admin_service_pb2.GetStatusResponse:
    """GetStatus. Raises grpc.RpcError."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(
            "/userprofile.v1.AdminService/GetStatus",
            request_serializer=admin_service_pb2.GetStatusRequest.SerializeToString,
            response_deserializer=admin_service_pb2.GetStatusResponse.FromString,
        )
        return call(admin_service_pb2.GetStatusRequest(), timeout=timeout_s)


def until_serving(address: str) -> float:
    """Returns when every shard serves; how long that took, in seconds."""
    began = time.monotonic()
    while True:
        try:
            if all(shard.state == "serving" for shard in status(address).shards):
                return time.monotonic() - began
        except grpc.RpcError:
            pass
        assert time.monotonic() < began + PATIENCE_S, f"not serving again after {PATIENCE_S:g} s"
        time.sleep(0.02)


def write_schema(directory: Path) -> Path:
    """The schema file of the known load."""
    path = directory / "known.yaml"
    path.write_text(SCHEMA)
    return path


def median_and_worst(seconds: Sequence[float]) -> str:
    """For people."""
    return f"median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s" if seconds else "none"


def processes_named(service: ServeProcess, name: str) -> list[int]:
    """Process ids of a Ray actor's class within the service."""
    return [process.pid for process in service.tree() if process.name().startswith(f"ray::{name}")]
