"""Streams of messages between processes of the service: frames on a connection, both ways at once.

    ┌────────────┬───────┬─────────────────┐
    │ uint32 len │ uint8 │ len bytes       │     little-endian
    └────────────┴───────┴─────────────────┘

| kind | from the caller | from the server |
|---|---|---|
| OPEN | the method's name; comes first | empty: the method is served |
| MESSAGE | a request | a response |
| END | no more requests | no more responses, all is well |
| FAILED | – | what went wrong, for people; the last frame |

A gRPC stream promises the same: order, a bound on what is on its way, either side's end. It costs two to four times
the CPU time (docs/performance.md), as every message is cut into HTTP/2 frames, copied slice by slice, and handed from a
thread to the loop. Producers and readers speak gRPC; this is for the one hop behind it that every event takes.

On one machine the connection is a Unix socket: TCP may pace there what is sent after a pause (BBR does), so that a
large message takes up to a tenth of a second with both sides idle (docs/operations.md). The socket's name is a secret
of the shard and of who asks it by gRPC; where it leads nowhere, the shard is elsewhere.

A large message is received into memory of its own, straight from the socket. A reader that does not read stops its
peer: beyond AHEAD_BYTES nothing more is taken from the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import struct
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from profile_service.config import KIB, MIB
from profile_service.errors import ProfileServiceError

Message = bytes | memoryview
"""A large one arrives as a read-only view."""

Handler = Callable[[AsyncIterator[Message]], AsyncIterator[Message]]
"""Serves one stream: requests in, responses out."""

OPEN, MESSAGE, END, FAILED = range(4)

AHEAD_BYTES = MIB
"""Received and not yet read."""

OPENING_S = 5.0
"""A connection that does not say for so long what it wants is closed."""

SILENCE_S = 5
"""A peer whose machine does not answer for about so long is lost."""

_HEADER = struct.Struct("<IB")
_NAME_BYTES = 256
_BUFFER_BYTES = 64 * KIB
_JOINED_BYTES = 16 * KIB
"""A message smaller than this is copied into one piece, rather than sent piece by piece."""

logger = logging.getLogger(__name__)


class StreamLost(Exception):
    """The stream has ended before its time: the connection broke, or the other side gave it up."""


class FrameStream(asyncio.BufferedProtocol):
    """One side of a stream.

    Args:
        largest_bytes: of a message that is received; a larger one ends the stream.
        opened: called when the connection is there.
    """

    def __init__(self, largest_bytes: int, opened: Callable[[FrameStream], None] | None = None) -> None:
        self._largest_bytes = largest_bytes
        self._opened = opened
        self._transport: asyncio.Transport | None = None
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        """What the buffer holds of frames that are not complete."""
        self._large: memoryview | None = None
        """A message that is too large for the buffer, and how much of it is there."""
        self._large_kind = MESSAGE
        self._large_end = 0
        self._received: deque[tuple[int, Message]] = deque()
        self._received_bytes = 0
        self._is_read = True
        self._arrived = asyncio.Event()
        self._is_full = False
        """Whether some of what was written is still in this process."""
        self._writable = asyncio.Event()
        self._lost: StreamLost | None = None
        self.closed = asyncio.Event()
        """Set when the connection is no more."""

    # --- what a side does ---

    async def read(self) -> Message | None:
        """The next message; None when the other side has sent its last. Raises StreamLost."""
        kind, message = self._next() if self._received else await self.read_frame()
        if kind == MESSAGE:
            return message
        if kind == END:
            return None
        text = str(message, "utf-8", "replace") if kind == FAILED else f"a frame of kind {kind} is none of a stream"
        self._lose(text)
        raise StreamLost(text)

    async def read_frame(self) -> tuple[int, Message]:
        """The next frame's kind and payload. Raises StreamLost."""
        while not self._received:
            if self._lost is not None:
                raise self._lost
            self._arrived.clear()
            await self._arrived.wait()
        return self._next()

    def _next(self) -> tuple[int, Message]:
        kind, message = self._received.popleft()
        self._received_bytes -= len(message)
        if not self._is_read and self._received_bytes < AHEAD_BYTES:
            self._is_read = True
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()
        return kind, message

    async def write(self, *pieces: Message) -> None:
        """Sends a message, in pieces that are put together on the way; returns when all that was written has left this
        process. Raises StreamLost."""
        self.put(MESSAGE, *pieces)
        if self._is_full:
            await self.drain()

    async def drain(self) -> None:
        """Returns when everything has left this process. Raises StreamLost."""
        while self._is_full and self._lost is None:
            self._writable.clear()
            await self._writable.wait()
        if self._lost is not None:
            raise self._lost

    def put(self, kind: int, *pieces: Message) -> None:
        """Sends a frame as far as that goes at once, and keeps the rest. Raises StreamLost."""
        if self._lost is not None:
            raise self._lost
        assert self._transport is not None
        size_bytes = sum(map(len, pieces))
        frame = (_HEADER.pack(size_bytes, kind), *pieces)
        if size_bytes < _JOINED_BYTES:
            self._transport.write(b"".join(frame))
        else:
            self._transport.writelines(frame)

    def close(self) -> None:
        """Ends the connection when everything has left."""
        if self._transport is not None:
            self._transport.close()

    def abort(self, reason: str = "the stream was given up") -> None:
        """Ends the connection at once, with all that is on its way."""
        self._lose(reason)

    # --- what the loop calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)
        # `write` returns when the system has everything: meanwhile what follows gathers.
        self._transport.set_write_buffer_limits(0)
        _prepare(transport.get_extra_info("socket"))
        if self._opened is not None:
            self._opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(f"connection lost: {exc}" if exc else "the connection was closed")
        self.closed.set()

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._writable.set()

    def eof_received(self) -> bool:
        # Neither side half-closes its connection: END says that a direction is at its end.
        return False

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._large is not None:
            return self._large[self._large_end :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._buffer):
            # A frame's begin; whole, it fits.
            rest = bytes(self._buffer[self._start : self._end])
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return self._buffer[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._large is not None:
            self._large_end += nbytes
            if self._large_end == len(self._large):
                message, self._large = self._large, None
                self._take(self._large_kind, message.toreadonly())
            return
        self._end += nbytes
        while self._lost is None and self._end - self._start >= _HEADER.size:
            size_bytes, kind = _HEADER.unpack_from(self._buffer, self._start)
            if size_bytes > self._largest_bytes:
                self._lose(f"a message of {size_bytes} bytes is larger than {self._largest_bytes}")
                return
            begin = self._start + _HEADER.size
            end = begin + size_bytes
            if end <= self._end:
                self._start = end
                self._take(kind, bytes(self._buffer[begin:end]))
            elif _HEADER.size + size_bytes > len(self._buffer):
                self._large, self._large_kind = np.empty(size_bytes, np.uint8).data, kind
                self._large_end = self._end - begin
                self._large[: self._large_end] = self._buffer[begin : self._end]
                self._start = self._end = 0
                return
            else:
                return

    def _take(self, kind: int, message: Message) -> None:
        self._received.append((kind, message))
        self._received_bytes += len(message)
        self._arrived.set()
        if self._is_read and self._received_bytes >= AHEAD_BYTES:
            self._is_read = False
            if self._transport is not None and not self._transport.is_closing():
                self._transport.pause_reading()

    def _lose(self, reason: str) -> None:
        if self._lost is None:
            self._lost = StreamLost(reason)
            if self._transport is not None:
                self._transport.abort()
        self._arrived.set()
        self._writable.set()


@dataclass(frozen=True)
class StreamAddress:
    """Where streams are served."""

    host: str
    port: int
    local_name: str
    """Of the Unix socket, by which the server is reached on its own machine."""


async def connect(address: StreamAddress, method: str, largest_bytes: int) -> FrameStream:
    """Opens a stream.

    Args:
        address: of the server.
        method: the stream's name there.
        largest_bytes: of a response.

    Raises:
        OSError: there is no connection.
        StreamLost: the other side does not serve the method.
    """
    loop = asyncio.get_running_loop()
    stream = FrameStream(largest_bytes)
    local = await _local_connection(address.local_name) if address.local_name else None
    if local is not None:
        await loop.create_unix_connection(lambda: stream, sock=local)
    else:
        await loop.create_connection(lambda: stream, address.host, address.port)
    try:
        stream.put(OPEN, method.encode())
        kind, message = await stream.read_frame()
        if kind != OPEN:
            raise StreamLost(f"{method} is not served: {str(message, 'utf-8', 'replace')}")
    except BaseException:
        stream.abort()
        raise
    return stream


async def _local_connection(name: str) -> socket.socket | None:
    """A connection to the Unix socket of that name; None where this machine has none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        # By itself, for uvloop cannot connect to such a name.
        await asyncio.get_running_loop().sock_connect(connection, f"\0{name}")
    except ConnectionRefusedError:
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


class FrameServer:
    """Serves streams on a port and a Unix socket of its own.

    Args:
        handlers: by method. A stream that its caller gives up, or loses, is cancelled.
        largest_bytes: of a request.
    """

    def __init__(self, handlers: Mapping[str, Handler], largest_bytes: int) -> None:
        self._handlers = handlers
        self._largest_bytes = largest_bytes
        self._listening: list[asyncio.Server] = []
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self, host: str) -> tuple[int, str]:
        """Begins to serve at the host's address; returns the port and the name of the Unix socket, which is empty on a
        system without such names."""
        loop = asyncio.get_running_loop()
        # Of this machine: nobody else is asked, and no thread waited for.
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(
            (address[0], 0), family=family, dualstack_ipv6=address[0] == "::" and socket.has_dualstack_ipv6()
        )
        self._listening = [await loop.create_server(self._accept, sock=listening)]
        local_name = f"profile-service-{secrets.token_hex(16)}" if sys.platform == "linux" else ""
        if local_name:
            self._listening.append(await loop.create_unix_server(self._accept, f"\0{local_name}"))
        return int(listening.getsockname()[1]), local_name

    async def stop(self, grace_s: float) -> None:
        """Takes no new stream, and gives those that run so long to end."""
        for listening in self._listening:
            listening.close()
        if self._serving:
            _, late = await asyncio.wait(self._serving, timeout=grace_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    def _accept(self) -> FrameStream:
        return FrameStream(self._largest_bytes, self._begin)

    def _begin(self, stream: FrameStream) -> None:
        task = asyncio.create_task(self._serve(stream))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, stream: FrameStream) -> None:
        handling = asyncio.create_task(self._handle(stream))
        gone = asyncio.create_task(stream.closed.wait())
        try:
            await asyncio.wait({handling, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (handling, gone):
                task.cancel()
            await asyncio.wait({handling, gone})
            if not stream.closed.is_set() and (handling.cancelled() or handling.exception() is not None):
                stream.abort()

    async def _handle(self, stream: FrameStream) -> None:
        method = ""
        with contextlib.suppress(StreamLost):
            try:
                async with asyncio.timeout(OPENING_S):
                    kind, name = await stream.read_frame()
                method = str(name[:_NAME_BYTES], "utf-8", "replace")
                handler = self._handlers.get(method) if kind == OPEN else None
                if handler is None:
                    stream.put(FAILED, f"there is no stream {method!r}".encode())
                else:
                    stream.put(OPEN)
                    async for response in handler(_requests(stream)):
                        await stream.write(response)
                    stream.put(END)
            except TimeoutError:
                stream.put(FAILED, b"nothing was asked for")
            except ProfileServiceError as error:
                stream.put(FAILED, error.message.encode())
            except StreamLost:
                raise
            except Exception as error:  # Whatever it is, the caller hears that the stream has failed.
                logger.exception("%s failed", method)
                stream.put(FAILED, f"{type(error).__name__}: {error}".encode())
            stream.close()


async def _requests(stream: FrameStream) -> AsyncIterator[Message]:
    while (message := await stream.read()) is not None:
        yield message


def _prepare(connection: socket.socket) -> None:
    """Has the system send at once, much at a time, and find out by itself that the other machine is gone."""
    if connection.family == socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    settings = {"TCP_KEEPIDLE": SILENCE_S, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": SILENCE_S * 1000}
    for name, value in settings.items():
        # Not every system has them all.
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
