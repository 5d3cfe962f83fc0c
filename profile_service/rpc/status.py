"""The one table from errors to what callers see: error class -> gRPC status code -> HTTP code.

Both protocols answer with the same google.rpc.Status: over gRPC as trailing metadata, over REST as JSON. Its details
are ErrorInfo (always), BadRequest where fields are at fault, RetryInfo where trying again helps.

HTTP codes are grpc-gateway's (runtime.HTTPStatusFromCode):

    OK 200                   INVALID_ARGUMENT 400   FAILED_PRECONDITION 400   OUT_OF_RANGE 400    UNAUTHENTICATED 401
    PERMISSION_DENIED 403    NOT_FOUND 404          ALREADY_EXISTS 409        ABORTED 409         CANCELLED 499
    RESOURCE_EXHAUSTED 429   UNKNOWN 500            INTERNAL 500              DATA_LOSS 500       UNIMPLEMENTED 501
    UNAVAILABLE 503          DEADLINE_EXCEEDED 504
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import aio
from grpc_status import rpc_status

from profile_service import errors

DOMAIN = "profile-service"
"""ErrorInfo.domain of every error."""

INTERNAL_MESSAGE = "internal error; the service's log says more"
"""All that callers learn of an error that nobody foresaw."""


@dataclass(frozen=True)
class Row:
    """One line of the table: `reason` is ErrorInfo's, for programs that need to tell more than the code does."""

    error: type[BaseException]
    code: grpc.StatusCode
    reason: str


TABLE = (
    Row(errors.InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
    Row(errors.NotFound, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    Row(errors.StorageFull, grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL"),
    Row(errors.ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    Row(errors.NotMine, grpc.StatusCode.UNAVAILABLE, "NOT_MINE"),
    Row(errors.Unavailable, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
    Row(errors.Superseded, grpc.StatusCode.ABORTED, "SUPERSEDED"),
    Row(errors.Replaced, grpc.StatusCode.ABORTED, "REPLACED"),
    Row(errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    Row(errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    Row(errors.Unimplemented, grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED"),
    Row(errors.DataLoss, grpc.StatusCode.DATA_LOSS, "DATA_LOSS"),
    Row(errors.SchemaError, grpc.StatusCode.FAILED_PRECONDITION, "SCHEMA_INVALID"),
    Row(errors.SchemaChangeRefused, grpc.StatusCode.FAILED_PRECONDITION, "SCHEMA_CHANGE_REFUSED"),
    Row(errors.StartupError, grpc.StatusCode.FAILED_PRECONDITION, "STARTUP_FAILED"),
    Row(asyncio.CancelledError, grpc.StatusCode.CANCELLED, "CANCELLED"),
    Row(TimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
)
"""The most specific class first: the first line whose class the error is an instance of decides."""

UNFORESEEN = Row(BaseException, grpc.StatusCode.INTERNAL, "INTERNAL")
"""For an error of no line. Its text is not for callers: whoever caught it logs it with its traceback."""

_HTTP_CODES = {
    grpc.StatusCode.OK: 200,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DATA_LOSS: 500,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}
_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

# A gRPC peer drops a call whose trailing metadata exceeds 8 KiB. The message travels twice, once percent-encoded (up to
# three times its size) and once in base64 with the violations, and what callers sent may be quoted in it.
_MESSAGE_BYTES = 1_000
_VIOLATION_BYTES = 400
_VIOLATIONS = 4


def row_of(error: BaseException) -> Row:
    """The table's line for an error."""
    for row in TABLE:
        if isinstance(error, row.error):
            return row
    return UNFORESEEN


def is_foreseen(error: BaseException) -> bool:
    """Whether the table knows the error; where not, callers see INTERNAL, and whoever caught it logs the traceback."""
    return row_of(error) is not UNFORESEEN


def grpc_code(error: BaseException) -> grpc.StatusCode:
    """The gRPC status code of an error."""
    return row_of(error).code


def http_code(code: grpc.StatusCode | int) -> int:
    """The HTTP code of a gRPC status code or its number; 500 for a number that is none."""
    found = _BY_NUMBER.get(code) if isinstance(code, int) else code
    return _HTTP_CODES[found] if found is not None else 500


def to_status(error: BaseException) -> Status:
    """What callers are told of an error, with details; never more of an unforeseen one than that it happened."""
    row = row_of(error)
    status = Status(code=row.code.value[0], message=_clip(_message(error, row), _MESSAGE_BYTES))
    _add(status, ErrorInfo(reason=row.reason, domain=DOMAIN, metadata=_metadata(error)))
    if isinstance(error, errors.InvalidArgument):
        bad_request = BadRequest()
        for violation in error.violations[:_VIOLATIONS]:
            bad_request.field_violations.add(
                field=_clip(violation.field, _VIOLATION_BYTES),
                description=_clip(violation.description, _VIOLATION_BYTES),
            )
        _add(status, bad_request)
    if isinstance(error, errors.ResourceExhausted | errors.Unavailable) and error.retry_after_s > 0:
        _add(status, RetryInfo(retry_delay=_duration(error.retry_after_s)))
    return status


def to_grpc(error: BaseException) -> grpc.Status:
    """The same for `context.abort_with_status`; `grpc_status.rpc_status.from_call` reads it on the other side."""
    return rpc_status.to_status(to_status(error))


def trailing_metadata(status: Status) -> tuple[tuple[str, str | bytes], ...]:
    """What carries a status over gRPC: `context.abort(code, status.message, trailing_metadata(status))`."""
    return rpc_status.to_status(status).trailing_metadata


async def abort(context: aio.ServicerContext[bytes, bytes], error: BaseException) -> NoReturn:
    """Ends a call with what its caller is told of an error."""
    status = to_status(error)
    await context.abort(_BY_NUMBER[status.code], status.message, trailing_metadata(status))


def _message(error: BaseException, row: Row) -> str:
    if row is UNFORESEEN:
        return INTERNAL_MESSAGE
    if isinstance(error, errors.ProfileServiceError):
        return error.message
    return "the call was cancelled" if row.code is grpc.StatusCode.CANCELLED else "the deadline passed"


def _metadata(error: BaseException) -> dict[str, str]:
    """What a program may want to know besides the reason."""
    return {"epoch": str(error.epoch)} if isinstance(error, errors.NotMine) else {}


def _add(status: Status, detail: Message) -> None:
    packed = Any()
    packed.Pack(detail)
    status.details.append(packed)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(math.ceil(seconds * 1e3) * 1_000_000)
    return duration


def _clip(text: str, most_bytes: int) -> str:
    """Text of at most so many bytes of UTF-8; a cut shows, and a lone surrogate becomes a question mark."""
    encoded = text.encode("utf-8", errors="replace")
    if len(encoded) <= most_bytes:
        return encoded.decode()
    return encoded[: most_bytes - 3].decode(errors="ignore") + "…"
