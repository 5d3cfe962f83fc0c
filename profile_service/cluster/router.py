"""Finds the owners of users and brings batches and questions to them.

    batch ─▶ split by owner (kernel) ─▶ a part to each owner's ApplyStream ─▶ done when every owner has applied its part
    read  ─▶ split by owner ─▶ a question to each owner's ReadStream ─▶ joined in the order asked for

The topology is cached; it is asked for anew when an owner says "not mine" or is lost. When partitions change owners,
the streams to those that lose some are paused until what they have sent is answered; then all that waits there is split
anew, in the old order, and goes on. So a lane's events of one partition keep their order through a change, too. The
other streams go on, and questions go to the new owners at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np
from grpc import StatusCode, aio
from numpy.typing import NDArray

from profile_service.cluster.apply_stream import parts_in_order
from profile_service.cluster.batches import Batch, Lane, Part
from profile_service.cluster.coordinator import reason_of
from profile_service.cluster.link import ShardLink
from profile_service.cluster.partitioning import partition_of, user_hash
from profile_service.cluster.topology import ShardLocation, Topology
from profile_service.config import Capacity
from profile_service.errors import DeadlineExceeded, ProfileServiceError, ResourceExhausted, StorageFull, Unavailable
from profile_service.rpc.query import Reader
from profile_service.wire.apply_request import ApplyPart
from profile_service.wire.gather import gather, split_by_owner
from profile_service.wire.scan import ScannedBatch
from userprofile.internal.v1 import shard_pb2

PATIENCE_S = 10.0
"""How long a call without a deadline looks for its owners."""

FIRST_RETRY_S = 0.02
LAST_RETRY_S = 0.1
AWAY_AFTER_S = 0.5
"""An owner that has not answered a question for so long is taken for away, where the profiles can be read elsewhere."""

CONTROL_TIMEOUT_S = 2.0
FIRST_TOPOLOGY_TIMEOUT_S = 15.0
"""A coordinator that starts looks for its shards first."""

logger = logging.getLogger(__name__)


class Router:
    """The way from one frontend to all shards. Lives in one event loop.

    Args:
        source: asks the coordinator for the topology.
        away: where profiles are read whose owner does not answer; None where there is no other place.
        scan: scans an encoded batch again as of a time in nanoseconds, when its users have new owners.
    """

    def __init__(
        self,
        source: Callable[[], Awaitable[Topology]],
        scan: Callable[[bytes | memoryview, int], ScannedBatch],
        capacity: Capacity,
        away: Reader | None = None,
    ) -> None:
        self._source = source
        self._away = away
        self._scan = scan
        self._capacity = capacity
        self._topology: Topology | None = None
        self._links: dict[int, ShardLink] = {}
        self._leaving: list[ShardLink] = []
        """To shards that are no more, until they have answered."""
        self._by_position: list[ShardLink] = []
        self._owners: NDArray[np.int32] = np.zeros(0, dtype=np.int32)
        self._refreshing: asyncio.Task[bool] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._started = asyncio.Event()
        """Set from the first topology on."""
        self._stable = asyncio.Event()
        """Set while batches may be split by `_owners`."""
        self._last_serial = 0

    @property
    def topology(self) -> Topology:
        """The topology by which it routes just now."""
        if self._topology is None:
            raise Unavailable("the topology is not known yet", retry_after_s=1.0)
        return self._topology

    @property
    def ready(self) -> bool:
        """Whether every shard is connected."""
        return bool(self._links) and all(link.connected for link in self._links.values())

    @property
    def held_bytes(self) -> int:
        """Event bytes that wait for an owner or its answer."""
        return sum(link.applies.held_bytes for link in self._links.values())

    async def start(self) -> None:
        """Asks for the topology, again and again until there is an answer, and begins to connect."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                async with asyncio.timeout(FIRST_TOPOLOGY_TIMEOUT_S):
                    topology = await self._source()
                break
            except Exception as error:  # noqa: BLE001  # The source is a remote call: the coordinator will be back.
                logger.warning("the topology is not known yet: %s", reason_of(error))
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)
        await self._install(topology)

    async def close(self) -> None:
        """Ends every stream; what still waits fails with Unavailable."""
        for task in (self._refreshing, self._settling):
            if task is not None:
                task.cancel()
        for link in (*self._links.values(), *self._leaving):
            await link.close()
            link.applies.fail_all(Unavailable("the frontend shuts down", retry_after_s=1.0))

    async def submit(
        self, scanned: ScannedBatch, lane: Lane, sequence: int, acknowledged_sequence: int, arrival_time_ns: int
    ) -> Batch:
        """Queues the valid events of a batch at their owners, behind the lane's earlier batches; `batch.done` says when
        they are durable and readable. A lane's batches are submitted one after the other.

        Waits for space where the lane is patient.

        Raises:
            ResourceExhausted: an owner's window is full and the lane is not patient; nothing is queued.
            ProfileServiceError: what the lane has failed with.
        """
        while True:
            # A waiter that was woken may come too late: owners change again.
            while not self._stable.is_set():
                await self._stable.wait()
            order, start = split_by_owner(
                scanned.user_hash, scanned.status, self._owners, self.topology.partition_bits, len(self._links)
            )
            touched = [
                (link, order[start[position] : start[position + 1]])
                for position, link in enumerate(self._by_position)
                if start[position + 1] > start[position]
            ]
            full = [link for link, _ in touched if link.applies.full]
            if not full:
                break
            if not lane.patient:
                raise ResourceExhausted(
                    f"shard {full[0].location.shard_id} has {full[0].applies.held_bytes} bytes waiting",
                    retry_after_s=0.1,
                )
            await full[0].applies.wait_for_space()
        batch = lane.open_batch(len(touched))
        for link, selection in touched:
            part = ApplyPart(
                producer_id=lane.producer_id,
                sequence=sequence,
                acknowledged_sequence=acknowledged_sequence,
                arrival_time_ns=arrival_time_ns,
                events=gather(scanned.buffer, scanned.offset, scanned.length, selection),
                event_count=len(selection),
            )
            self._put(link, batch, part)
        return batch

    async def ingest(
        self, scanned: ScannedBatch, producer_id: str, sequence: int, arrival_time_ns: int, deadline_s: float | None
    ) -> None:
        """One batch by itself: returns when its valid events are durable and readable at all their owners.

        Raises:
            ResourceExhausted: an owner's queue is full; nothing is queued.
            Unavailable: an owner was lost, and sending again might count the events twice; or it was away for
                PATIENCE_S.
            DeadlineExceeded: no acknowledgement within `deadline_s`.
        In the last two cases some of the events may be counted.
        """
        lane = Lane(producer_id, patient=False)
        async with _patience(deadline_s, lambda: "the events may have been counted in part"):
            batch = await self.submit(scanned, lane, sequence, 0, arrival_time_ns)
            await batch.done

    def tell_acknowledged(self, producer_id: str, sequence: int, now_ns: int) -> None:
        """Tells one owner that every batch of the producer up to this sequence is durable, with what else goes to that
        owner; returns at once. Where the owner is away for PATIENCE_S, or has no room, nobody is told: what a producer
        hears when it comes back may lag."""
        if not self._stable.is_set():
            return
        link = self._owner_of(producer_id)
        if link.applies.full:
            return
        lane = Lane(producer_id, patient=True)
        batch = lane.open_batch(1)
        part = ApplyPart(producer_id=producer_id, acknowledged_sequence=sequence, arrival_time_ns=now_ns)
        self._put(link, batch, part)
        late = asyncio.get_running_loop().call_later(
            PATIENCE_S, lane.fail, Unavailable("its owner cannot be reached", retry_after_s=1.0)
        )
        batch.done.add_done_callback(lambda _: late.cancel())

    async def read(
        self, user_ids: Sequence[str], features: Sequence[str], deadline_s: float | None = None
    ) -> list[bytes]:
        """Encoded profiles in the order of `user_ids`, empty for users never seen.

        Raises:
            DeadlineExceeded: no answer within `deadline_s`.
            Unavailable: an owner could not be reached for PATIENCE_S.
        """
        profiles: list[bytes] = [b""] * len(user_ids)
        missing = list(range(len(user_ids)))

        async def attempt() -> ProfileServiceError | None:
            asked = self._split_users(user_ids, missing)
            questions = [link.reads.ask([user_ids[i] for i in indexes], features) for link, indexes in asked]
            # A task a question is for questions to several owners; most reads have one.
            patience_s = None if self._away is None else AWAY_AFTER_S
            if len(questions) == 1:
                answers = [await _answer_or_error(questions[0], patience_s)]
            else:
                answers = await asyncio.gather(*(_answer_or_error(question, patience_s) for question in questions))
            failure: ProfileServiceError | None = None
            missing.clear()
            for (_, indexes), answer in zip(asked, answers, strict=True):
                if isinstance(answer, Unavailable):
                    missing.extend(indexes)
                    failure = answer
                elif isinstance(answer, ProfileServiceError):
                    raise answer
                else:
                    for index, profile in zip(indexes, answer, strict=True):
                        profiles[index] = profile
            if failure is not None and self._away is not None:
                try:
                    found = await self._away.read([user_ids[i] for i in missing], features)
                except Unavailable as error:
                    return error
                for index, profile in zip(missing, found, strict=True):
                    profiles[index] = profile
                return None
            return failure

        await self._until_answered(attempt, deadline_s)
        return profiles

    async def population(self, features: Sequence[str], deadline_s: float | None = None) -> bytes:
        """All users as one encoded profile, from whichever shard answers. Raises as `read` does."""
        found: list[bytes] = []
        turn = 0

        async def attempt() -> ProfileServiceError | None:
            nonlocal turn
            links = sorted(self._links.values(), key=lambda link: not link.connected)
            turn += 1
            question = links[(turn - 1) % len(links)].reads.ask([], features, population=True)
            answer = await _answer_or_error(question, None if self._away is None else AWAY_AFTER_S)
            if isinstance(answer, Unavailable) and self._away is not None and turn >= len(links):
                try:
                    answer = [await self._away.population(features)]
                except Unavailable as error:
                    return error
            if isinstance(answer, Unavailable):
                return answer
            if isinstance(answer, ProfileServiceError):
                raise answer
            found[:] = answer
            return None

        await self._until_answered(attempt, deadline_s)
        return found[0]

    async def acknowledged(self, producer_id: str) -> int:
        """The highest sequence up to which any reachable shard knows the producer to be acknowledged.

        Raises Unavailable where none can be reached.
        """
        await self._started.wait()
        answers = await asyncio.gather(
            *(link.acknowledged(producer_id, CONTROL_TIMEOUT_S) for link in self._links.values()),
            return_exceptions=True,
        )
        known = [answer for answer in answers if isinstance(answer, int)]
        if not known:
            raise Unavailable("no shard can be reached", retry_after_s=1.0)
        return max(known)

    async def status(self) -> list[tuple[ShardLocation, shard_pb2.GetShardStatusResponse | None]]:
        """How each shard does, by shard id; None where one cannot be reached. A shard that knows of a later epoch is
        followed; of one that does not answer it is asked whether it is elsewhere: a process that hangs, or a machine
        that is cut off, breaks no stream for a while."""
        links = [self._links[shard_id] for shard_id in sorted(self._links)]
        answers = await asyncio.gather(*(link.status(CONTROL_TIMEOUT_S) for link in links), return_exceptions=True)
        statuses = [None if isinstance(answer, BaseException) else answer for answer in answers]
        if any(status is None or status.epoch > self.topology.epoch for status in statuses):
            await self.refresh()
        return [(link.location, status) for link, status in zip(links, statuses, strict=True)]

    async def create_snapshot(self, deadline_s: float | None = None) -> dict[int, int]:
        """Has every shard write a snapshot, all at once; returns the log position of each, by shard id.

        Raises the error of the first shard, by its number, that could not; those of the others stay.
        """
        links = [self._links[shard_id] for shard_id in sorted(self._links)]
        answers = await asyncio.gather(*(link.create_snapshot(deadline_s) for link in links), return_exceptions=True)
        positions = {}
        for link, answer in zip(links, answers, strict=True):
            if isinstance(answer, aio.AioRpcError):
                raise _error_of(answer, f"shard {link.location.shard_id} wrote no snapshot")
            if isinstance(answer, BaseException):
                raise answer
            positions[link.location.shard_id] = answer
        return positions

    async def refresh(self) -> bool:
        """Asks for the topology and follows it; many callers share one question. Errors are logged: the old one stays.

        Returns whether there was a later one.
        """
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh())
        return await asyncio.shield(self._refreshing)

    async def _refresh(self) -> bool:
        try:
            # Whoever lost an owner waits for this, and may find the owner where it was.
            async with asyncio.timeout(CONTROL_TIMEOUT_S):
                topology = await self._source()
        except Exception as error:  # noqa: BLE001  # The source is a remote call: the topology in hand still serves.
            logger.warning("the topology cannot be refreshed: %s", reason_of(error))
            return False
        else:
            return await self._install(topology)
        finally:
            self._refreshing = None

    async def _install(self, topology: Topology) -> bool:
        before = self._topology
        if before is not None and topology.epoch <= before.epoch:
            return False
        if before is not None and topology.same_owners(before):
            self._topology = topology
            for location in topology.shards:
                await self._links[location.shard_id].move(location)
        else:
            await self._change_owners(topology)
        logger.info("routing by epoch %d: %d shards", topology.epoch, len(topology.shards))
        return True

    async def _change_owners(self, topology: Topology) -> None:
        """Questions go by the new owners when this returns; batches wait until what was split before has settled."""
        if self._settling is not None:
            await self._settling
        self._stable.clear()
        lost = set() if self._topology is None else topology.losers_since(self._topology)
        losing = [link for shard_id, link in self._links.items() if shard_id in lost]
        # From here on they send nothing: what waits there goes to others.
        answered = [link.applies.pause() for link in losing]
        links = {}
        for location in topology.shards:
            link = self._links.get(location.shard_id)
            if link is None:
                link = ShardLink(location, self._capacity, self.refresh, lambda: self.topology.epoch)
                link.start()
            elif link not in losing:
                await link.move(location)
            links[location.shard_id] = link
        self._leaving = [link for shard_id, link in self._links.items() if shard_id not in links]
        self._topology = topology
        self._links = links
        self._by_position = [links[location.shard_id] for location in topology.shards]
        self._owners = topology.owner_table()
        self._started.set()
        self._settling = asyncio.create_task(self._settle(losing, answered))

    async def _settle(self, losing: Sequence[ShardLink], answered: Sequence[Awaitable[object]]) -> None:
        await asyncio.gather(*answered)
        for part in parts_in_order(link.applies for link in losing):
            self._put_again(part)
        for shard_id, link in self._links.items():
            if link in losing:
                # Shards may have moved again meanwhile, with the same owners.
                await link.move(next(shard for shard in self.topology.shards if shard.shard_id == shard_id))
                link.applies.resume()
        self._stable.set()
        while self._leaving:
            await self._leaving.pop().close()

    def _put(self, link: ShardLink, batch: Batch, part: ApplyPart) -> None:
        self._last_serial += 1
        link.applies.put(Part(batch, self._last_serial, part))

    def _put_again(self, waiting: Part) -> None:
        """Splits a part by the owners of now."""
        part = waiting.content
        if not part.events:
            self._put(self._owner_of(part.producer_id), waiting.batch, part)
            return
        scanned = self._scan(part.events, part.arrival_time_ns)
        order, start = split_by_owner(
            scanned.user_hash, scanned.status, self._owners, self.topology.partition_bits, len(self._links)
        )
        touched = [position for position in range(len(self._links)) if start[position + 1] > start[position]]
        waiting.batch.split_further(len(touched))
        for position in touched:
            selection = order[start[position] : start[position + 1]]
            events = gather(scanned.buffer, scanned.offset, scanned.length, selection)
            share = replace(part, events=events, event_count=len(selection))
            self._put(self._by_position[position], waiting.batch, share)

    def _owner_of(self, name: str) -> ShardLink:
        """Whoever owns the partition of a user, or of something else that is to have one place."""
        return self._by_position[int(self._owners[partition_of(user_hash(name), self.topology.partition_bits)])]

    def _split_users(self, user_ids: Sequence[str], indexes: Sequence[int]) -> list[tuple[ShardLink, list[int]]]:
        by_owner: dict[int, list[int]] = {}
        owners, bits = self._owners.data, self.topology.partition_bits
        for index in indexes:
            by_owner.setdefault(owners[partition_of(user_hash(user_ids[index]), bits)], []).append(index)
        return [(self._by_position[position], owned) for position, owned in by_owner.items()]

    async def _until_answered(
        self, attempt: Callable[[], Awaitable[ProfileServiceError | None]], deadline_s: float | None
    ) -> None:
        """Repeats an attempt, by a fresh topology each time, until it returns None."""
        retry_s = FIRST_RETRY_S
        failure: ProfileServiceError | None = None
        async with _patience(deadline_s, lambda: "its owner cannot be reached" if failure is None else failure.message):
            while True:
                await self._started.wait()
                failure = await attempt()
                if failure is None:
                    return
                if not await self.refresh():
                    await asyncio.sleep(retry_s)
                    retry_s = min(2 * retry_s, LAST_RETRY_S)


