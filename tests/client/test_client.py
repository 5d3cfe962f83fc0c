"""Calls of both clients against one fake service: the same behaviour, awaited or not."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest
from google.rpc import code_pb2

from profile_client import (
    AsyncProfileClient,
    DataLossError,
    DeadlineExceededError,
    Event,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ProfileClientError,
    RejectedEventsError,
    ResourceExhaustedError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from tests.client.both import Both
from tests.client.fake_service import CANCELLED, FULL, UNAVAILABLE, FakeService, Serving, failure

WAIT_S = 30.0


def test_reads_and_their_errors(both: Both, fake: FakeService) -> None:
    fake.counts.update({"u1": 3, "u/2": 1})

    async def scenario(client: Any) -> None:
        assert (await client.get_profile("u1")).event_count == 3
        assert (await client.get_population()).event_count == 4
        batch = await client.batch_get_profiles(["u/2", "nobody", "u1", "u1"])
        assert [profile.user_id for profile in batch.profiles] == ["u/2", "u1", "u1"]
        assert batch.missing_user_ids == ["nobody"]
        assert (await client.get_status()).state == "serving"
        assert (await client.get_topology()).epoch == 3
        await client.get_schema()
        with pytest.raises(NotFoundError, match="nobody"):
            await client.get_profile("nobody")

    both.run(scenario)


def test_what_the_service_does_not_offer_says_so(both: Both) -> None:
    async def scenario(client: Any) -> None:
        for call in (
            client.rank_items("u1", [("i1", {"color": "red", "price": 1})]),
            client.delete_profile("u1"),
            client.merge_profiles("u1", "u2"),
            client.move_partitions([1, 2], 0),
        ):
            with pytest.raises(UnimplementedError):
                await call
        with pytest.raises(UnimplementedError, match="not served"):
            async for _ in client.watch("unserved"):
                pass

    both.run(scenario)


def test_details_of_an_error_come_through(both: Both, fake: FakeService) -> None:
    fake.failures.append(failure(code_pb2.INVALID_ARGUMENT, "at most 256 bytes", field="user_id"))
    fake.failures.append(FULL)

    async def scenario(client: Any) -> None:
        with pytest.raises(InvalidArgumentError) as wrong:
            await client.get_profile("u1")
        assert wrong.value.violations == (("user_id", "at most 256 bytes"),)
        with pytest.raises(ResourceExhaustedError, match="queue is full") as full:
            await client.create_snapshot()
        assert full.value.retry_after_s == pytest.approx(0.04)
        assert full.value.reason == "QUEUE_FULL"

    both.run(scenario)
    assert fake.calls == 2


@pytest.mark.parametrize(
    ("code", "error", "match"),
    [
        (code_pb2.UNAUTHENTICATED, UnauthenticatedError, "^why$"),
        (code_pb2.PERMISSION_DENIED, PermissionDeniedError, "^why$"),
        (code_pb2.DATA_LOSS, DataLossError, "^why$"),
        (code_pb2.INTERNAL, ServiceError, "^INTERNAL: why$"),
    ],
)
def test_each_status_has_its_error(
    both: Both, fake: FakeService, code: int, error: type[ServiceError], match: str
) -> None:
    fake.failures.append(failure(code, "why"))

    async def scenario(client: Any) -> None:
        with pytest.raises(error, match=match) as caught:
            await client.get_profile("u1")
        assert isinstance(caught.value, ProfileClientError)
        assert caught.value.code.value[0] == code

    both.run(scenario)
    assert fake.calls == 1


def test_reads_are_tried_again_while_the_service_is_unavailable_or_full(both: Both, fake: FakeService) -> None:
    fake.counts["u1"] = 1
    fake.failures.extend([UNAVAILABLE, FULL, UNAVAILABLE])
    started = time.monotonic()

    async def scenario(client: Any) -> None:
        assert (await client.get_profile("u1")).event_count == 1

    both.run(scenario)
    assert fake.calls == 4
    assert time.monotonic() - started >= 0.04, "the service asked for that"


def test_the_deadline_is_kept_over_all_tries(both: Both, fake: FakeService) -> None:
    fake.failures.extend([UNAVAILABLE] * 1000)

    async def scenario(client: Any) -> None:
        started = time.monotonic()
        with pytest.raises((UnavailableError, DeadlineExceededError)):
            await client.get_profile("u1", timeout_s=0.3)
        assert time.monotonic() - started < 5

    both.run(scenario)
    assert 1 < fake.calls < 1000


@pytest.mark.parametrize("of_client", [True, False], ids=["of the client", "of the call"])
def test_a_service_that_does_not_answer_ends_in_the_timeout(both: Both, fake: FakeService, of_client: bool) -> None:
    fake.may_answer.clear()

    async def scenario(client: Any) -> None:
        with pytest.raises(DeadlineExceededError) as caught:
            await (client.get_population() if of_client else client.get_population(timeout_s=0.1))
        assert isinstance(caught.value, TimeoutError)
        assert str(caught.value)

    both.run(scenario, timeout_s=0.1 if of_client else 60)


def test_nobody_at_the_address_is_said_with_the_address(both: Both) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"

        async def scenario(client: Any) -> None:
            with pytest.raises(UnavailableError, match=address):
                await client.get_profile("u1", timeout_s=0.5)

        both.run(scenario, address=address)


@pytest.mark.parametrize("request_id", [None, "r1"])
@pytest.mark.parametrize("loses", ["the request", "the answer"])
def test_a_batch_is_tried_again_under_one_request_id_and_counts_once(
    both: Both, fake: FakeService, request_id: str | None, loses: str
) -> None:
    (fake.failures if loses == "the request" else fake.failures_after).extend([UNAVAILABLE, FULL, CANCELLED])

    async def scenario(client: Any) -> None:
        assert await client.ingest_events([Event("u1", "view")], request_id) == 1

    both.run(scenario)
    assert fake.calls == 4
    assert fake.counts == {"u1": 1}
    assert len(fake.request_ids) == 1
    assert request_id is None or fake.request_ids == {request_id}


def test_every_batch_without_a_request_id_gets_one_of_its_own(both: Both, fake: FakeService) -> None:
    async def scenario(client: Any) -> None:
        for _ in range(3):
            await client.ingest_events([Event("u1", "view")])

    both.run(scenario)
    assert fake.counts == {"u1": 3}
    assert len(fake.request_ids - {""}) == 3


def test_a_batch_survives_a_connection_that_is_lost_while_it_waits(both: Both, fake: FakeService) -> None:
    fake.may_answer.clear()

    async def scenario(client: Any) -> None:
        ingesting = asyncio.ensure_future(client.ingest_events([Event("u1", "view")], timeout_s=WAIT_S))
        await asyncio.to_thread(fake.wait_until, lambda: fake.counts["u1"] == 1)
        await asyncio.to_thread(served.stop)
        fake.may_answer.set()
        await asyncio.to_thread(served.start)
        assert await ingesting == 1

    with Serving(fake) as served:
        both.run(scenario, address=served.address)
    assert fake.counts == {"u1": 1}
    assert fake.calls == 2


def test_what_is_too_large_for_a_message_is_not_tried_again(both: Both, fake: FakeService) -> None:
    fake.failures.append(failure(code_pb2.RESOURCE_EXHAUSTED, "Received message larger than max"))

    async def scenario(client: Any) -> None:
        with pytest.raises(ResourceExhaustedError, match="larger than max"):
            await client.ingest_events([Event("u1", "view")])

    both.run(scenario)
    assert fake.calls == 1


def test_refused_events_of_a_batch_are_named_and_the_rest_counts(both: Both, fake: FakeService) -> None:
    events = [Event("u1", "view"), Event("u2", "bad", event_id="e7"), Event("u3", "view")]

    async def scenario(client: Any) -> None:
        with pytest.raises(RejectedEventsError, match="event 1: type: not declared") as caught:
            await client.ingest_events(iter(events))
        assert caught.value.accepted_count == 2
        (rejected,) = caught.value.rejected
        assert (rejected.index, rejected.position, rejected.field) == (1, 1, "type")
        assert (rejected.event.user_id, rejected.event.event_id) == ("u2", "e7")

    both.run(scenario)
    assert fake.counts == {"u1": 1, "u3": 1}


def test_watch_goes_on_until_the_caller_stops(both: Both) -> None:
    async def scenario(client: Any) -> None:
        seen = []
        async for profile in client.watch("u1"):
            seen.append(profile.event_count)
            if len(seen) == 3:
                break
        assert seen == [1, 2, 3]

    both.run(scenario)


def test_an_asyncio_client_without_a_loop_fails_when_it_is_made() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncProfileClient("127.0.0.1:1")
