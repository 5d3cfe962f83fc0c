"""Producers of both clients against a service that breaks: counted once, in order, in bounds, and never silent."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from profile_client import (
    AbortedError,
    AsyncProducer,
    AsyncProfileClient,
    BufferFullError,
    DeadlineExceededError,
    Event,
    InvalidArgumentError,
    Producer,
    ProducerClosedError,
    ProducerOptions,
    ProfileClient,
    ProfileClientError,
    Rejected,
    RejectedEventsError,
    ServiceError,
    UnavailableError,
)
from profile_client.events import frame
from profile_client.ways import FRONTEND
from tests.client.both import Both
from tests.client.fake_service import STORAGE_FULL, FakeService, Serving, serving
from userprofile.v1 import event_pb2

QUICK: dict[str, Any] = {"reconnect_s": (0.001, 0.01)}
WAIT_S = 30.0
"""Longer than any wait here lasts, shorter than a hang."""


async def send_without_waiting(producer: Any, count: int) -> None:
    for event in views(count):
        await producer.send(event, timeout_s=0)


async def send_for_ever(producer: Any) -> None:
    while True:
        await producer.send(Event("u1", "view"))
        await producer.flush(WAIT_S)


async def send_and_fail(producer: Any) -> None:
    async with producer:
        await producer.send(Event("u1", "view"))
        raise LookupError


async def send_for_room(producer: Any) -> None:
    while True:
        await producer.send(Event("u1", "view"))


async def fill(producer: Any, event: Event) -> None:
    while True:
        await producer.send(event, timeout_s=0.05)


def views(count: int) -> list[Event]:
    return [Event(f"u{number % 7}", "view", event_id=str(number)) for number in range(count)]


def test_what_is_flushed_is_readable(both: Both, fake: FakeService) -> None:
    async def scenario(client: Any) -> None:
        async with client.producer() as producer:
            await producer.flush(WAIT_S)  # nothing to wait for
            await producer.send(Event("u1", "view"))
            await producer.send_serialized(Event("u1", "view").to_message().SerializeToString())
            await producer.send_batch(views(10))
            await producer.flush(WAIT_S)
            assert producer.sent_events == producer.acknowledged_events == 12
            assert (await client.get_profile("u1")).event_count == 4

    both.run(scenario)


def test_leaving_the_producer_flushes(both: Both, fake: FakeService) -> None:
    async def scenario(client: Any) -> None:
        async with client.producer() as producer:
            await producer.send(Event("u1", "view"))

    both.run(scenario)
    assert fake.counts == {"u1": 1}


def test_an_event_alone_is_sent_when_it_has_lingered(both: Both, fake: FakeService) -> None:
    async def scenario(client: Any) -> None:
        async with client.producer() as producer:
            await producer.send(Event("u1", "view"))
            await asyncio.to_thread(fake.wait_until, lambda: fake.counts["u1"] == 1)

    both.run(scenario)


def test_batches_without_linger_depend_on_what_is_sent_alone(both: Both, fake: FakeService) -> None:
    options = ProducerOptions(batch_events=5, linger_s=float("inf"))

    async def scenario(client: Any) -> None:
        async with client.producer(options=options) as producer:
            await producer.send_batch(views(12))
            await producer.flush(WAIT_S)
            await producer.send_batch(views(6))

    both.run(scenario)
    assert fake.sizes == [5, 5, 2, 5, 1]


def test_a_producer_is_counted_once_however_often_its_stream_breaks(both: Both, fake: FakeService, seed: int) -> None:
    rng = random.Random(seed)
    fake.break_streams_after = iter([rng.randint(1, 6) for _ in range(12)])
    fake.lag = iter([rng.randint(0, 3) for _ in range(100)])
    events = [Event(f"u{n % 7}", "bad" if rng.random() < 0.2 else "view", event_id=str(n)) for n in range(400)]
    bad = [position for position, event in enumerate(events) if event.type == "bad"]
    reported: list[Rejected] = []
    options = ProducerOptions(
        batch_events=5, in_flight_batches=3, on_acknowledged=lambda _, refused: reported.extend(refused), **QUICK
    )

    async def scenario(client: Any) -> None:
        async with client.producer(options=options) as producer:
            await producer.send_batch(events)
            with pytest.raises(RejectedEventsError) as caught:
                await producer.flush(WAIT_S)
            # Told once each, also those whose answer was lost with its stream.
            assert [r.position for r in caught.value.rejected] == bad
            assert [r.event.event_id for r in caught.value.rejected] == [str(position) for position in bad]
            assert (producer.acknowledged_events, producer.rejected_events) == (400, len(bad))

    both.run(scenario)
    assert fake.counts == Counter(event.user_id for event in events if event.type != "bad")
    assert [r.position for r in reported] == bad
    assert fake.hellos >= 13
    assert max(fake.sizes) <= 5


def test_a_flush_raises_what_was_refused_since_the_last_one(both: Both, fake: FakeService) -> None:
    async def scenario(client: Any) -> None:
        async with client.producer() as producer:
            for round_ in range(2):
                await producer.send_batch([Event("u1", "view"), Event(f"b{round_}", "bad"), Event("u2", "view")])
                with pytest.raises(RejectedEventsError, match=r"event .: type: not declared") as caught:
                    await producer.flush(WAIT_S)
                (rejected,) = caught.value.rejected
                assert (rejected.field, rejected.position) == ("type", 1 + 3 * round_)
                assert rejected.event.user_id == f"b{round_}"
                await producer.flush(WAIT_S)
            assert producer.rejected_events == 2

    both.run(scenario)
    assert fake.counts == {"u1": 2, "u2": 2}


def test_a_returning_producer_goes_on_where_it_was(both: Both, fake: FakeService) -> None:
    async def scenario(client: Any) -> None:
        for expected in (0, 1):
            async with client.producer("p1") as producer:
                assert await producer.acknowledged_sequence() == expected
                await producer.send(Event("u1", "view"))

    both.run(scenario)
    assert fake.counts == {"u1": 2}
    assert fake.applied == {"p1": 2}


def test_an_import_that_is_interrupted_goes_on_without_counting_twice(both: Both, fake: FakeService) -> None:
    options = ProducerOptions(batch_events=10, linger_s=float("inf"))
    events = views(95)
    fake.lag = iter([0, 2])

    async def interrupted(client: Any) -> None:
        producer = client.producer("import", options)
        await producer.send_batch(events[:58])
        await asyncio.to_thread(fake.wait_until, lambda: fake.applied.get("import") == 5)
        await producer.close(flush=False)

    async def resumed(client: Any) -> None:
        async with client.producer("import", options) as producer:
            done = await producer.acknowledged_sequence()
            assert done == 3
            await producer.send_batch(events[done * 10 :])

    both.run(interrupted)
    both.run(resumed)
    assert fake.counts == Counter(event.user_id for event in events)
    assert fake.applied == {"import": 10}


def test_a_service_that_restarts_is_found_again(fake: FakeService) -> None:
    with serving(fake) as address:
        client = ProfileClient(address)
        producer = client.producer(options=ProducerOptions(**QUICK))
        producer.send(Event("u1", "view"))
        producer.flush(WAIT_S)
    producer.send(Event("u1", "view"))
    with serving(fake, int(address.rpartition(":")[2])):
        producer.flush(WAIT_S)
        client.close()
    assert fake.counts == {"u1": 2}


def test_the_window_bounds_what_is_on_its_way(both: Both, fake: FakeService) -> None:
    fake.may_answer.clear()
    options = ProducerOptions(batch_events=1, in_flight_batches=3)

    async def scenario(client: Any) -> None:
        async with client.producer(options=options) as producer:
            await producer.send_batch(views(10))
            await asyncio.to_thread(fake.wait_until, lambda: fake.received == 3)
            # A whole call to and fro over the same connection, for a fourth batch to show.
            await client.get_status()
            assert fake.received == 3
            fake.may_answer.set()
            await producer.flush(WAIT_S)
            assert fake.received == 10

    both.run(scenario)


def test_a_full_buffer_makes_send_wait_and_then_raise(both: Both, fake: FakeService) -> None:
    fake.may_answer.clear()
    options = ProducerOptions(batch_events=1, batch_bytes=100, buffer_bytes=100, in_flight_batches=1)

    async def scenario(client: Any) -> None:
        async with client.producer(options=options) as producer:
            with pytest.raises(BufferFullError, match="no room"):
                await send_without_waiting(producer, 50)
            accepted = producer.sent_events
            assert 1 <= accepted < 50
            with pytest.raises(BufferFullError):
                await producer.send(Event("u1", "view"), timeout_s=0.02)
            waiting = asyncio.ensure_future(producer.send(Event("late", "view")))
            with pytest.raises(DeadlineExceededError, match="events not acknowledged"):
                await producer.flush(0.02)
            fake.may_answer.set()
            await waiting
            await producer.flush(WAIT_S)
            assert producer.acknowledged_events == accepted + 1

    both.run(scenario)
    assert fake.counts["late"] == 1


async def send_and_flush(producer: Any) -> None:
    """Whichever of the two comes after the refusal raises it."""
    await producer.send(Event("u1", "view"))
    await producer.flush(WAIT_S)


@pytest.mark.parametrize(
    ("code", "error"),
    [(grpc.StatusCode.INVALID_ARGUMENT, InvalidArgumentError), (grpc.StatusCode.ABORTED, AbortedError)],
)
@pytest.mark.parametrize("at_once", [True, False], ids=["stream", "batch"])
def test_what_is_refused_as_a_whole_fails_the_producer_at_once(
    both: Both, fake: FakeService, code: grpc.StatusCode, error: type[ServiceError], at_once: bool
) -> None:
    if at_once:
        fake.refuse_stream = code
    else:
        fake.break_on = {"view": code}

    async def scenario(client: Any) -> None:
        producer = client.producer()
        with pytest.raises(error, match="by the test" if at_once else "by an event"):
            await send_and_flush(producer)
        with pytest.raises(error):
            await producer.send(Event("u1", "view"))
        with pytest.raises(error):
            await producer.close()
        await producer.close(flush=False)

    both.run(scenario)
    assert fake.hellos == 1


def test_a_batch_that_breaks_every_stream_fails_the_producer_in_the_end(both: Both, fake: FakeService) -> None:
    fake.break_on = {"poison": grpc.StatusCode.INTERNAL}
    options = ProducerOptions(give_up_s=0.1, **QUICK)

    async def scenario(client: Any) -> None:
        producer = client.producer(options=options)
        await producer.send(Event("u1", "poison"))
        with pytest.raises(ServiceError, match="INTERNAL: broken by an event of type poison"):
            await producer.flush(WAIT_S)
        await producer.close(flush=False)

    both.run(scenario)
    assert fake.hellos > 2


def test_a_service_that_is_away_is_named_by_flush_and_fails_the_producer_in_the_end(both: Both) -> None:
    with serving(FakeService()) as nobody:  # type: ignore[abstract]
        pass
    options = ProducerOptions(give_up_s=0.3, reconnect_s=(0.01, 0.02))

    async def scenario(client: Any) -> None:
        producer = client.producer(options=options)
        with pytest.raises(DeadlineExceededError, match=f"no stream within .*{nobody}"):
            await producer.acknowledged_sequence(0.2)
        await producer.send(Event("u1", "view"))
        with pytest.raises(UnavailableError, match=f"{nobody}.*; 1 events are not acknowledged"):
            await producer.flush(WAIT_S)
        with pytest.raises(UnavailableError, match=nobody):
            await producer.send(Event("u2", "view"))
        await producer.close(flush=False)
        (unsent,) = await producer.unacknowledged()
        assert event_pb2.Event.FromString(unsent).user_id == "u1"

    both.run(scenario, address=nobody)


def test_a_service_that_takes_everything_and_answers_nothing_fails_the_producer_in_the_end(
    both: Both, fake: FakeService
) -> None:
    fake.may_answer.clear()
    options = ProducerOptions(give_up_s=0.3, batch_events=1, batch_bytes=100, buffer_bytes=100)

    async def scenario(client: Any) -> None:
        producer = client.producer(options=options)
        # The first to notice is whoever waits: here `send`, for room.
        with pytest.raises(UnavailableError, match=r"acknowledges nothing; \d+ events"):
            await asyncio.wait_for(send_for_room(producer), WAIT_S)
        with pytest.raises(UnavailableError):
            await producer.flush()
        await producer.close(flush=False)
        assert len(await producer.unacknowledged()) == producer.sent_events > 0

    both.run(scenario)


def test_a_producer_outlives_a_service_that_is_away_and_holds_its_program_back_meanwhile(both: Both) -> None:
    fake = FakeService()  # type: ignore[abstract]
    options = ProducerOptions(batch_events=5, batch_bytes=200, buffer_bytes=1000, **QUICK)
    events = views(300)

    async def scenario(client: Any) -> None:
        async with client.producer(options=options) as producer:
            await producer.send_batch(events[:100])
            await producer.flush(WAIT_S)
            for down in (served.stop, lambda: served.stop(0.2)):
                # At once, and with a GOAWAY first.
                await asyncio.to_thread(down)
                sending = asyncio.ensure_future(producer.send_batch(events[producer.sent_events :][:100]))
                with pytest.raises(BufferFullError):
                    await fill(producer, events[0])
                assert not sending.done()
                await asyncio.to_thread(served.start)
                await sending
                await producer.flush(WAIT_S)
            assert producer.acknowledged_events == producer.sent_events

    with Serving(fake) as served:
        both.run(scenario, address=served.address)
    assert sum(fake.counts.values()) >= 300
    assert sum(fake.sizes) == sum(fake.counts.values())


def test_while_nobody_listens_one_stream_waits_for_the_connection_however_quick_the_producer_is_to_try(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    # gRPC makes a connection while a call waits for it: streams that fail at once, over and over, put it off.
    fake = FakeService()  # type: ignore[abstract]
    begun: list[int] = []

    def counted(begin: Any) -> Any:
        def counting(producer: Any, ways: Any, number: int, *given: Any) -> Any:
            begun.append(number)
            return begin(producer, ways, number, *given)

        return counting

    for kind in (AsyncProducer, Producer):
        monkeypatch.setattr(kind, "_begin", counted(kind._begin))

    async def scenario(client: Any) -> None:
        async with client.producer(options=ProducerOptions(**QUICK)) as producer:
            await producer.send(Event("u1", "view"))
            await producer.flush(WAIT_S)
            await asyncio.to_thread(served.stop)
            await producer.send(Event("u1", "view"))
            with pytest.raises(DeadlineExceededError, match="the last stream ended with"):
                await producer.flush(1.0)
            assert begun == [FRONTEND] * 2
            await asyncio.to_thread(served.start)
            await producer.flush(WAIT_S)

    with Serving(fake) as served:
        both.run(scenario, address=served.address)
    assert fake.counts == {"u1": 2}


def test_a_disk_that_is_full_is_waited_for_as_long_as_the_service_says(both: Both, fake: FakeService) -> None:
    fake.stream_failures = [STORAGE_FULL] * 4

    async def scenario(client: Any) -> None:
        started = time.monotonic()
        async with client.producer(options=ProducerOptions(**QUICK)) as producer:
            await producer.send(Event("u1", "view"))
            await producer.flush(WAIT_S)
        assert time.monotonic() - started > 4 * 0.05
        assert producer.last_error.reason == "STORAGE_FULL"

    both.run(scenario)
    assert fake.counts == {"u1": 1}
    assert fake.hellos == 5


def body(events: Sequence[Event]) -> bytes:
    return b"".join(frame(event.to_message().SerializeToString()) for event in events)


def test_batches_that_are_serialized_already_go_as_they_are(both: Both, fake: FakeService) -> None:
    heard: list[tuple[int, list[tuple[int, int, int]]]] = []

    def hear(sequence: int, refused: Sequence[Rejected]) -> None:
        heard.append((sequence, [(r.sequence, r.index, r.position) for r in refused]))

    async def scenario(client: Any) -> None:
        async with client.producer("p", ProducerOptions(on_acknowledged=hear)) as producer:
            assert await producer.acknowledged_sequence() == 0
            await producer.send_serialized_batch(body(views(10)), 10)
            await producer.send_serialized_batch(b"", 0)
            await producer.send_serialized_batch(body([Event("u1", "view"), Event("u2", "bad")]), 2)
            with pytest.raises(RejectedEventsError) as caught:
                await producer.flush(WAIT_S)
            assert [(r.position, r.serialized) for r in caught.value.rejected] == [(11, b"")]
            with pytest.raises(ValueError, match="must be 1 or more"):
                await producer.send_serialized_batch(b"", 0, sequence=-1)

    both.run(scenario)
    assert fake.sizes == [10, 0, 2]
    assert [sequence for sequence, _ in heard] == sorted({sequence for sequence, _ in heard})
    assert [refused for _, told in heard for refused in told] == [(3, 1, 11)]


def test_a_producer_that_begins_anew_with_the_same_numbers_counts_once_and_hears_all_that_was_refused(
    both: Both, fake: FakeService, seed: int
) -> None:
    rng = random.Random(seed)
    events = [Event(f"u{n % 7}", "bad" if rng.random() < 0.1 else "view", event_id=str(n)) for n in range(400)]
    batches = [events[start : start + 20] for start in range(0, 400, 20)]
    bad = [(n // 20 + 1, n % 20) for n, event in enumerate(events) if event.type == "bad"]
    # One process after the other sends all batches, and ends after so many of them; the streams break besides.
    ends = [rng.randint(1, 19) for _ in range(5)] + [20]
    fake.break_streams_after = iter([rng.randint(1, 6) for _ in range(20)])
    fake.lag = iter([rng.randint(0, 3) for _ in range(100)])
    heard: list[tuple[int, int]] = []

    def hear(_: int, refused: Sequence[Rejected]) -> None:
        heard.extend((r.sequence, r.index) for r in refused)

    for end in ends:
        heard.clear()

        async def run(client: Any, end: int = end) -> None:
            producer = client.producer("file", ProducerOptions(on_acknowledged=hear, in_flight_batches=4, **QUICK))
            for sequence, batch in enumerate(batches[:end], start=1):
                await producer.send_serialized_batch(body(batch), len(batch), sequence=sequence)
            if end == 20:
                with pytest.raises(RejectedEventsError):
                    await producer.flush(WAIT_S)
                assert producer.acknowledged_events == 400
            else:
                await asyncio.to_thread(fake.wait_until, lambda: fake.received > 0)
            await producer.close(flush=False)

        both.run(run)
    assert heard == bad
    assert fake.counts == Counter(event.user_id for event in events if event.type != "bad")


def test_two_producers_of_one_id_are_found_out(both: Both, fake: FakeService) -> None:
    fake.applied["p1"] = 3
    fake.lag = iter([3, 0])
    fake.break_on = {"view": grpc.StatusCode.UNAVAILABLE}

    async def scenario(client: Any) -> None:
        producer = client.producer("p1", ProducerOptions(**QUICK))
        await producer.send(Event("u1", "view"))
        with pytest.raises(ProfileClientError, match="another producer uses the same producer_id"):
            await producer.flush(WAIT_S)
        await producer.close(flush=False)

    both.run(scenario)


@pytest.mark.parametrize("fails", [False, True])
def test_a_slow_callback_is_done_before_flush_is(both: Both, fake: FakeService, fails: bool) -> None:
    heard: list[Rejected] = []

    def listen(_: int, rejected: Sequence[Rejected]) -> None:
        threading.Event().wait(0.05)
        if fails:
            raise LookupError("no place to write")
        heard.extend(rejected)

    async def scenario(client: Any) -> None:
        producer = client.producer(options=ProducerOptions(on_acknowledged=listen))
        await producer.send(Event("u1", "bad"))
        with pytest.raises(ProfileClientError, match="no place to write" if fails else "1 events refused"):
            await producer.flush(WAIT_S)
        assert len(heard) == (0 if fails else 1)
        await producer.close(flush=False)

    both.run(scenario)


def test_a_callback_that_fails_fails_the_producer(both: Both, fake: FakeService) -> None:
    def complain(_: int, rejected: Sequence[Rejected]) -> None:
        raise LookupError("no place to write")

    async def scenario(client: Any) -> None:
        producer = client.producer(options=ProducerOptions(on_acknowledged=complain))
        await producer.send_batch([Event("u1", "bad"), Event("u1", "view")])
        await asyncio.to_thread(fake.wait_until, lambda: fake.counts["u1"] == 1)
        with pytest.raises(ProfileClientError, match="no place to write"):
            await send_for_ever(producer)
        await producer.close(flush=False)

    both.run(scenario)


def test_a_closed_producer_says_so(both: Both, fake: FakeService) -> None:
    async def scenario(client: Any) -> None:
        producer = client.producer()
        await producer.send(Event("u1", "view"))
        await producer.close()
        await producer.close()
        await producer.flush()  # all that was sent is delivered
        with pytest.raises(ProducerClosedError):
            await producer.send(Event("u1", "view"))

    both.run(scenario)
    assert fake.counts == {"u1": 1}


def test_a_closed_producer_leaves_no_thread(fake: FakeService) -> None:
    with serving(fake) as address, ProfileClient(address) as client:
        producers = [client.producer() for _ in range(3)]
        names = {f"producer {producer.producer_id}" for producer in producers}
        assert names <= {thread.name for thread in threading.enumerate()}
        for producer in producers:
            producer.close()
        assert not names & {thread.name for thread in threading.enumerate()}


def test_closing_the_client_ends_its_producers_and_those_who_wait_for_them(both: Both, fake: FakeService) -> None:
    fake.may_answer.clear()

    async def scenario(client: Any) -> None:
        producer = client.producer()
        await producer.send(Event("u1", "view"))
        flushing = asyncio.ensure_future(producer.flush())
        await asyncio.to_thread(fake.wait_until, lambda: fake.received == 1)
        await client.close()
        with pytest.raises(ProducerClosedError, match="1 events were not acknowledged"):
            await flushing
        with pytest.raises(ProducerClosedError):
            await producer.send(Event("u1", "view"))

    both.run(scenario)


def test_a_producer_left_by_an_exception_does_not_wait(both: Both, fake: FakeService) -> None:
    fake.may_answer.clear()

    async def scenario(client: Any) -> None:
        with pytest.raises(LookupError):
            await send_and_fail(client.producer())

    both.run(scenario)


def test_many_threads_share_a_producer(fake: FakeService) -> None:
    options = ProducerOptions(batch_events=50, batch_bytes=1000, buffer_bytes=2000, in_flight_batches=2)
    with serving(fake) as address, ProfileClient(address) as client, client.producer(options=options) as producer:

        def send() -> None:
            for _ in range(10):
                producer.send_batch(views(50))
                producer.flush(WAIT_S)

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert producer.acknowledged_events == 2000
    assert sum(fake.counts.values()) == 2000


async def test_many_tasks_share_a_producer_within_its_bounds(fake: FakeService) -> None:
    options = ProducerOptions(batch_events=50, batch_bytes=1000, buffer_bytes=2000, in_flight_batches=2)
    with serving(fake) as address:
        async with AsyncProfileClient(address) as client, client.producer(options=options) as producer:
            await asyncio.gather(*(producer.send_batch(views(500)) for _ in range(4)))
            await producer.flush(WAIT_S)
            assert producer.acknowledged_events == 2000
    assert sum(fake.counts.values()) == 2000


async def test_a_caller_with_many_events_leaves_the_loop_to_others(fake: FakeService) -> None:
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    with serving(fake) as address:
        counting = asyncio.create_task(count_turns())
        options = ProducerOptions(batch_events=10)
        async with AsyncProfileClient(address) as client, client.producer(options=options) as producer:
            await producer.send_batch(views(200))
            assert turns >= 200 // 10 - 1
        counting.cancel()
