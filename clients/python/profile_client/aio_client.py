"""The asyncio client. `client.py` is made from this file by `scripts/generate_sync_client.py`: change this one."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from profile_client.aio_concurrency import begin, outcome
from profile_client.aio_producer import AsyncProducer
from profile_client.channel import CHANNEL_OPTIONS, is_retryable, next_wait_s
from profile_client.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    Rejected,
    RejectedEventsError,
    ServiceError,
    from_rpc_error,
)
from profile_client.events import Event, frame_all, set_attributes, unframe
from profile_client.options import ProducerOptions
from profile_client.owners import FIRST_TRY_S, TRY_S, Owner, OwnerAccess, Owners
from profile_client.profiles import BatchProfiles, Profile, RankedItem, Ranking
from userprofile.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    event_service_pb2,
    event_service_pb2_grpc,
    profile_pb2,
    profile_service_pb2,
    profile_service_pb2_grpc,
)

BATCH_USERS = 1_000
"""Most users of a batch read that the service takes unless told otherwise. More of them are a frontend's to refuse."""


class AsyncProfileClient:
    """A connection to the service. To be made where an event loop runs.

    Calls that may be repeated are tried again, with growing waits, while the service is unavailable or full and the
    timeout allows.

    Example::

        async with AsyncProfileClient("localhost:50051") as client:
            profile = await client.get_profile("u1")
            profile["color"].likelihood("red")

    Args:
        address: host:port of a frontend's gRPC server.
        timeout_s: how long a call may take, tries and waits together; each call can be given its own.
        channel_credentials: for TLS; without them the connection is in the clear.
        direct: whether reads of profiles, and events of producers, go straight to the shards that own the users. What
            cannot be reached from here, or does not answer, is asked of, and sent to, the frontend. With
            `channel_credentials` all is.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        timeout_s: float = 5.0,
        channel_credentials: grpc.ChannelCredentials | None = None,
        direct: bool = True,
    ) -> None:
        # grpc.aio binds a channel to the loop; without one, fail here and not at the first call.
        asyncio.get_running_loop()
        self.address = address
        self.timeout_s = timeout_s
        if channel_credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, channel_credentials, options=CHANNEL_OPTIONS)
        self._events: Any = event_service_pb2_grpc.EventServiceStub(self._channel)
        self._profiles: Any = profile_service_pb2_grpc.ProfileServiceStub(self._channel)
        self._admin: Any = admin_service_pb2_grpc.AdminServiceStub(self._channel)
        self._producers: weakref.WeakSet[AsyncProducer] = weakref.WeakSet()
        self._owners = Owners(address) if direct and channel_credentials is None else None
        self._channels: dict[str, grpc.aio.Channel] = {}
        """To owners, by address."""
        self._stubs: dict[str, Any] = {}
        self._retired: list[tuple[float, grpc.aio.Channel]] = []
        """Those to addresses where no shard is any more, and when to close them."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection: calls under way end, and so do producers, with what they have not delivered."""
        for producer in list(self._producers):
            await producer.close(flush=False)
        retired = [channel for _, channel in self._retired]
        for channel in [*retired, *self._channels.values(), self._channel]:
            await channel.close()

    async def _call(self, method: Any, request: Any, timeout_s: float | None, *, repeatable: bool) -> Any:
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        before: ServiceError | None = None
        for attempt in itertools.count():
            left_s = max(0.001, deadline - time.monotonic())
            try:
                # gRPC makes a connection again while a call waits for it.
                return await method(request, timeout=left_s, wait_for_ready=before is not None)
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error)
                if before is not None and isinstance(error, DeadlineExceededError):
                    # Why it had to be tried again says more than that the time is over.
                    raise before from rpc_error
                before = error
                wait_s = next_wait_s(attempt, error.retry_after_s, random.random())
                if not repeatable or not is_retryable(error) or time.monotonic() + wait_s >= deadline:
                    raise error from rpc_error
                await asyncio.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    async def _learn_owners(self, left_s: float) -> None:
        """Asks for the topology if that is due; one of several callers at once does."""
        owners = self._owners
        if owners is None or not owners.wants_topology(time.monotonic()):
            return
        request = admin_service_pb2.GetTopologyRequest()
        try:
            topology = await self._admin.GetTopology(request, timeout=min(TRY_S, 0.5 * left_s))
        except grpc.RpcError as rpc_error:
            unknown = rpc_error.code() == grpc.StatusCode.UNIMPLEMENTED
            owners.topology_failed(time.monotonic(), for_good=unknown)
        else:
            for address in owners.install(topology):
                self._stubs.pop(address, None)
                if (channel := self._channels.pop(address, None)) is not None:
                    self._retired.append((time.monotonic() + 2 * TRY_S, channel))
            # By then no call is on its way there.
            while self._retired and self._retired[0][0] < time.monotonic():
                await self._retired.pop(0)[1].close()

    def _channel_of(self, owner: Owner) -> grpc.aio.Channel:
        channel = self._channels.get(owner.address)
        if channel is None:
            channel = self._channels.setdefault(
                owner.address, grpc.aio.insecure_channel(owner.address, options=CHANNEL_OPTIONS)
            )
        return channel

    def _stub_of(self, owner: Owner) -> Any:
        stub = self._stubs.get(owner.address)
        if stub is None:
            made: Any = profile_service_pb2_grpc.ProfileServiceStub(self._channel_of(owner))
            stub = self._stubs.setdefault(owner.address, made)
        return stub

    def _refused(self, owners: Owners, owner: Owner, rpc_error: Any, try_s: float) -> ServiceError:
        """Notes what an owner's error says of it, after a try that could take so long."""
        error = from_rpc_error(rpc_error)
        if error.reason:
            owners.answered(owner)
        if error.reason == "NOT_MINE":
            owners.not_mine()
        elif isinstance(error, DeadlineExceededError) and try_s < FIRST_TRY_S:
            pass  # The caller is in a hurry.
        elif not isinstance(error, NotFoundError | InvalidArgumentError):
            owners.failed(owner, time.monotonic())
        return error

    async def _read_from_owner(self, user_id: str, request: Any, left_s: float) -> profile_pb2.Profile | None:
        """What the user's owner answers; None where a frontend is to be asked."""
        await self._learn_owners(left_s)
        owners = self._owners
        owner = None if owners is None else owners.of(user_id, time.monotonic())
        if owners is None or owner is None:
            return None
        try_s = owner.try_s(left_s)
        try:
            profile: profile_pb2.Profile = await self._stub_of(owner).GetProfile(request, timeout=try_s)
        except grpc.RpcError as rpc_error:
            error = self._refused(owners, owner, rpc_error, try_s)
            if isinstance(error, NotFoundError | InvalidArgumentError):
                raise error from rpc_error
            return None
        owners.answered(owner)
        return profile

    async def _read_from_owners(
        self, user_ids: Sequence[str], features: Sequence[str], left_s: float
    ) -> dict[str, profile_pb2.Profile | None]:
        """What the users' owners answer: by user a profile, or None for one never seen. Users are left out for whom a
        frontend is to be asked."""
        await self._learn_owners(left_s)
        owners = self._owners
        if owners is None or len(user_ids) > BATCH_USERS:
            return {}
        now_s = time.monotonic()
        asked: dict[str, tuple[Owner, list[str]]] = {}
        for user_id in user_ids:
            owner = owners.of(user_id, now_s)
            if owner is not None:
                asked.setdefault(owner.address, (owner, []))[1].append(user_id)
        calls = []
        for owner, theirs in asked.values():
            request = profile_service_pb2.BatchGetProfilesRequest(user_ids=theirs, features=features)
            calls.append(begin(self._stub_of(owner).BatchGetProfiles, request, owner.try_s(left_s)))
        found: dict[str, profile_pb2.Profile | None] = {}
        for (owner, _), call in zip(asked.values(), calls, strict=True):
            try:
                answer = await outcome(call)
            except grpc.RpcError as rpc_error:
                # A fault of the request, too, is the frontend's to tell: it counts in the whole of it.
                self._refused(owners, owner, rpc_error, owner.try_s(left_s))
            else:
                owners.answered(owner)
                found.update((profile.user_id, profile) for profile in answer.profiles)
                found.update((user_id, None) for user_id in answer.missing_user_ids)
        return found

    async def get_profile(
        self, user_id: str, features: Sequence[str] = (), *, timeout_s: float | None = None
    ) -> Profile:
        """One user's profile, now.

        Raises:
            NotFoundError: the user was never seen.
            InvalidArgumentError: the user id, or a feature's name, is wrong.
        """
        request = profile_service_pb2.GetProfileRequest(user_id=user_id, features=features)
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        answer = await self._read_from_owner(user_id, request, deadline - time.monotonic())
        if answer is None:
            left_s = deadline - time.monotonic()
            answer = await self._call(self._profiles.GetProfile, request, left_s, repeatable=True)
        return Profile(answer)

    async def batch_get_profiles(
        self, user_ids: Iterable[str], features: Sequence[str] = (), *, timeout_s: float | None = None
    ) -> BatchProfiles:
        """Up to 1,000 users' profiles, in the order asked for; users never seen are named apart."""
        wanted = list(user_ids)
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        found = await self._read_from_owners(wanted, features, deadline - time.monotonic())
        if not wanted or any(user_id not in found for user_id in wanted):
            request = profile_service_pb2.BatchGetProfilesRequest(user_ids=wanted, features=features)
            left_s = deadline - time.monotonic()
            answer = await self._call(self._profiles.BatchGetProfiles, request, left_s, repeatable=True)
            return BatchProfiles([Profile(p) for p in answer.profiles], list(answer.missing_user_ids))
        profiles = [Profile(profile) for user_id in wanted if (profile := found[user_id]) is not None]
        return BatchProfiles(profiles, [user_id for user_id in wanted if found[user_id] is None])

    async def get_population(self, features: Sequence[str] = (), *, timeout_s: float | None = None) -> Profile:
        """All users as one profile; at most 2 s old."""
        request = profile_service_pb2.GetPopulationRequest(features=features)
        return Profile(await self._call(self._profiles.GetPopulation, request, timeout_s, repeatable=True))

    async def watch(
        self, user_id: str, features: Sequence[str] = (), *, timeout_s: float | None = None
    ) -> AsyncIterator[Profile]:
        """The profile now, then after each change, until the caller stops; no timeout means for ever."""
        request = profile_service_pb2.WatchProfileRequest(user_id=user_id, features=features)
        call = self._profiles.WatchProfile(request, timeout=timeout_s)
        try:
            async for message in call:
                yield Profile(message)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    async def rank_items(
        self, user_id: str, items: Iterable[tuple[str, Mapping[str, Any]]], *, timeout_s: float | None = None
    ) -> Ranking:
        """Up to 1,000 items, each an id and its attributes, the best for the user first."""
        request = profile_service_pb2.RankItemsRequest(user_id=user_id)
        for item_id, attributes in items:
            set_attributes(request.items.add(item_id=item_id).attributes, attributes)
        answer = await self._call(self._profiles.RankItems, request, timeout_s, repeatable=True)
        ranked = [RankedItem(item.item_id, item.score, dict(item.contributions)) for item in answer.items]
        return Ranking(ranked, answer.ranked_by_population)

    async def delete_profile(
        self, user_id: str, *, timeout_s: float | None = None
    ) -> profile_service_pb2.DeleteProfileResponse:
        """Forgets a user."""
        request = profile_service_pb2.DeleteProfileRequest(user_id=user_id)
        answer: profile_service_pb2.DeleteProfileResponse
        # Said twice, it would answer that there was nothing to delete.
        answer = await self._call(self._profiles.DeleteProfile, request, timeout_s, repeatable=False)
        return answer

    async def merge_profiles(self, user_id: str, source_user_id: str, *, timeout_s: float | None = None) -> Profile:
        """Joins the source user into the user, and returns the user's profile."""
        request = profile_service_pb2.MergeProfilesRequest(user_id=user_id, source_user_id=source_user_id)
        answer = await self._call(self._profiles.MergeProfiles, request, timeout_s, repeatable=False)
        return Profile(answer.profile)

    async def ingest_events(
        self, events: Iterable[Event], request_id: str | None = None, *, timeout_s: float | None = None
    ) -> int:
        """Sends one batch of up to 10,000 events and returns how many were counted, once they are durable and readable.

        The batch is counted once, however often it is sent: within the timeout it is sent again while the service, or
        the way to it, is unavailable or full. After a `DeadlineExceededError`, an `UnavailableError` or a
        `ResourceExhaustedError` some of its events may be counted; sent again with the same `request_id`, the rest
        follow.

        Args:
            events: the batch.
            request_id: names the batch, at most 256 bytes; a random one if None. A program that sends the batch again
                in a later call gives its own, and never the same one for other events.
            timeout_s: for all tries together.

        Raises:
            RejectedEventsError: some events were refused; the others were counted.
            TypeError, ValueError: an event holds what an event cannot hold; nothing was sent.
        """
        body = b"".join(frame_all(events))
        rest = event_service_pb2.IngestEventsRequest(request_id=request_id or uuid.uuid4().hex).SerializeToString()
        request = event_service_pb2.IngestEventsRequest.FromString(body + rest)
        answer = await self._call(self._events.IngestEvents, request, timeout_s, repeatable=True)
        if answer.rejected:
            sent = list(unframe(body))
            rejected = [Rejected(0, r.index, r.field, r.reason, r.index, sent[r.index]) for r in answer.rejected]
            raise RejectedEventsError(rejected, len(rejected), answer.accepted_count)
        return int(answer.accepted_count)

    def producer(self, producer_id: str | None = None, options: ProducerOptions | None = None) -> AsyncProducer:
        """A stream of events: batched, bounded, sent again after a broken connection, counted once.

        Use it as a context manager; leaving it flushes.

        Args:
            producer_id: for a producer that goes on after its process ended: it sends again, in the same batches, what
                follows its `acknowledged_sequence`, for a number that the service holds is not counted again. Other
                events under the same numbers would be lost; so would those of two producers with one id, of which the
                one that connects later ends the other. Without one, a random id.
            options: how it batches, how much it holds, and when it gives up.
        """
        owners = self._owners
        access = None if owners is None else OwnerAccess(owners, self._learn_owners, self._channel_of)
        producer = AsyncProducer(self._channel, producer_id, options, access)
        self._producers.add(producer)
        return producer

    async def get_schema(self, *, timeout_s: float | None = None) -> admin_service_pb2.GetSchemaResponse:
        """What a profile is."""
        answer: admin_service_pb2.GetSchemaResponse
        request = admin_service_pb2.GetSchemaRequest()
        answer = await self._call(self._admin.GetSchema, request, timeout_s, repeatable=True)
        return answer

    async def get_topology(self, *, timeout_s: float | None = None) -> admin_service_pb2.GetTopologyResponse:
        """Which shard owns which users."""
        answer: admin_service_pb2.GetTopologyResponse
        request = admin_service_pb2.GetTopologyRequest()
        answer = await self._call(self._admin.GetTopology, request, timeout_s, repeatable=True)
        return answer

    async def get_status(self, *, timeout_s: float | None = None) -> admin_service_pb2.GetStatusResponse:
        """How the service does."""
        answer: admin_service_pb2.GetStatusResponse
        request = admin_service_pb2.GetStatusRequest()
        answer = await self._call(self._admin.GetStatus, request, timeout_s, repeatable=True)
        return answer

    async def create_snapshot(self, *, timeout_s: float | None = None) -> admin_service_pb2.CreateSnapshotResponse:
        """Writes a snapshot of every shard. Large shards take minutes: give a `timeout_s` that allows for it."""
        answer: admin_service_pb2.CreateSnapshotResponse
        request = admin_service_pb2.CreateSnapshotRequest()
        answer = await self._call(self._admin.CreateSnapshot, request, timeout_s, repeatable=False)
        return answer

    async def move_partitions(
        self, partitions: Iterable[int], target_shard_id: int, *, timeout_s: float | None = None
    ) -> admin_service_pb2.MovePartitionsResponse:
        """Moves partitions to another shard, live."""
        answer: admin_service_pb2.MovePartitionsResponse
        request = admin_service_pb2.MovePartitionsRequest(partitions=partitions, target_shard_id=target_shard_id)
        answer = await self._call(self._admin.MovePartitions, request, timeout_s, repeatable=False)
        return answer
