"""The asyncio producer. `producer.py` is made from this file by `scripts/generate_sync_client.py`: change this one.

`send` puts into a window; in the background one conversation after the other is kept up, of a stream to a frontend and
streams straight to owners, and takes acknowledgements. What is sent, when, and when again is `window.py`'s and
`reconnect.py`'s, by which way is that of `ways.py`; here is the I/O around them. One lock guards them, and whatever
changes wakes those who wait for room, for acknowledgements, or for something to send.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from profile_client.aio_concurrency import Background, Condition
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
from profile_client.owners import TRY_S, OwnerAccess
from profile_client.reconnect import Reconnection
from profile_client.stream import METHOD, encode_acknowledged, encode_hello, encode_part, parse_response
from profile_client.ways import FRONTEND, Part, Way, Ways
from profile_client.window import ProducerWindow

LONGEST_WAIT_S = 3600.0
"""Whoever waits looks up so often, whatever happens."""
TELL_S = 0.1
"""How often a frontend is told what is acknowledged of batches that went straight to owners: what a producer hears that
comes back after its process was killed is as old."""
TURN_S = 1.0
"""How long a conversation lasts at least before another one is begun to go straight to more owners."""
GOODBYE_S = 0.5
"""How long it may take to be told the last of it."""


class AsyncProducer:
    """A stream of events: batched, bounded, sent again after a broken connection, counted once. To be made where an
    event loop runs.

    As a context manager it flushes when it is left; left by an exception, it drops what is not yet acknowledged.

    Example::

        async with client.producer() as producer:
            await producer.send(Event("u1", "view", attributes={"color": "red"}))
            await producer.flush()
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        producer_id: str | None = None,
        options: ProducerOptions | None = None,
        access: OwnerAccess | None = None,
    ) -> None:
        self.producer_id = producer_id or uuid.uuid4().hex
        self.options = options or ProducerOptions()
        self._stream: Any = channel.stream_stream(METHOD)
        self._access = access
        self._window = ProducerWindow(self.options)
        self._reconnection = Reconnection(self.options)
        self._changed = Condition()
        self._closing = False
        self._connected = False
        self._was_told = False
        self._last_error: ServiceError | None = None
        self._generation = 0
        self._turn_at = float("inf")
        """When other ways may be found than those that are used."""
        self._background = Background(self._run, f"producer {self.producer_id}")

    async def __aenter__(self) -> Self:
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

    @property
    def is_connected(self) -> bool:
        """Whether a stream is open just now. Without one the producer goes on by itself as soon as it can."""
        return self._connected

    @property
    def last_error(self) -> ServiceError | None:
        """What the last stream ended with; None where none has, or where the service ended it in order."""
        return self._last_error

    async def acknowledged_sequence(self, timeout_s: float = 30.0) -> int:
        """Up to which of this producer's batches the service holds everything; waits until the service has said so.

        Raises:
            DeadlineExceededError: it has not said so in time.
            ProfileClientError: the producer has failed.
        """
        async with self._changed:
            if not await self._wait(lambda: self._was_told, timeout_s):
                raise DeadlineExceededError(f"no stream within {timeout_s} s{self._because()}")
            return self._window.acknowledged_sequence

    async def unacknowledged(self) -> list[bytes]:
        """The serialized events that were taken and are not acknowledged, in their order.

        Of a producer that has failed or was closed: what is to be kept elsewhere. Some of it may be counted: then its
        acknowledgement was not heard.
        """
        async with self._changed:
            return list(self._window.unacknowledged())

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

    async def send_serialized_batch(
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
        async with self._changed:
            self._window.check_batch(events, count, sequence)
            await self._make_room(len(events), timeout_s)
            self._window.add_batch(events, count, sequence, time.monotonic())
            self._changed.notify_all()
        # A caller with events at hand would else keep the loop to itself until the buffer is full.
        await asyncio.sleep(0)

    async def _put(self, element: bytes, timeout_s: float | None) -> None:
        window = self._window
        async with self._changed:
            await self._make_room(len(element), timeout_s)
            sealed = window.sealed_batches
            window.add(element, time.monotonic())
            if window.calls_for_sender:
                self._changed.notify_all()
        if window.sealed_batches > sealed:
            # A caller with events at hand would else keep the loop to itself until the buffer is full.
            await asyncio.sleep(0)

    async def _make_room(self, size: int, timeout_s: float | None) -> None:
        """Returns, under the lock, when so many bytes may be added."""
        window = self._window
        if self._closing:
            raise ProducerClosedError("the producer is closed")
        if window.failure is None and window.has_room(size):
            return
        if not await self._wait(lambda: window.has_room(size), timeout_s):
            raise BufferFullError(f"no room for {size} bytes within {timeout_s} s{self._because()}")
        if self._closing:
            raise ProducerClosedError("the producer is closed")

    async def flush(self, timeout_s: float | None = None) -> None:
        """Returns when everything sent before is durable and readable; without a timeout, however long it takes.

        Raises:
            RejectedEventsError: events were refused since the last flush; the others are durable.
            DeadlineExceededError: not everything was acknowledged in time; it goes on being sent.
            ProfileClientError: the producer has failed, for `give_up_s` have passed without an acknowledgement, or the
                service refuses what it sends; or it was closed before.
        """
        window = self._window
        async with self._changed:
            window.seal(time.monotonic())
            batches, events = window.sealed_batches, window.sent_events
            self._changed.notify_all()
            if not await self._wait(lambda: window.acknowledged_batches >= batches, timeout_s):
                missing = events - window.acknowledged_events
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
            async with self._changed:
                self._closing = True
                self._changed.notify_all()
            await self._background.join()

    async def _wait(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
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
                self._changed.notify_all()
                break
            look_again_in_s = min(self.options.give_up_s - stalled_s + 0.01, LONGEST_WAIT_S)
            await self._changed.wait(look_again_in_s if deadline is None else min(look_again_in_s, deadline - now))
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

    async def _run(self) -> None:
        failure: ProfileClientError | None = None
        try:
            failure = await self._keep_streaming()
        except asyncio.CancelledError:
            # By `close`, by the end of the loop, or by a channel that was closed under the stream.
            self._closing = self._closing or self._window.failure is None
        except Exception as error:  # noqa: BLE001  whatever ends this must reach those who wait for it
            failure = ProfileClientError(f"the producer's stream cannot go on: {error!r}")
            failure.__cause__ = error
        async with self._changed:
            self._connected = False
            self._window.failure = self._window.failure or failure
            self._changed.notify_all()

    async def _keep_streaming(self) -> ProfileClientError | None:
        """One stream after the other, until one ends for good: why; None where the producer was closed."""
        while True:
            error = await self._converse()
            async with self._changed:
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
                    await self._changed.wait(until - now)
                    now = time.monotonic()

    async def _converse(self) -> ServiceError | None:
        """One stream to a frontend, and beside it those straight to owners, until one of them ends: what with."""
        ways = await self._find_ways()
        async with self._changed:
            if self._has_ended():
                return None
            self._generation += 1
            generation = self._generation
        listening = [self._begin(ways, FRONTEND, self._stream, generation)]
        try:
            async with self._changed:
                while not (self._connected or ways.have_ended or self._has_ended()):
                    await self._changed.wait()
            if self._access is not None and ways.is_split and not ways.have_ended:
                for number, way in enumerate(ways.all):
                    if way.owner is not None:
                        stream = self._access.channel_of(way.owner).stream_stream(METHOD)
                        listening.append(self._begin(ways, number, stream, generation))
                await self._settle(ways)
            async with self._changed:
                ways.settle()
                self._changed.notify_all()
                while not (ways.have_ended or self._has_ended()):
                    await self._changed.wait()
                if self._closing and ways.is_split and self._window.is_idle:
                    await self._say_goodbye(ways)
        finally:
            async with self._changed:
                # The generators of requests belong to this conversation, and end before the next may take batches.
                self._generation += 1
                self._changed.notify_all()
            for way in ways.all:
                self._leave(way)
            for listener in listening:
                await listener.join()
        return ways.error

    async def _find_ways(self) -> Ways:
        """Who can be reached straight away; without anybody, everything goes through the frontend."""
        self._turn_at = float("inf")
        if self._access is None:
            return Ways()
        await self._access.learn(2 * TRY_S)
        now = time.monotonic()
        owners, shift = self._access.owners.by_partition(now)
        self._turn_at = max(now + TURN_S, self._access.owners.next_try_s(now))
        return Ways(owners, shift)

    def _begin(self, ways: Ways, number: int, stream: Any, generation: int) -> Background:
        """Opens a way's stream, and listens to it in the background."""
        # gRPC makes a connection again while a call waits for it: the streams after one that broke do.
        waits = number == FRONTEND and self._last_error is not None
        call = ways.all[number].call = stream(self._requests(ways, number, generation), wait_for_ready=waits)
        return Background(
            functools.partial(self._listen, ways, number, call), f"producer {self.producer_id}, way {number}"
        )

    async def _settle(self, ways: Ways) -> None:
        """Waits for owners to answer, but not long: to those that do not, nothing goes straight for now."""
        assert self._access is not None
        owners = [(way, way.owner) for way in ways.all if way.owner is not None]
        now = time.monotonic()
        until = now + max(owner.try_s(2 * TRY_S) for _, owner in owners)
        async with self._changed:
            while now < until and not (all(way.is_open or way.has_ended for way, _ in owners) or self._has_ended()):
                await self._changed.wait(until - now)
                now = time.monotonic()
            # Not later than what was known before: the time of an owner that is not among the ways may have come.
            self._turn_at = min(self._turn_at, max(now + TURN_S, self._access.owners.next_try_s(now)))

    async def _listen(self, ways: Ways, number: int, call: Any) -> None:
        """Takes what a way answers, until its stream ends."""
        way = ways.all[number]
        error = None
        try:
            async for message in call:
                async with self._changed:
                    if not way.is_left:
                        self._hear(ways, number, *parse_response(message))
                        self._changed.notify_all()
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
        except asyncio.CancelledError:
            # By us, by the end of the loop, or by a channel that was closed under the stream.
            self._closing = self._closing or (not way.is_left and self._window.failure is None)
        async with self._changed:
            way.has_ended = True
            if not (way.is_left or (error is None and ways.is_turning)):
                self._note_end(way, error)
            self._changed.notify_all()

    def _hear(self, ways: Ways, number: int, sequence: int, refused: Sequence[Rejected]) -> None:
        way = ways.all[number]
        if way.is_open:
            ways.acknowledge(number, sequence, refused)
            self._take_acknowledged(ways)
        elif way.owner is None:
            self._window.connected(sequence)
            self._connected = self._was_told = self._window.failure is None
        elif self._access is not None:
            self._access.owners.answered(way.owner)
            if ways.is_settled:
                # Too late for this conversation.
                self._turn_at = min(self._turn_at, time.monotonic() + TURN_S)
        way.is_open = True

    def _note_end(self, way: Way, error: ServiceError | None) -> None:
        """What the end of a stream says of its way."""
        if way.owner is None or self._access is None:
            way.error = error
            return
        owners = self._access.owners
        if error is not None and error.reason == "NOT_MINE":
            owners.not_mine()
        now = time.monotonic()
        owners.failed(way.owner, now)
        # However late it is known: it is tried again.
        self._turn_at = min(self._turn_at, max(now + TURN_S, owners.next_try_s(now)))
        if way.is_open:
            way.error = error
        else:
            # Nothing went that way.
            way.is_left = True

    def _leave(self, way: Way) -> None:
        way.is_left = True
        if way.call is not None:
            way.call.cancel()

    async def _say_goodbye(self, ways: Ways) -> None:
        """Lets the frontend hear what was acknowledged last, for it is only told now and then."""
        until = time.monotonic() + GOODBYE_S
        while not ways.all[FRONTEND].has_ended and time.monotonic() < until:
            await self._changed.wait(until - time.monotonic())

    def _given_up(self, error: ServiceError | None) -> ServiceError:
        """The error, and how much it leaves undelivered."""
        if error is None:
            error = UnavailableError("the service acknowledges nothing", grpc.StatusCode.UNAVAILABLE)
        missing = self._window.sent_events - self._window.acknowledged_events
        if missing:
            error.args = (f"{error.args[0]}; {missing} events are not acknowledged",)
        return error

    def _take_acknowledged(self, ways: Ways) -> None:
        """Takes what is acknowledged by now, and tells of it before a flush that waits for it returns."""
        answered = self._window.acknowledged_batches
        if (acknowledged := ways.acknowledged()) is None:
            return
        sequence, refused = acknowledged
        placed = self._window.acknowledge(sequence, refused, time.monotonic())
        if self.options.on_acknowledged is None or (self._window.acknowledged_batches == answered and not placed):
            return
        try:
            self.options.on_acknowledged(sequence, placed)
        except Exception as error:  # noqa: BLE001  it is the program's own
            self._window.failure = ProfileClientError(f"on_acknowledged failed: {error!r}")
            self._window.failure.__cause__ = error

    async def _requests(self, ways: Ways, number: int, generation: int) -> AsyncIterator[bytes]:
        yield encode_hello(self.producer_id, self._window.acknowledged_sequence if ways.is_split else None)
        while (message := await self._next_message(ways, number, generation)) is not None:
            yield message

    async def _next_message(self, ways: Ways, number: int, generation: int) -> bytes | None:
        """The next message for a way; None when no more is to go over its stream."""
        window = self._window
        async with self._changed:
            while self._generation == generation and not (self._closing or ways.is_turning):
                now = time.monotonic()
                wait_s = LONGEST_WAIT_S
                if ways.is_settled:
                    if (part := self._next_part(ways, number, now)) is not None:
                        return encode_part(part, window.acknowledged_sequence if ways.is_split else None)
                    # Due, but the window is full: the next acknowledgement wakes us.
                    wait_s = window.due_in_s(now) or LONGEST_WAIT_S
                    if number == FRONTEND:
                        tell_in_s = ways.told_at + TELL_S - now if self._has_to_tell(ways) else LONGEST_WAIT_S
                        if tell_in_s <= 0:
                            return self._tell(ways, now)
                        if now >= self._turn_at:
                            self._turn(ways)
                            break
                        wait_s = min(wait_s, tell_in_s, self._turn_at - now)
                await self._changed.wait(wait_s)
            if number == FRONTEND and self._generation == generation and self._has_to_tell(ways):
                return self._tell(ways, time.monotonic())
            return None

    def _turn(self, ways: Ways) -> None:
        """Ends the conversation in order: what was sent is waited for."""
        ways.is_turning = True
        for way in ways.all:
            if not way.is_open:
                self._leave(way)
        self._changed.notify_all()

    def _next_part(self, ways: Ways, number: int, now: float) -> Part | None:
        while (part := ways.take(number)) is None:
            batch = self._window.take(now)
            if batch is None:
                return None
            ways.put(batch)
            # One without events has no parts.
            self._take_acknowledged(ways)
            self._changed.notify_all()
        return part

    def _has_to_tell(self, ways: Ways) -> bool:
        return ways.is_split and self._window.acknowledged_sequence > ways.told_sequence

    def _tell(self, ways: Ways, now: float) -> bytes:
        ways.told_sequence, ways.told_at = self._window.acknowledged_sequence, now
        return encode_acknowledged(ways.told_sequence)
