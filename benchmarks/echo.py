"""The floor under every call: a bare grpc.aio server that looks at nothing.

Stream   takes messages unparsed and answers each with a few bytes
Unary    answers with as many bytes as the request's first four say

It needs grpcio and uvloop only, so that `scripts/bench_libraries.py` can run it with other versions of them, on
asyncio's own event loop (`--loop asyncio`), and as a server of threads (`--threads N`).
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import uvloop

METHOD = "/benchmark.Echo/Stream"
UNARY = "/benchmark.Echo/Unary"
OPTIONS = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20)]

_BODY = bytes(range(256)) * 4096


def unary_request(answer_bytes: int, size_bytes: int) -> bytes:
    """A request of a size for an answer of a size, of 1 MiB at most."""
    return answer_bytes.to_bytes(4, "little").ljust(size_bytes, b"u")


async def _answer(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
    async for message in requests:
        yield len(message).to_bytes(8, "little")


async def _answer_once(request: bytes, _context: Any) -> bytes:
    return _BODY[: int.from_bytes(request[:4], "little")]


def _answer_in_a_thread(requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
    for message in requests:
        yield len(message).to_bytes(8, "little")


def _answer_once_in_a_thread(request: bytes, _context: Any) -> bytes:
    return _BODY[: int.from_bytes(request[:4], "little")]


def _handlers(stream: Any, unary: Any) -> tuple[Any]:
    handlers: Any = {
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
    }
    return (grpc.method_handlers_generic_handler("benchmark.Echo", handlers),)


async def serve() -> None:
    """Serves on a free port until SIGTERM."""
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers(_handlers(_answer, _answer_once))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    print(f"ready: gRPC 127.0.0.1:{port}", flush=True)
    await stopped.wait()
    await server.stop(1)


def serve_in_threads(threads: int) -> None:
    """The same with a thread for each call under way, of so many."""
    server = grpc.server(ThreadPoolExecutor(threads), options=OPTIONS)
    server.add_generic_rpc_handlers(_handlers(_answer_in_a_thread, _answer_once_in_a_thread))
    port = server.add_insecure_port("127.0.0.1:0")
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    server.start()
    print(f"ready: gRPC 127.0.0.1:{port}", flush=True)
    stopped.wait()
    server.stop(1).wait()


def main() -> None:
    """Serves as the command line says."""
    parser = argparse.ArgumentParser(description="A bare gRPC server that looks at nothing.")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--threads", type=int, default=0, help="Serves in threads, without an event loop.")
    arguments = parser.parse_args()
    if arguments.threads:
        serve_in_threads(arguments.threads)
    elif arguments.loop == "uvloop":
        uvloop.run(serve())
    else:
        asyncio.run(serve())


if __name__ == "__main__":
    main()
