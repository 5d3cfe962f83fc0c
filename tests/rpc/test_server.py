"""Calls that come together are started together, and a server ends as gRPC's own does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc import aio

from profile_service.rpc.server import CALLS_AT_ONCE, Server
from tests.cluster.local_cluster import until

METHOD = "/test.Echo/Call"


class Echo:
    """Answers with the request, once it may; knows in how many turns of the loop the calls began."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.began = 0
        self.turns = 0
        self.turn_began = -1
        self._turn = 0

    async def turn(self) -> None:
        """Counts the loop's turns, until it is cancelled."""
        while True:
            self._turn += 1
            await asyncio.sleep(0)

    async def call(self, request: bytes, _: object) -> bytes:
        self.began += 1
        if self.turn_began != self._turn:
            self.turn_began, self.turns = self._turn, self.turns + 1
        await self.may_answer.wait()
        return request


@asynccontextmanager
async def serving(echo: Echo) -> AsyncIterator[tuple[Server, aio.UnaryUnaryMultiCallable[bytes, bytes]]]:
    server = Server()
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {"Call": grpc.unary_unary_rpc_method_handler(echo.call)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Echo", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        try:
            yield server, channel.unary_unary(METHOD)
        finally:
            await server.stop(0)


async def test_calls_that_have_arrived_begin_in_few_turns() -> None:
    echo = Echo()
    async with serving(echo) as (_, call):
        calls = [call(b"%d" % number) for number in range(CALLS_AT_ONCE)]
        await until(lambda: echo.began >= 1)
        echo.turns, echo.turn_began = 0, -1
        turning = asyncio.create_task(echo.turn())
        await until(lambda: echo.began >= CALLS_AT_ONCE)
        turning.cancel()
        assert echo.turns < CALLS_AT_ONCE / 2
        echo.may_answer.set()
        assert await asyncio.gather(*calls) == [b"%d" % number for number in range(CALLS_AT_ONCE)]


async def test_more_calls_than_are_asked_for_ahead_are_all_answered() -> None:
    echo = Echo()
    echo.may_answer.set()
    async with serving(echo) as (server, call):
        requests = [b"%d" % number for number in range(20 * CALLS_AT_ONCE)]
        assert await asyncio.gather(*map(call, requests)) == requests
        assert not server._calls


async def test_stopping_answers_what_runs_and_takes_nothing_new() -> None:
    echo = Echo()
    async with serving(echo) as (server, call):
        running = call(b"running")
        await until(lambda: echo.began >= 1)
        stopping = asyncio.create_task(server.stop(10.0))
        await until(lambda: not server._inner.is_running())
        with pytest.raises(aio.AioRpcError) as refused:
            await call(b"late", timeout=5.0)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        echo.may_answer.set()
        assert await running == b"running"
        await stopping
        # Again, as a drain does.
        await server.stop(None)


async def test_a_call_that_its_caller_gives_up_is_cancelled() -> None:
    echo = Echo()
    async with serving(echo) as (server, call):
        running = call(b"given up")
        await until(lambda: echo.began >= 1)
        running.cancel()
        await until(lambda: not server._calls)
