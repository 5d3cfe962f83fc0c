"""The servers of one shard: raw messages in, the shard's verdicts out. No Ray here; `actor.py` wraps it. They serve
from the first moment on: a stand-in says that the shard recovers until `serve` brings the shard itself.

Frontends come here over the internal service, their streams of events and questions in frames (`rpc/frames.py`), all
else over gRPC; and whoever knows the topology over a part of the public one: reads
(`rpc.query`) and producers' streams (`rpc.producer_streams`) of this shard's own users.

A stream is read as long as the bytes of its unanswered requests stay below a bound (`exchange.py`). Requests are
submitted without waiting for the one before, answers go out as they come, as many as are ready in one message.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import os
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import grpc

from profile_service.clock import Clock, system_clock
from profile_service.config import KIB, MIB, STREAM_LOOKAHEAD_BYTES, Settings
from profile_service.errors import (
    InvalidArgument,
    NotMine,
    ProfileServiceError,
    ResourceExhausted,
    StorageFull,
    Unavailable,
)
from profile_service.rpc.frames import FrameServer, Message
from profile_service.rpc.query import Query
from profile_service.rpc.server import Server, ServerContext
from profile_service.rpc.status import abort, is_foreseen
from profile_service.shard import replication_stream
from profile_service.shard.direct import DirectIngest
from profile_service.shard.exchange import Exchange
from profile_service.shard.following import Taken
from profile_service.shard.health import Health
from profile_service.shard.shard import AfterRefusal, Sender, ShardCounters
from profile_service.wire.apply_request import ApplyPart, decode_request
from profile_service.wire.plan import WirePlan
from userprofile.internal.v1 import shard_pb2

SERVICE = "userprofile.internal.v1.ShardService"
PROFILE_SERVICE = "userprofile.v1.ProfileService"
EVENT_SERVICE = "userprofile.v1.EventService"

REQUEST_OVERHEAD_BYTES = MIB
"""A request may be so much larger than the largest batch."""

OVERLOAD_PATIENCE_S = 1.0
"""A full shard stops reading the stream for so long before it refuses."""

PRODUCER_PATIENCE_S = 10.0
"""The same for a producer's stream: a new one would bring the same again."""

OVERLOAD_POLL_S = 0.005
READ_SLICE_USERS = 128
"""Profiles read before the loop may turn: in about half a millisecond."""

UNSENT_USERS = 4096
"""Profiles asked for and not yet sent back on one stream; beyond it, the stream is not read."""

logger = logging.getLogger(__name__)

UnaryCall = Callable[[bytes, float | None], Awaitable[bytes]]
"""An encoded request and the seconds left, for an encoded response."""

ApplyResult = shard_pb2.ApplyResponse.Result
ApplyStatus = shard_pb2.ApplyResponse.Status
ReadAnswer = shard_pb2.ReadResponse.Answer
ReadStatus = shard_pb2.ReadResponse.Status
STATUS_READ = ReadStatus.STATUS_READ


class ServedShard(Protocol):
    """What is served: a `Shard`, or what stands in for it."""

    epoch: int

    @property
    def is_remote(self) -> bool:
        """As Shard.is_remote."""

    async def bring(self, user_ids: Sequence[str] = (), producer_ids: Sequence[str] = ()) -> None:
        """As Shard.bring."""

    @property
    def plan(self) -> WirePlan:
        """As Shard.plan."""

    async def submit(
        self, parts: Sequence[ApplyPart], size_bytes: int, epoch: int, sender: Sender | None = None
    ) -> None:
        """As Shard.submit."""

    def read(self, user_ids: Sequence[str], features: Sequence[str], epoch: int | None = None) -> list[bytes]:
        """As Shard.read."""

    def population_profile(self, features: Sequence[str]) -> bytes:
        """As Shard.population_profile."""

    def acknowledged(self, producer_id: str) -> int:
        """As Shard.acknowledged."""

    async def receive(self, move_id: str, piece: bytes) -> None:
        """As Shard.receive."""

    async def take(self, replication: str, number: int, records: Sequence[Taken]) -> None:
        """As Shard.take."""

    async def create_snapshot(self) -> int:
        """As Shard.create_snapshot."""

    def status(self) -> ShardCounters:
        """As Shard.status."""


