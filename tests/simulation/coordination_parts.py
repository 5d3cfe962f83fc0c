"""Shards' processes as `coordination` runs them: real shards, leases and replication, on made-up disks, that die, stop
and are replaced; and the memory of the coordinators, which fails."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from profile_service.cluster.leases import Holder
from profile_service.cluster.ownership import Ownership
from profile_service.cluster.places import Places
from profile_service.errors import Replaced, Unavailable
from profile_service.shard.following import Following
from profile_service.shard.health import Health
from profile_service.shard.lease import Grant, Lease
from profile_service.shard.replication import ReplicatedLog, Shipped
from profile_service.shard.replication_stream import decode, encode
from profile_service.shard.reports import Departed, Shipping
from profile_service.shard.shard import Shard
from profile_service.shard.state import ShardState
from profile_service.storage.crashing_fs import CrashingFileSystem
from profile_service.storage.fs import DiskFull
from profile_service.wire.apply_request import ApplyPart
from tests.shard import shards
from tests.shard.test_shard import SCHEMA
from tests.simulation.loop import SimulatedLoop
from tests.simulation.model import Violation

if TYPE_CHECKING:
    from tests.simulation.coordination import World

PARTITION_BITS = 4
PARTITIONS = 1 << PARTITION_BITS
LEASE_S = 2.0
MACHINES = ("a", "b", "c")

USERS = [f"u{n}" for n in range(60)]
BEGINNING_NS = shards.NOW_NS

PROCESS: contextvars.ContextVar[int] = contextvars.ContextVar("process", default=0)
"""Which process a task belongs to; 0 for everybody outside."""


class Lost(Exception):
    """A message, or the process that was to answer it."""


def partition_of(user: str) -> int:
    return xxhash.xxh64_intdigest(user.encode()) >> (64 - PARTITION_BITS)


class Memory:
    """What outlasts coordinators: each write takes its time, and is done at some moment of it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.state: dict[str, Any] = {"epoch": 0, "holders": {}, "places": Places()}
        self.fail_next: OSError | None = None

    def shard_ids(self) -> list[int]:
        return list(self.state["ownership"].shard_ids)

    async def epoch(self, epoch: int) -> None:
        await self._write("epoch", epoch)

    async def holders(self, holders: Mapping[int, Holder]) -> None:
        await self._write("holders", dict(holders))

    async def ownership(self, ownership: Ownership) -> None:
        assert Ownership.decode(ownership.encode()) == ownership
        await self._write("ownership", ownership)

    async def places(self, places: Places) -> None:
        assert Places.decode(places.encode()) == places
        await self._write("places", places)

    async def _write(self, name: str, value: Any) -> None:
        random = self._world.random
        self._world.check_alive()
        failure, self.fail_next = self.fail_next, None
        await asyncio.sleep(random.random() * 0.002)
        self._world.check_alive()
        # A failed write may be there all the same, unless it is the disk that had no room.
        if failure is None or (not isinstance(failure, DiskFull) and random.random() < 0.5):
            self.state[name] = value
        await asyncio.sleep(random.random() * 0.002)
        if failure is not None:
            self._world.seen["memory failed"] += 1
            raise failure


