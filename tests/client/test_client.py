"""Both clients against one fake service: the same behaviour, awaited or not."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.protobuf import json_format
from google.rpc import code_pb2

from profile_client import (
    AsyncProfileClient,
    BufferFullError,
    DeadlineExceededError,
    Event,
    InvalidArgumentError,
    NotFoundError,
    ProducerOptions,
    ProfileClient,
    RejectedEventsError,
    UnavailableError,
    UnimplementedError,
)
from tests.client.fake_service import UNAVAILABLE, FakeService, failure, serving

Run = Callable[[Callable[[Any], Any]], Any]


class Both:
    """Runs a scenario, written with awaits, on the asyncio client or on the synchronous one."""

    def __init__(self, address: str, *, use_asyncio: bool) -> None:
        self.address = address
        self.use_asyncio = use_asyncio

    def run(self, scenario: Callable[[Any], Any], **options: Any) -> Any:
        async def with_asyncio() -> Any:
            async with AsyncProfileClient(self.address, **options) as client:
                return await scenario(client)

        if self.use_asyncio:
            return asyncio.run(with_asyncio())
        with ProfileClient(self.address, **options) as client:
            return asyncio.run(scenario(_Awaitable(client)))


class _Awaitable:
    """A synchronous object whose calls can be awaited, so that one scenario serves both."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._held, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "producer":
                return _Awaitable(value(*args, **kwargs))

            async def finish() -> Any:
                return value(*args, **kwargs)

            return finish()

        return call

    async def __aenter__(self) -> Any:
        self._held.__enter__()
        return self

    async def __aexit__(self, *details: Any) -> None:
        self._held.__exit__(*details)


@pytest.fixture
def fake() -> FakeService:
    return FakeService()  # type: ignore[abstract]  # what it leaves out answers UNIMPLEMENTED


@pytest.fixture(params=[False, True], ids=["sync", "asyncio"])
def both(request: pytest.FixtureRequest, fake: FakeService) -> Iterator[Both]:
    with serving(fake) as address:
        yield Both(address, use_asyncio=request.param)


def test_reads_and_their_errors(both: Both, fake: FakeService) -> None:
    fake.counts.update({"u1": 3, "u/2": 1})

    async def scenario(client: Any) -> None:
        assert (await client.get_profile("u1")).event_count == 3
        batch = await client.batch_get_profiles(["u/2", "nobody", "u1", "u1"])
        assert [profile.user_id for profile in batch.profiles] == ["u/2", "u1", "u1"]
        assert batch.missing_user_ids == ["nobody"]
        with pytest.raises(NotFoundError, match="nobody"):
            await client.get_profile("nobody")
        with pytest.raises(UnimplementedError):
            await client.rank_items("u1", [("i1", {"color": "red"})])

    both.run(scenario)


def test_details_of_an_error_come_through(both: Both, fake: FakeService) -> None:
    fake.failures.append(failure(code_pb2.INVALID_ARGUMENT, "at most 256 bytes", field="user_id"))

    async def scenario(client: Any) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            await client.get_profile("u1")
        assert caught.value.violations == (("user_id", "at most 256 bytes"),)

    both.run(scenario)
    assert fake.calls == 1


def test_reads_are_tried_again_while_the_service_is_unavailable(both: Both, fake: FakeService) -> None:
    fake.counts["u1"] = 1
    fake.failures.extend([UNAVAILABLE] * 3)

    async def scenario(client: Any) -> None:
        assert (await client.get_profile("u1")).event_count == 1

    both.run(scenario)
    assert fake.calls == 4


def test_the_deadline_is_kept_over_all_tries(both: Both, fake: FakeService) -> None:
    fake.failures.extend([UNAVAILABLE] * 1000)

    async def scenario(client: Any) -> None:
        with pytest.raises((UnavailableError, DeadlineExceededError)):
            await client.get_profile("u1", timeout_s=0.3)

    both.run(scenario)
    assert 1 < fake.calls < 1000


def test_a_batch_is_tried_again_only_with_a_request_id(both: Both, fake: FakeService) -> None:
    fake.failures.append(UNAVAILABLE)

    async def scenario(client: Any) -> None:
        with pytest.raises(UnavailableError) as caught:
            await client.ingest_events([Event("u1", "view")])
        assert caught.value.retry_after_s == pytest.approx(0.005)
        fake.failures.append(UNAVAILABLE)
        assert await client.ingest_events([Event("u1", "view")], request_id="r1") == 1

    both.run(scenario)
    assert fake.counts == {"u1": 1}


