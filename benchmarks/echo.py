"""The floor under every call: a bare grpc.aio server that looks at nothing.

Stream   takes messages unparsed and answers each with a few bytes
Unary    answers with as many bytes as the request's first four say
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop

METHOD = "/benchmark.Echo/Stream"
UNARY = "/benchmark.Echo/Unary"
OPTIONS = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20)]

_BODY = bytes(range(256)) * 256


def unary_request(answer_bytes: int, size_bytes: int) -> bytes:
    """A request of a size for an answer of a size, of 64 KiB at most."""
    return answer_bytes.to_bytes(4, "little").ljust(size_bytes, b"u")


async def _answer(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
    async for message in requests:
        yield len(message).to_bytes(8, "little")


async def _answer_once(request: bytes, _context: Any) -> bytes:
    return _BODY[: int.from_bytes(request[:4], "little")]


async def serve() -> None:
    """Serves on a free port until SIGTERM."""
    server = grpc.aio.server(options=OPTIONS)
    handlers: Any = {
        "Stream": grpc.stream_stream_rpc_method_handler(_answer),
        "Unary": grpc.unary_unary_rpc_method_handler(_answer_once),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    print(f"ready: gRPC 127.0.0.1:{port}", flush=True)
    await stopped.wait()
    await server.stop(1)


if __name__ == "__main__":
    uvloop.run(serve())
