"""Calls to a running service, whose errors become errors of the command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from profile_service.commands.terminal import CommandError

if TYPE_CHECKING:
    import grpc

    from profile_client import ProfileClientError

CALL_TIMEOUT_S = 30.0


@contextmanager
def connect(address: str) -> Iterator[grpc.Channel]:
    """A channel to the service at `address`; a failed call inside raises `CommandError`."""
    import grpc

    with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            raise call_error(address, error) from error


def call_error(address: str, error: grpc.RpcError) -> CommandError:
    """What a failed call means to the caller of a command."""
    import grpc

    if not isinstance(error, grpc.Call):
        return CommandError(f"{address}: {error}")
    return _explain(address, error.code(), error.details() or "")


def client_error(address: str, error: ProfileClientError) -> CommandError:
    """The same for an error of the client."""
    from profile_client import ServiceError

    if not isinstance(error, ServiceError):
        return CommandError(f"{address}: {error}")
    return _explain(address, error.code, str(error))


def _explain(address: str, code: grpc.StatusCode, details: str) -> CommandError:
    import grpc

    if code is grpc.StatusCode.UNAVAILABLE:
        return CommandError(
            f"no answer from {address}: {details}. Is the service running (profile-service serve)? "
            "Name another with --address."
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return CommandError(f"{address} did not answer within {CALL_TIMEOUT_S:g} s")
    if code is grpc.StatusCode.ABORTED:
        return CommandError(f"another command that sends the same has taken over, and goes on: {details}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return CommandError(
            f"{address} does not offer this call: {details or 'another service or version listens there'}"
        )
    return CommandError(details or code.name)
