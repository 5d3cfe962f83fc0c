"""The producer over asyncio: `send` puts into a window, one task keeps a stream open and takes acknowledgements.

What is sent, when, and when again is `window.py`'s and `reconnect.py`'s; here is the I/O around them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

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


class AsyncProducer:
    """A stream of events: batched, bounded, sent again after a broken connection, counted once.

    As a context manager it flushes when it is left; left by an exception, it drops what is not yet acknowledged.

    Example::

        async with client.producer() as producer:
            await producer.send(Event("u1", "view", attributes={"color": "red"}))
            await producer.flush()
    """

    def __init__(
        self, channel: grpc.aio.Channel, producer_id: str | None = None, options: ProducerOptions | None = None
    ) -> None:
        self.producer_id = producer_id or uuid.uuid4().hex
        self.options = options or ProducerOptions()
        self._stream: Any = channel.stream_stream(METHOD)
        self._window = ProducerWindow(self.options)
        self._reconnection = Reconnection(self.options)
        self._changed = asyncio.Condition()
        self._work = asyncio.Event()
        self._closing = False
        self._connected = False
        self._was_told = False
        self._last_error: ServiceError | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close(flush=kind is None)

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

    async def acknowledged_sequence(self, timeout_s: float = 30.0) -> int:
        """Up to which of this producer's batches the service holds everything; waits until the service has said so.

        Raises:
            DeadlineExceededError: it has not said so in time.
            ProfileClientError: the producer has failed.
        """
        self._start()
        if not await self._wait(lambda: self._was_told, timeout_s):
            raise DeadlineExceededError(f"no stream within {timeout_s} s{self._because()}")
        return self._window.acknowledged_sequence

    async def send(self, event: Event, *, timeout_s: float | None = None) -> None:
        """Takes an event to be sent soon; waits while the buffer is full.

        Raises:
            BufferFullError: there was no room for `timeout_s` seconds; 0 does not wait at all.
            TypeError, ValueError: the event holds what an event cannot hold, as `Event.to_message` says.
            ProfileClientError: the producer has failed, as `flush` says too, or was closed.
        """
        await self._put(frame(event.to_message().SerializeToString()), timeout_s)

    async def send_serialized(self, event: bytes, *, timeout_s: float | None = None) -> None:
        """Takes a serialized userprofile.v1.Event, as `send` takes an event."""
        await self._put(frame(event), timeout_s)

    async def send_batch(self, events: Iterable[Event]) -> None:
        """Takes many events, waiting whenever the buffer is full; they go out in as many batches as the options say."""
        for event in events:
            await self._put(frame(event.to_message().SerializeToString()), None)

    async def _put(self, element: bytes, timeout_s: float | None) -> None:
        self._start()
        window = self._window
        if (
            (window.failure is not None or not window.has_room(len(element)))
            and not self._closing
            and not await self._wait(lambda: window.has_room(len(element)), timeout_s)
        ):
            raise BufferFullError(f"no room for {len(element)} bytes within {timeout_s} s{self._because()}")
        if self._closing:
            raise ProducerClosedError("the producer is closed")
        sealed = window.sealed_batches
        window.add(element, time.monotonic())
        if window.calls_for_sender:
            self._work.set()
        if window.sealed_batches > sealed:
            # A caller with events at hand would else keep the loop to itself until the buffer is full.
            await asyncio.sleep(0)

    async def flush(self, timeout_s: float | None = None) -> None:
        """Returns when everything sent before is durable and readable; without a timeout, however long it takes.

        Raises:
            RejectedEventsError: events were refused since the last flush; the others are durable.
            DeadlineExceededError: not everything was acknowledged in time; it goes on being sent.
            ProfileClientError: the producer has failed, or was closed before.
        """
        self._start()
        window = self._window
        target = window.sent_events
        window.seal()
        self._work.set()
        if not await self._wait(lambda: window.acknowledged_events >= target, timeout_s):
            missing = target - window.acknowledged_events
            raise DeadlineExceededError(f"{missing} events not acknowledged within {timeout_s} s{self._because()}")
        rejected, count = window.take_rejected()
        if count:
            raise RejectedEventsError(rejected, count)

    async def close(self, *, flush: bool = True, timeout_s: float | None = None) -> None:
        """Flushes, unless told not to, and ends the stream. What `flush` raises, this raises."""
        try:
            if flush and not self._closing:
                await self.flush(timeout_s)
        finally:
            self._closing = True
            task = self._task
            if task is not None and task is not asyncio.current_task():
                task.cancel()
                await asyncio.wait([task])
            await self._notify()

    async def _wait(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Waits for the condition and says whether it holds; a producer that has failed or was closed raises."""
        window = self._window
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: window.failure is not None or self._closing or condition())
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

    async def _notify(self) -> None:
        self._work.set()
        async with self._changed:
            self._changed.notify_all()

    # --- the task ---

    def _start(self) -> None:
        if self._task is None and not self._closing:
            self._task = asyncio.create_task(self._run(), name=f"producer {self.producer_id}")

    async def _run(self) -> None:
        try:
            failure = await self._keep_streaming()
        except asyncio.CancelledError:
            # By `close`, by the end of the loop, or by a channel that was closed under the stream.
            self._closing = True
            raise
        except Exception as error:  # noqa: BLE001  whatever ends the task must reach those who wait for it
            failure = ProfileClientError(f"the producer's stream cannot go on: {error!r}")
            failure.__cause__ = error
        finally:
            self._connected = False
        self._window.failure = failure
        await self._notify()

    async def _keep_streaming(self) -> ProfileClientError:
        """One stream after the other, until one ends for good: why."""
        while True:
            error = None
            try:
                await self._converse()
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error)
            if self._window.failure is not None:
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
            await asyncio.sleep(verdict)

    async def _converse(self) -> None:
        """One stream, from its first message until it ends."""
        call = self._stream()
        writer = asyncio.create_task(self._write(call))
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                sequence, refused = parse_response(message)
                if not self._connected:
                    self._window.connected(sequence)
                    if self._window.failure is not None:
                        return
                    self._connected = self._was_told = True
                self._report(self._window.acknowledge(sequence, refused))
                await self._notify()
                if self._window.failure is not None:
                    return
            if await call.code() is grpc.StatusCode.OK:
                self._report(self._window.ended())
                await self._notify()
        finally:
            # The writer ends with its stream, before the next one may take batches.
            writer.cancel()
            await asyncio.wait([writer])
            call.cancel()

    def _report(self, refused: tuple[Rejected, ...]) -> None:
        """Tells of refused events, before a flush that waits for them returns."""
        if not refused or self.options.on_rejected is None:
            return
        try:
            self.options.on_rejected(refused)
        except Exception as error:  # noqa: BLE001  it is the program's own
            self._window.failure = ProfileClientError(f"on_rejected failed: {error!r}")
            self._window.failure.__cause__ = error

    async def _write(self, call: Any) -> None:
        # A stream that breaks while it is written to: the reader learns why.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await call.write(encode_hello(self.producer_id))
            while (batch := await self._next_batch()) is not None:
                await call.write(encode_batch(batch))
            await call.done_writing()

    async def _next_batch(self) -> Batch | None:
        """The next batch to send; None when no more is to go over this stream."""
        while True:
            self._work.clear()
            now = time.monotonic()
            if self._connected:
                batch = self._window.take(now)
                if batch is not None or self._window.is_asked:
                    return batch
            # Due, but the window is full: the next acknowledgement wakes us.
            due_in_s = (self._window.due_in_s(now) if self._connected else None) or None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due_in_s):
                    await self._work.wait()
