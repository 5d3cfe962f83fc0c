"""Every error has one gRPC code, one HTTP code and the details that help its caller."""

from __future__ import annotations

import asyncio
import inspect
from typing import cast

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from profile_service import errors
from profile_service.rpc import status as table

CASES = [
    (errors.InvalidArgument("user_id", "must not be empty"), grpc.StatusCode.INVALID_ARGUMENT, 400, "INVALID_ARGUMENT"),
    (errors.NotFound("no such user"), grpc.StatusCode.NOT_FOUND, 404, "NOT_FOUND"),
    (errors.StorageFull("disk full", 1.0), grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "STORAGE_FULL"),
    (errors.ResourceExhausted("queue full", 0.25), grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "QUEUE_FULL"),
    (errors.Unavailable("shard 2 recovers", 1.0), grpc.StatusCode.UNAVAILABLE, 503, "UNAVAILABLE"),
    (errors.NotMine("partition 7 moved", 12), grpc.StatusCode.UNAVAILABLE, 503, "NOT_MINE"),
    (errors.Superseded("a newer stream"), grpc.StatusCode.ABORTED, 409, "SUPERSEDED"),
    (errors.PermissionDenied("not here"), grpc.StatusCode.PERMISSION_DENIED, 403, "PERMISSION_DENIED"),
    (errors.DeadlineExceeded("too late"), grpc.StatusCode.DEADLINE_EXCEEDED, 504, "DEADLINE_EXCEEDED"),
    (errors.Unimplemented("not yet"), grpc.StatusCode.UNIMPLEMENTED, 501, "UNIMPLEMENTED"),
    (errors.DataLoss("record 5 is damaged"), grpc.StatusCode.DATA_LOSS, 500, "DATA_LOSS"),
    (errors.SchemaError("s.yaml", ()), grpc.StatusCode.FAILED_PRECONDITION, 400, "SCHEMA_INVALID"),
    (errors.StartupError("port in use"), grpc.StatusCode.FAILED_PRECONDITION, 400, "STARTUP_FAILED"),
    (asyncio.CancelledError(), grpc.StatusCode.CANCELLED, 499, "CANCELLED"),
    (TimeoutError(), grpc.StatusCode.DEADLINE_EXCEEDED, 504, "DEADLINE_EXCEEDED"),
    (KeyError("/secret/path"), grpc.StatusCode.INTERNAL, 500, "INTERNAL"),
]


@pytest.mark.parametrize(("error", "code", "http", "reason"), CASES, ids=[type(case[0]).__name__ for case in CASES])
def test_each_error_has_its_codes_and_its_reason(
    error: BaseException, code: grpc.StatusCode, http: int, reason: str
) -> None:
    status = table.to_status(error)
    assert status.code == code.value[0]
    assert table.grpc_code(error) is code
    assert table.http_code(code) == http == table.http_code(status.code)
    info = detail(status, ErrorInfo())
    assert (info.reason, info.domain) == (reason, "profile-service")


def test_every_class_of_the_error_tree_is_in_the_table() -> None:
    classes = {
        value
        for value in vars(errors).values()
        if inspect.isclass(value)
        and issubclass(value, errors.ProfileServiceError)
        and not value.__name__.startswith("_")
    }
    assert {row.error for row in table.TABLE} >= classes - {errors.ProfileServiceError}


def test_no_line_of_the_table_hides_a_more_specific_one_below_it() -> None:
    for position, row in enumerate(table.TABLE):
        assert not any(issubclass(below.error, row.error) for below in table.TABLE[position + 1 :]), row


def test_a_subclass_of_a_known_error_gets_its_parents_line() -> None:
    class Moved(errors.NotMine):
        pass

    assert table.to_status(Moved("moved", 3)).code == grpc.StatusCode.UNAVAILABLE.value[0]


def test_every_grpc_code_has_an_http_code() -> None:
    for code in grpc.StatusCode:
        assert 200 <= table.http_code(code) <= 599
        assert table.http_code(code) == table.http_code(code.value[0])
    assert table.http_code(77) == 500


def test_an_unforeseen_error_says_nothing_of_the_inside() -> None:
    status = table.to_status(RuntimeError("password is 1234"))
    assert b"1234" not in status.SerializeToString()
    assert not table.is_foreseen(RuntimeError())
    assert table.is_foreseen(errors.NotFound(""))


def test_a_wrong_field_is_named_in_bad_request() -> None:
    status = table.to_status(errors.InvalidArgument("events[3].user_id", "must not be empty"))
    (violation,) = detail(status, BadRequest()).field_violations
    assert (violation.field, violation.description) == ("events[3].user_id", "must not be empty")
    assert status.message == "events[3].user_id: must not be empty"


def test_retry_info_says_when_to_try_again() -> None:
    delay = detail(table.to_status(errors.ResourceExhausted("full", 1.25)), RetryInfo()).retry_delay
    assert (delay.seconds, delay.nanos) == (1, 250_000_000)
    assert len(table.to_status(errors.ResourceExhausted("too large", 0.0)).details) == 1


def test_a_stale_route_is_told_the_epoch() -> None:
    assert detail(table.to_status(errors.NotMine("moved", 12)), ErrorInfo()).metadata["epoch"] == "12"


@pytest.mark.parametrize(
    "text", ["x" * 100_000, "é" * 50_000, "broken \udcff half", "line\nbreak \x00 \U0001f600" * 9_000]
)
def test_what_a_caller_sent_never_makes_the_status_too_large_for_a_header(text: str) -> None:
    status = table.to_status(errors.InvalidArgument(text, text))
    assert len(status.SerializeToString()) * 4 / 3 + 3 * len(status.message.encode()) < 8_000


async def test_a_client_reads_the_status_with_rpc_status_from_call() -> None:
    async def refuse(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        error = errors.InvalidArgument("user_id", "must not be empty, is “”")
        if request == b"abort":
            status = table.to_status(error)
            await context.abort(table.grpc_code(error), status.message, table.trailing_metadata(status))
        await context.abort_with_status(table.to_grpc(error))
        return b""

    server = grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(refuse)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", {"Refuse": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for request in (b"abort", b"status"):
                call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Service/Refuse")
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await call(request, timeout=10)
                status = rpc_status.from_call(cast(grpc.Call, raised.value))
                assert detail(status, BadRequest()).field_violations[0].field == "user_id"
    finally:
        await server.stop(None)


def detail(status: Status, empty: BadRequest | ErrorInfo | RetryInfo):  # type: ignore[no-untyped-def]
    """The status' detail of the type of `empty`."""
    (packed,) = (packed for packed in status.details if packed.Is(empty.DESCRIPTOR))
    packed.Unpack(empty)
    return empty
