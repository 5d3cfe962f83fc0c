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
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Its name misleads: this is how long a connection may take to be made.
    ("grpc.min_reconnect_backoff_ms", 2000),
    # A peer that vanished without a word is noticed: at once where bytes wait for it (keepalive sets the socket's user
    # timeout), else by a ping. Servers take pings more often than every 5 minutes for abuse and end the connection.
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The tries of a call are this package's own: they know what may be repeated.
    ("grpc.enable_retries", 0),
]

_FIRST_WAIT_S = 0.02
_LONGEST_WAIT_S = 1.0

_BROKEN_CALL = {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN}
"""What gRPC may say, beside UNAVAILABLE, of a connection that broke, or of a server that stopped before it answered."""


def is_retryable(error: ServiceError) -> bool:
    """Whether the same call may succeed a little later."""
    # The service gives a reason for each error of its own; one without comes from the way to it.
    broken = error.code in _BROKEN_CALL and not error.reason
    return broken or (isinstance(error, UnavailableError | ResourceExhaustedError) and not is_too_large(error))


def is_too_large(error: ServiceError) -> bool:
    """Whether gRPC itself refused a message for its size. A service that is full says why, and when to come again."""
    return isinstance(error, ResourceExhaustedError) and not error.reason and error.retry_after_s is None


def next_wait_s(attempt: int, retry_after_s: float | None, chance: float) -> float:
    """Seconds to wait after the try number `attempt` (from 0): what the service asks for at least, or a doubling time.

    `chance` in [0, 1) spreads callers who failed together.
    """
    return max(retry_after_s or 0.0, spread_s(_FIRST_WAIT_S, _LONGEST_WAIT_S, attempt, chance))


def spread_s(first_s: float, longest_s: float, attempt: int, chance: float) -> float:
    """A time that doubles with each attempt up to the longest, less up to half of it by chance."""
    return min(longest_s, first_s * 2.0 ** min(attempt, 50)) * (0.5 + 0.5 * chance)
