"""HTTP's own part of a call: the body within its limit, the deadline, and the answers.

Where grpc-gateway's code for a status says less than HTTP could, HTTP's own is sent with the same status in the body:

    405   UNIMPLEMENTED       the path is served, not with this method; `Allow` says with which
    413   INVALID_ARGUMENT    the body is larger than a message may be
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from starlette.requests import Request
from starlette.responses import Response

from profile_service import errors
from profile_service.rpc import status

JSON = "application/json"

OVERSIZE_FACTOR = 2
"""A body up to so many times the limit is read to its end, and dropped, before it is refused: a caller who is still
sending when the connection closes sees a broken connection instead of the answer."""

_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


class Refusal(Exception):
    """A request that HTTP has a code of its own for."""

    def __init__(self, error: errors.ProfileServiceError, http_code: int, headers: Mapping[str, str]) -> None:
        super().__init__(error.message)
        self.error = error
        self.http_code = http_code
        self.headers = headers


def wrong_method(http_method: str, path: str, allowed: Iterable[str]) -> Refusal:
    """405: `path` is served, but with other methods."""
    names = ", ".join(allowed)
    error = errors.Unimplemented(f"{path} takes {names}, not {http_method}")
    return Refusal(error, 405, {"allow": names})


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The body of a request, which is JSON whatever its Content-Type says: `curl -d` calls everything a form.

    Raises:
        Refusal: it is too large.
        PermissionDenied: a page of another site sent it. A browser sends such a form without asking first, so that any
            page its user looks at could write here.
    """
    if request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise errors.PermissionDenied("pages of other sites may not write here: send it from a program, or from /docs")
    declared = request.headers.get("content-length", "")
    asks_first = request.headers.get("expect", "").lower() == "100-continue"
    if declared.isdecimal() and int(declared) > (most_bytes if asks_first else OVERSIZE_FACTOR * most_bytes):
        raise _too_large(most_bytes)
    chunks = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > OVERSIZE_FACTOR * most_bytes:
            break
        if size <= most_bytes:
            chunks.append(chunk)
    if size > most_bytes:
        raise _too_large(most_bytes)
    return b"".join(chunks)


def deadline_s(request: Request) -> float | None:
    """Seconds that the caller waits, from the header `Grpc-Timeout`, as in "500m" or "2S"; None without it."""
    # Header names come in lower case.
    text = next((value for name, value in request.scope["headers"] if name == b"grpc-timeout"), None)
    if text is None:
        return None
    found = _TIMEOUT.fullmatch(text.decode("latin-1"))
    if found is None:
        raise errors.InvalidArgument("Grpc-Timeout", "must be up to 8 digits and one of H, M, S, m, u, n, as in 500m")
    return int(found[1]) * _UNIT_S[found[2]]


def json_response(content: bytes, http_code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON."""
    return Response(content, http_code, headers, media_type=JSON)


class JsonAnswer(Response):
    """200 with JSON, for what is answered often: its two headers need no mapping to be made of them."""

    def __init__(self, content: bytes) -> None:
        self.status_code = 200
        self.body = content
        self.background = None
        self.raw_headers = [(b"content-length", b"%d" % len(content)), (b"content-type", JSON.encode())]


def error_response(error: BaseException) -> Response:
    """What callers see of an error: the google.rpc.Status as JSON, with its HTTP code."""
    if isinstance(error, Refusal):
        return json_response(orjson.dumps(status_tree(error.error)), error.http_code, error.headers)
    told = status.to_status(error)
    retry = _retry_after(told)
    return json_response(orjson.dumps(_tree(told)), status.http_code(told.code), retry)


def status_tree(error: BaseException) -> dict[str, Any]:
    """An error's google.rpc.Status as what orjson writes: {"code", "message", "details": [{"@type", …}]}."""
    return _tree(status.to_status(error))


def _tree(told: Message) -> dict[str, Any]:
    return json_format.MessageToDict(told, always_print_fields_with_no_presence=True)


def _retry_after(told: Status) -> dict[str, str]:
    """HTTP's own way to say when to try again, in whole seconds."""
    info = RetryInfo()
    for detail in told.details:
        if detail.Unpack(info):
            return {"retry-after": str(math.ceil(info.retry_delay.ToNanoseconds() / 1e9))}
    return {}


def _too_large(most_bytes: int) -> Refusal:
    # What is left of the body is not read: the connection cannot serve another request.
    error = errors.InvalidArgument("", f"the body must be at most {most_bytes} bytes")
    return Refusal(error, 413, {"connection": "close"})