class ShardProcess:
    """One process of a shard."""

    def __init__(self, world: World, shard_id: int, machine: str, lock: str) -> None:
        self.world = world
        self.shard_id = shard_id
        self.machine = machine
        self.lock = lock
        self.number = next(world.numbers)
        self.address = f"host:{self.number}"
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self.number)
        self.alive = True
        self.death: asyncio.Future[None] = world.loop.create_future()
        self.health = Health()
        self.lease = Lease(world.clock, self.address)
        self.shard: Shard | None = None
        self.disk = world.disks.setdefault((shard_id, machine), CrashingFileSystem(world.random.getrandbits(32)))
        self._stops = 0
        self._awake = asyncio.Event()
        self._awake.set()
        self._epoch, self._owned = 0, list[int]()

    def start(self) -> None:
        self._living = self.world.loop.create_task(self._live(), context=self.context)

    async def _live(self) -> None:
        try:
            await self._recover_and_serve()
        except Replaced:
            self.world.seen["owners replaced by their standbys"] += 1
            self.world.restart(self)
        except Exception as error:  # noqa: BLE001  Whatever it is, it ends a real one.
            if self.alive:
                self.world.failure = self.world.failure or error

    async def _recover_and_serve(self) -> None:
        world = self.world
        await asyncio.sleep(world.random.random() * 0.2)
        found = await shards.recovered(
            self.disk,
            SCHEMA,
            gate=self._work,  # type: ignore[arg-type]
            partition_bits=PARTITION_BITS,
            directory=Path(f"/data/shard-{self.shard_id}"),
        )
        world.seen["recoveries"] += 1
        shard = shards.make_shard(
            found,
            shard_id=self.shard_id,
            owned=(),
            epoch=0,
            partition_bits=PARTITION_BITS,
            health=self.health,
            lease=self.lease,
            snapshot_log_bytes=world.random.choice((2000, 1 << 40)),
        )
        shard.update_topology(self._epoch, self._owned)
        self.shard = shard
        await shard.run()

    async def _work(self, work: Callable[[], Any]) -> Any:
        await self.awake()
        await asyncio.sleep(self.world.random.random() * 0.002)
        return work()

    async def awake(self) -> None:
        """Returns when the process runs."""
        await self._awake.wait()

    def stop_for(self, seconds: float) -> asyncio.Task[None]:
        async def wake() -> None:
            await asyncio.sleep(seconds)
            self._stops -= 1
            if not self._stops:
                self._awake.set()

        self._stops += 1
        self._awake.clear()
        return self.world.loop.create_task(wake(), context=contextvars.Context())

    async def end(self, *, power: bool) -> None:
        """As SIGKILL, or with its machine."""
        if not self.alive:
            return
        self.alive = False
        place = self.shard_id, self.machine
        if self.world.disks.get(place) is self.disk:
            self.world.disks[place] = self.disk.crash() if power else self.disk.kill()
        self.world.by_address.pop(self.address, None)
        self.death.set_result(None)
        # Whoever waits for it to wake hears that it has ended.
        self._awake.set()
        self.world.dead.add(self.number)
        await end_tasks(self.world.loop, self.number)

    # What the coordinator asks for.

    async def describe(self, grant: Grant | None) -> Description:
        if grant is not None:
            self.lease.take(grant)
        epoch = self._epoch if self.shard is None else self.shard.epoch
        state = "recovering" if self.shard is None else self.health.state
        lock = "" if self.shard is None else self.lock
        return Description(
            self.address,
            epoch,
            state,
            self.lease.incarnation,
            lock,
            self.lease.ask(),
            self.shipping,
            self.shard is not None and self.following.promoted,
        )

    async def update_topology(self, epoch: int, owned: Sequence[int]) -> None:
        if self.shard is not None:
            self.shard.update_topology(epoch, owned)
        elif epoch > self._epoch:
            self._epoch, self._owned = epoch, list(owned)

    @property
    def running(self) -> Shard:
        if self.shard is None:
            raise Unavailable("it recovers", 0.1)
        return self.shard

    @property
    def log(self) -> ReplicatedLog:
        log = self.running._log
        assert isinstance(log, ReplicatedLog)
        return log

    @property
    def shipping(self) -> Shipping:
        return Shipping() if self.shard is None else self.log.shipping

    @property
    def following(self) -> Following:
        following = self.running.following
        assert following is not None
        return following

    async def follow(self, replication: str, incarnation: str) -> None:
        following = self._followed(incarnation)
        if self.lease.was_held or self.running.owns_any:
            self.world.seen["owners replaced by their standbys"] += 1
            self.world.restart(self)
            raise Unavailable("it ends", 0.1)
        following.expect(replication)

    async def promote(self, incarnation: str) -> None:
        following = self._followed(incarnation)
        self.world.seen["standbys promoted"] += 1
        self.world.handed_over.add(following.replication)
        await following.promote()

    async def replicate(self, replication: str, address: str) -> None:
        state = self.running._state
        assert isinstance(state, ShardState)
        self.log.replicate(replication, Standby(self, address), self.running, state)

    async def release(self, replication: str) -> None:
        self.world.seen["owners released"] += 1
        self.log.release(replication)

    def _followed(self, incarnation: str) -> Following:
        if incarnation != self.lease.incarnation:
            raise Unavailable("it is another process by now", 0.1)
        return self.following

    async def submit(self, part: ApplyPart, users: Sequence[str], epoch: int) -> None:
        await self.running.submit([part], part.size_bytes, epoch)
        self.world.note_acknowledged(self, users, epoch)


