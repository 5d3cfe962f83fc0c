"""How the package speaks gRPC: channel options, and when a call is worth another try."""

from __future__ import annotations

from typing import Any

import grpc

from profile_client.errors import ResourceExhaustedError, ServiceError, UnavailableError

MESSAGE_BYTES = 64 << 20
"""Largest message taken; answers of many profiles are larger than what may be sent."""

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # The tries of a call are this package's own: they know what may be repeated.
    ("grpc.enable_retries", 0),
]

MOST_TRIES = 20
_FIRST_WAIT_S = 0.02
_LONGEST_WAIT_S = 1.0


def is_retryable(error: ServiceError) -> bool:
    """Whether the same call may succeed a little later."""
    return isinstance(error, UnavailableError | ResourceExhaustedError)


_BROKEN_STREAM = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    # grpc.aio ends a stream that breaks while it is written to with "Internal error from Core".
    grpc.StatusCode.INTERNAL,
}


def is_broken_stream(error: ServiceError) -> bool:
    """Whether a producer's stream may go on over a new connection: its batches count once, so sending again is safe."""
    return error.code in _BROKEN_STREAM


def next_wait_s(attempt: int, retry_after_s: float | None, chance: float) -> float:
    """Seconds to wait after the try number `attempt` (from 0): what the service asks for, or a doubling time.

    `chance` in [0, 1) spreads callers who failed together.
    """
    doubled = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0**attempt)
    return max(retry_after_s or 0.0, doubled * (0.5 + 0.5 * chance))
