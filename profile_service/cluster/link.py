"""A frontend's connection to one shard: the stream of events, the stream of questions, and a channel for a few plain
calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from grpc import aio

from profile_service.cluster.apply_stream import ApplyStream
from profile_service.cluster.read_stream import ReadStream
from profile_service.cluster.topology import ShardLocation
from profile_service.config import MIB, Capacity
from profile_service.rpc.frames import FrameStream, StreamAddress, connect
from userprofile.internal.v1 import shard_pb2

SERVICE = "/userprofile.internal.v1.ShardService"
READ_RESPONSE_BYTES = 256 * MIB
"""Largest answer of a shard: a thousand large profiles."""

CONNECT_S = 1.0
"""How long a connection may take to be made."""

KEEPALIVE_S = 5.0
"""A peer that does not answer a ping for so long is taken for lost."""


class ShardLink:
    """Everything that goes from here to one shard.

    Args:
        lost: awaited when a stream was lost or refused, before it is opened again; returns whether the topology is
            another one now.
        epoch: gives the epoch of the current topology.
    """

    def __init__(
        self,
        location: ShardLocation,
        capacity: Capacity,
        lost: Callable[[], Awaitable[bool]],
        epoch: Callable[[], int],
    ) -> None:
        self.location = location
        self._channel = self._open_channel()
        shard_id = location.shard_id
        self.applies = ApplyStream(shard_id, self._open_stream, lost, capacity.owner_window_bytes, epoch)
        self.reads = ReadStream(shard_id, self._open_stream, lost, epoch)

    @property
    def connected(self) -> bool:
        """Whether both streams are open."""
        return self.applies.connected and self.reads.connected

    def start(self) -> None:
        """Begins to connect."""
        self.applies.start()
        self.reads.start()

    async def close(self) -> None:
        """Ends both streams at once."""
        await asyncio.gather(self.applies.close(), self.reads.close())
        await self._channel.close()

    async def move(self, location: ShardLocation) -> None:
        """The shard is at another address now: calls end there and are opened here."""
        before, self.location = self.location, location
        if location.address != before.address:
            channel, self._channel = self._channel, self._open_channel()
            self.applies.cut()
            self.reads.cut()
            await channel.close()

    async def acknowledged(self, producer_id: str, timeout_s: float) -> int:
        """The highest sequence up to which the shard knows the producer to be acknowledged. Raises AioRpcError."""
        call = self._channel.unary_unary(
            f"{SERVICE}/GetProducer",
            request_serializer=shard_pb2.GetProducerRequest.SerializeToString,
            response_deserializer=shard_pb2.GetProducerResponse.FromString,
        )
        answer = await call(shard_pb2.GetProducerRequest(producer_id=producer_id), timeout=timeout_s)
        return answer.acknowledged_sequence

    async def status(self, timeout_s: float) -> shard_pb2.GetShardStatusResponse:
        """How the shard does. Raises AioRpcError."""
        call = self._channel.unary_unary(
            f"{SERVICE}/GetShardStatus",
            request_serializer=shard_pb2.GetShardStatusRequest.SerializeToString,
            response_deserializer=shard_pb2.GetShardStatusResponse.FromString,
        )
        return await call(shard_pb2.GetShardStatusRequest(), timeout=timeout_s)

    async def create_snapshot(self, timeout_s: float | None) -> int:
        """Has the shard write a snapshot; returns the log position from which a recovery would replay. Raises
        AioRpcError."""
        call = self._channel.unary_unary(
            f"{SERVICE}/CreateSnapshot",
            request_serializer=shard_pb2.CreateSnapshotRequest.SerializeToString,
            response_deserializer=shard_pb2.CreateSnapshotResponse.FromString,
        )
        answer = await call(shard_pb2.CreateSnapshotRequest(), timeout=timeout_s)
        return answer.log_position

    async def _open_stream(self, method: str) -> FrameStream:
        call = self._channel.unary_unary(
            f"{SERVICE}/GetStreamAddress",
            request_serializer=shard_pb2.GetStreamAddressRequest.SerializeToString,
            response_deserializer=shard_pb2.GetStreamAddressResponse.FromString,
        )
        host = self.location.address.rpartition(":")[0].strip("[]")
        answer = await call(shard_pb2.GetStreamAddressRequest(), timeout=CONNECT_S)
        async with asyncio.timeout(CONNECT_S):
            address = StreamAddress(host, answer.port, answer.local_name)
            return await connect(address, method, READ_RESPONSE_BYTES)

    def _open_channel(self) -> aio.Channel:
        return aio.insecure_channel(
            # An address that is not known yet refuses connections, as a shard that starts does.
            self.location.address or "127.0.0.1:0",
            options=[
                ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
                ("grpc.keepalive_timeout_ms", int(KEEPALIVE_S * 1000)),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 500),
                # Its name misleads: this is how long a connection may take to be made.
                ("grpc.min_reconnect_backoff_ms", int(CONNECT_S * 1000)),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.enable_http_proxy", 0),
            ],
        )