def test_refused_events_are_named_and_the_rest_counts(both: Both, fake: FakeService) -> None:
    events = [Event("u1", "view"), Event("u1", "bad"), Event("u2", "view")]

    async def scenario(client: Any) -> None:
        with pytest.raises(RejectedEventsError) as caught:
            await client.ingest_events(events)
        assert [(r.index, r.field) for r in caught.value.rejected] == [(1, "type")]
        async with client.producer() as producer:
            for event in events:
                await producer.send(event)
            with pytest.raises(RejectedEventsError) as caught:
                await producer.flush(timeout_s=10)
            assert [(r.sequence, r.index) for r in caught.value.rejected] == [(1, 1)]
            await producer.flush(timeout_s=10)
            assert producer.rejected_events == 1

    both.run(scenario)
    assert fake.counts == {"u1": 2, "u2": 2}


def test_a_producer_is_counted_once_however_often_its_stream_breaks(both: Both, fake: FakeService, seed: int) -> None:
    rng = random.Random(seed)
    fake.break_streams_after = iter([rng.randint(1, 6) for _ in range(12)])
    options = ProducerOptions(batch_events=5, in_flight_batches=3, reconnect_s=(0.001, 0.01))
    sent: dict[str, int] = {}

    async def scenario(client: Any) -> None:
        async with client.producer(options=options) as producer:
            for number in range(400):
                user = f"u{number % 7}"
                sent[user] = sent.get(user, 0) + 1
                await producer.send(Event(user, "view"))
            await producer.flush(timeout_s=30)
            assert producer.acknowledged_events == 400

    both.run(scenario)
    assert fake.counts == sent
    assert fake.hellos == 13
    assert max(fake.sizes) <= 5


def test_a_returning_producer_goes_on_where_it_was(both: Both, fake: FakeService) -> None:
    async def scenario(client: Any) -> None:
        for expected in (0, 1):
            async with client.producer("p1") as producer:
                assert await producer.acknowledged_sequence() == expected
                await producer.send(Event("u1", "view"))

    both.run(scenario)
    assert fake.counts == {"u1": 2}
    assert fake.applied == {"p1": 2}


def test_a_refused_stream_fails_the_producer_at_once(both: Both, fake: FakeService) -> None:
    import grpc

    fake.refuse_stream = grpc.StatusCode.INVALID_ARGUMENT

    async def scenario(client: Any) -> None:
        producer = client.producer()
        await producer.send(Event("u1", "view"))
        with pytest.raises(InvalidArgumentError, match="rise by one"):
            await producer.flush(timeout_s=10)
        await producer.close(flush=False)

    both.run(scenario)
    assert fake.hellos == 1


def test_a_full_buffer_makes_send_wait_and_then_raise(both: Both, fake: FakeService) -> None:
    fake.hold = threading.Event()
    options = ProducerOptions(batch_events=1, batch_bytes=100, buffer_bytes=100, in_flight_batches=1)

    async def scenario(client: Any) -> None:
        async with client.producer(options=options) as producer:
            with pytest.raises(BufferFullError):
                await send_many(producer)
            accepted = producer.sent_events
            assert accepted < 50
            fake.hold.set()
            await producer.flush(timeout_s=10)
            assert producer.acknowledged_events == accepted

    both.run(scenario)


async def send_many(producer: Any) -> None:
    for _ in range(50):
        await producer.send(Event("u1", "view"), timeout_s=0.05)


def test_watch_goes_on_until_the_caller_stops(both: Both) -> None:
    if not both.use_asyncio:
        with ProfileClient(both.address) as client:
            seen = []
            for profile in client.watch("u1"):
                seen.append(profile.event_count)
                if len(seen) == 3:
                    break
            assert seen == [1, 2, 3]
        return

    async def scenario(client: Any) -> None:
        seen = []
        async for profile in client.watch("u1"):
            seen.append(profile.event_count)
            if len(seen) == 3:
                break
        assert seen == [1, 2, 3]

    both.run(scenario)


@pytest.mark.parametrize(
    ("event", "error", "match"),
    [
        (Event("u", "view", attributes={"x": object()}), TypeError, "'x' of user 'u' is a object"),
        (Event("u", "view", time=dt.datetime(2026, 1, 1)), ValueError, "no time zone"),  # noqa: DTZ001
    ],
)
def test_what_cannot_be_serialised_is_said_at_once(event: Event, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        event.to_message()


def test_times_and_attributes_go_out_as_they_are() -> None:
    zone = dt.timezone(dt.timedelta(hours=2))
    attributes = {"a": "x", "b": 1, "c": True, "d": None, "e": [1, "y"], "f": {"g": 2.5}}
    message = Event("u", "view", dt.datetime(2026, 1, 1, 2, tzinfo=zone), "id", attributes).to_message()
    assert message.time.ToJsonString() == "2026-01-01T00:00:00Z"
    assert json_format.MessageToDict(message.attributes) == attributes
    assert Event("u", "view", 1.5).to_message().time.ToNanoseconds() == 1_500_000_000
