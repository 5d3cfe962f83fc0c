"""When a producer opens its stream again, and when it gives up; without I/O or clock.

    stream ends ─▶ an error that repeating does not mend ▶ give up
                ├▶ nothing to deliver, or progress made ─▶ after a short wait
                └▶ no progress ──────────────────────────▶ after a doubling wait; give up after `give_up_s` of it

Progress is what counts, not a connection: a batch that breaks every stream that carries it would connect for ever.
"""

from __future__ import annotations

import grpc

from profile_client.channel import is_too_large, spread_s
from profile_client.errors import ServiceError, UnavailableError
from profile_client.options import ProducerOptions

_BROKEN_STREAM = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    # grpc.aio ends a stream that breaks while it is written to with "Internal error from Core".
    grpc.StatusCode.INTERNAL,
}
"""Statuses after which a new stream may go on: batches count once, so sending them again is safe."""


class Reconnection:
    """The waits of one producer between its streams."""

    def __init__(self, options: ProducerOptions) -> None:
        self._options = options
        self._progress = -1
        self._attempt = 0

    def stream_ended(
        self,
        error: ServiceError | None,
        *,
        progress: int,
        was_connected: bool,
        is_idle: bool,
        stalled_s: float,
        chance: float,
    ) -> float | ServiceError:
        """What comes after a stream: seconds to wait before the next one, or the error to give up with.

        Args:
            error: what it ended with; None where the service ended it in order.
            progress: a number that grows with all that is answered.
            was_connected: whether the service had answered its first message.
            is_idle: whether there is nothing to deliver.
            stalled_s: for how long there has been something to deliver without progress.
            chance: in [0, 1), spreads producers whose streams broke together.
        """
        if error is not None and (error.code not in _BROKEN_STREAM or is_too_large(error)):
            return error
        progressed, self._progress = progress > self._progress, progress
        if progressed or (is_idle and was_connected):
            self._attempt = 0
        if stalled_s > self._options.give_up_s:
            return error or UnavailableError("the service ends every stream at once", grpc.StatusCode.UNAVAILABLE)
        first_s, longest_s = self._options.reconnect_s
        asked_s = error.retry_after_s if error is not None and error.retry_after_s else 0.0
        wait_s = max(asked_s, spread_s(first_s, longest_s, self._attempt, chance))
        self._attempt += 1
        return wait_s
