"""The stream from a shard's owner to its standby, both ends: `replication.Standby` over gRPC, and who serves it.

A message holds a group's records, and the next one goes when it is answered. The records' bytes are copied once, into
the message; they are read as views into it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from profile_service.errors import InvalidArgument, ProfileServiceError, Replaced, Unavailable
from profile_service.rpc.status import abort
from profile_service.shard.following import Taken
from profile_service.shard.replication import Shipped
from profile_service.wire.framing import length_prefix, read_fields
from userprofile.internal.v1 import shard_pb2

METHOD = "/userprofile.internal.v1.ShardService/Replicate"
RETRY_S = 0.5

_REQUEST = shard_pb2.ReplicateRequest
_RECORD = shard_pb2.ReplicateRequest.Record

Take = Callable[[str, int, Sequence[Taken]], Awaitable[None]]
"""As Following.take."""


class RemoteStandby:
    """A standby at an address, host:port."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = aio.insecure_channel(
            address, options=[("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
        )
        self._open = self._channel.stream_stream(
            METHOD, request_serializer=_as_it_is, response_deserializer=shard_pb2.ReplicateResponse.FromString
        )
        self._call: aio.StreamStreamCall[bytes, shard_pb2.ReplicateResponse] | None = None

    async def take(self, replication: str, number: int, records: Sequence[Shipped]) -> None:
        """As Standby.take."""
        if self._call is None:
            self._call = self._open()
        call = self._call
        try:
            await call.write(encode(replication, number, records))
            answer = await call.read()
        except (aio.AioRpcError, asyncio.InvalidStateError):
            answer = aio.EOF
        if not isinstance(answer, shard_pb2.ReplicateResponse):
            await self._raise_end(call)
        elif answer.number != number:
            raise Unavailable(f"the standby at {self._address} answers message {answer.number}, not {number}", RETRY_S)

    async def _raise_end(self, call: aio.StreamStreamCall[bytes, shard_pb2.ReplicateResponse]) -> None:
        """Raises what the stream has ended with."""
        code, details = await call.code(), await call.details()
        reason = details or code.name
        if code is grpc.StatusCode.ABORTED:
            raise Replaced(reason)
        raise Unavailable(f"the standby at {self._address} takes no more: {reason}", RETRY_S)

    async def close(self) -> None:
        """As Standby.close."""
        await self._channel.close()


async def serve(
    requests: AsyncIterator[bytes], context: aio.ServicerContext[Any, Any], take: Take
) -> AsyncIterator[bytes]:
    """The other end of the stream."""
    await context.send_initial_metadata(())
    async for request in requests:
        try:
            replication, number, records = decode(request)
            await take(replication, number, records)
        except DecodeError as error:
            await abort(context, InvalidArgument("", f"a request cannot be read: {error}"))
        except ProfileServiceError as error:
            await abort(context, error)
        yield shard_pb2.ReplicateResponse(number=number).SerializeToString()


def _as_it_is(message: bytes) -> bytes:
    return message


def encode(replication: str, number: int, records: Sequence[Shipped]) -> bytes:
    """An encoded ReplicateRequest; the one copy of the records that is made."""
    pieces: list[bytes | memoryview] = [_REQUEST(replication=replication, number=number).SerializeToString()]
    for kind, payload in records:
        size_bytes = sum(map(len, payload))
        head = _RECORD(type=kind).SerializeToString() + length_prefix(_RECORD.PAYLOAD_FIELD_NUMBER, size_bytes)
        pieces += (length_prefix(_REQUEST.RECORDS_FIELD_NUMBER, len(head) + size_bytes), head, *payload)
    return b"".join(pieces)


def decode(request: bytes) -> tuple[str, int, list[Taken]]:
    """(replication, number, records) of an encoded ReplicateRequest, the payloads as views. Raises DecodeError."""
    replication, number, records = "", 0, []
    for field, value in read_fields(memoryview(request)):
        if isinstance(value, int):
            if field == _REQUEST.NUMBER_FIELD_NUMBER:
                number = value
        elif field == _REQUEST.REPLICATION_FIELD_NUMBER:
            replication = bytes(value).decode(errors="replace")
        elif field == _REQUEST.RECORDS_FIELD_NUMBER:
            records.append(_decode_record(value))
    return replication, number, records


def _decode_record(encoded: memoryview) -> Taken:
    kind, payload = 0, memoryview(b"")
    for field, value in read_fields(encoded):
        if isinstance(value, int):
            if field == _RECORD.TYPE_FIELD_NUMBER:
                kind = value
        elif field == _RECORD.PAYLOAD_FIELD_NUMBER:
            payload = value
    return kind, payload
