"""What a call can end with.

ProfileClientError
├── ServiceError                  the service, or the way to it, refused: `code`, `reason`, `retry_after_s`
│   ├── InvalidArgumentError      the request is wrong: `violations` names the fields
│   ├── NotFoundError             no such user
│   ├── ResourceExhaustedError    the service is full, or the message too large
│   ├── UnavailableError          no owner answers just now, or nobody listens at the address
│   ├── DeadlineExceededError     the timeout passed; also a TimeoutError
│   ├── AbortedError              another producer took over the producer_id
│   ├── UnauthenticatedError      who calls is not known
│   ├── PermissionDeniedError     who calls may not
│   ├── UnimplementedError        this version of the service does not offer the call
│   └── DataLossError             what was stored is damaged
├── RejectedEventsError           events were refused: `rejected` says which and why
├── BufferFullError               the producer's buffer had no room within the time given
└── ProducerClosedError           the producer was closed, and takes or delivers nothing more
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from userprofile.v1 import event_pb2


class ProfileClientError(Exception):
    """Base of every error of this package."""


class ServiceError(ProfileClientError):
    """The service, or the way to it, refused the call."""

    def __init__(self, message: str, code: grpc.StatusCode) -> None:
        super().__init__(message)
        self.code = code
        self.reason = ""
        """The service's own word for it, such as QUEUE_FULL; empty where the error is not the service's."""
        self.retry_after_s: float | None = None
        """How long the service asks to wait before the next try; None where it says nothing."""
        self.violations: tuple[tuple[str, str], ...] = ()
        """The fields at fault, as (path, what is wrong)."""


class InvalidArgumentError(ServiceError):
    """The request is wrong."""


class NotFoundError(ServiceError):
    """There is no such user."""


class ResourceExhaustedError(ServiceError):
    """The service is full, or the message is larger than it takes."""


class UnavailableError(ServiceError):
    """No owner answers just now, or nobody listens at the address."""


class DeadlineExceededError(ServiceError, TimeoutError):
    """The timeout passed before the answer came."""

    def __init__(self, message: str, code: grpc.StatusCode = grpc.StatusCode.DEADLINE_EXCEEDED) -> None:
        super().__init__(message, code)

    def __str__(self) -> str:
        return str(self.args[0])


class AbortedError(ServiceError):
    """Another producer took over the producer_id."""


class UnauthenticatedError(ServiceError):
    """Who calls is not known."""


class PermissionDeniedError(ServiceError):
    """Who calls may not."""


class UnimplementedError(ServiceError):
    """This version of the service does not offer the call."""


class DataLossError(ServiceError):
    """What was stored is damaged."""


class BufferFullError(ProfileClientError):
    """The producer's buffer had no room within the time given."""


class ProducerClosedError(ProfileClientError):
    """The producer was closed, and takes or delivers nothing more."""


@dataclasses.dataclass(frozen=True)
class Rejected:
    """An event that the service refused."""

    sequence: int
    """The producer's batch; 0 for `ingest_events`."""
    index: int
    """Position in that batch, from 0."""
    field: str
    """Path of the field at fault within the event."""
    reason: str
    """What was wrong, and what would be right."""
    position: int = -1
    """Position among all events given to the call, or ever given to the producer, from 0."""
    serialized: bytes = dataclasses.field(default=b"", repr=False)
    """The event as it was sent."""

    @property
    def event(self) -> event_pb2.Event:
        """The event as it was sent.

        Raises:
            google.protobuf.message.DecodeError: it was sent by `send_serialized` and is not an Event.
        """
        return event_pb2.Event.FromString(self.serialized)


class RejectedEventsError(ProfileClientError):
    """Events were refused; everything else that was sent with them was counted."""

    def __init__(self, rejected: Sequence[Rejected], count: int, accepted_count: int | None = None) -> None:
        shown = "; ".join(f"event {r.position}: {r.field}: {r.reason}" for r in rejected[:3])
        super().__init__(f"{count} events refused: {shown}{'; …' if count > 3 else ''}")
        self.rejected = tuple(rejected)
        """The refused events, the first of them where there were very many."""
        self.count = count
        """How many were refused in all."""
        self.accepted_count = accepted_count
        """How many of the call's events were counted; None from a producer, which has counters of its own."""


_CLASSES: dict[grpc.StatusCode, type[ServiceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.DATA_LOSS: DataLossError,
}


def from_rpc_error(error: grpc.RpcError) -> ServiceError:
    """The error of this package for one of gRPC, with the service's details."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return ServiceError(str(error), grpc.StatusCode.UNKNOWN)
    code = error.code()
    text = error.details() or "the service gave no reason"
    answer_class = _CLASSES.get(code)
    # A class of its own names the status; the rest needs it in the text.
    answer = answer_class(text, code) if answer_class else ServiceError(f"{code.name}: {text}", code)
    try:
        # The synchronous function serves both kinds of errors.
        status = rpc_status.from_call(cast("grpc.Call", error))
    except ValueError:
        # Details that contradict the status are no details.
        status = None
    for packed in status.details if status is not None else ():
        retry, request, info = (
            error_details_pb2.RetryInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.ErrorInfo(),
        )
        if packed.Unpack(retry):
            answer.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
        elif packed.Unpack(request):
            answer.violations = tuple((v.field, v.description) for v in request.field_violations)
        elif packed.Unpack(info):
            answer.reason = info.reason
    return answer
