"""The REST edge over an API that records what it is asked and answers what the test says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from google.protobuf.message import Message

from profile_service.config import Limits
from profile_service.frontends.api import CallContext
from profile_service.frontends.metrics import Metrics
from profile_service.frontends.rest.app import build_app
from profile_service.frontends.rest.bindings import Binding, service_bindings

BINDINGS = {binding.method.rpartition("/")[2]: binding for binding in service_bindings()}
"""A binding by its method's name."""


@dataclass
class RecordingApi:
    """Answers every call with `answer`, or raises it; a stream answers with each of a list in turn."""

    answer: Any = None
    calls: list[tuple[str, Message, CallContext]] = field(default_factory=list)
    closed_streams: int = 0

    async def call(self, method: str, request: bytes, context: CallContext) -> bytes:
        self._record(method, request, context)
        answer = self.answer(self.request) if isinstance(self.answer, Callable) else self.answer  # type: ignore[arg-type]
        if isinstance(answer, BaseException):
            raise answer
        return (answer or binding_of(method).response_type()).SerializeToString()

    async def stream(self, method: str, request: bytes, context: CallContext) -> AsyncIterator[bytes]:
        self._record(method, request, context)
        try:
            for answer in self.answer:
                if isinstance(answer, BaseException):
                    raise answer
                yield answer.SerializeToString()
        finally:
            self.closed_streams += 1

    @property
    def request(self) -> Any:
        """The only request there was."""
        ((_, request, _),) = self.calls
        return request

    @property
    def method(self) -> str:
        """The only method that was called."""
        ((method, _, _),) = self.calls
        return method

    def _record(self, method: str, request: bytes, context: CallContext) -> None:
        self.calls.append((method, binding_of(method).request_type.FromString(request), context))


@dataclass
class Edge:
    """A client of the edge, and what is behind it."""

    http: httpx.AsyncClient
    api: RecordingApi
    metrics: Metrics
    ready: bool = True

    async def get(self, path: str, **more: Any) -> httpx.Response:
        return await self.http.get(path, **more)

    async def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return await self.http.post(path, **({"json": body} if body is not None else {}), **more)


@asynccontextmanager
async def rest_edge(answer: Any = None, limits: Limits | None = None) -> AsyncIterator[Edge]:
    api = RecordingApi(answer)
    metrics = Metrics()
    edge: Edge
    app = build_app(api, metrics, lambda: edge.ready, limits)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as http:
        edge = Edge(http, api, metrics)
        yield edge


def binding_of(method: str) -> Binding:
    return BINDINGS[method.rpartition("/")[2]]


def detail(response: httpx.Response, name: str) -> dict[str, Any]:
    """A detail of the google.rpc.Status that was answered."""
    suffix = f"/google.rpc.{name}"
    (found,) = (each for each in response.json()["details"] if each["@type"].endswith(suffix))
    return found  # type: ignore[no-any-return]


def violation(response: httpx.Response) -> tuple[str, str]:
    """(field, description) of the only field at fault."""
    (found,) = detail(response, "BadRequest")["fieldViolations"]
    return found["field"], found["description"]
