"""The producer over threads: `send` puts into a window, one thread keeps a stream open and brings acknowledgements
back."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from profile_client.channel import is_broken_stream, next_wait_s
from profile_client.errors import BufferFullError, ProfileClientError, RejectedEventsError, from_rpc_error
from profile_client.events import Event, frame
from profile_client.stream import METHOD, encode_batch, encode_hello, parse_response
from profile_client.window import ProducerOptions, ProducerWindow


class Producer:
    """A stream of events: batched, bounded, sent again after a broken connection, counted once. Safe for threads.

    >>> with client.producer() as producer:  # doctest: +SKIP
    ...     producer.send(Event("u1", "view", attributes={"color": "red"}))
    ...     producer.flush()
    """

    def __init__(
        self, channel: grpc.Channel, producer_id: str | None = None, options: ProducerOptions | None = None
    ) -> None:
        self.producer_id = producer_id or uuid.uuid4().hex
        self.options = options or ProducerOptions()
        self._stream: Any = channel.stream_stream(METHOD)
        self._window = ProducerWindow(self.options)
        self._changed = threading.Condition()
        self._closing = False
        self._connected = False
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
    def acknowledged_events(self) -> int:
        """Events sent by this object that the service holds durably or has refused."""
        return self._window.acknowledged_events

    @property
    def rejected_events(self) -> int:
        """Events that the service refused."""
        return self._window.rejected_events

    @property
    def sent_events(self) -> int:
        """Events given to `send`."""
        return self._window.sent_events

    def acknowledged_sequence(self, timeout_s: float = 30.0) -> int:
        """Up to which of this producer's batches the service holds everything; waits for the connection."""
        with self._changed:
            if not self._wait(lambda: self._connected, timeout_s):
                raise TimeoutError(f"no connection within {timeout_s} s")
            return self._window.acknowledged_sequence

    def send(self, event: Event, *, timeout_s: float | None = None) -> None:
        """Takes an event to be sent soon; waits while the buffer is full.

        Raises:
            BufferFullError: there was no room for `timeout_s` seconds; 0 does not wait at all.
            TypeError: an attribute is of a type that JSON does not know.
            ProfileClientError: the producer has failed, as its `flush` says too.
        """
        self.send_serialized(event.to_message().SerializeToString(), timeout_s=timeout_s)

    def send_all(self, events: Iterable[Event]) -> None:
        """Takes many events."""
        for event in events:
            self.send(event)

    def send_serialized(self, event: bytes, *, timeout_s: float | None = None) -> None:
        """Takes a serialized userprofile.v1.Event."""
        element = frame(event)
        with self._changed:
            if self._closing:
                raise ProfileClientError("the producer is closed")
            if not self._wait(lambda: self._window.has_room(len(element)), timeout_s):
                raise BufferFullError(f"no room for {len(element)} bytes within {timeout_s} s")
            was_idle = self._window.is_idle
            self._window.add(element, time.monotonic())
            if was_idle or self._window.due_in_s(0.0) is None:
                self._changed.notify_all()

    def flush(self, timeout_s: float | None = None) -> None:
        """Returns when everything sent before is durable and readable.

        Raises:
            RejectedEventsError: events were refused since the last flush; the others are durable.
            TimeoutError: not everything was acknowledged in time; it goes on being sent.
            ProfileClientError: the producer has failed.
        """
        with self._changed:
            target = self._window.sent_events
            self._window.seal()
            self._changed.notify_all()
            if not self._wait(lambda: self._window.acknowledged_events >= target, timeout_s):
                missing = target - self._window.acknowledged_events
                raise TimeoutError(f"{missing} events were not acknowledged within {timeout_s} s")
            rejected, count = self._window.take_rejected()
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
            self._thread.join()

    def _wait(self, condition: Any, timeout_s: float | None) -> bool:
        """Waits for the condition under the lock; a failed producer raises."""
        held = self._changed.wait_for(lambda: self._window.failure is not None or condition(), timeout_s)
        if self._window.failure is not None:
            raise self._window.failure
        return held

    def _run(self) -> None:
        attempt, working_at = 0, time.monotonic()
        while not self._closing:
            try:
                self._converse()
                error = None
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error)
            with self._changed:
                if self._closing:
                    return
                if self._connected:
                    attempt, working_at = 0, time.monotonic()
                self._connected = False
                gave_up = time.monotonic() - working_at > self.options.give_up_s
                if error is not None and (not is_broken_stream(error) or gave_up):
                    self._window.failure = error
                    self._changed.notify_all()
                    return
                first_s, longest_s = self.options.reconnect_s
                wait_s = next_wait_s(attempt, error.retry_after_s if error else None, random.random())
                self._changed.wait_for(lambda: self._closing, min(longest_s, max(first_s, wait_s)))
                attempt += 1

    def _converse(self) -> None:
        """One stream, from its first message until it ends."""
        with self._changed:
            self._generation += 1
            self._call = call = self._stream(self._requests(self._generation))
        try:
            for number, message in enumerate(call):
                sequence, rejected = parse_response(message)
                with self._changed:
                    if number == 0:
                        self._window.connected(sequence)
                        self._connected = True
                    self._window.acknowledge(sequence, rejected)
                    self._changed.notify_all()
        finally:
            with self._changed:
                # The generator of requests belongs to this call alone.
                self._generation += 1
                self._changed.notify_all()
            call.cancel()

    def _requests(self, generation: int) -> Iterator[bytes]:
        yield encode_hello(self.producer_id)
        while True:
            with self._changed:
                while True:
                    if self._generation != generation or self._closing:
                        return
                    now = time.monotonic()
                    batch = self._window.take(now) if self._connected else None
                    if batch is not None:
                        break
                    due_in_s = self._window.due_in_s(now) if self._connected else None
                    # Due, but the window is full: the next acknowledgement wakes us.
                    self._changed.wait(due_in_s or None)
            yield encode_batch(batch)
