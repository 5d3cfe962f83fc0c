"""Streams and calls between frontends and a shard without sockets: messages take their time, keep their order, and get
lost with their stream when a side goes away.

    ApplyStream ── Network.connect ──▶ SimulatedStream ──▶ handler of ShardServer
                                          │   ▲
                                  requests▼   │responses      each direction delivers in order, after a random delay
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, cast
from unittest import mock

import grpc

from profile_service.config import Settings
from profile_service.rpc.frames import END, FrameStream, Handler, Message
from profile_service.shard.health import Health
from profile_service.shard.service import ShardServer

CALL = "/userprofile.internal.v1.ShardService/"


class CallLost(Exception):
    """The connection broke, or there was none."""


class Network:
    """The way to the shard, while there is one."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self._methods: dict[str, Any] = {}
        self._context = contextvars.copy_context()
        self._calls: list[SimulatedStream] = []
        self.slowest_s = 0.002

    def serve(self, shard: Any, settings: Settings, health: Health, context: contextvars.Context) -> ShardServer:
        """A shard's server as this network's only one; what it does, it does in `context`."""
        recorder = _Recorder()
        with (
            mock.patch("profile_service.shard.service.Server", return_value=recorder),
            mock.patch("profile_service.shard.service.FrameServer", recorder.take_streams),
        ):
            server = ShardServer(shard, settings, health)
        self._methods, self._context = recorder.methods, context
        return server

    @property
    def connected(self) -> bool:
        """Whether the shard can be reached."""
        return bool(self._methods)

    def cut(self) -> None:
        """The shard's process has ended, and every connection with it."""
        self._methods = {}
        for call in self._calls:
            call.lose("connection reset by peer")
        self._calls.clear()

    async def connect(self, method: str) -> FrameStream:
        """Opens a stream to the shard, wherever that is. Raises CallLost."""
        stream = SimulatedStream(self)
        self._calls = [held for held in self._calls if not held.ended]
        self._calls.append(stream)
        await asyncio.sleep(self.delay_s())
        stream.open(self._methods.get(method), method)
        return cast(FrameStream, stream)

    async def unary(self, name: str, request: Any) -> Any:
        """One answer. Raises CallLost."""
        await asyncio.sleep(self.delay_s())
        handler = self._methods.get(name)
        if handler is None:
            raise CallLost("connection refused")
        serving = asyncio.create_task(handler.unary_unary(request, _Context()), context=self._context)
        await asyncio.wait([serving])
        if serving.cancelled():
            raise CallLost("connection reset by peer")
        answer = serving.result()
        await asyncio.sleep(self.delay_s())
        if handler is not self._methods.get(name):
            raise CallLost("connection reset by peer")
        return answer

    def begin(self, serving: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Runs the server's side of a call in the server."""
        return asyncio.create_task(serving, name=name, context=self._context)

    def delay_s(self) -> float:
        """How long the next message takes."""
        return self.random.random() * self.slowest_s


class SimulatedStream:
    """One stream, as a caller sees it."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._loop = asyncio.get_running_loop()
        self._requests = _Direction(network)
        self._responses = _Direction(network)
        self._serving: asyncio.Task[None] | None = None
        self.ended = False

    def open(self, handler: Handler | None, method: str) -> None:
        """The server, if there is one, begins to serve it."""
        if handler is None or self.ended:
            raise CallLost("connection refused")
        self._serving = self._network.begin(self._serve(handler), f"server of {method}")

    async def write(self, *pieces: Message) -> None:
        await self._requests.put(b"".join(pieces))

    def put(self, kind: int) -> None:
        assert kind == END
        self._requests.end(None)

    async def drain(self) -> None:
        pass

    async def read(self) -> bytes | None:
        return await self._responses.get()

    def abort(self, reason: str = "") -> None:
        """The caller gives up: what is on its way may still arrive before the server hears of it."""
        self._responses.drop(CallLost(reason))
        if self._serving is not None and not self._serving.done():
            serving = self._serving
            self._requests.after_all(serving.cancel)
        self.ended = self._serving is None

    def lose(self, reason: str) -> None:
        """The connection breaks, with all that is on its way."""
        self.ended = True
        if self._serving is not None:
            self._serving.cancel()
        self._requests.drop(CallLost(reason))
        self._responses.drop(CallLost(reason))

    async def _serve(self, handler: Handler) -> None:
        try:
            async for message in handler(self._arriving()):
                await self._responses.put(bytes(message))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  as it is: the caller hears that the stream has failed
            self._responses.end(CallLost(f"the handler failed: {error!r}"))
        else:
            self._responses.end(None)
        finally:
            self._requests.drop(CallLost("the server has ended the call"))
            self.ended = True

    async def _arriving(self) -> AsyncIterator[bytes]:
        while (message := await self._requests.get()) is not None:
            yield message


class _Direction:
    """Messages one way, in order."""

    WINDOW = 4

    def __init__(self, network: Network) -> None:
        self._network = network
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[bytes | Exception | None] = deque()
        self._on_the_way = 0
        self._latest_s = 0.0
        self._changed = asyncio.Event()
        self._broken: Exception | None = None

    async def put(self, message: bytes) -> None:
        """Sends; waits while too much is on its way."""
        while self._broken is None and self._on_the_way + len(self._arrived) >= self.WINDOW:
            self._changed.clear()
            await self._changed.wait()
        if self._broken is not None:
            raise self._broken
        self._send(message)

    def end(self, error: Exception | None) -> None:
        """Nothing more comes after what was sent."""
        self._send(error)

    def after_all(self, then: Callable[[], object]) -> None:
        """Calls when everything sent has arrived."""
        self._loop.call_at(self._arrival_s(), then)

    def drop(self, error: Exception) -> None:
        """Everything on its way is lost."""
        if self._broken is None:
            self._broken = error
            self._arrived.clear()
            self._changed.set()

    async def get(self) -> bytes | None:
        """The next message; None at the end."""
        while not self._arrived:
            if self._broken is not None:
                raise self._broken
            self._changed.clear()
            await self._changed.wait()
        message = self._arrived.popleft()
        self._changed.set()
        if isinstance(message, Exception):
            self._broken = message
            raise message
        return message

    def _arrival_s(self) -> float:
        # Timers of one moment run in any order; messages do not.
        self._latest_s = max(self._latest_s + 1e-7, self._loop.time() + self._network.delay_s())
        return self._latest_s

    def _send(self, message: bytes | Exception | None) -> None:
        if self._broken is None:
            self._on_the_way += 1
            self._loop.call_at(self._arrival_s(), self._arrive, message)

    def _arrive(self, message: bytes | Exception | None) -> None:
        self._on_the_way -= 1
        if self._broken is None:
            self._arrived.append(message)
            self._changed.set()


class _Context:
    """The part of a servicer's context that a shard uses."""

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        raise CallLost(f"{code.name}: {details}")


class _Recorder:
    """In place of a shard's servers: keeps the handlers that they are given."""

    def __init__(self) -> None:
        self.methods: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        for handler in handlers:
            for name in ("GetProducer", "GetShardStatus", "CreateSnapshot"):
                found = handler.service(cast(grpc.HandlerCallDetails, _Details(CALL + name)))
                if found is not None:
                    self.methods[name] = found

    def take_streams(self, handlers: Mapping[str, Handler], largest_bytes: int) -> object:
        """In place of the server of streams."""
        self.methods.update(handlers)
        return object()


@dataclass(frozen=True)
class _Details:
    method: str
