"""Reads of profiles: as many as are answered, one after the other, or at a rate that nothing slows down.

An `Ask` asks the question of a number and returns when it is answered. Who asks by gRPC or HTTP is a context manager
that gives one.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks import echo
from benchmarks.processes import BenchmarkError
from benchmarks.producing import STREAM
from profile_service.sample.shoppers import shopper_id
from userprofile.v1 import event_service_pb2, profile_service_pb2
from userprofile.v1.event_pb2 import Event

GET = "/userprofile.v1.ProfileService/GetProfile"
BATCH_GET = "/userprofile.v1.ProfileService/BatchGetProfiles"
_TIMEOUT_S = 60.0
_HEAD_END = b"\r\n\r\n"

Ask = Callable[[int], Awaitable[object]]


@dataclass(frozen=True)
class Question:
    """A call to make."""

    address: str
    """host:port of who is asked."""
    request: bytes


@asynccontextmanager
async def over_grpc(method: str, questions: Sequence[Question]) -> AsyncIterator[Ask]:
    """Asks the questions in turn, over one channel to each address."""
    channels = {
        address: grpc.aio.insecure_channel(address, options=echo.OPTIONS)
        for address in {question.address for question in questions}
    }
    try:
        stubs: dict[str, Any] = {address: channel.unary_unary(method) for address, channel in channels.items()}
        for channel in channels.values():
            await channel.channel_ready()
        calls = [(stubs[question.address], question.request) for question in questions]

        async def ask(number: int) -> None:
            call, request = calls[number % len(calls)]
            if not await call(request, timeout=_TIMEOUT_S):
                raise BenchmarkError(f"question {number} got an empty answer")

        yield ask
    finally:
        for channel in channels.values():
            await channel.close()


@asynccontextmanager
async def over_http(address: str, paths: Sequence[str], connections: int) -> AsyncIterator[Ask]:
    """Gets the paths in turn, over so many connections that are kept open, a request at a time on each. One that the
    server has closed because nothing came is opened anew."""
    host, _, port = address.rpartition(":")
    requests = [f"GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n".encode() for path in paths]
    loop = asyncio.get_running_loop()
    free: list[_Connection] = []
    room = asyncio.Semaphore(connections)

    async def ask(number: int) -> None:
        async with room:
            request = requests[number % len(requests)]
            while free:
                connection = free.pop()
                try:
                    if not connection.closed:
                        await connection.ask(request)
                        free.append(connection)
                        return
                except _Closed:
                    # The server had just closed it, because nothing came.
                    continue
            _, connection = await loop.create_connection(_Connection, host, int(port))
            await connection.ask(request)
            free.append(connection)

    try:
        yield ask
    finally:
        for connection in free:
            connection.close()


class _Closed(BenchmarkError):
    """The server has closed the connection."""


class _Connection(asyncio.Protocol):
    """One connection of HTTP/1.1: a client of less than this would not be the bottleneck of its own measurement."""

    def __init__(self) -> None:
        self.closed = False
        self._received = b""
        self._answered: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def ask(self, request: bytes) -> asyncio.Future[None]:
        """The future of the answer."""
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answered

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(_HEAD_END)
        if end < 0 or self._answered is None:
            return
        head = self._received[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self._received) < end + len(_HEAD_END) + length:
            return
        answered, self._answered = self._answered, None
        if not head.startswith(b"http/1.1 200") or not length:
            answered.set_exception(BenchmarkError(f"an answer was {self._received[:300]!r}"))
        else:
            answered.set_result(None)
        self._received = b""

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(_Closed(f"the connection was closed: {error}"))

    def close(self) -> None:
        """Ends it."""
        self._transport.close()


async def as_fast_as_answered(ask: Ask, at_once: int, seconds: float) -> tuple[int, float]:
    """Asks so many questions at once, each anew when it is answered; returns how many were answered, and in how many
    seconds."""
    numbers = itertools.count()
    began = time.perf_counter()

    async def go_on() -> int:
        answered = 0
        while time.perf_counter() - began < seconds:
            await ask(next(numbers))
            answered += 1
        return answered

    async with asyncio.TaskGroup() as tasks:
        asking = [tasks.create_task(go_on()) for _ in range(at_once)]
    return sum(task.result() for task in asking), time.perf_counter() - began


async def in_turns(asks: Mapping[str, Ask], count: int) -> dict[str, NDArray[np.float64]]:
    """Asks one question at a time, of each in turn; returns how long each took to answer, in seconds."""
    answered = {name: np.empty(count) for name in asks}
    for number in range(count):
        for name, ask in asks.items():
            began = time.perf_counter()
            await ask(number)
            answered[name][number] = time.perf_counter() - began
    return answered


async def at_rate(
    ask: Ask, requests_per_second: float, seconds: float, stop: asyncio.Event | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Asks at a rate that nothing slows down, for so long or until it is to stop: a question that waits holds up none
    that is due after it.

    Returns when each was due (`time.monotonic`) and how long after that it was answered, in seconds.
    """
    due: NDArray[np.float64] = np.arange(max(1, int(requests_per_second * seconds))) / requests_per_second
    answered: NDArray[np.float64] = np.full(len(due), np.nan)

    async def one(number: int) -> None:
        await ask(number)
        answered[number] = time.monotonic()

    due += time.monotonic()
    asked = 0
    async with asyncio.TaskGroup() as tasks:
        for number in range(len(due)):
            if stop is not None and stop.is_set():
                break
            delay = float(due[number]) - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.create_task(one(number))
            asked += 1
    return due[:asked], (answered - due)[:asked]


