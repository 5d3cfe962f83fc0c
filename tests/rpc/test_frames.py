"""What a stream of frames promises, on asyncio's loop and uvloop's, over TCP and a Unix socket: everything arrives
once and in order, whoever reads slowly slows its peer down, and each side hears of the other's end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from profile_service.errors import InvalidArgument
from profile_service.rpc import frames
from profile_service.rpc.frames import (
    AHEAD_BYTES,
    END,
    MESSAGE,
    FrameServer,
    FrameStream,
    Handler,
    Message,
    StreamAddress,
    StreamLost,
    connect,
)

LARGEST = 8 << 20
SIZES = st.one_of(st.integers(0, 300), st.integers(65_500, 65_600), st.integers(0, 400_000))

Run = Callable[[Coroutine[Any, Any, None]], None]
Place = Callable[[StreamAddress], StreamAddress]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine in a loop of its own."""
    return request.param  # type: ignore[no-any-return]


def by_name(address: StreamAddress) -> StreamAddress:
    assert address.local_name
    return replace(address, port=0)


def by_port(address: StreamAddress) -> StreamAddress:
    return replace(address, local_name="")


def from_elsewhere(address: StreamAddress) -> StreamAddress:
    """As another machine sees it, where nothing has that name."""
    return replace(address, local_name="nothing-has-this-name")


@pytest.fixture(params=[by_name, by_port, from_elsewhere])
def place(request: pytest.FixtureRequest) -> Place:
    """How the server is reached."""
    return request.param  # type: ignore[no-any-return]


