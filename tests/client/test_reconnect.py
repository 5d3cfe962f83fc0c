"""When a producer tries again and when it gives up, without a network."""

from __future__ import annotations

import grpc
import pytest

from profile_client import ProducerOptions, ResourceExhaustedError, ServiceError
from profile_client.channel import is_too_large, next_wait_s
from profile_client.reconnect import Reconnection

BROKEN = ServiceError("broken", grpc.StatusCode.UNAVAILABLE)
OPTIONS = ProducerOptions(reconnect_s=(0.1, 1.0), give_up_s=10)


def ended(
    reconnection: Reconnection,
    error: ServiceError | None = BROKEN,
    *,
    progress: int = 0,
    was_connected: bool = False,
    is_idle: bool = False,
    stalled_s: float = 0.0,
) -> float | ServiceError:
    return reconnection.stream_ended(
        error, progress=progress, was_connected=was_connected, is_idle=is_idle, stalled_s=stalled_s, chance=0.0
    )


def test_waits_double_to_the_longest_and_begin_anew_with_progress() -> None:
    reconnection = Reconnection(OPTIONS)
    assert [ended(reconnection) for _ in range(6)] == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5]
    assert ended(reconnection, progress=1) == 0.05


def test_a_connection_without_progress_does_not_put_off_giving_up() -> None:
    reconnection = Reconnection(OPTIONS)
    assert ended(reconnection, was_connected=True, stalled_s=9) != BROKEN
    assert ended(reconnection, was_connected=True, stalled_s=11) is BROKEN
    verdict = ended(reconnection, None, was_connected=True, stalled_s=11)
    assert isinstance(verdict, ServiceError)


def test_an_idle_producer_does_not_hammer_a_service_that_is_away() -> None:
    reconnection = Reconnection(OPTIONS)
    assert [ended(reconnection, is_idle=True) for _ in range(3)] == [0.05, 0.1, 0.2]
    assert ended(reconnection, is_idle=True, was_connected=True) == 0.05


def test_the_service_s_own_wish_is_honoured() -> None:
    full = ServiceError("full", grpc.StatusCode.RESOURCE_EXHAUSTED)
    full.retry_after_s = 3.0
    assert ended(Reconnection(OPTIONS), full) == 3.0


def test_a_call_waits_as_long_as_it_is_asked_to_and_else_ever_longer() -> None:
    assert next_wait_s(0, 3.0, 0.5) == 3.0
    waits = [next_wait_s(attempt, None, 0.0) for attempt in range(12)]
    assert waits == sorted(waits)
    assert waits[-1] == 0.5
    assert waits[0] < next_wait_s(0, None, 0.9) < 2 * waits[0]


def test_what_is_too_large_is_not_repeated_but_what_is_full_is() -> None:
    error = ServiceError("x", grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert is_too_large(error) is False, "of that class only"
    error = ResourceExhaustedError("Received message larger than max", grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert ended(Reconnection(OPTIONS), error) is error
    error.reason = "STORAGE_FULL"
    assert ended(Reconnection(OPTIONS), error) == 0.05
    error.retry_after_s = 1.5
    assert ended(Reconnection(OPTIONS), error) == 1.5


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.DATA_LOSS,
    ],
)
def test_what_repeating_does_not_mend_is_not_repeated(code: grpc.StatusCode) -> None:
    error = ServiceError("no", code)
    assert ended(Reconnection(OPTIONS), error) is error


def test_options_name_all_their_faults_at_once() -> None:
    with pytest.raises(ValueError, match="batch_events must be 1 to 10000, is 0") as caught:
        ProducerOptions(batch_events=0, in_flight_batches=0, buffer_bytes=1, linger_s=-1, reconnect_s=(2, 1))
    for name in ("in_flight_batches", "buffer_bytes", "linger_s", "reconnect_s"):
        assert name in str(caught.value)
