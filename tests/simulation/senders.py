"""Those who send: frontends with their queues and streams, and behind them producers, requests with ids, and batches
without any. All of them outlive the shard."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import xxhash

from profile_service.cluster.apply_stream import ApplyStream
from profile_service.cluster.batches import Batch, Lane, Part
from profile_service.errors import DeadlineExceeded, ProfileServiceError, ResourceExhausted, Unavailable
from profile_service.wire.apply_request import REQUEST_PREFIX
from tests.simulation.events import Event, Events, part_of
from tests.simulation.model import Ledger, Violation
from tests.simulation.network import CallLost, Network
from userprofile.internal.v1 import shard_pb2

PARTITION_BITS = 4
EPOCH = 7
MOST_IN_FLIGHT = 4


@dataclass
class Outside:
    """What all senders share."""

    random: Random
    network: Network
    ledger: Ledger
    events: Events
    clock: Callable[[], int]
    seen: Counter[str]
    trace: Callable[[str], None]
    """What was exercised, how often."""
    frontends: list[Frontend] = field(default_factory=list)
    hurry: bool = False
    """Nobody thinks or gives up any more: what is left is sent."""
    last_serial: int = 0

    def frontend(self) -> Frontend:
        """Any of them."""
        return self.random.choice(self.frontends)

    async def think(self, longest_s: float) -> None:
        """Some time passes."""
        await asyncio.sleep(0.0 if self.hurry else self.random.random() * longest_s)


class Frontend:
    """A frontend's queue of one shard, with its stream."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self.applies = ApplyStream(0, outside.network.connect, self._lost, 1 << 20, lambda: EPOCH)
        self.applies.start()

    async def _lost(self) -> bool:
        await asyncio.sleep(self._outside.network.delay_s())
        return False

    def put(
        self, lane: Lane, batch: Batch, sequence: int, acknowledged: int, events: Sequence[Event], arrival_ns: int
    ) -> None:
        """Queues one part of a batch."""
        outside = self._outside
        outside.ledger.sending(lane.producer_id, sequence, events)
        outside.trace(f"{lane.producer_id}/{sequence}: sends {[event.number for event in events]}")
        outside.last_serial += 1
        part = part_of(
            tuple(events),
            producer_id=lane.producer_id,
            sequence=sequence,
            acknowledged_sequence=acknowledged,
            arrival_time_ns=arrival_ns,
        )
        self.applies.put(Part(batch, outside.last_serial, part))

    async def close(self) -> None:
        """Ends the stream."""
        await self.applies.close()


class SimulatedProducer:
    """A stream of numbered batches, sent until each is acknowledged; now and then by way of another frontend.

    What it sends again has the same number and the same events, though not in the same parts.
    """

    def __init__(self, outside: Outside, producer_id: str, batches: int) -> None:
        self._outside = outside
        self.producer_id = producer_id
        self._batches: list[tuple[Event, ...]] = []
        self._wanted = batches
        self._event_ids: list[Event] = []
        self.acknowledged = 0
        """What it was told."""

    async def run(self) -> None:
        """Sends all there is to send."""
        while self.acknowledged < self._wanted:
            await self._session(self._next_start())
            await self._outside.think(0.02)

    async def send_all_again(self) -> None:
        """Everything once more, from the first batch on."""
        self.acknowledged, told = 0, self.acknowledged
        while self.acknowledged < told:
            await self._session(self.acknowledged + 1, anew=False)

    def events_up_to(self, sequence: int) -> list[Event]:
        """Those of its first batches."""
        return [event for batch in self._batches[:sequence] for event in batch]

    def _next_start(self) -> int:
        """Where a producer goes on: behind what was acknowledged, as far as it knows, or remembers."""
        random = self._outside.random
        if self.acknowledged and random.random() < 0.2:
            self._outside.seen["producer repeats what was acknowledged"] += 1
            return random.randint(1, self.acknowledged)
        return self.acknowledged + 1

    async def _session(self, start: int, *, anew: bool = True) -> None:
        outside = self._outside
        try:
            answer = await outside.network.unary(
                "GetProducer", shard_pb2.GetProducerRequest(producer_id=self.producer_id)
            )
        except CallLost:
            await asyncio.sleep(0.01)
            return
        known: int = answer.acknowledged_sequence
        outside.trace(f"{self.producer_id}: from {start} on; {self.acknowledged} acknowledged, {known} known to be")
        if known > len(self._batches):
            raise Violation(f"{self.producer_id} is told of batch {known}, and has sent {len(self._batches)}")
        for sequence in range(1, known + 1):
            outside.ledger.promise(self._batches[sequence - 1])
        if anew:
            self.acknowledged = max(self.acknowledged, known)
        frontend, lane = outside.frontend(), Lane(self.producer_id, patient=True)
        told = max(known, start - 1)
        in_flight: list[tuple[int, Batch]] = []
        following = start
        try:
            while lane.error is None:
                while in_flight and in_flight[0][1].done.done() and in_flight[0][1].done.exception() is None:
                    told = max(told, in_flight.pop(0)[0])
                    self._promise(told)
                if not outside.hurry and outside.random.random() < 0.02:
                    outside.seen["producer changes its frontend"] += 1
                    return
                if following <= self._wanted and len(in_flight) < MOST_IN_FLIGHT:
                    in_flight.append((following, self._send(frontend, lane, following, told)))
                    following += 1
                    await outside.think(0.004)
                elif in_flight:
                    await asyncio.wait([in_flight[0][1].done])
                else:
                    self._tell(frontend, told)
                    return
        finally:
            lane.fail(Unavailable("the stream has ended", retry_after_s=1.0))

    def _tell(self, frontend: Frontend, told: int) -> None:
        """As a frontend does when a stream is all acknowledged: the owners may know."""
        lane = Lane(self.producer_id, patient=True)
        frontend.put(lane, lane.open_batch(1), 0, told, (), self._outside.clock())

    def _promise(self, told: int) -> None:
        self._outside.trace(f"{self.producer_id}: {told} acknowledged")
        for sequence in range(self.acknowledged + 1, told + 1):
            self._outside.ledger.promise(self._batches[sequence - 1])
        self.acknowledged = max(self.acknowledged, told)

    def _send(self, frontend: Frontend, lane: Lane, sequence: int, told: int) -> Batch:
        outside, random = self._outside, self._outside.random
        while len(self._batches) < sequence:
            self._batches.append(self._draw())
        events = self._batches[sequence - 1]
        halves = [events]
        if len(events) > 1 and random.random() < 0.2:
            # Partitions that change owners split what is on its way.
            bit = random.randrange(PARTITION_BITS)
            halves = [[], []]  # type: ignore[list-item]
            for event in events:
                halves[_partition(event) >> bit & 1].append(event)  # type: ignore[attr-defined]
            halves = [half for half in halves if half]
            outside.seen["batch in several parts"] += len(halves) > 1
        batch = lane.open_batch(len(halves))
        arrival_ns = outside.clock() - random.choice((0, 0, 10**6))
        for half in halves:
            frontend.put(lane, batch, sequence, told, half, arrival_ns)
        return batch

    def _draw(self) -> tuple[Event, ...]:
        outside, random = self._outside, self._outside.random
        few = random.sample(outside.events.user_ids, 2) if random.random() < 0.3 else outside.events.user_ids
        events = []
        for _ in range(min(random.choice((1, 2, 5, 5, 10, 40)), outside.events.most_at_once)):
            if self._event_ids and random.random() < 0.2:
                outside.seen["event id sent again in another batch"] += 1
                events.append(random.choice(self._event_ids))
                continue
            event_id = f"{self.producer_id}-{random.getrandbits(40)}" if random.random() < 0.15 else ""
            event = outside.events.draw(outside.clock(), user_id=random.choice(few), event_id=event_id)
            if event_id:
                self._event_ids.append(event)
            events.append(event)
        return tuple(events)