async def echo(requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
    async for request in requests:
        yield bytes(request)


@asynccontextmanager
async def serving(handlers: Mapping[str, Handler]) -> AsyncIterator[StreamAddress]:
    server = FrameServer(handlers, LARGEST)
    port, local_name = await server.start("127.0.0.1")
    try:
        yield StreamAddress("127.0.0.1", port, local_name)
    finally:
        await server.stop(0)


@asynccontextmanager
async def opened(address: StreamAddress, method: str = "Echo") -> AsyncIterator[FrameStream]:
    stream = await connect(address, method, LARGEST)
    try:
        yield stream
    finally:
        stream.abort()
        await stream.closed.wait()


async def read_all(stream: FrameStream) -> list[bytes]:
    found = []
    while (message := await stream.read()) is not None:
        found.append(bytes(message))
    return found


@given(messages=st.lists(st.lists(SIZES, max_size=3), max_size=12), seed=st.binary(min_size=1, max_size=3))
@pytest.mark.parametrize("loop", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("reach", [by_name, by_port])
def test_messages_arrive_as_they_were_sent(loop: Run, reach: Place, messages: list[list[int]], seed: bytes) -> None:
    sent = [[(seed * size)[:size] for size in sizes] for sizes in messages]

    async def main() -> None:
        async with serving({"Echo": echo}) as address, opened(reach(address)) as stream:
            reading = asyncio.create_task(read_all(stream))
            for pieces in sent:
                await stream.write(*pieces)
            stream.put(END)
            assert await reading == [b"".join(pieces) for pieces in sent]

    loop(main())


def test_a_large_message_is_a_view_that_nobody_can_change(run: Run, place: Place) -> None:
    async def main() -> None:
        async with serving({"Echo": echo}) as address, opened(place(address)) as stream:
            await stream.write(b"x" * 1_000_000)
            message = await stream.read()
            assert isinstance(message, memoryview)
            assert message.readonly
            assert message == b"x" * 1_000_000

    run(main())


def test_who_does_not_read_slows_down_who_writes(run: Run, place: Place) -> None:
    """Of a hundred megabytes only what the system's own buffers hold gets on its way, and all arrives in the end."""

    async def main() -> None:
        read = asyncio.Event()
        arrived = 0

        async def wait_and_count(requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
            nonlocal arrived
            await read.wait()
            async for request in requests:
                arrived += len(request)
            yield b"done"

        async with serving({"Count": wait_and_count}) as address, opened(place(address), "Count") as stream:
            written = 0

            async def write() -> None:
                nonlocal written
                for _ in range(400):
                    await stream.write(bytes(256 << 10))
                    written += 256 << 10
                stream.put(END)

            writing = asyncio.create_task(write())
            last = -1
            while written != last:
                last = written
                await asyncio.sleep(0.1)
            assert not writing.done()
            assert written < AHEAD_BYTES + (48 << 20)
            read.set()
            await writing
            assert await read_all(stream) == [b"done"]
            assert arrived == 400 * (256 << 10)

    run(main())


def test_what_a_handler_fails_with_is_what_the_caller_hears(run: Run, place: Place) -> None:
    async def refuse(requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
        yield b"one"
        raise InvalidArgument("", "that was no request")

    async def break_down(requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
        raise RuntimeError("oh")
        yield b""

    async def main() -> None:
        async with serving({"Refuse": refuse, "Break": break_down}) as address:
            async with opened(place(address), "Refuse") as stream:
                assert await stream.read() == b"one"
                with pytest.raises(StreamLost, match="that was no request"):
                    await stream.read()
                with pytest.raises(StreamLost):
                    await stream.write(b"late")
            async with opened(place(address), "Break") as stream:
                with pytest.raises(StreamLost, match="RuntimeError: oh"):
                    await stream.read()
            with pytest.raises(StreamLost, match="there is no stream 'Other'"):
                await connect(place(address), "Other", LARGEST)

    run(main())


def test_a_stream_that_is_given_up_cancels_its_handler(run: Run, place: Place) -> None:
    async def main() -> None:
        cancelled = asyncio.Event()

        async def wait(requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
            try:
                async for request in requests:
                    yield request
                    await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        async with serving({"Wait": wait}) as address:
            async with opened(place(address), "Wait") as stream:
                await stream.write(b"a")
                assert await stream.read() == b"a"
            await asyncio.wait_for(cancelled.wait(), 10)

    run(main())


def test_a_server_that_stops_gives_streams_some_time(run: Run) -> None:
    async def main() -> None:
        release = asyncio.Event()

        async def wait(requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
            await release.wait()
            yield b"late, and in time"

        server = FrameServer({"Wait": wait, "Echo": echo}, LARGEST)
        port, local_name = await server.start("127.0.0.1")
        address = StreamAddress("127.0.0.1", port, local_name)
        slow, idle = await connect(address, "Wait", LARGEST), await connect(address, "Echo", LARGEST)
        stopping = asyncio.create_task(server.stop(1.0))
        await asyncio.sleep(0)
        with pytest.raises(OSError):
            await connect(address, "Echo", LARGEST)
        release.set()
        assert await read_all(slow) == [b"late, and in time"]
        with pytest.raises(StreamLost):
            await idle.read()
        await stopping

    run(main())


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (struct.pack("<IB", LARGEST + 1, MESSAGE), None),
        (struct.pack("<IB", 3, MESSAGE) + b"abc", b"there is no stream 'abc'"),
        (struct.pack("<IB", 3, 77) + b"abc", b"there is no stream 'abc'"),
        (os.urandom(5), None),
        (b"GET / HTTP/1.1\r\n\r\n", None),
    ],
    ids=["too large", "no opening", "no kind", "noise", "HTTP"],
)
def test_whoever_speaks_otherwise_is_turned_away(
    run: Run, monkeypatch: pytest.MonkeyPatch, sent: bytes, said: bytes | None
) -> None:
    monkeypatch.setattr(frames, "OPENING_S", 0.2)

    async def main() -> None:
        async with serving({"Echo": echo}) as address:
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(sent)
            heard = b""
            with contextlib.suppress(ConnectionError):
                heard = await asyncio.wait_for(reader.read(), 10)
            assert said is None or said in heard
            writer.close()
            # Nobody else is disturbed.
            async with opened(address) as stream:
                await stream.write(b"a")
                assert await stream.read() == b"a"

    run(main())


def test_a_message_that_is_too_large_for_the_caller_ends_its_stream(run: Run, place: Place) -> None:
    async def main() -> None:
        async with serving({"Echo": echo}) as address:
            stream = await connect(place(address), "Echo", 1_000)
            await stream.write(bytes(1_001))
            with pytest.raises(StreamLost, match="1001 bytes is larger than 1000"):
                await stream.read()

    run(main())
