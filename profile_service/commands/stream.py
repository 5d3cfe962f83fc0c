"""A producer's stream of batches that are serialized already.

    send ─▶ window of unacknowledged batches ─▶ stream ─▶ acknowledgement: the batch leaves the window
                        ▲                          │
                        └── sent again, in order ◀─┘ when the stream breaks

The window is bounded in bytes: `send` waits while it is full. Batches are numbered, so what is sent again is not
counted again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from profile_service.commands.connection import call_error
from profile_service.commands.terminal import CommandError
from profile_service.wire.framing import varint

if TYPE_CHECKING:
    import grpc

    from userprofile.v1 import event_pb2, event_service_pb2

WINDOW_BYTES = 8 << 20
GIVE_UP_S = 30.0
"""How long the service may be away before the run ends."""

_METHOD = "/userprofile.v1.EventService/StreamEvents"
_PRODUCER_ID, _SEQUENCE = 0x12, 0x18

Acknowledged = Callable[[int, "Sequence[event_pb2.RejectedEvent]"], None]
"""Hears of each batch that is durable, by its sequence, in order; and of the events refused in the batches up to it."""


class BatchStream:
    """Sends batches to the service at `address` as the producer `producer_id`.

    As a context manager it opens the stream, and at the end waits until everything is acknowledged.
    """

    def __init__(self, channel: grpc.Channel, address: str, producer_id: str, acknowledged: Acknowledged) -> None:
        from userprofile.v1 import event_service_pb2

        self._address = address
        self._producer_id = producer_id.encode()
        self._tell = acknowledged
        self._open_call = channel.stream_stream(
            _METHOD,
            request_serializer=bytes,
            response_deserializer=event_service_pb2.StreamEventsResponse.FromString,
        )
        self._changed = threading.Condition()
        self._window: deque[tuple[int, bytes]] = deque()
        self._window_bytes = 0
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._told = 0
        self._held: int | None = None
        self._finished = False
        self._error: CommandError | None = None
        self._reader = threading.Thread(target=self._run, name="batch stream", daemon=True)

    @property
    def held(self) -> int:
        """The service holds every batch up to this sequence from before; known once the stream is open."""
        with self._changed:
            self._changed.wait_for(lambda: self._held is not None or self._error is not None)
            self._raise_error()
            assert self._held is not None
            return self._held

    def send(self, sequence: int, events: bytes) -> None:
        """Sends a batch, one sequence after the other; waits while the window is full."""
        message = b"".join((bytes([_SEQUENCE]), varint(sequence), events))
        with self._changed:
            self._changed.wait_for(
                lambda: not self._window or self._window_bytes + len(message) <= WINDOW_BYTES or self._error is not None
            )
            self._raise_error()
            self._window.append((sequence, message))
            self._window_bytes += len(message)
            self._outgoing.put(message)

    def flush(self) -> None:
        """Returns when everything that was sent is durable and readable."""
        with self._changed:
            self._changed.wait_for(lambda: not self._window or self._error is not None)
            self._raise_error()

    def __enter__(self) -> BatchStream:
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
        with self._changed:
            self._finished = True
            self._outgoing.put(None)
        if kind is None:
            self._reader.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        """Reads acknowledgements; opens the stream anew when it breaks, until nothing has moved for too long."""
        import grpc

        patience_s, pause_s = GIVE_UP_S, 0.05
        while True:
            before, started = self._told, time.monotonic()
            try:
                self._read(self._open())
                return
            except grpc.RpcError as error:
                if self._finished:
                    return
                again = isinstance(error, grpc.Call) and error.code() in (
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                )
                if self._told > before:
                    patience_s, pause_s = GIVE_UP_S, 0.05
                patience_s -= time.monotonic() - started + pause_s
                # One that never answered at all is most likely not there: said at once, not after the patience.
                if not again or self._held is None or patience_s <= 0:
                    self._fail(call_error(self._address, error))
                    return
            with self._changed:
                self._changed.wait(pause_s)
            pause_s = min(2 * pause_s, 2.0)

    def _open(self) -> Iterator[event_service_pb2.StreamEventsResponse]:
        """A stream that begins with everything in the window."""
        with self._changed:
            outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            outgoing.put(bytes([_PRODUCER_ID]) + varint(len(self._producer_id)) + self._producer_id)
            for _, message in self._window:
                outgoing.put(message)
            if self._finished:
                outgoing.put(None)
            self._outgoing.put(None)
            self._outgoing = outgoing
        return self._open_call(_drain(outgoing))

    def _read(self, responses: Iterator[event_service_pb2.StreamEventsResponse]) -> None:
        for response in responses:
            with self._changed:
                if self._held is None:
                    self._held = response.sequence
                while self._window and self._window[0][0] <= response.sequence:
                    _, message = self._window.popleft()
                    self._window_bytes -= len(message)
                self._told = max(self._told, response.sequence)
                self._changed.notify_all()
            self._tell(response.sequence, response.rejected)

    def _fail(self, error: CommandError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()


def _drain(outgoing: queue.SimpleQueue[bytes | None]) -> Iterator[bytes]:
    while (message := outgoing.get()) is not None:
        yield message
