"""The synchronous producer. Made from `aio_producer.py` by `scripts/generate_sync_client.py`: change that one.

`send` puts into a window; in the background one stream after the other is kept open and takes acknowledgements. What is
sent, when, and when again is `window.py`'s and `reconnect.py`'s; here is the I/O around them. One lock guards the
window, and whatever changes wakes those who wait for room, for acknowledgements, or for something to send.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from profile_client.concurrency import Background, Condition
from profile_client.errors import (
    BufferFullError,
    DeadlineExceededError,
    ProducerClosedError,
    ProfileClientError,
    Rejected,
    RejectedEventsError,
    ServiceError,
    UnavailableError,
    from_rpc_error,
)
from profile_client.events import Event, frame
from profile_client.options import ProducerOptions
from profile_client.reconnect import Reconnection
from profile_client.stream import METHOD, encode_batch, encode_hello, parse_response
from profile_client.window import Batch, ProducerWindow

LONGEST_WAIT_S = 3600.0
"""Whoever waits looks up so often, whatever happens."""


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
        self._changed = Condition()
        self._closing = False
        self._connected = False
        self._was_told = False
        self._last_error: ServiceError | None = None
        self._call: Any = None
        self._generation = 0
        self._background = Background(self._run, f"producer {self.producer_id}")

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

    @property
    def is_connected(self) -> bool:
        """Whether a stream is open just now. Without one the producer goes on by itself as soon as it can."""
        return self._connected

    @property
    def last_error(self) -> ServiceError | None:
        """What the last stream ended with; None where none has, or where the service ended it in order."""
        return self._last_error

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

    def unacknowledged(self) -> list[bytes]:
        """The serialized events that were taken and are not acknowledged, in their order.

        Of a producer that has failed or was closed: what is to be kept elsewhere. Some of it may be counted: then its
        acknowledgement was not heard.
        """
        with self._changed:
            return list(self._window.unacknowledged())

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

    def send_serialized_batch(
        self, events: bytes, count: int, *, sequence: int | None = None, timeout_s: float | None = None
    ) -> None:
        """Takes a batch that is serialized already, and sends it as it is: for many events a second, and for batches
        that are the same when they are sent again. Waits while the buffer is full.

        With a `sequence` a producer can begin anew after its process has ended, and be counted once: it makes the same
        batches again, under the same numbers, from any that it likes; what the service holds is not counted again, but
        what was refused of it is told again. `acknowledged_sequence`, asked before the first batch, says where the
        service was.

        Args:
            events: the events one after the other, each as 0A, its length (varint) and a serialized
                userprofile.v1.Event: an IngestEventsRequest's encoding. May be empty.
            count: how many they are.
            sequence: the batch's number, from 1; each is one more than the one before. Without it the batches are
                numbered on from what the service holds. Either all batches of a producer have one or none, and then
                there are no single events.
            timeout_s: how long to wait for room; None waits as long as it takes.

        Raises:
            BufferFullError: there was no room for `timeout_s` seconds; 0 does not wait at all.
            ValueError: the number is not the next one, or the batch is too large for a message.
            ProfileClientError: the producer has failed, as `flush` says too, or was closed.
        """
        with self._changed:
            self._window.check_batch(events, count, sequence)
            self._make_room(len(events), timeout_s)
            self._window.add_batch(events, count, sequence, time.monotonic())
            self._changed.notify_all()

    def _put(self, element: bytes, timeout_s: float | None) -> None:
        window = self._window
        with self._changed:
            self._make_room(len(element), timeout_s)
            window.add(element, time.monotonic())
            if window.calls_for_sender:
                self._changed.notify_all()

    def _make_room(self, size: int, timeout_s: float | None) -> None:
        """Returns, under the lock, when so many bytes may be added."""
        window = self._window
        if self._closing:
            raise ProducerClosedError("the producer is closed")
        if window.failure is None and window.has_room(size):
            return
        if not self._wait(lambda: window.has_room(size), timeout_s):
            raise BufferFullError(f"no room for {size} bytes within {timeout_s} s{self._because()}")
        if self._closing:
            raise ProducerClosedError("the producer is closed")

    def flush(self, timeout_s: float | None = None) -> None:
        """Returns when everything sent before is durable and readable; without a timeout, however long it takes.

        Raises:
            RejectedEventsError: events were refused since the last flush; the others are durable.
            DeadlineExceededError: not everything was acknowledged in time; it goes on being sent.
            ProfileClientError: the producer has failed, for `give_up_s` have passed without an acknowledgement, or the
                service refuses what it sends; or it was closed before.
        """
        window = self._window
        with self._changed:
            window.seal(time.monotonic())
            batches, events = window.sealed_batches, window.sent_events
            self._changed.notify_all()
            if not self._wait(lambda: window.acknowledged_batches >= batches, timeout_s):
                missing = events - window.acknowledged_events
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
            self._cancel_call()
            self._background.join()

    def _wait(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Waits, under the lock, for the condition and says whether it holds; a producer that has failed or was closed
        raises. Here one fails that nobody answers, though its stream stands."""
        window = self._window
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._has_ended() and not condition():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return False
            stalled_s = window.stalled_s(now)
            if stalled_s > self.options.give_up_s:
                window.failure = self._given_up(self._last_error)
                self._cancel_call()
                self._changed.notify_all()
                break
            look_again_in_s = min(self.options.give_up_s - stalled_s + 0.01, LONGEST_WAIT_S)
            self._changed.wait(look_again_in_s if deadline is None else min(look_again_in_s, deadline - now))
        if window.failure is not None:
            raise window.failure
        if not condition():
            missing = window.sent_events - window.acknowledged_events
            raise ProducerClosedError(f"the producer is closed; {missing} events were not acknowledged")
        return True

    def _has_ended(self) -> bool:
        return self._closing or self._window.failure is not None

    def _because(self) -> str:
        return f"; the last stream ended with: {self._last_error}" if self._last_error is not None else ""

    # --- in the background ---

    def _run(self) -> None:
        failure: ProfileClientError | None = None
        try:
            failure = self._keep_streaming()
        except Exception as error:  # noqa: BLE001  whatever ends this must reach those who wait for it
            failure = ProfileClientError(f"the producer's stream cannot go on: {error!r}")
            failure.__cause__ = error
        with self._changed:
            self._connected = False
            self._window.failure = self._window.failure or failure
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
                was_connected, self._connected = self._connected, False
                if self._has_ended():
                    return self._window.failure
                self._last_error = error
                now = time.monotonic()
                verdict = self._reconnection.stream_ended(
                    error,
                    progress=self._window.acknowledged_batches,
                    was_connected=was_connected,
                    is_idle=self._window.is_idle,
                    stalled_s=self._window.stalled_s(now),
                    chance=random.random(),
                )
                if isinstance(verdict, ServiceError):
                    return self._given_up(verdict)
                until = now + verdict
                while not self._has_ended() and now < until:
                    self._changed.wait(until - now)
                    now = time.monotonic()

    def _converse(self) -> None:
        """One stream, from its first message until it ends."""
        with self._changed:
            if self._has_ended():
                return
            self._generation += 1
            self._call = call = self._stream(self._requests(self._generation))
        try:
            for message in call:
                sequence, refused = parse_response(message)
                with self._changed:
                    if self._connected:
                        self._acknowledge(sequence, refused)
                    else:
                        self._window.connected(sequence)
                        self._connected = self._was_told = self._window.failure is None
                    self._changed.notify_all()
                    if self._window.failure is not None:
                        return
        finally:
            with self._changed:
                # The generator of requests belongs to this call alone, and ends before the next one may take batches.
                self._generation += 1
                self._changed.notify_all()
            call.cancel()

    def _cancel_call(self) -> None:
        if self._call is not None:
            self._call.cancel()

    def _given_up(self, error: ServiceError | None) -> ServiceError:
        """The error, and how much it leaves undelivered."""
        if error is None:
            error = UnavailableError("the service acknowledges nothing", grpc.StatusCode.UNAVAILABLE)
        missing = self._window.sent_events - self._window.acknowledged_events
        if missing:
            error.args = (f"{error.args[0]}; {missing} events are not acknowledged",)
        return error

    def _acknowledge(self, sequence: int, refused: Sequence[Rejected]) -> None:
        """Takes an answer, and tells of it before a flush that waits for it returns."""
        answered = self._window.acknowledged_batches
        placed = self._window.acknowledge(sequence, refused, time.monotonic())
        if self.options.on_acknowledged is None or (self._window.acknowledged_batches == answered and not placed):
            return
        try:
            self.options.on_acknowledged(sequence, placed)
        except Exception as error:  # noqa: BLE001  it is the program's own
            self._window.failure = ProfileClientError(f"on_acknowledged failed: {error!r}")
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
                    if batch is not None:
                        return batch
                # Due, but the window is full: the next acknowledgement wakes us.
                self._changed.wait((self._window.due_in_s(now) if self._connected else None) or None)
            return None
