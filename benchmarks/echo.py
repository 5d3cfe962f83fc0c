"""The floor under every stream: a bare grpc.aio server that takes messages unparsed and answers each with a few
bytes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop

METHOD = "/benchmark.Echo/Stream"
OPTIONS = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20)]


async def _answer(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
    async for message in requests:
        yield len(message).to_bytes(8, "little")


async def serve() -> None:
    """Serves on a free port until SIGTERM."""
    server = grpc.aio.server(options=OPTIONS)
    handler: Any = grpc.stream_stream_rpc_method_handler(_answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark.Echo", {"Stream": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    print(f"ready: gRPC 127.0.0.1:{port}", flush=True)
    await stopped.wait()
    await server.stop(1)


if __name__ == "__main__":
    uvloop.run(serve())
