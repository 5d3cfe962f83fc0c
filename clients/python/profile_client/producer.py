"""The producer over threads: `send` puts into a window, one thread keeps a stream open and takes acknowledgements.

What is sent, when, and when again is `window.py`'s and `reconnect.py`'s; here is the I/O around them. One lock guards
the window; a condition on it wakes those who wait for room, for acknowledgements, or for something to send.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from profile_client.errors import (
    BufferFullError,
    DeadlineExceededError,
    ProducerClosedError,
    ProfileClientError,
    Rejected,
    RejectedEventsError,
    ServiceError,
    from_rpc_error,
)
from profile_client.events import Event, frame
from profile_client.options import ProducerOptions
from profile_client.reconnect import Reconnection
from profile_client.stream import METHOD, encode_batch, encode_hello, parse_response
from profile_client.window import Batch, ProducerWindow


class Producer:
    """A stream of events: batched, bounded, sent again after a broken connection, counted once. Safe for threads.

    As a context manager it flushes when it is left; left by an exception, it drops what is not yet acknowledged.

    Example::

        with client.producer() as producer:
            producer.send(Event("u1", "view", attributes={"color": "red"}))
            producer.flush()
    """

    def __init__(
        self, channel: grpc.Channel, producer_id: str | None = None, options: ProducerOptions | None = None
    ) -> None:
        self.producer_id = producer_id or uuid.uuid4().hex
        self.options = options or ProducerOptions()
        self._stream: Any = channel.stream_stream(METHOD)
        self._window = ProducerWindow(self.options)
        self._reconnection = Reconnection(self.options)
        self._changed = threading.Condition()
        self._closing = False
        self._connected = False
        self._was_told = False
        self._last_error: ServiceError | None = None
        self._call: Any = None
        self._generation = 0
        self._thread = threading.Thread(target=self._run, name=f"producer {self.producer_id}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(flush=kind is None)

    @property
    def sent_events(self) -> int:
        """Events that the producer has taken."""
        return self._window.sent_events

    @property
    def acknowledged_events(self) -> int:
        """Those of them that the service holds durably or has refused."""
        return self._window.acknowledged_events

    @property
    def rejected_events(self) -> int:
        """Those of them that the service has refused."""
        return self._window.rejected_events

    def acknowledged_sequence(self, timeout_s: float = 30.0) -> int:
        """Up to which of this producer's batches the service holds everything; waits until the service has said so.

        Raises:
            DeadlineExceededError: it has not said so in time.
            ProfileClientError: the producer has failed.
        """
        with self._changed:
            if not self._wait(lambda: self._was_told, timeout_s):
                raise DeadlineExceededError(f"no stream within {timeout_s} s{self._because()}")
            return self._window.acknowledged_sequence

    def send(self, event: Event, *, timeout_s: float | None = None) -> None:
        """Takes an event to be sent soon; waits while the buffer is full.

        Raises:
            BufferFullError: there was no room for `timeout_s` seconds; 0 does not wait at all.
            TypeError, ValueError: the event holds what an event cannot hold, as `Event.to_message` says.
            ProfileClientError: the producer has failed, as `flush` says too, or was closed.
        """
        self._put(frame(event.to_message().SerializeToString()), timeout_s)

    def send_serialized(self, event: bytes, *, timeout_s: float | None = None) -> None:
        """Takes a serialized userprofile.v1.Event, as `send` takes an event."""
        self._put(frame(event), timeout_s)

    def send_batch(self, events: Iterable[Event]) -> None:
        """Takes many events, waiting whenever the buffer is full; they go out in as many batches as the options say."""
        for event in events:
            self._put(frame(event.to_message().SerializeToString()), None)

    def _put(self, element: bytes, timeout_s: float | None) -> None:
        window = self._window
        with self._changed:
            if (
                (window.failure is not None or not window.has_room(len(element)))
                and not self._closing
                and not self._wait(lambda: window.has_room(len(element)), timeout_s)
            ):
                raise BufferFullError(f"no room for {len(element)} bytes within {timeout_s} s{self._because()}")
            if self._closing:
                raise ProducerClosedError("the producer is closed")
            window.add(element, time.monotonic())
            if window.calls_for_sender:
                self._changed.notify_all()

    def flush(self, timeout_s: float | None = None) -> None:
        """Returns when everything sent before is durable and readable; without a timeout, however long it takes.

        Raises:
            RejectedEventsError: events were refused since the last flush; the others are durable.
            DeadlineExceededError: not everything was acknowledged in time; it goes on being sent.
            ProfileClientError: the producer has failed, or was closed before.
        """
        window = self._window
        with self._changed:
            target = window.sent_events
            window.seal()
            self._changed.notify_all()
            if not self._wait(lambda: window.acknowledged_events >= target, timeout_s):
                missing = target - window.acknowledged_events
                raise DeadlineExceededError(f"{missing} events not acknowledged within {timeout_s} s{self._because()}")
            rejected, count = window.take_rejected()
        if count:
            raise RejectedEventsError(rejected, count)

    def close(self, *, flush: bool = True, timeout_s: float | None = None) -> None:
        """Flushes, unless told not to, and ends the stream. What `flush` raises, this raises."""
        try:
            if flush and not self._closing:
                self.flush(timeout_s)
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
                call = self._call
            if call is not None:
                call.cancel()
            if self._thread is not threading.current_thread():
                self._thread.join()

    def _wait(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Waits, under the lock, for the condition and says whether it holds; a producer that has failed or was closed
        raises."""
        window = self._window
        self._changed.wait_for(lambda: window.failure is not None or self._closing or condition(), timeout_s)
        if window.failure is not None:
            raise window.failure
        if condition():
            return True
        if self._closing:
            missing = window.sent_events - window.acknowledged_events
            raise ProducerClosedError(f"the producer is closed; {missing} events were not acknowledged")
        return False

    def _because(self) -> str:
        return f"; the last stream ended with: {self._last_error}" if self._last_error is not None else ""

    # --- the thread ---

    def _run(self) -> None:
        try:
            failure = self._keep_streaming()
        except Exception as error:  # noqa: BLE001  whatever ends the thread must reach those who wait for it
            failure = ProfileClientError(f"the producer's stream cannot go on: {error!r}")
            failure.__cause__ = error
        with self._changed:
            self._connected = False
            self._window.failure = failure
            self._changed.notify_all()

    def _keep_streaming(self) -> ProfileClientError | None:
        """One stream after the other, until one ends for good: why; None where the producer was closed."""
        while True:
            error = None
            try:
                self._converse()
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error)
            with self._changed:
                if self._closing or self._window.failure is not None:
                    return self._window.failure
                was_connected, self._connected = self._connected, False
                self._last_error = error
                verdict = self._reconnection.stream_ended(
                    error,
                    progress=self._window.acknowledged_events,
                    was_connected=was_connected,
                    is_idle=self._window.is_idle,
                    now=time.monotonic(),
                    chance=random.random(),
                )
                if isinstance(verdict, ServiceError):
                    return verdict
                if self._changed.wait_for(lambda: self._closing, verdict):
                    return None

    def _converse(self) -> None:
        """One stream, from its first message until it ends."""
        with self._changed:
            if self._closing:
                return
            self._generation += 1
            self._call = call = self._stream(self._requests(self._generation))
        try:
            for message in call:
                sequence, refused = parse_response(message)
                with self._changed:
                    if not self._connected:
                        self._window.connected(sequence)
                        if self._window.failure is not None:
                            return
                        self._connected = self._was_told = True
                    self._report(self._window.acknowledge(sequence, refused))
                    self._changed.notify_all()
                    if self._window.failure is not None:
                        return
            with self._changed:
                self._report(self._window.ended())
                self._changed.notify_all()
        finally:
            with self._changed:
                # The generator of requests belongs to this call alone, and ends before the next one may take batches.
                self._generation += 1
                self._changed.notify_all()
            call.cancel()

    def _report(self, refused: tuple[Rejected, ...]) -> None:
        """Tells of refused events, under the lock: before a flush that waits for them returns."""
        if not refused or self.options.on_rejected is None:
            return
        try:
            self.options.on_rejected(refused)
        except Exception as error:  # noqa: BLE001  it is the program's own
            self._window.failure = ProfileClientError(f"on_rejected failed: {error!r}")
            self._window.failure.__cause__ = error

    def _requests(self, generation: int) -> Iterator[bytes]:
        yield encode_hello(self.producer_id)
        while (batch := self._next_batch(generation)) is not None:
            yield encode_batch(batch)

    def _next_batch(self, generation: int) -> Batch | None:
        """The next batch to send; None when no more is to go over this stream."""
        with self._changed:
            while self._generation == generation and not self._closing:
                now = time.monotonic()
                if self._connected:
                    batch = self._window.take(now)
                    if batch is not None or self._window.is_asked:
                        return batch
                # Due, but the window is full: the next acknowledgement wakes us.
                self._changed.wait((self._window.due_in_s(now) if self._connected else None) or None)
            return None