class ShardServer:
    """Serves one shard on a port of its own.

    Args:
        health: how the shard does.
    """

    def __init__(self, shard: ServedShard, settings: Settings, health: Health, clock: Clock = system_clock) -> None:
        self._shard = shard
        self._health = health
        self._window_bytes = settings.capacity.owner_window_bytes
        self._settings = settings
        largest_bytes = settings.limits.message_bytes + REQUEST_OVERHEAD_BYTES
        self._streams = FrameServer({"Apply": self._apply, "Read": self._read}, largest_bytes)
        self._stream_address = shard_pb2.GetStreamAddressResponse()
        self._server = Server(
            options=[
                ("grpc.max_receive_message_length", largest_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                # As at a frontend, so that a producer's stream that is not read takes no more than this.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", STREAM_LOOKAHEAD_BYTES),
                # Frontends ping to find out that a shard has gone; that is no abuse.
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
                ("grpc.http2.max_ping_strikes", 0),
            ]
        )
        self._query = Query(self, settings.limits)
        submit = functools.partial(self._submit, patience_s=PRODUCER_PATIENCE_S)
        self._ingest = DirectIngest(lambda: self._shard, submit, settings, clock)
        self._server.add_generic_rpc_handlers((self._handlers(), *self._public_handlers()))

    async def start(self) -> str:
        """Begins to serve; returns host:port, by which this machine's frontends reach it."""
        stream_port, local_name = await self._streams.start(self._settings.host)
        self._stream_address = shard_pb2.GetStreamAddressResponse(port=stream_port, local_name=local_name)
        port = self._server.add_insecure_port(self._settings.address(0))
        await self._server.start()
        # "Every address" is one to listen on, not one to call.
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._settings.host, self._settings.host)  # noqa: S104
        return replace(self._settings, host=reachable).address(port)

    def serve(self, shard: ServedShard) -> None:
        """From now on this is the shard."""
        self._shard = shard
        self._ingest.warm_up()

    async def stop(self, grace_s: float) -> None:
        """Ends: takes no new call, and gives those that run so long to end."""
        self._ingest.drain()
        await asyncio.gather(self._server.stop(grace_s), self._streams.stop(grace_s))

    def _handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "GetStreamAddress": grpc.unary_unary_rpc_method_handler(
                    self._get_stream_address,
                    request_deserializer=shard_pb2.GetStreamAddressRequest.FromString,
                    response_serializer=shard_pb2.GetStreamAddressResponse.SerializeToString,
                ),
                "GetProducer": grpc.unary_unary_rpc_method_handler(
                    self._get_producer,
                    request_deserializer=shard_pb2.GetProducerRequest.FromString,
                    response_serializer=shard_pb2.GetProducerResponse.SerializeToString,
                ),
                "GetShardStatus": grpc.unary_unary_rpc_method_handler(
                    self._get_status,
                    request_deserializer=shard_pb2.GetShardStatusRequest.FromString,
                    response_serializer=shard_pb2.GetShardStatusResponse.SerializeToString,
                ),
                "Receive": grpc.unary_unary_rpc_method_handler(
                    self._receive,
                    request_deserializer=shard_pb2.ReceiveRequest.FromString,
                    response_serializer=shard_pb2.ReceiveResponse.SerializeToString,
                ),
                "Replicate": grpc.stream_stream_rpc_method_handler(self._replicate),
                "CreateSnapshot": grpc.unary_unary_rpc_method_handler(
                    self._create_snapshot,
                    request_deserializer=shard_pb2.CreateSnapshotRequest.FromString,
                    response_serializer=shard_pb2.CreateSnapshotResponse.SerializeToString,
                ),
            },
        )

    def _public_handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        calls: dict[str, UnaryCall] = {
            "GetProfile": self._query.get_profile,
            "BatchGetProfiles": self._query.batch_get_profiles,
            "GetPopulation": self._query.get_population,
        }
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            name: grpc.unary_unary_rpc_method_handler(_answering(call)) for name, call in calls.items()
        }
        streaming = _streaming(self._ingest.stream_events)
        stream: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(streaming)
        return (
            grpc.method_handlers_generic_handler(PROFILE_SERVICE, handlers),
            grpc.method_handlers_generic_handler(EVENT_SERVICE, {"StreamEvents": stream}),
        )

    async def _apply(self, requests: AsyncIterator[Message]) -> AsyncIterator[bytes]:
        exchange: Exchange[ApplyResult] = Exchange(self._window_bytes)

        sender = Sender()

        async def take(encoded: Message) -> None:
            request_id, epoch, parts = decode_request(encoded)
            submission = None if sender.refused else await self._submit(parts, len(encoded), epoch, sender)
            refused = submission is not None and submission.done() and submission.exception() is not None
            # Known before the next request is read.
            sender.refused |= refused
            exchange.run(self._apply_result(request_id, submission, refused=refused), len(encoded))

        async for results in exchange.carry(requests, take):
            yield shard_pb2.ApplyResponse(results=results, epoch=self._shard.epoch).SerializeToString()

    async def _submit(
        self,
        parts: Sequence[ApplyPart],
        size_bytes: int,
        epoch: int,
        sender: Sender,
        patience_s: float = OVERLOAD_PATIENCE_S,
    ) -> asyncio.Task[None]:
        """Hands a request to the shard; returns once the shard has taken or refused it. A full shard is waited for a
        while: meanwhile the stream is not read, and no later request can get ahead."""
        give_up_at = asyncio.get_running_loop().time() + patience_s
        while True:
            submission = asyncio.create_task(self._shard.submit(parts, size_bytes, epoch, sender))
            # Whoever waits for it may go away with its stream; what it is refused with is nobody's then.
            submission.add_done_callback(_take_error)
            # `submit` takes or refuses before it first waits.
            await asyncio.sleep(0)
            refusal = submission.exception() if submission.done() else None
            full = isinstance(refusal, ResourceExhausted) and not isinstance(refusal, StorageFull)
            if not full or asyncio.get_running_loop().time() >= give_up_at:
                return submission
            await asyncio.sleep(OVERLOAD_POLL_S)

    async def _apply_result(
        self, request_id: int, submission: asyncio.Task[None] | None, *, refused: bool
    ) -> ApplyResult:
        status, message = ApplyStatus.STATUS_APPLIED, ""
        try:
            if submission is None:
                raise AfterRefusal("an earlier request of the stream was refused", retry_after_s=0.1)
            await submission
        except ProfileServiceError as error:
            status, message = _apply_status(error, refused=refused), error.message
        return ApplyResult(request_id=request_id, status=status, message=message)

    async def _read(self, requests: AsyncIterator[Message]) -> AsyncIterator[bytes]:
        exchange: Exchange[bytes] = Exchange(UNSENT_USERS)

        async def take(encoded: Message) -> None:
            request = shard_pb2.ReadRequest.FromString(bytes(encoded))
            users = _users_of(request)
            if self._shard.is_remote:
                exchange.run(self._bring_and_read(request), users)
            elif users <= READ_SLICE_USERS:
                exchange.put(self._read_response(request), users)
            else:
                exchange.run(self._read_in_slices(request), users)

        async for responses in exchange.carry(requests, take):
            for response in responses:
                yield response

    def _read_response(self, request: shard_pb2.ReadRequest) -> bytes:
        response = shard_pb2.ReadResponse(request_id=request.request_id, epoch=self._shard.epoch)
        # What callers ask alike is read together: it costs little more than one of them alone.
        for (population, features), alike in itertools.groupby(request.queries, _kind_of):
            queries = list(alike)
            if population:
                response.answers.extend(self._population_answer(features) for _ in queries)
            else:
                asked: list[Sequence[str]] = [query.user_ids for query in queries]
                response.answers.extend(self._answers(asked, features, request.epoch))
        return response.SerializeToString()

    async def _bring_and_read(self, request: shard_pb2.ReadRequest) -> bytes:
        """The same where rows have to be brought first: those of all callers together."""
        user_ids = [user_id for query in request.queries for user_id in query.user_ids]
        if len(user_ids) <= READ_SLICE_USERS:
            try:
                await self._shard.bring(user_ids)
            except ProfileServiceError as error:
                if len(request.queries) == 1:
                    answer = ReadAnswer(status=_read_status(error), message=error.message)
                    response = shard_pb2.ReadResponse(
                        request_id=request.request_id, epoch=self._shard.epoch, answers=[answer]
                    )
                    return response.SerializeToString()
            else:
                return self._read_response(request)
        return await self._read_in_slices(request)

    async def _read_in_slices(self, request: shard_pb2.ReadRequest) -> bytes:
        """The same for so many users that the loop has to turn meanwhile, or of whom some cannot be brought."""
        response = shard_pb2.ReadResponse(request_id=request.request_id)
        for query in request.queries:
            if query.population:
                response.answers.append(self._population_answer(query.features))
                continue
            answer = ReadAnswer(status=STATUS_READ)
            for start in range(0, len(query.user_ids), READ_SLICE_USERS):
                users = query.user_ids[start : start + READ_SLICE_USERS]
                part = await self._brought_answer(users, query.features, request.epoch)
                if part.status != STATUS_READ:
                    answer = part
                    break
                answer.profiles.extend(part.profiles)
                await asyncio.sleep(0)
            response.answers.append(answer)
        response.epoch = self._shard.epoch
        return response.SerializeToString()

    async def _brought_answer(self, user_ids: Sequence[str], features: Sequence[str], epoch: int) -> ReadAnswer:
        if self._shard.is_remote:
            try:
                await self._shard.bring(user_ids)
            except ProfileServiceError as error:
                return ReadAnswer(status=_read_status(error), message=error.message)
        (answer,) = self._answers([user_ids], features, epoch)
        return answer

    def _answers(self, asked: list[Sequence[str]], features: Sequence[str], epoch: int) -> list[ReadAnswer]:
        try:
            every = [user_id for user_ids in asked for user_id in user_ids]
            profiles = self._shard.read(every, features, epoch)
        except ProfileServiceError as error:
            if len(asked) == 1:
                return [ReadAnswer(status=_read_status(error), message=error.message)]
            # One of them spoils it for all; which one shows when each is read alone.
            return [answer for user_ids in asked for answer in self._answers([user_ids], features, epoch)]
        ends = itertools.accumulate(map(len, asked))
        starts = (end - len(user_ids) for end, user_ids in zip(ends, asked, strict=True))
        return [
            ReadAnswer(status=STATUS_READ, profiles=profiles[start : start + len(user_ids)])
            for start, user_ids in zip(starts, asked, strict=True)
        ]

    def _population_answer(self, features: Sequence[str]) -> ReadAnswer:
        try:
            profile = self._shard.population_profile(features)
        except ProfileServiceError as error:
            return ReadAnswer(status=_read_status(error), message=error.message)
        return ReadAnswer(status=STATUS_READ, profiles=[profile])

    async def _profiles(self, user_ids: Sequence[str], features: Sequence[str], epoch: int | None) -> list[bytes]:
        if len(user_ids) <= READ_SLICE_USERS:
            if self._shard.is_remote:
                await self._shard.bring(user_ids)
            return self._shard.read(user_ids, features, epoch)
        profiles: list[bytes] = []
        for start in range(0, len(user_ids), READ_SLICE_USERS):
            some = user_ids[start : start + READ_SLICE_USERS]
            if self._shard.is_remote:
                await self._shard.bring(some)
            profiles += self._shard.read(some, features, epoch)
            await asyncio.sleep(0)
        return profiles

    async def read(
        self, user_ids: Sequence[str], features: Sequence[str], deadline_s: float | None = None
    ) -> list[bytes]:
        """For `Query`: this shard's users; raises NotMine where one is not."""
        return await self._profiles(user_ids, features, None)

    async def population(self, features: Sequence[str], deadline_s: float | None = None) -> bytes:
        """For `Query`."""
        return self._shard.population_profile(features)

    async def _get_stream_address(
        self, request: shard_pb2.GetStreamAddressRequest, context: ServerContext
    ) -> shard_pb2.GetStreamAddressResponse:
        return self._stream_address

    async def _get_producer(
        self, request: shard_pb2.GetProducerRequest, context: ServerContext
    ) -> shard_pb2.GetProducerResponse:
        try:
            if self._shard.is_remote:
                await self._shard.bring(producer_ids=[request.producer_id])
            return shard_pb2.GetProducerResponse(acknowledged_sequence=self._shard.acknowledged(request.producer_id))
        except Unavailable as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)

    async def _receive(self, request: shard_pb2.ReceiveRequest, context: ServerContext) -> shard_pb2.ReceiveResponse:
        try:
            await self._shard.receive(request.move_id, request.transfer)
        except ProfileServiceError as error:
            await abort(context, error)
        return shard_pb2.ReceiveResponse()

    async def _replicate(self, requests: AsyncIterator[bytes], context: ServerContext) -> AsyncIterator[bytes]:
        async for answer in replication_stream.serve(requests, context, self._shard.take):
            yield answer

    async def _create_snapshot(
        self, request: shard_pb2.CreateSnapshotRequest, context: ServerContext
    ) -> shard_pb2.CreateSnapshotResponse:
        try:
            return shard_pb2.CreateSnapshotResponse(log_position=await self._shard.create_snapshot())
        except StorageFull as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, error.message)
        except Unavailable as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)

    async def _get_status(
        self, request: shard_pb2.GetShardStatusRequest, context: ServerContext
    ) -> shard_pb2.GetShardStatusResponse:
        counters = self._shard.status()
        return shard_pb2.GetShardStatusResponse(
            state=self._health.state,
            epoch=self._shard.epoch,
            user_count=counters.user_count,
            event_count=counters.event_count,
            state_bytes=counters.state_bytes,
            log_position=counters.log_position,
            queued_bytes=counters.queued_bytes,
            duplicate_count=counters.duplicate_count,
            event_id_count=counters.event_id_count,
            resident_bytes=_resident_bytes(),
            cpu_seconds=time.process_time(),
            pid=os.getpid(),
            sync_mode=counters.sync_mode,
            recovery_progress=self._health.progress,
            message=self._health.message,
            log_bytes=counters.log_bytes,
            snapshot_position=counters.snapshot_position,
            snapshot_time_ns=counters.snapshot_time_ns,
        )


