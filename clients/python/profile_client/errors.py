"""What a call can end with.

ProfileClientError
├── InvalidArgumentError     the request is wrong: `violations` names the fields
├── NotFoundError            no such user
├── ResourceExhaustedError   the service is full: `retry_after_s`
├── UnavailableError         no owner answers just now: `retry_after_s`
├── DeadlineExceededError    the timeout passed
├── UnimplementedError       this version of the service does not offer the call
├── BufferFullError          the producer's buffer had no room within the time given
├── RejectedEventsError      events were refused: `rejected` says which and why
└── ServiceError             anything else, with the gRPC status
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status


class ProfileClientError(Exception):
    """Base of every error of this package."""


class ServiceError(ProfileClientError):
    """The service, or the way to it, refused the call."""

    def __init__(self, message: str, code: grpc.StatusCode) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s: float | None = None
        """How long the service asks to wait before the next try; None where it says nothing."""
        self.violations: tuple[tuple[str, str], ...] = ()
        """The fields at fault, as (path, what is wrong)."""


class InvalidArgumentError(ServiceError):
    """The request is wrong."""


class NotFoundError(ServiceError):
    """There is no such user."""


class ResourceExhaustedError(ServiceError):
    """The service is full."""


class UnavailableError(ServiceError):
    """No owner answers just now."""


class DeadlineExceededError(ServiceError):
    """The timeout passed before the answer came."""


class UnimplementedError(ServiceError):
    """This version of the service does not offer the call."""


class BufferFullError(ProfileClientError):
    """The producer's buffer had no room within the time given."""


@dataclass(frozen=True)
class Rejected:
    """An event that the service refused."""

    sequence: int
    """The producer's batch; 0 for `ingest_events`."""
    index: int
    """Position in that batch."""
    field: str
    """Path of the field at fault."""
    reason: str


class RejectedEventsError(ProfileClientError):
    """Events were refused; everything else that was sent with them was counted."""

    def __init__(self, rejected: Sequence[Rejected], count: int) -> None:
        shown = "; ".join(f"{r.field}: {r.reason}" for r in rejected[:3])
        super().__init__(f"{count} events refused: {shown}{'; …' if count > 3 else ''}")
        self.rejected = tuple(rejected)
        """The refused events, the first of them where there were very many."""
        self.count = count
        """How many were refused in all."""


_CLASSES: dict[grpc.StatusCode, type[ServiceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
}


def from_rpc_error(error: grpc.RpcError) -> ServiceError:
    """The error of this package for one of gRPC, with the service's details."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return ServiceError(str(error), grpc.StatusCode.UNKNOWN)
    code = error.code()
    answer = _CLASSES.get(code, ServiceError)(error.details() or code.name, code)
    try:
        # The synchronous function serves both kinds of errors.
        status = rpc_status.from_call(cast("grpc.Call", error))
    except ValueError:
        # Details that contradict the status are no details.
        status = None
    for packed in status.details if status is not None else ():
        retry, request = error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
        if packed.Unpack(retry):
            answer.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
        elif packed.Unpack(request):
            answer.violations = tuple((v.field, v.description) for v in request.field_violations)
    return answer
