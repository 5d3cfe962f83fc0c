"""Calls as a stranger makes them: raw bytes over gRPC, exact paths over HTTP, a stream message by message."""

from __future__ import annotations

import http.client
import itertools
import json
import queue
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from userprofile.v1 import event_service_pb2, profile_pb2

TIMEOUT_S = 30.0

_serial = itertools.count()


def new_user(of: str = "user") -> str:
    """An id that no other test has, in this run or another."""
    return f"{of}-{secrets.token_hex(4)}-{next(_serial)}"


def delimited(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field by hand, whatever its content.

    >>> delimited(1, b"ab").hex()
    '0a026162'
    """
    size, encoded = len(content), bytearray([number << 3 | 2])
    while size > 0x7F:
        encoded.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes(encoded) + bytes([size]) + content


@dataclass(frozen=True)
class Failure:
    """How a call failed, in either protocol."""

    code: str
    """Name of the gRPC status code."""
    message: str
    violations: dict[str, str]
    """Description by field."""
    domain: str
    http_code: int = 0
    retry_after_s: float | None = None
    """When the service asks to be tried again; None where it does not say, or over HTTP."""


class GrpcCaller:
    """Calls by method name with bytes that may be no message at all."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(
            address, [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        )

    def __enter__(self) -> GrpcCaller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.channel.close()

    def call(self, method: str, request: bytes) -> bytes | Failure:
        """The encoded response of `userprofile.v1.<method>`, or how it failed."""
        try:
            response: bytes = self.method(method)(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return failure_of(error)
        return response

    def method(self, method: str) -> grpc.UnaryUnaryMultiCallable[bytes, bytes]:
        """`userprofile.v1.<method>`, of bytes for bytes."""
        return self.channel.unary_unary(
            f"/userprofile.v1.{method}", request_serializer=_as_is, response_deserializer=_as_is
        )

    def ingest(self, request: bytes) -> event_service_pb2.IngestEventsResponse | Failure:
        """IngestEvents."""
        answer = self.call("EventService/IngestEvents", request)
        return answer if isinstance(answer, Failure) else event_service_pb2.IngestEventsResponse.FromString(answer)

    def profile(self, user_id: str) -> profile_pb2.Profile:
        """GetProfile of a user who is known to be there."""
        answer = self.call("ProfileService/GetProfile", delimited(1, user_id.encode()))
        assert isinstance(answer, bytes), answer
        return profile_pb2.Profile.FromString(answer)

    def stream(self) -> ProducerStream:
        """A StreamEvents call."""
        return ProducerStream(self.channel)


class ProducerStream:
    """One StreamEvents call: what is sent and what comes back, a message at a time."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = channel.stream_stream(
            "/userprofile.v1.EventService/StreamEvents",
            request_serializer=_as_is,
            response_deserializer=event_service_pb2.StreamEventsResponse.FromString,
        )(iter(self._requests.get, None), timeout=2 * TIMEOUT_S)
        self._responses: Iterator[event_service_pb2.StreamEventsResponse] = iter(self._call)

    def begin(self, producer_id: str) -> int:
        """Names the producer; returns up to which sequence the service says to hold everything."""
        self.send(event_service_pb2.StreamEventsRequest(producer_id=producer_id))
        return self.receive().sequence

    def send(self, request: event_service_pb2.StreamEventsRequest | bytes) -> None:
        """Sends a message."""
        self._requests.put(request if isinstance(request, bytes) else request.SerializeToString())

    def receive(self) -> event_service_pb2.StreamEventsResponse:
        """The next response; raises grpc.RpcError where the stream failed."""
        return next(self._responses)

    def receive_until(self, sequence: int) -> list[event_service_pb2.StreamEventsResponse]:
        """The responses up to the one that acknowledges `sequence`."""
        responses = [self.receive()]
        while responses[-1].sequence < sequence:
            responses.append(self.receive())
        return responses

    def end(self) -> list[event_service_pb2.StreamEventsResponse]:
        """Ends the stream and returns the responses that were left."""
        self._requests.put(None)
        return list(self._responses)

    def failure(self) -> Failure:
        """How the stream failed, after what it still answered; fails where it did not."""
        try:
            answered = list(self._responses)
        except grpc.RpcError as error:
            return failure_of(error)
        finally:
            self._requests.put(None)
        raise AssertionError(f"the stream ended well, with {answered}")

    def cancel(self) -> None:
        """Breaks the stream off."""
        self._call.cancel()
        self._requests.put(None)


@dataclass(frozen=True)
class HttpAnswer:
    """An HTTP response whose body is JSON."""

    code: int
    body: Any

    @property
    def failure(self) -> Failure:
        """The google.rpc.Status of the body."""
        details = self.body["details"]
        violations = {
            violation["field"]: violation["description"]
            for detail in details
            if detail["@type"].endswith("google.rpc.BadRequest")
            for violation in detail["fieldViolations"]
        }
        domains = [d["domain"] for d in details if d["@type"].endswith("google.rpc.ErrorInfo")]
        code = next(code.name for code in grpc.StatusCode if code.value[0] == self.body["code"])
        return Failure(code, self.body["message"], violations, domains[0] if domains else "", self.code)


class HttpCaller:
    """Requests with the path exactly as given: nothing is normalised on the way."""

    def __init__(self, address: str) -> None:
        self._address = address

    def request(self, method: str, path: str, body: bytes | None = None) -> HttpAnswer:
        """One request; a body is said to be JSON."""
        connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_S)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body is not None else {})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        is_json = "json" in response.headers.get("Content-Type", "")
        return HttpAnswer(response.status, json.loads(text) if is_json else text)

    def get(self, path: str) -> HttpAnswer:
        """GET."""
        return self.request("GET", path)

    def post(self, path: str, message: object) -> HttpAnswer:
        """POST of a message in JSON."""
        return self.request("POST", path, json.dumps(message).encode())


def failure_of(error: grpc.RpcError) -> Failure:
    """What a failed call says of itself."""
    assert isinstance(error, grpc.Call), error
    status = rpc_status.from_call(error)
    violations: dict[str, str] = {}
    domain, retry_after_s = "", None
    for detail in status.details if status is not None else []:
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad_request = error_details_pb2.BadRequest()
            detail.Unpack(bad_request)
            violations |= {violation.field: violation.description for violation in bad_request.field_violations}
        elif detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            domain = info.domain
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return Failure(error.code().name, error.details() or "", violations, domain, retry_after_s=retry_after_s)


def _as_is(message: bytes) -> bytes:
    return message