@dataclass(frozen=True)
class Description:
    address: str
    epoch: int
    state: str
    incarnation: str
    lock: str
    asked_ns: int
    shipping: Shipping
    promoted: bool
    node: str = "node"
    progress: float = 1.0
    message: str = ""


class Target:
    """`moves.Target`."""

    def __init__(self, sender: ShardProcess, address: str) -> None:
        self._sender = sender
        self._address = address

    async def receive(self, move_id: str, piece: bytes) -> None:
        world = self._sender.world
        await self._sender.awake()
        try:
            await world.deliver(
                lambda: world.by_address.get(self._address), lambda process: process.running.receive(move_id, piece)
            )
        except Lost as error:
            raise Unavailable(str(error), 0.1) from None
        await self._sender.awake()


class Standby:
    """`replication.Standby`."""

    def __init__(self, sender: ShardProcess, address: str) -> None:
        self._sender = sender
        self._address = address

    async def take(self, replication: str, number: int, records: Sequence[Shipped]) -> None:
        world = self._sender.world
        message = decode(encode(replication, number, records))
        await self._sender.awake()
        try:
            await world.deliver(
                lambda: world.by_address.get(self._address), lambda process: process.running.take(*message)
            )
        except Lost as error:
            raise Unavailable(str(error), 0.1) from None
        await self._sender.awake()

    async def close(self) -> None:
        pass


class Control:
    """`ShardControl`: messages to whichever process the shard has there."""

    def __init__(self, world: World, find: Callable[[], ShardProcess | None]) -> None:
        self._world = world
        self._find = find

    async def _call(self, work: Callable[[ShardProcess], Awaitable[Any]]) -> Any:
        return await self._world.deliver(self._find, work)

    async def follow(self, replication: str, incarnation: str) -> None:
        await self._call(lambda process: process.follow(replication, incarnation))

    async def promote(self, incarnation: str) -> None:
        await self._call(lambda process: process.promote(incarnation))

    async def replicate(self, replication: str, address: str) -> None:
        await self._call(lambda process: process.replicate(replication, address))

    async def release(self, replication: str) -> None:
        await self._call(lambda process: process.release(replication))

    async def describe(self, grant: Grant | None) -> Description:
        answer: Description = await self._call(lambda process: process.describe(grant))
        return answer

    async def update_topology(self, epoch: int, owned: Sequence[int]) -> None:
        await self._call(lambda process: process.update_topology(epoch, owned))

    async def expect(self, move_id: str, epoch: int, partitions: Sequence[int]) -> None:
        await self._call(lambda process: process.running.moves.expect(move_id, epoch, partitions))

    async def depart(self, move_id: str, epoch: int, partitions: Sequence[int], address: str) -> Departed:
        departed: Departed = await self._call(
            lambda process: process.running.moves.depart(move_id, epoch, partitions, Target(process, address))
        )
        return departed

    async def finish(self, move_id: str) -> Departed:
        departed: Departed = await self._call(lambda process: process.running.moves.finish(move_id))
        return departed

    async def clean(self, partitions: Sequence[int]) -> None:
        await self._call(lambda process: process.running.moves.clean(partitions))

    async def sums(self) -> bytes:
        async def sums(process: ShardProcess) -> bytes:
            return process.running.moves.sums()

        answer: bytes = await self._call(sums)
        return answer

    async def adopt(self, sums: bytes) -> None:
        await self._call(lambda process: process.running.moves.adopt(sums))

    async def population_state(self) -> bytes:
        async def state(process: ShardProcess) -> bytes:
            return process.running.population_state()

        answer: bytes = await self._call(state)
        return answer

    async def set_population(self, states: Sequence[bytes]) -> None:
        pass


async def end_tasks(loop: SimulatedLoop, number: int) -> None:
    for _ in range(100):
        left = [task for task, context in loop.live_tasks() if context.get(PROCESS) == number]
        if not left:
            return
        for task in left:
            task.cancel()
        await asyncio.sleep(0)
    raise Violation(f"tasks of a dead process go on: {left}")
