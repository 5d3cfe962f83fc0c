"""Those who send and read in a run of `coordination`: each batch until it is acknowledged, some once more."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from profile_service.cluster.topology import Topology
from profile_service.errors import ProfileServiceError
from profile_service.wire.apply_request import ApplyPart
from tests.simulation.coordination_parts import BEGINNING_NS, USERS, Lost, ShardProcess, partition_of
from tests.simulation.model import Violation
from userprofile.v1 import event_service_pb2, profile_pb2

if TYPE_CHECKING:
    from tests.simulation.coordination import World


class Sender:
    """Whoever sends batches, one after the other, each until it is acknowledged by all owners."""

    def __init__(self, world: World, name: str, batches: int) -> None:
        self.world = world
        self.name = name
        self.batches = batches
        self._topology: Topology | None = None
        self._acknowledged: Counter[str] = Counter()

    async def run(self) -> None:
        random = self.world.random
        for number in range(1, self.batches + 1):
            await asyncio.sleep(random.random())
            users = [random.choice(USERS) for _ in range(random.randint(1, 12))]
            events = [(user, f"{self.name}-{number}-{n}") for n, user in enumerate(users)]
            self.world.counts.update(users)
            while not await self._attempt(number, events):  # noqa: ASYNC110  # The time is made up.
                await asyncio.sleep(random.random() * 0.1)
            self._acknowledged.update(users)
            await self._read(random.choice(users))
            if random.random() < 0.2:
                # Nobody has told it that it is acknowledged.
                self.world.seen["batches sent again"] += 1
                await self._attempt(number, events)

    def part(self, number: int, events: Sequence[tuple[str, str]]) -> ApplyPart:
        raise NotImplementedError

    async def _refresh(self) -> None:
        coordinator = self.world.coordinator
        if coordinator is not None:
            with contextlib.suppress(TimeoutError, Lost):
                async with asyncio.timeout(1.0):
                    self._topology = await coordinator.topology()

    async def _attempt(self, number: int, events: Sequence[tuple[str, str]]) -> bool:
        world = self.world
        if self._topology is None or world.random.random() < 0.1:
            await self._refresh()
        topology = self._topology
        if topology is None:
            return False
        by_owner: dict[int, list[tuple[str, str]]] = {}
        for event in events:
            by_owner.setdefault(topology.owner_of(partition_of(event[0])), []).append(event)
        if len(by_owner) > 1:
            world.seen["batches of several owners"] += 1
        sent = [self._send(topology, owner, number, part) for owner, part in by_owner.items()]
        done = all(await asyncio.gather(*sent))
        if not done:
            await self._refresh()
        return done

    async def _send(self, topology: Topology, owner: int, number: int, events: Sequence[tuple[str, str]]) -> bool:
        world = self.world
        (place,) = [shard.address for shard in topology.shards if shard.shard_id == owner]
        users = [user for user, _ in events]
        part = self.part(number, events)
        try:
            async with asyncio.timeout(2.0):
                await world.deliver(
                    lambda: world.by_address.get(place), lambda process: process.submit(part, users, topology.epoch)
                )
        except (Lost, TimeoutError, ProfileServiceError) as error:
            world.trace(f"{self.name}/{number} to shard {owner} at {place}, epoch {topology.epoch}: {error!r}")
            return False
        world.trace(f"{self.name}/{number} acknowledged by shard {owner} at {place}, epoch {topology.epoch}")
        return True

    async def _read(self, user: str) -> None:
        """What was acknowledged to this sender is read by it."""
        topology, world = self._topology, self.world
        assert topology is not None
        (place,) = [s.address for s in topology.shards if s.shard_id == topology.owner_of(partition_of(user))]

        async def read(process: ShardProcess) -> int:
            (encoded,) = process.running.read([user], [], topology.epoch)
            return profile_pb2.Profile.FromString(encoded).event_count

        try:
            count = await world.deliver(lambda: world.by_address.get(place), read)
        except (Lost, ProfileServiceError):
            return
        world.seen["reads"] += 1
        if count < self._acknowledged[user]:
            raise Violation(f"{user} has {count} events, {self._acknowledged[user]} were acknowledged to {self.name}")


class Producer(Sender):
    """Names itself and numbers its batches."""

    def part(self, number: int, events: Sequence[tuple[str, str]]) -> ApplyPart:
        return _part(events, producer_id=self.name, sequence=number, acknowledged=number - 1)


class Caller(Sender):
    """Names each request, or each event."""

    def part(self, number: int, events: Sequence[tuple[str, str]]) -> ApplyPart:
        if number % 2:
            return _part(events, producer_id=f"request:{self.name}-{number}")
        return _part(events, event_ids=True)


def _part(
    events: Sequence[tuple[str, str]],
    *,
    producer_id: str = "",
    sequence: int = 0,
    acknowledged: int = 0,
    event_ids: bool = False,
) -> ApplyPart:
    request = event_service_pb2.IngestEventsRequest()
    for user, event_id in events:
        event = request.events.add(user_id=user, type="view", event_id=event_id if event_ids else "")
        event.attributes.update({"color": "red", "price": 10.0, "item": f"item of {event_id}"})
    return ApplyPart(
        producer_id=producer_id,
        sequence=sequence,
        acknowledged_sequence=acknowledged,
        arrival_time_ns=BEGINNING_NS,
        events=request.SerializeToString(),
        event_count=len(events),
    )
