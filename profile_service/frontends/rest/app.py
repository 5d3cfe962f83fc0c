"""The HTTP application: the API's paths as the protos declare them, and what people and machines look at beside them.

/v1/…                     the API
/openapi.json  /docs      its description, for programs and for people
/healthz  /readyz         the process lives; it takes calls
/metrics                  Prometheus' text format
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc
import orjson
from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from profile_service.config import Limits
from profile_service.errors import InvalidArgument, ProfileServiceError, Unavailable
from profile_service.frontends.api import CallContext
from profile_service.frontends.metrics import CONTENT_TYPE, Metrics
from profile_service.frontends.rest import docs, events, json_in, json_out
from profile_service.frontends.rest.bindings import Binding, service_bindings
from profile_service.frontends.rest.http import (
    JsonAnswer,
    Refusal,
    deadline_s,
    error_response,
    json_response,
    read_body,
    wrong_method,
)
from profile_service.frontends.rest.openapi import build_document
from profile_service.frontends.rest.query import fill_from_query, refuse_query
from profile_service.frontends.rest.routing import Match, Router, WrongMethod, no_such_path
from profile_service.frontends.rest.watch import stream_response
from profile_service.rpc.status import grpc_code
from userprofile.v1.event_service_pb2 import IngestEventsResponse

LARGE_BODY_BYTES = 64 * 1024
"""A larger body is read in a thread: a batch of 10,000 events takes a good part of a second, and others do not wait."""

Result = TypeVar("Result")


class Api(Protocol):
    """What the edge needs of `frontends.api.Api`: encoded requests in, encoded responses out."""

    async def call(self, method: str, request: bytes, context: CallContext) -> bytes:
        """Answers a unary call, counts it, and logs what nobody foresaw."""
        ...

    def stream(self, method: str, request: bytes, context: CallContext) -> AsyncIterator[bytes]:
        """The same for a call with a stream of answers."""
        ...


def build_app(api: Api, metrics: Metrics, ready: Callable[[], bool], limits: Limits | None = None) -> ASGIApp:
    """The application. Starlette serves what lies beside the API; calls, which are many, do not go through it.

    Args:
        api: answers the calls.
        metrics: shown at /metrics; the edge counts there what it refuses itself.
        ready: whether calls are taken; false while starting and while draining.
        limits: what a caller may send; the defaults if None.
    """
    document = orjson.dumps(build_document(service_bindings()))

    async def describe(request: Request) -> Response:
        return json_response(document)

    async def is_alive(request: Request) -> Response:
        return PlainTextResponse("alive\n")

    async def is_ready(request: Request) -> Response:
        if ready():
            return PlainTextResponse("ready\n")
        return error_response(Unavailable("the service is starting or draining", retry_after_s=1.0))

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    async def go_to_docs(request: Request) -> Response:
        return RedirectResponse("/docs")

    app = Starlette(
        routes=[
            Route("/", go_to_docs),
            Route("/healthz", is_alive),
            Route("/readyz", is_ready),
            Route("/metrics", show_metrics),
            Route("/openapi.json", describe),
            *docs.routes(),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _unforeseen},
    )
    # A path with a slash more is another path, for which nothing is served.
    app.router.redirect_slashes = False
    calls = ServerErrorMiddleware(_Calls(api, metrics, limits or Limits()), handler=_unforeseen)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        is_call = scope["type"] == "http" and scope["path"].startswith("/v1/")
        await (calls if is_call else app)(scope, receive, send)

    return serve


@dataclass(frozen=True)
class _Call:
    """A request that was read: what the API is asked."""

    message: Message
    context: CallContext
    batch: events.ReadBatch | None = None


class _Calls:
    """The ASGI application of the API's own paths."""

    def __init__(self, api: Api, metrics: Metrics, limits: Limits) -> None:
        self._api = api
        self._metrics = metrics
        self._limits = limits
        self._router = Router(service_bindings())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await self._respond(request)
        except ClientDisconnect:
            return
        if request.method == "HEAD":
            response.body = b""
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        try:
            match = self._router.match(request.method, request.scope["raw_path"])
            if isinstance(match, WrongMethod):
                raise wrong_method(request.method, request.url.path, match.allowed)
        except (ProfileServiceError, Refusal) as error:
            return error_response(error)
        began_s = time.perf_counter()
        try:
            call = await self._read(request, match)
        except (ProfileServiceError, Refusal) as error:
            # The API never sees this call: it is counted here.
            code = grpc_code(error.error if isinstance(error, Refusal) else error)
            self._count(match.binding.method, code, began_s)
            return error_response(error)
        if call.batch is not None and not call.batch.positions and call.batch.unread:
            self._count(match.binding.method, grpc.StatusCode.OK, began_s)
            return _json_of(match.binding, call.batch.answer(IngestEventsResponse()).SerializeToString())
        return await self._answer(request, match.binding, call)

    async def _read(self, request: Request, match: Match) -> _Call:
        """The request as a message; raises what is wrong with it."""
        binding = match.binding
        context = CallContext("rest", deadline_s(request))
        query = request.scope["query_string"]
        message = binding.request_type()
        if not binding.has_body:
            fill_from_query(message, query, binding.path_fields)
        else:
            refuse_query(query, binding.descriptor.input_type)
            body = await read_body(request, self._limits.message_bytes)
            if binding.method == events.METHOD:
                batch = await _aside(body, lambda: events.read_batch(json_in.load(body), self._limits.events_per_batch))
                for rejected in batch.unread:
                    self._metrics.events_rejected(rejected.field)
                return _Call(batch.request, context, batch)
            await _aside(body, lambda: json_in.fill(message, json_in.load(body)))
        for field, value in match.values.items():
            given = getattr(message, field)
            if given not in ("", value):
                raise InvalidArgument(
                    field, f"is {json_in.shown(value)} in the path, {json_in.shown(given)} in the body"
                )
            setattr(message, field, value)
        return _Call(message, context)

    async def _answer(self, request: Request, binding: Binding, call: _Call) -> Response:
        encoded = call.message.SerializeToString()
        try:
            if binding.is_streaming:
                messages = self._api.stream(binding.method, encoded, call.context)
                return await stream_response(request, messages, binding.response_type)
            answer = await self._api.call(binding.method, encoded, call.context)
        except Exception as error:  # noqa: BLE001 - whatever it is, the table says what callers see of it
            return error_response(error)
        if call.batch is not None:
            answer = call.batch.answer(IngestEventsResponse.FromString(answer)).SerializeToString()
        return _json_of(binding, answer)

    def _count(self, method: str, code: grpc.StatusCode, began_s: float) -> None:
        self._metrics.call(method, "rest", code, time.perf_counter() - began_s)


def _json_of(binding: Binding, answer: bytes) -> Response:
    return JsonAnswer(json_out.encode(binding.response_type, answer))


async def _aside(body: bytes, read: Callable[[], Result]) -> Result:
    """What `read` returns; in a thread where the body is large."""
    return await asyncio.to_thread(read) if len(body) > LARGE_BODY_BYTES else read()


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself: a path that is not served, a wrong method on one of those beside the API."""
    assert isinstance(error, HTTPException)
    if error.status_code != 405:
        return error_response(no_such_path(request.scope["raw_path"]))
    return error_response(wrong_method(request.method, request.url.path, ("GET", "HEAD")))


async def _unforeseen(request: Request, error: Exception) -> Response:
    """What nobody foresaw; the server logs it with its traceback."""
    return error_response(error)
