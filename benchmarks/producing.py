"""Streams of batches to `StreamEvents`, or to the bare echo beside it: as fast as they go, or at a rate that nothing
slows down."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks import echo
from benchmarks.load import Load
from benchmarks.processes import BenchmarkError
from userprofile.v1 import admin_service_pb2, event_service_pb2

STREAM = "/userprofile.v1.EventService/StreamEvents"
TOPOLOGY = "/userprofile.v1.AdminService/GetTopology"
STATUS = "/userprofile.v1.AdminService/GetStatus"
SNAPSHOT = "/userprofile.v1.AdminService/CreateSnapshot"


async def send(address: str, method: str, load: Load, producers: int, window: int) -> float:
    """Sends every batch over so many streams at once, each with at most `window` unanswered; returns the seconds it
    took."""
    async with grpc.aio.insecure_channel(address, options=echo.OPTIONS) as channel:
        await channel.channel_ready()
        started_at = time.perf_counter()
        await asyncio.gather(
            *(_produce(channel, method, load.batches[number::producers], window) for number in range(producers))
        )
        return time.perf_counter() - started_at


async def send_directly(parts: Sequence[tuple[str, Load]], producers: int, window: int) -> float:
    """Sends to each address, a shard's, every batch of its load, over so many streams to each; otherwise as `send`."""
    async with AsyncExitStack() as stack:
        streams = []
        for address, load in parts:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=echo.OPTIONS))
            await channel.channel_ready()
            streams += [(channel, load.batches[number::producers]) for number in range(producers)]
        started_at = time.perf_counter()
        await asyncio.gather(*(_produce(channel, STREAM, batches, window) for channel, batches in streams))
        return time.perf_counter() - started_at


async def topology(address: str) -> admin_service_pb2.GetTopologyResponse:
    """Which shard owns which users."""
    async with grpc.aio.insecure_channel(address) as channel:
        ask: Any = channel.unary_unary(TOPOLOGY)
        return admin_service_pb2.GetTopologyResponse.FromString(await ask(b"", timeout=30))


async def _produce(channel: grpc.aio.Channel, method: str, batches: list[bytes], window: int) -> None:
    room = asyncio.Semaphore(window)

    async def requests() -> AsyncIterator[bytes]:
        yield _named()
        for number, batch in enumerate(batches, start=1):
            await room.acquire()
            yield _numbered(batch, number)

    stream: Any = channel.stream_stream(method)
    call = stream(requests())
    answered = -1 if method == echo.METHOD else 0
    async for message in call:
        before = answered
        answered = answered + 1 if method == echo.METHOD else _acknowledged(message, answered)
        for _ in range(max(answered, 0) - max(before, 0)):
            room.release()
        if answered >= len(batches):
            break
    call.cancel()


def _named() -> bytes:
    message: bytes = event_service_pb2.StreamEventsRequest(producer_id=uuid.uuid4().hex).SerializeToString()
    return message


def _numbered(batch: bytes, number: int) -> bytes:
    # Fields of a message may come in pieces: the batch's events, then its sequence.
    sequence: bytes = event_service_pb2.StreamEventsRequest(sequence=number).SerializeToString()
    return batch + sequence


def _acknowledged(message: bytes, before: int) -> int:
    response = event_service_pb2.StreamEventsResponse.FromString(message)
    if response.rejected:
        raise BenchmarkError(f"an event was refused: {response.rejected[0]}")
    return max(before, response.sequence)