async def _answer_or_error(
    question: Awaitable[list[bytes]], patience_s: float | None
) -> list[bytes] | ProfileServiceError:
    try:
        if patience_s is None:
            return await question
        async with asyncio.timeout(patience_s):
            return await question
    except TimeoutError:
        return Unavailable(f"no answer within {patience_s:g} s", retry_after_s=0.1)
    except ProfileServiceError as error:
        return error


class _patience:  # noqa: N801  # Used as `asyncio.timeout` is.
    """Ends what takes longer than the deadline, or than PATIENCE_S where there is none; says what is known then. A
    class, for generator-based context managers cost more."""

    __slots__ = ("_deadline_s", "_outcome", "_timeout")

    def __init__(self, deadline_s: float | None, outcome: Callable[[], str]) -> None:
        self._deadline_s = deadline_s
        self._outcome = outcome
        self._timeout = asyncio.timeout(PATIENCE_S if deadline_s is None else deadline_s)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            if self._deadline_s is None:
                message = f"no answer within {PATIENCE_S:g} s; {self._outcome()}"
                raise Unavailable(message, retry_after_s=1.0) from None
            raise DeadlineExceeded(f"no answer within {self._deadline_s:g} s; {self._outcome()}") from None


def _error_of(error: aio.AioRpcError, what: str) -> ProfileServiceError:
    """What a shard's plain call ended with, as an error of ours."""
    message = f"{what}: {error.details() or error.code().name}"
    match error.code():
        case StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(message)
        case StatusCode.RESOURCE_EXHAUSTED:
            return StorageFull(message, retry_after_s=1.0)
        case StatusCode.UNAVAILABLE | StatusCode.CANCELLED:
            return Unavailable(message, retry_after_s=1.0)
    return ProfileServiceError(message)