def get_request(user: int) -> bytes:
    """An encoded GetProfileRequest for a shopper."""
    return profile_service_pb2.GetProfileRequest(user_id=shopper_id(user)).SerializeToString()


async def read_steadily(
    address: str, users: int, requests_per_second: float, seconds: float, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Reads the profiles of users drawn from all through a frontend, as `at_rate` does."""
    drawn = np.random.default_rng(seed).integers(0, users, 10_000).tolist()
    async with over_grpc(GET, [Question(address, get_request(user)) for user in drawn]) as ask:
        return await at_rate(ask, requests_per_second, seconds)


async def read_fast(
    address: str, users: int, at_once: int, seconds: float, seed: int
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """So many reads at once of users drawn from all, through a frontend: how many a second, when each was asked
    (`time.monotonic`), and how long after that it was answered, in seconds."""
    drawn = np.random.default_rng(seed).integers(0, users, 10_000).tolist()
    asked: list[float] = []
    taken: list[float] = []
    async with over_grpc(GET, [Question(address, get_request(user)) for user in drawn]) as ask:

        async def timed(number: int) -> None:
            began = time.monotonic()
            await ask(number)
            asked.append(began)
            taken.append(time.monotonic() - began)

        count, spent = await as_fast_as_answered(timed, at_once, seconds)
    return count / spent, np.array(asked), np.array(taken)


async def probe(
    address: str, event_type: str, probes_per_second: float, seconds: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Events of users of their own at a rate that nothing slows down, each read through a frontend from then on until
    its profile is there; returns when each was due (`time.monotonic`), and how long after that it was read, in
    seconds."""
    name = uuid.uuid4().hex
    due: NDArray[np.float64] = np.arange(max(1, int(probes_per_second * seconds))) / probes_per_second
    shown: NDArray[np.float64] = np.full(len(due), np.nan)
    async with grpc.aio.insecure_channel(address, options=echo.OPTIONS) as channel:
        await channel.channel_ready()
        stream: Any = channel.stream_stream(STREAM)
        read: Any = channel.unary_unary(BATCH_GET)
        call = stream()
        await call.write(event_service_pb2.StreamEventsRequest(producer_id=name).SerializeToString())
        known = asyncio.Event()

        async def until_shown(number: int, user_id: str) -> None:
            request = profile_service_pb2.BatchGetProfilesRequest(user_ids=[user_id]).SerializeToString()
            while True:
                answer = await read(request, timeout=_TIMEOUT_S)
                if profile_service_pb2.BatchGetProfilesResponse.FromString(answer).profiles:
                    break
            shown[number] = time.monotonic()

        async def listen() -> None:
            async for message in call:
                known.set()
                if event_service_pb2.StreamEventsResponse.FromString(message).rejected:
                    raise BenchmarkError("a probe was refused")

        listening = asyncio.create_task(listen())
        # The service says first what it knows of the producer.
        await known.wait()
        due += time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for number in range(len(due)):
                delay = float(due[number]) - time.monotonic()
                if delay > 0:
                    await asyncio.sleep(delay)
                user_id = f"{name}-{number}"
                event = Event(user_id=user_id, type=event_type)
                batch = event_service_pb2.StreamEventsRequest(sequence=number + 1, events=[event])
                await call.write(batch.SerializeToString())
                tasks.create_task(until_shown(number, user_id))
        await call.done_writing()
        await listening
    return due, shown - due