class SteadyProducer:
    """One stream to which a batch is due every `interval_s`, whatever becomes of those before it.

    A batch that is late, because the loop, the stream or the service was held up, counts from when it was due: nothing
    that waits is left out of the figures ("coordinated omission").
    """

    def __init__(
        self, address: str, load: Load, interval_s: float, most_batches: int, *, first: int = 0, first_round: int = 0
    ) -> None:
        """Batch `i` is the load's whole batch `first + i`; after the last of them they begin anew, with the ids of the
        next round."""
        self._address = address
        self._load = load
        self._first = first + first_round * load.whole_batches
        self._interval_s = interval_s
        self._due_s: NDArray[np.float64] = np.full(most_batches, np.nan)
        self._acknowledged_s: NDArray[np.float64] = np.full(most_batches, np.nan)
        self._sent = 0
        self._answered = 0
        self._stopped = False
        self._begin: float | None = None
        self._first_answer = asyncio.Event()

    @property
    def sent(self) -> int:
        """Batches sent so far."""
        return self._sent

    async def run(self, begin: float | None = None) -> None:
        """Sends from `begin` (`time.monotonic`; by default at once) until `stop` or the last batch, then waits for the
        last acknowledgement."""
        self._begin = begin
        async with grpc.aio.insecure_channel(self._address, options=echo.OPTIONS) as channel:
            await channel.channel_ready()
            stream: Any = channel.stream_stream(STREAM)
            call = stream(self._requests())
            async for message in call:
                answered = _acknowledged(message, self._answered)
                self._acknowledged_s[self._answered : answered] = time.monotonic()
                self._answered = answered
                self._first_answer.set()
        if self._answered != self._sent:
            raise BenchmarkError(f"{self._sent} batches were sent, {self._answered} were acknowledged")

    def stop(self) -> None:
        """Sends no more."""
        self._stopped = True

    async def _requests(self) -> AsyncIterator[bytes]:
        yield _named()
        # The service says first what it knows of the producer; the clock starts after that.
        await self._first_answer.wait()
        begun = time.monotonic() if self._begin is None else self._begin
        while not self._stopped and self._sent < len(self._due_s):
            round_number, number = divmod(self._first + self._sent, self._load.whole_batches)
            due = begun + self._sent * self._interval_s
            delay = due - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            self._due_s[self._sent] = due
            self._sent += 1
            yield _numbered(self._load.batch(number, round_number), self._sent)

    def latencies(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """When each batch was due (`time.monotonic`) and how long after that it was acknowledged, in seconds."""
        due = self._due_s[: self._answered]
        return due, self._acknowledged_s[: self._answered] - due


async def flood(address: str, load: Load, seconds: float) -> tuple[int, int]:
    """One stream that sends whatever the transport takes for so long, without waiting for acknowledgements, and then
    waits for all of them; returns the events sent, and the most bytes that were sent and not acknowledged."""
    sent, answered, most = 0, 0, 0
    sizes: list[int] = [0]
    async with grpc.aio.insecure_channel(address, options=echo.OPTIONS) as channel:
        stream: Any = channel.stream_stream(STREAM)
        call = stream()
        await call.write(_named())

        async def listen() -> None:
            nonlocal answered
            async for message in call:
                answered = _acknowledged(message, answered)

        listening = asyncio.create_task(listen())
        until = time.monotonic() + seconds
        while time.monotonic() < until and not listening.done():
            round_number, number = divmod(sent, load.whole_batches)
            message = _numbered(load.batch(number, round_number), sent + 1)
            await call.write(message)
            sent += 1
            sizes.append(sizes[-1] + len(message))
            most = max(most, sizes[sent] - sizes[answered])
        await call.done_writing()
        await listening
    if answered != sent:
        raise BenchmarkError(f"{sent} batches were sent, {answered} were acknowledged")
    return sent * load.batch_events, most


async def send_steadily(
    address: str, load: Load, events_per_second: float, seconds: float, producers: int, first_round: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sends batches of a load over so many streams, each at its share of the rate and half a step from the others;
    returns what `SteadyProducer.latencies` does, of all."""
    interval_s = load.batch_events * producers / events_per_second
    count = max(1, round(seconds / interval_s))
    begin = time.monotonic() + 0.5
    streams = [
        SteadyProducer(address, load, interval_s, count, first=number * count, first_round=first_round)
        for number in range(producers)
    ]
    await asyncio.gather(
        *(stream.run(begin + number * interval_s / producers) for number, stream in enumerate(streams))
    )
    due, latency = zip(*(stream.latencies() for stream in streams), strict=True)
    order = np.argsort(np.concatenate(due), kind="stable")
    return np.concatenate(due)[order], np.concatenate(latency)[order]


async def status(address: str) -> admin_service_pb2.GetStatusResponse:
    """How the service says it does."""
    async with grpc.aio.insecure_channel(address) as channel:
        ask: Any = channel.unary_unary(STATUS)
        answer = await ask(b"", timeout=30)
        return admin_service_pb2.GetStatusResponse.FromString(answer)


def check_totals(address: str, events: int, users: int | None = None) -> admin_service_pb2.GetStatusResponse:
    """The status of a service that has counted exactly so many events, of exactly so many users.

    Raises:
        BenchmarkError: it has not.
    """
    answer = asyncio.run(status(address))
    if answer.event_count != events:
        raise BenchmarkError(f"{events:,} events were acknowledged, the service counted {answer.event_count:,}")
    if users is not None and answer.user_count != users:
        raise BenchmarkError(f"events of {users:,} users were acknowledged, the service holds {answer.user_count:,}")
    return answer


async def create_snapshot(address: str, timeout_s: float) -> None:
    """Has every shard write a snapshot, and returns when they are published."""
    async with grpc.aio.insecure_channel(address) as channel:
        ask: Any = channel.unary_unary(SNAPSHOT)
        await ask(b"", timeout=timeout_s)
