"""The producer over asyncio: `send` puts into a window, one task keeps a stream open and brings acknowledgements
back."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from profile_client.channel import is_broken_stream, next_wait_s
from profile_client.errors import BufferFullError, ProfileClientError, RejectedEventsError, from_rpc_error
from profile_client.events import Event, frame
from profile_client.stream import METHOD, encode_batch, encode_hello, parse_response
from profile_client.window import Batch, ProducerOptions, ProducerWindow


class AsyncProducer:
    """A stream of events: batched, bounded, sent again after a broken connection, counted once.

    >>> async with client.producer() as producer:  # doctest: +SKIP
    ...     await producer.send(Event("u1", "view", attributes={"color": "red"}))
    ...     await producer.flush()
    """

    def __init__(
        self, channel: grpc.aio.Channel, producer_id: str | None = None, options: ProducerOptions | None = None
    ) -> None:
        self.producer_id = producer_id or uuid.uuid4().hex
        self.options = options or ProducerOptions()
        self._stream: Any = channel.stream_stream(METHOD)
        self._window = ProducerWindow(self.options)
        self._changed = asyncio.Condition()
        self._work = asyncio.Event()
        self._closing = False
        self._connected = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close(flush=kind is None)

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

    def _start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"producer {self.producer_id}")

    async def acknowledged_sequence(self, timeout_s: float = 30.0) -> int:
        """Up to which of this producer's batches the service holds everything; waits for the connection."""
        self._start()
        if not await self._wait(lambda: self._connected, timeout_s):
            raise TimeoutError(f"no connection within {timeout_s} s")
        return self._window.acknowledged_sequence

    async def send(self, event: Event, *, timeout_s: float | None = None) -> None:
        """Takes an event to be sent soon; waits while the buffer is full.

        Raises:
            BufferFullError: there was no room for `timeout_s` seconds.
            TypeError: an attribute is of a type that JSON does not know.
            ProfileClientError: the producer has failed, as its `flush` says too.
        """
        await self.send_serialized(event.to_message().SerializeToString(), timeout_s=timeout_s)

    async def send_all(self, events: Iterable[Event]) -> None:
        """Takes many events."""
        for event in events:
            await self.send(event)

    async def send_serialized(self, event: bytes, *, timeout_s: float | None = None) -> None:
        """Takes a serialized userprofile.v1.Event."""
        self._start()
        element = frame(event)
        if self._closing:
            raise ProfileClientError("the producer is closed")
        free = self._window.failure is None and self._window.has_room(len(element))
        if not free and not await self._wait(lambda: self._window.has_room(len(element)), timeout_s):
            raise BufferFullError(f"no room for {len(element)} bytes within {timeout_s} s")
        self._window.add(element, time.monotonic())
        self._work.set()

    async def flush(self, timeout_s: float | None = None) -> None:
        """Returns when everything sent before is durable and readable.

        Raises:
            RejectedEventsError: events were refused since the last flush; the others are durable.
            TimeoutError: not everything was acknowledged in time; it goes on being sent.
            ProfileClientError: the producer has failed.
        """
        self._start()
        target = self._window.sent_events
        self._window.seal()
        self._work.set()
        if not await self._wait(lambda: self._window.acknowledged_events >= target, timeout_s):
            missing = target - self._window.acknowledged_events
            raise TimeoutError(f"{missing} events were not acknowledged within {timeout_s} s")
        rejected, count = self._window.take_rejected()
        if count:
            raise RejectedEventsError(rejected, count)

    async def close(self, *, flush: bool = True, timeout_s: float | None = None) -> None:
        """Flushes, unless told not to, and ends the stream. What `flush` raises, this raises."""
        try:
            if flush and not self._closing:
                await self.flush(timeout_s)
        finally:
            self._closing = True
            if self._task is not None:
                self._task.cancel()
                await asyncio.wait([self._task])

    async def _wait(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Waits for the condition; a failed producer raises."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._window.failure is not None or condition())
        except TimeoutError:
            return False
        if self._window.failure is not None:
            raise self._window.failure
        return True

    async def _notify(self) -> None:
        self._work.set()
        async with self._changed:
            self._changed.notify_all()

    async def _run(self) -> None:
        attempt, working_at = 0, time.monotonic()
        while not self._closing:
            error = None
            try:
                await self._converse()
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error)
            if self._connected:
                attempt, working_at = 0, time.monotonic()
            self._connected = False
            gave_up = time.monotonic() - working_at > self.options.give_up_s
            if error is not None and (not is_broken_stream(error) or gave_up):
                self._window.failure = error
                await self._notify()
                return
            first_s, longest_s = self.options.reconnect_s
            wait_s = next_wait_s(attempt, error.retry_after_s if error else None, random.random())
            await asyncio.sleep(min(longest_s, max(first_s, wait_s)))
            attempt += 1

    async def _converse(self) -> None:
        """One stream, from its first message until it ends."""
        call = self._stream()
        writer = asyncio.create_task(self._write(call))
        try:
            first = True
            while (message := await call.read()) is not grpc.aio.EOF:
                sequence, rejected = parse_response(message)
                if first:
                    self._window.connected(sequence)
                    self._connected, first = True, False
                self._window.acknowledge(sequence, rejected)
                await self._notify()
        finally:
            # The writer ends with its stream, before the next one may take batches.
            writer.cancel()
            await asyncio.wait([writer])
            call.cancel()

    async def _write(self, call: Any) -> None:
        try:
            await call.write(encode_hello(self.producer_id))
            while True:
                await call.write(encode_batch(await self._next_batch()))
        except (grpc.RpcError, asyncio.InvalidStateError):
            # The stream is broken: the reader learns why.
            return

    async def _next_batch(self) -> Batch:
        while True:
            self._work.clear()
            now = time.monotonic()
            batch = self._window.take(now) if self._connected else None
            if batch is not None:
                return batch
            # Due, but the window is full: the next acknowledgement wakes us.
            due_in_s = (self._window.due_in_s(now) if self._connected else None) or None
            try:
                async with asyncio.timeout(due_in_s):
                    await self._work.wait()
            except TimeoutError:
                continue
