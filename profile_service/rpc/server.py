"""A grpc.aio server that takes in calls many at a time.

grpc.aio asks gRPC for one call, starts it, and asks for the next one. Each call so waits for a thread that wakes the
event loop, and on a machine with more work than processors a wake-up takes milliseconds: some hundred calls a second,
however little each of them costs. Here as many calls are asked for as may come at once; all that has arrived is then
started in one turn of the loop.

This leans on what is inside of grpcio (`_request_call`, `_handle_rpc`, `_schedule_rpc_coro`), as its own loop uses
them in the version that `pyproject.toml` pins. Another version needs another look.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from grpc import aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]

ServerContext = aio.ServicerContext[Any, Any]

CALLS_AT_ONCE = 32
"""Calls asked for ahead, beside the one that grpc.aio asks for."""


class Server(aio.Server):
    """As `grpc.aio.server`.

    Args:
        options: of the channel, as for `grpc.aio.server`.
    """

    def __init__(self, options: Sequence[tuple[str, Any]] = ()) -> None:
        self._server = aio.server(options=options)
        self._inner: Any = self._server._server  # type: ignore[attr-defined]
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._acceptors: list[asyncio.Task[None]] = []
        self._calls: set[asyncio.Task[None]] = set()

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """As `grpc.aio.Server`; before `start`."""
        added = tuple(generic_rpc_handlers)
        self._handlers.extend(added)
        self._server.add_generic_rpc_handlers(added)

    def add_insecure_port(self, address: str) -> int:
        """As `grpc.aio.Server`."""
        return self._server.add_insecure_port(address)

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """As `grpc.aio.Server`."""
        return self._server.add_secure_port(address, server_credentials)

    async def start(self) -> None:
        """As `grpc.aio.Server`."""
        await self._server.start()
        self._acceptors = [asyncio.create_task(self._accept(), name="accept") for _ in range(CALLS_AT_ONCE)]

    async def stop(self, grace: float | None) -> None:
        """As `grpc.aio.Server`."""
        await self._server.stop(grace)
        # What was asked for and did not come has failed by now.
        await asyncio.gather(*self._acceptors)

    async def wait_for_termination(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109  as it is there
        """As `grpc.aio.Server`."""
        return await self._server.wait_for_termination(timeout)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(cygrpc._RequestCallError):
            while self._inner.is_running():
                state = await self._inner._request_call()
                answering = cygrpc._handle_rpc(self._handlers, (), state, loop, False)
                # Cancelled by the client it ends, too.
                call = loop.create_task(cygrpc._schedule_rpc_coro(answering, state, loop))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
