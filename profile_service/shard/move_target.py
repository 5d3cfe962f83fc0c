"""The way to the shard that partitions go to: `moves.Target` over gRPC."""

from __future__ import annotations

from grpc import aio

from profile_service.errors import Unavailable
from userprofile.internal.v1 import shard_pb2

METHOD = "/userprofile.internal.v1.ShardService/Receive"
RETRY_S = 0.1
TIMEOUT_S = 5.0
"""A piece takes some milliseconds."""


class RemoteTarget:
    """A shard at an address, host:port."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = aio.insecure_channel(
            address, options=[("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
        )
        self._call = self._channel.unary_unary(
            METHOD, shard_pb2.ReceiveRequest.SerializeToString, shard_pb2.ReceiveResponse.FromString
        )

    async def receive(self, move_id: str, piece: bytes) -> None:
        """As Target.receive."""
        try:
            await self._call(shard_pb2.ReceiveRequest(move_id=move_id, transfer=piece), timeout=TIMEOUT_S)
        except aio.AioRpcError as error:
            reason = error.details() or error.code().name
            raise Unavailable(f"the shard at {self._address} takes no more of the move: {reason}", RETRY_S) from None

    async def close(self) -> None:
        """As Target.close."""
        await self._channel.close()
