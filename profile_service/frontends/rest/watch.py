"""A stream of messages over HTTP: Server-Sent Events where the caller asks for them, lines of JSON elsewhere.

    Accept: text/event-stream     data: {"userId": …}             event: error
                                                                  data: {"code": …}
    else                          {"result": {"userId": …}}       {"error": {"code": …}}

The lines are grpc-gateway's. The first message is awaited before the answer begins, so that an error until then has its
HTTP code; a later one is the stream's last message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import orjson
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from profile_service.frontends.rest import json_out
from profile_service.frontends.rest.http import status_tree

KEEP_ALIVE_S = 15.0
"""A silent stream of Server-Sent Events says so often that it lives: proxies close what says nothing for a minute."""

Frame = Callable[[str, bytes], bytes]
"""("result" or "error", JSON) as bytes of the stream."""


async def stream_response(request: Request, messages: AsyncIterator[bytes], kind: type[Message]) -> Response:
    """The answer to a streaming call; raises what the stream raises before its first message."""
    events = "text/event-stream" in request.headers.get("accept", "")
    frame = _event if events else _line
    first = await anext(messages, None)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    body = _frames(first, messages, kind, frame, keep_alive=b": alive\n\n" if events else None)
    return StreamingResponse(
        body, headers=headers, media_type="text/event-stream" if events else "application/x-ndjson"
    )


async def _frames(
    first: bytes | None, messages: AsyncIterator[bytes], kind: type[Message], frame: Frame, keep_alive: bytes | None
) -> AsyncIterator[bytes]:
    try:
        if first is None:
            return
        yield frame("result", json_out.encode(kind, first))
        while True:
            following = asyncio.ensure_future(anext(messages, None))
            try:
                while keep_alive and not (await asyncio.wait((following,), timeout=KEEP_ALIVE_S))[0]:
                    yield keep_alive
                message = await following
            except Exception as error:  # noqa: BLE001 - the answer has begun: its last message says why it ends
                yield frame("error", orjson.dumps(status_tree(error)))
                return
            finally:
                if not following.done():
                    following.cancel()
                    await asyncio.wait((following,))
            if message is None:
                return
            yield frame("result", json_out.encode(kind, message))
    finally:
        close = getattr(messages, "aclose", None)
        if close is not None:
            await close()


def _line(what: str, text: bytes) -> bytes:
    return b'{"%s":%s}\n' % (what.encode(), text)


def _event(what: str, text: bytes) -> bytes:
    name = b"" if what == "result" else b"event: %s\n" % what.encode()
    return b"%sdata: %s\n\n" % (name, text)
