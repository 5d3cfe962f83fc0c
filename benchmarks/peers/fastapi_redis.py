"""What many build first: profiles computed elsewhere and kept as JSON in Redis, and FastAPI that hands them out.

    python -m benchmarks.peers.fastapi_redis SOCKET     serves GET /v1/profiles/{user_id} on a free port until SIGTERM

It has it easier than ours: nothing is computed when a profile is read, and what it answers is as old as when it was
written.
"""

from __future__ import annotations

import signal
import socket
import sys

import uvicorn
from fastapi import FastAPI, HTTPException, Response
from redis import asyncio as aioredis


def build_app(path: str) -> FastAPI:
    """The application, over the Redis that listens at a socket's path."""
    app = FastAPI()
    store = aioredis.Redis(unix_socket_path=path)

    @app.get("/v1/profiles/{user_id}")
    async def get_profile(user_id: str) -> Response:
        found = await store.get(user_id)
        if found is None:
            raise HTTPException(404, f"user {user_id!r} was never seen")
        return Response(found, media_type="application/json")

    return app


def main() -> None:
    """Serves."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(f"ready: HTTP 127.0.0.1:{listening.getsockname()[1]}", flush=True)
        config = uvicorn.Config(build_app(sys.argv[1]), loop="uvloop", http="httptools", access_log=False, log_level=30)
        # uvicorn raises the signal that ended it once more; to end was all it asked for.
        signal.signal(signal.SIGTERM, lambda *_: None)
        uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