class Caller:
    """Batches of their own: with a request id, with event ids, or with nothing."""

    def __init__(self, outside: Outside, name: str, calls: int) -> None:
        self._outside = outside
        self._name = name
        self._calls = calls
        self._settled: list[Callable[[], Awaitable[None]]] = []

    async def run(self) -> None:
        """Makes its calls, one after the other."""
        kinds = [self._request, self._event_ids, self._nothing]
        for number in range(self._calls):
            await self._outside.think(0.03)
            kind = self._outside.random.choice(kinds)
            await kind(f"{self._name}-{number}")

    async def send_all_again(self) -> None:
        """Everything once more that counts once."""
        for again in self._settled:
            await again()

    async def _request(self, name: str) -> None:
        events = self._draw("")
        producer_id = REQUEST_PREFIX + name

        async def until_acknowledged() -> None:
            while not await self._attempt(producer_id, 1, events):
                await self._outside.think(0.01)

        if self._outside.random.random() < 0.2:
            self._outside.seen["request sent twice at once"] += 1
            await asyncio.gather(until_acknowledged(), until_acknowledged())
        else:
            await until_acknowledged()
        self._settled.append(until_acknowledged)

    async def _event_ids(self, name: str) -> None:
        events = self._draw(name)

        async def until_acknowledged() -> None:
            while not await self._attempt("", 0, events):
                await self._outside.think(0.01)

        await until_acknowledged()
        self._settled.append(until_acknowledged)

    async def _nothing(self, name: str) -> None:
        # It is not sent again: what is in doubt stays in doubt.
        await self._attempt("", 0, self._draw(""), last=True)

    async def _attempt(self, producer_id: str, sequence: int, events: Sequence[Event], *, last: bool = False) -> bool:
        outside = self._outside
        lane = Lane(producer_id, patient=False)
        batch = lane.open_batch(1)
        outside.frontend().put(lane, batch, sequence, 0, events, outside.clock())
        patience_s = None if outside.hurry or outside.random.random() < 0.7 else outside.random.random() * 0.05
        try:
            async with asyncio.timeout(patience_s):
                await asyncio.shield(batch.done)
        except TimeoutError:
            lane.fail(DeadlineExceeded("too late"))
            outside.seen["caller gives up"] += 1
        except ResourceExhausted:
            outside.seen["caller is refused"] += 1
            if last:
                outside.ledger.refuse(events)
        except ProfileServiceError:
            outside.seen["caller in doubt"] += 1
        else:
            outside.ledger.promise(events)
            return True
        await outside.think(0.01)
        return False

    def _draw(self, event_id: str) -> tuple[Event, ...]:
        outside, random = self._outside, self._outside.random
        return tuple(
            outside.events.draw(outside.clock(), event_id=f"{event_id}-{number}" if event_id else "")
            for number in range(random.choice((1, 1, 3, 8)))
        )


def _partition(event: Event) -> int:
    hashed: int = xxhash.xxh64_intdigest(event.user_id.encode())
    return hashed >> (64 - PARTITION_BITS)