def _take_error(submission: asyncio.Task[None]) -> None:
    if not submission.cancelled():
        submission.exception()


def _answering(call: UnaryCall) -> Callable[[bytes, ServerContext], Awaitable[bytes]]:
    """A handler that passes raw bytes on, and errors as the frontends do."""

    async def answer(request: bytes, context: ServerContext) -> bytes:
        try:
            return await call(request, None)
        except Exception as error:  # Whatever it is, it becomes a status.
            if not is_foreseen(error):
                logger.error("%s failed", call.__name__, exc_info=error)
            await abort(context, error)

    return answer


def _streaming(
    call: Callable[[AsyncIterator[bytes]], AsyncIterator[bytes]],
) -> Callable[[AsyncIterator[bytes], ServerContext], AsyncIterator[bytes]]:
    """The same for a stream of requests and responses."""

    async def answer(requests: AsyncIterator[bytes], context: ServerContext) -> AsyncIterator[bytes]:
        try:
            async for response in call(requests):
                yield response
        except Exception as error:  # Whatever it is, it becomes a status.
            if not is_foreseen(error):
                logger.error("%s failed", call.__name__, exc_info=error)
            await abort(context, error)

    return answer


def _kind_of(query: shard_pb2.ReadRequest.Query) -> tuple[bool, list[str]]:
    """What queries must have in common to be read together."""
    return query.population, list(query.features)


def _users_of(request: shard_pb2.ReadRequest) -> int:
    return sum(max(1, len(query.user_ids)) for query in request.queries)


def _apply_status(error: ProfileServiceError, *, refused: bool) -> ApplyStatus.ValueType:
    """The status of a request that was refused when it came, or that ended with an error later."""
    match error:
        case AfterRefusal():
            return ApplyStatus.STATUS_AFTER_REFUSAL
        case NotMine():
            return ApplyStatus.STATUS_NOT_MINE
        case StorageFull():
            return ApplyStatus.STATUS_FULL
        case ResourceExhausted():
            return ApplyStatus.STATUS_OVERLOADED
        case InvalidArgument():
            return ApplyStatus.STATUS_MALFORMED
    return ApplyStatus.STATUS_UNAVAILABLE if refused else ApplyStatus.STATUS_LOST


def _read_status(error: ProfileServiceError) -> ReadStatus.ValueType:
    match error:
        case NotMine():
            return ReadStatus.STATUS_NOT_MINE
        case InvalidArgument():
            return ReadStatus.STATUS_INVALID
    return ReadStatus.STATUS_UNAVAILABLE


def _resident_bytes() -> int:
    """Resident memory of this process; its highest so far where the system has no /proc."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
