"""One run: a coordinator, its shards and those who send, while processes die, are stopped and replaced, messages get
lost or come late, and partitions move all the time.

    seed ─▶ senders ──▶ shards, each on a disk of its own ◀── coordinator, mover ─▶ memory
                          ▲ kill, crash, stop, replace          ▲ kill                ▲ fails
              at the end: everything is healed, and held against what was sent; then all machines go down, and once more

In most runs each shard has a standby on another machine, and machines burn down with the disk of an owner.

Shards, coordinator, leases, mover and replicas are the real ones; what lies between them is made up: time, messages,
disks. Held against all the time: one process at a time acknowledges for a partition, by ever later epochs; whoever has
had an acknowledgement reads what was acknowledged. At the end: every event counted once, in users, sums and population;
nothing left over; each standby holds what its owner holds, and takes over when every owner burns down.

An owner whose standby has taken its place may still tell a sender what it got the standby's answer for before: that is
an acknowledgement of the successor's, which has the events, as if it were late on its way. So its epoch may be an
earlier one; never may two processes acknowledge by the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import logging
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import xxhash

from profile_service.cluster import coordinator as coordinator_module
from profile_service.cluster import mover as mover_module
from profile_service.cluster import replicas as replicas_module
from profile_service.cluster.coordinator import Coordinator
from profile_service.cluster.leases import Holder, Leases
from profile_service.cluster.mover import Mover, Undecided
from profile_service.cluster.ownership import Ownership
from profile_service.cluster.places import PlaceRegister, Places
from profile_service.cluster.replicas import Replicas
from profile_service.cluster.topology import Topology
from profile_service.domain.population import Population
from profile_service.errors import ProfileServiceError, Replaced, Unavailable
from profile_service.shard import moves as moves_module
from profile_service.shard import replication as replication_module
from profile_service.shard import transfer as transfer_module
from profile_service.shard.following import Following
from profile_service.shard.health import Health
from profile_service.shard.lease import Grant, Lease
from profile_service.shard.replication import ReplicatedLog, Shipped
from profile_service.shard.replication_stream import decode, encode
from profile_service.shard.reports import IN_SYNC, Departed, Shipping
from profile_service.shard.shard import Shard
from profile_service.shard.state import ShardState
from profile_service.storage.crashing_fs import CrashingFileSystem
from profile_service.storage.fs import DiskFull
from profile_service.wire.apply_request import ApplyPart
from tests.shard import shards
from tests.shard.test_shard import SCHEMA
from tests.simulation.loop import SimulatedLoop
from tests.simulation.model import Violation
from tests.simulation.run import Report
from userprofile.v1 import event_service_pb2, profile_pb2

PARTITION_BITS = 4
PARTITIONS = 1 << PARTITION_BITS
LEASE_S = 2.0
PATIENCE_S = 300.0
"""Made-up seconds after which whoever waits waits in vain."""

MACHINES = ("a", "b", "c")

USERS = [f"u{n}" for n in range(60)]
BEGINNING_NS = shards.NOW_NS

_PROCESS: contextvars.ContextVar[int] = contextvars.ContextVar("process", default=0)
"""Which process a task belongs to; 0 for everybody outside."""


class Lost(Exception):
    """A message, or the process that was to answer it."""


def partition_of(user: str) -> int:
    return xxhash.xxh64_intdigest(user.encode()) >> (64 - PARTITION_BITS)


def run(seed: int, *, traced: bool = False, standbys: bool | None = None) -> Report:
    """One run, with standbys or without; by default the seed decides. Never raises what goes wrong: the report says
    it."""
    report = Report(seed)
    loop = SimulatedLoop()
    try:
        world = _World(seed, loop, report, traced=traced, standbys=standbys)
        with world.small_parts():
            try:
                loop.run_until_complete(world.run())
            except Exception as error:  # noqa: BLE001  whatever it is, the run has found it
                report.fault = "".join(traceback.format_exception(error))
            loop.end_tasks()
    finally:
        loop.close()
    return report


class _World:
    def __init__(self, seed: int, loop: SimulatedLoop, report: Report, *, traced: bool, standbys: bool | None) -> None:
        self.random = Random(seed)
        self.loop = loop
        self.seen = report.seen
        self._report = report
        self._traced = traced
        self.calm = False
        self.failure: Exception | None = None
        """Of a shard that has ended by itself, to which nothing gave a reason."""
        """Whether nothing goes wrong any more."""
        self.numbers = itertools.count(1)
        self.dead: set[int] = set()
        """Processes that have ended. Their tasks are cancelled, and what they would do then is not done."""
        self.loss = self.random.choice((0.0, 0.01, 0.05))
        self.slowest_s = self.random.choice((0.002, 0.02))
        drawn = self.random.random() < 0.7
        self.has_standbys = drawn if standbys is None else standbys
        self.memory = _Memory(self)
        self.disks: dict[tuple[int, str], CrashingFileSystem] = {}
        """By shard and machine."""
        self.current: dict[tuple[int, str], _Process] = {}
        """By shard and machine: the process that the coordinator reaches."""
        self.handed_over: set[str] = set()
        """Replications whose standbys were promoted."""
        self.by_address: dict[str, _Process] = {}
        self.coordinator: _CoordinatorProcess | None = None
        self.acknowledged: dict[int, tuple[int, str]] = {}
        """By partition: the epoch and the process that acknowledged last."""
        self.owners_of_epoch: dict[tuple[int, int], str] = {}
        self.counts: Counter[str] = Counter()
        """Events sent, by user."""

    def clock(self) -> int:
        return int(self.loop.time() * 1e9)

    def trace(self, line: str) -> None:
        if self._traced:
            self._report.trace.append(f"{self.loop.time():9.4f} {line}")

    @contextlib.contextmanager
    def small_parts(self) -> Iterator[None]:
        """Everything that goes in pieces goes in small ones."""
        random = self.random
        patches: list[contextlib.AbstractContextManager[object]] = [
            mock.patch.object(transfer_module, "PIECE_BYTES", random.choice((300, 3000, 1 << 18))),
            mock.patch.object(transfer_module, "SCANNED_ROWS", random.choice((3, 20, 1 << 14))),
            mock.patch.object(transfer_module, "PRODUCERS_A_PIECE", random.choice((1, 256))),
            mock.patch.object(transfer_module, "REQUESTS_A_PIECE", random.choice((2, 4096))),
            mock.patch.object(transfer_module, "EVENT_IDS_A_PIECE", random.choice((3, 1 << 14))),
            mock.patch.object(moves_module, "NEARLY_THERE", random.choice((1, 10, 256))),
            mock.patch.object(moves_module, "CLEANED_ROWS", random.choice((2, 1 << 14))),
            mock.patch.object(moves_module, "CLEANED_USERS", random.choice((1, 256))),
            mock.patch.object(mover_module, "MOVED_AT_ONCE", random.choice((1, 4))),
            mock.patch.object(mover_module, "COPY_TIMEOUT_S", 5.0),
            mock.patch.object(mover_module, "CALL_TIMEOUT_S", 2.0),
            mock.patch.object(mover_module, "START_TIMEOUT_S", 20.0),
            mock.patch.object(replicas_module, "CALL_TIMEOUT_S", 1.0),
            mock.patch.object(replicas_module, "RETRY_S", 0.2),
            mock.patch.object(replication_module, "TAKE_TIMEOUT_S", random.choice((0.1, 0.5))),
            mock.patch.object(replication_module, "MESSAGE_BYTES", random.choice((200, 1 << 22))),
            mock.patch.object(coordinator_module, "DESCRIBE_TIMEOUT_S", 1.0),
            mock.patch.object(coordinator_module, "TELL_TIMEOUT_S", 0.3),
            mock.patch.object(coordinator_module, "FIRST_LOOK_S", 1.0),
        ]
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            level = logging.root.manager.disable
            logging.disable(logging.CRITICAL)
            stack.callback(logging.disable, level)
            yield

    # --- messages ---

    async def deliver(self, find: Callable[[], _Process | None], work: Callable[[_Process], Awaitable[Any]]) -> Any:
        """Has a process do something, as a message to it does: the message or the answer may get lost, or come late.
        Who no longer waits for the answer does not keep the work from being done."""
        self.check_alive()
        return await asyncio.shield(self.loop.create_task(self._deliver(find, work), context=contextvars.Context()))

    def check_alive(self) -> None:
        """Ends the task where its process has ended."""
        if _PROCESS.get() in self.dead:
            raise asyncio.CancelledError

    async def _deliver(self, find: Callable[[], _Process | None], work: Callable[[_Process], Awaitable[Any]]) -> Any:
        await self._travel()
        process = find()
        if process is None or not process.alive:
            raise Lost("nobody is there")
        await process.awake()
        if not process.alive:
            raise Lost("the process has ended")
        task = self.loop.create_task(_as_coroutine(work(process)), context=process.context)
        await asyncio.wait([task, process.death], return_when=asyncio.FIRST_COMPLETED)
        if not task.done() or task.cancelled():
            raise Lost("the process has ended")
        await process.awake()
        await self._travel()
        return task.result()

    async def _travel(self) -> None:
        random = self.random
        if not self.calm and random.random() < self.loss:
            self.seen["messages lost"] += 1
            await asyncio.sleep(random.random())
            raise Lost("the message is lost")
        if not self.calm and random.random() < self.loss:
            self.seen["messages late"] += 1
            await asyncio.sleep(random.random() * 3)
        await asyncio.sleep(random.random() * self.slowest_s)

    # --- the run ---

    async def run(self) -> None:
        random = self.random
        self.memory.state["ownership"] = Ownership.even(PARTITION_BITS, random.randint(1, 3))
        await self.start_coordinator()
        senders = [_Producer(self, f"p{n}", random.randint(5, 25)) for n in range(2)]
        callers = [_Caller(self, f"c{n}", random.randint(3, 10)) for n in range(2)]
        sending = [self.loop.create_task(sender.run()) for sender in (*senders, *callers)]
        trouble = [self.loop.create_task(self._trouble()), self.loop.create_task(self._changes())]
        for _ in range(random.randint(5, 25)):
            await asyncio.sleep(random.random())
            if all(task.done() for task in sending):
                break
        for task in trouble:
            task.cancel()
        await asyncio.wait(trouble)
        for task in trouble:
            if not task.cancelled() and task.exception() is not None:
                raise Violation("trouble") from task.exception()
        await self._heal()
        _, waiting_for = await asyncio.wait(sending, timeout=PATIENCE_S)
        if waiting_for:
            if self.failure is not None:
                raise Violation("a shard has ended by itself") from self.failure
            waiting = "\n".join(repr(task) for task, _ in self.loop.live_tasks())
            raise Violation(f"senders wait in vain:\n{waiting}")
        await asyncio.gather(*sending)
        await self._check()
        await self._power_off()
        await self._check()
        if self.has_standbys:
            await self._burn_every_owner()
            await self._check()

    async def start_coordinator(self) -> None:
        self.coordinator = _CoordinatorProcess(self)
        await self.coordinator.start()

    def start_shard(self, shard_id: int, machine: str, lock: str = "") -> None:
        process = _Process(self, shard_id, machine, lock or f"lock of {shard_id} on {machine}")
        self.current[shard_id, machine] = process
        self.by_address[process.address] = process
        process.start()

    def restart(self, process: _Process) -> None:
        """The process ends by itself, and is started again."""

        async def restart() -> None:
            await process.end(power=False)
            self._start_again(process)

        self._restarting = self.loop.create_task(restart(), context=contextvars.Context())

    def _start_again(self, process: _Process) -> None:
        place = process.shard_id, process.machine
        if process.shard_id in self.memory.shard_ids() and place in self.disks and self.current.get(place) is process:
            self.start_shard(*place)

    async def _trouble(self) -> None:
        random = self.random
        kinds = ["kill", "crash", "stop", "replace", "coordinator", "memory", "snapshot", "nothing"]
        if self.has_standbys:
            kinds += ["burn", "burn"]
        while True:
            await asyncio.sleep(random.random() * 1.5)
            what = random.choice(kinds)
            alive = [process for process in self.current.values() if process.alive]
            if what == "coordinator":
                self.seen["coordinators killed"] += 1
                assert self.coordinator is not None
                await self.coordinator.kill()
                await asyncio.sleep(random.random())
                await self.start_coordinator()
            elif what == "burn":
                await self._burn(random.choice(self.memory.shard_ids()))
            elif what == "memory":
                self.memory.fail_next = random.choice((DiskFull(Path("/memory"), 1), OSError("it fails")))
            elif not alive or what == "nothing":
                continue
            else:
                await self._hurt(random.choice(alive), what)

    async def _hurt(self, process: _Process, what: str) -> None:
        random = self.random
        self.trace(f"{what} of shard {process.shard_id} at {process.address}")
        if what in ("kill", "crash"):
            self.seen[f"shards: {what}"] += 1
            await process.end(power=what == "crash")
            await asyncio.sleep(random.random())
            self._start_again(process)
        elif what == "stop":
            self.seen["shards stopped"] += 1
            self._stopped = process.stop_for(random.random() * 2 * LEASE_S)
        elif what == "snapshot" and process.shard is not None:
            with contextlib.suppress(ProfileServiceError):
                self.seen["snapshots"] += 1
                await process.shard.create_snapshot()
        elif what == "replace" and process.shard is not None:
            # Stopped, then another process is started from a copy of its disk; it wakes when its lease has run out.
            self.seen["shards replaced"] += 1
            stopped = process.stop_for(LEASE_S * random.uniform(1.05, 2.0))
            await asyncio.sleep(random.random() * LEASE_S)
            place = process.shard_id, process.machine
            if self.current.get(place) is process and process.alive:
                self.disks[place] = deepcopy(process.disk).kill()
                self.start_shard(*place, f"lock of a copy, {next(self.numbers)}")
                await asyncio.shield(stopped)
                await asyncio.sleep(random.random())
                await process.end(power=False)

    async def _burn(self, shard_id: int) -> bool:
        """The machine of an owner is lost with its disk, if that is the only thing that is amiss with the shard: the
        coordinator counts on the standby, and the owner ships to it. Returns whether it was."""
        places: Places = self.memory.state["places"]
        standby = places.standbys.get(shard_id)
        place = shard_id, places.homes.get(shard_id, "")
        owner = self.current.get(place)
        if standby is None or not standby.in_sync or owner is None or not owner.alive:
            return False
        if owner.shipping.state != IN_SYNC or not owner.shipping.replication.startswith(f"{standby.node}/"):
            return False
        self.seen["owners burnt"] += 1
        self.trace(f"shard {shard_id} burns on {place[1]}, its standby is on {standby.node}")
        self.disks.pop(place)
        await self.current.pop(place).end(power=True)
        return True

    async def _burn_every_owner(self) -> None:
        for shard_id in self.memory.shard_ids():
            if not await self._burn(shard_id):
                raise Violation(f"shard {shard_id} has no standby that is in sync, although nothing goes wrong")

    async def _changes(self) -> None:
        random = self.random
        while True:
            await asyncio.sleep(random.random() * 0.5)
            coordinator = self.coordinator
            if coordinator is None or coordinator.mover is None:
                continue
            mover = coordinator.mover
            change: Callable[[], Awaitable[int]]
            if random.random() < 0.5:
                moving = random.sample(range(PARTITIONS), random.randint(1, 4))
                target = random.choice(self.memory.shard_ids())
                change = lambda: mover.move(moving, target)  # noqa: B023, E731
            else:
                count = random.randint(1, 4)
                change = lambda: mover.scale(count)  # noqa: B023, E731
            await coordinator.do(change)

    async def _heal(self) -> None:
        self.calm = True
        self.memory.fail_next = None
        if self.coordinator is None or not self.coordinator.alive:
            await self.start_coordinator()
        for shard_id, machine in self.disks:
            place = shard_id, machine
            if shard_id in self.memory.shard_ids() and (place not in self.current or not self.current[place].alive):
                self.start_shard(shard_id, machine)

    async def _power_off(self) -> None:
        assert self.coordinator is not None
        await self.coordinator.kill()
        for process in list(self.current.values()):
            await process.end(power=True)
        for shard_id, machine in self.disks:
            if shard_id in self.memory.shard_ids():
                self.start_shard(shard_id, machine)
        await self.start_coordinator()

    # --- what must hold ---

    def note_acknowledged(self, process: _Process, users: Sequence[str], epoch: int) -> None:
        """The process has decided to acknowledge events of these users, sent by this epoch."""
        for partition in {partition_of(user) for user in users}:
            before = self.acknowledged.get(partition)
            # What was sent by an earlier epoch is taken by who has been the owner ever since.
            if before is not None and before[1] == process.address:
                epoch = max(epoch, before[0])
            if before is not None and before[0] > epoch and process.shipping.replication not in self.handed_over:
                raise Violation(f"partition {partition}: {process.address} acknowledges at {epoch}, after {before}")
            owner = self.owners_of_epoch.setdefault((partition, epoch), process.address)
            if owner != process.address:
                raise Violation(f"partition {partition}, epoch {epoch}: {owner} and {process.address} acknowledge")
            if before is not None and before[0] > epoch:
                self.seen["acknowledgements of a successor's"] += 1
            else:
                self.acknowledged[partition] = (epoch, process.address)

    async def _check(self) -> None:
        coordinator = self.coordinator
        assert coordinator is not None
        try:
            async with asyncio.timeout(PATIENCE_S):
                await coordinator.settled()
        except TimeoutError:
            raise Violation("it never comes to rest") from None
        assert coordinator.coordinator is not None
        topology, ownership = coordinator.coordinator.topology, coordinator.coordinator.ownership
        ownership.check_invariants()
        if ownership.leftovers or ownership.retiring:
            raise Violation(f"left over: {ownership}")
        found: Counter[str] = Counter()
        states, events = [], 0
        for shard_id in ownership.shard_ids:
            shard = coordinator.owner(shard_id).running
            assert isinstance(shard._state, ShardState)
            shard._state.check_invariants()
            users = shard._state.table.users
            held = {users.bytes_of(number).decode() for number in users.numbers().tolist()}
            strangers = {user for user in held if topology.owner_of(partition_of(user)) != shard_id}
            if strangers:
                raise Violation(f"shard {shard_id} holds users of others: {sorted(strangers)}")
            for user in held:
                (encoded,) = shard.read([user], [])
                profile = profile_pb2.Profile.FromString(encoded)
                found[user] = profile.event_count
                if profile.features["views"].counter.value != profile.event_count:
                    raise Violation(f"user {user}: {profile}")
            if self.has_standbys:
                self._check_standby(shard, coordinator.standby(shard_id).running)
            states.append(shard.population_state())
            events += shard.status().event_count
        if found != self.counts:
            wrong = {user: (found[user], self.counts[user]) for user in USERS if found[user] != self.counts[user]}
            raise Violation(f"counted, sent: {wrong}")
        if events != self.counts.total():
            raise Violation(f"the shards have counted {events} events, {self.counts.total()} were sent")
        population = profile_pb2.Profile.FromString(Population.merge(SCHEMA, states).profile(BEGINNING_NS))
        if population.event_count != self.counts.total():
            raise Violation(f"the population has {population.event_count} events, {self.counts.total()} were sent")

    def _check_standby(self, owner: Shard, standby: Shard) -> None:
        mine, theirs = owner._state, standby._state
        assert isinstance(mine, ShardState)
        assert isinstance(theirs, ShardState)
        theirs.check_invariants()
        found = []
        for state in (mine, theirs):
            users = state.table.users
            held = sorted(users.bytes_of(number).decode() for number in users.numbers().tolist())
            profiles = [state.table.profile(user, BEGINNING_NS) for user in held]
            producers = state.producers
            sequences = {p.producer_id: p.last.tolist() for p in producers.producers(0, producers.places)}
            requests = {r.request_id: r.reached for r in producers.requests(*producers.requests_held)}
            found.append((held, profiles, sequences, requests, state.event_count, state.adopted))
        if found[0] != found[1]:
            raise Violation(f"shard {owner.shard_id} and its standby differ: {found}")


async def _as_coroutine(work: Awaitable[Any]) -> Any:
    return await work


class _Memory:
    """What outlasts coordinators: each write takes its time, and is done at some moment of it."""

    def __init__(self, world: _World) -> None:
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


class _Process:
    """One process of a shard."""

    def __init__(self, world: _World, shard_id: int, machine: str, lock: str) -> None:
        self.world = world
        self.shard_id = shard_id
        self.machine = machine
        self.lock = lock
        self.number = next(world.numbers)
        self.address = f"host:{self.number}"
        self.context = contextvars.copy_context()
        self.context.run(_PROCESS.set, self.number)
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
        await _end_tasks(self.world.loop, self.number)

    # What the coordinator asks for.

    async def describe(self, grant: Grant | None) -> _Description:
        if grant is not None:
            self.lease.take(grant)
        epoch = self._epoch if self.shard is None else self.shard.epoch
        state = "recovering" if self.shard is None else self.health.state
        lock = "" if self.shard is None else self.lock
        return _Description(
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
        self.log.replicate(replication, _Standby(self, address), self.running, state)

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
class _Description:
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


class _Target:
    """`moves.Target`."""

    def __init__(self, sender: _Process, address: str) -> None:
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


class _Standby:
    """`replication.Standby`."""

    def __init__(self, sender: _Process, address: str) -> None:
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


class _Control:
    """`ShardControl`: messages to whichever process the shard has there."""

    def __init__(self, world: _World, find: Callable[[], _Process | None]) -> None:
        self._world = world
        self._find = find

    async def _call(self, work: Callable[[_Process], Awaitable[Any]]) -> Any:
        return await self._world.deliver(self._find, work)

    async def follow(self, replication: str, incarnation: str) -> None:
        await self._call(lambda process: process.follow(replication, incarnation))

    async def promote(self, incarnation: str) -> None:
        await self._call(lambda process: process.promote(incarnation))

    async def replicate(self, replication: str, address: str) -> None:
        await self._call(lambda process: process.replicate(replication, address))

    async def release(self, replication: str) -> None:
        await self._call(lambda process: process.release(replication))

    async def describe(self, grant: Grant | None) -> _Description:
        answer: _Description = await self._call(lambda process: process.describe(grant))
        return answer

    async def update_topology(self, epoch: int, owned: Sequence[int]) -> None:
        await self._call(lambda process: process.update_topology(epoch, owned))

    async def expect(self, move_id: str, epoch: int, partitions: Sequence[int]) -> None:
        await self._call(lambda process: process.running.moves.expect(move_id, epoch, partitions))

    async def depart(self, move_id: str, epoch: int, partitions: Sequence[int], address: str) -> Departed:
        departed: Departed = await self._call(
            lambda process: process.running.moves.depart(move_id, epoch, partitions, _Target(process, address))
        )
        return departed

    async def finish(self, move_id: str) -> Departed:
        departed: Departed = await self._call(lambda process: process.running.moves.finish(move_id))
        return departed

    async def clean(self, partitions: Sequence[int]) -> None:
        await self._call(lambda process: process.running.moves.clean(partitions))

    async def sums(self) -> bytes:
        async def sums(process: _Process) -> bytes:
            return process.running.moves.sums()

        answer: bytes = await self._call(sums)
        return answer

    async def adopt(self, sums: bytes) -> None:
        await self._call(lambda process: process.running.moves.adopt(sums))

    async def population_state(self) -> bytes:
        async def state(process: _Process) -> bytes:
            return process.running.population_state()

        answer: bytes = await self._call(state)
        return answer

    async def set_population(self, states: Sequence[bytes]) -> None:
        pass


class _CoordinatorProcess:
    """One process of the coordinator."""

    def __init__(self, world: _World) -> None:
        self._world = world
        self._number = next(world.numbers)
        self._context = contextvars.copy_context()
        self._context.run(_PROCESS.set, self._number)
        self.alive = True
        self.coordinator: Coordinator | None = None
        self.mover: Mover | None = None
        self._started: asyncio.Task[None] | None = None

    async def start(self) -> None:
        world, state = self._world, self._world.memory.state
        world.trace("a coordinator starts")
        ownership: Ownership = state["ownership"]
        self._register = PlaceRegister(state["places"], world.memory.places)
        controls: dict[int, Any] = {shard_id: self._control(shard_id) for shard_id in ownership.shard_ids}
        leases = Leases(LEASE_S, world.clock, state["holders"])
        replicas = Replicas(self._register, lambda shard_id: _Control(world, lambda: self._standby_or_none(shard_id)))
        self.coordinator = Coordinator(
            ownership, PARTITION_BITS, max(1, state["epoch"]), controls, 0.5, world.memory, leases, replicas
        )
        self._placing = world.loop.create_task(self._place(), context=self._context)
        self.mover = Mover(self.coordinator, self)
        self._started = world.loop.create_task(self._begin(), context=self._context)

    async def _begin(self) -> None:
        assert self.coordinator is not None
        assert self.mover is not None
        await self.coordinator.start()
        await self._attempt(self.mover.resume)

    def _control(self, shard_id: int) -> _Control:
        return _Control(self._world, lambda: self._owner_or_none(shard_id))

    def _owner_or_none(self, shard_id: int) -> _Process | None:
        home = self._register.places.homes.get(shard_id)
        return None if home is None else self._world.current.get((shard_id, home))

    def _standby_or_none(self, shard_id: int) -> _Process | None:
        standby = self._register.places.standbys.get(shard_id)
        return None if standby is None else self._world.current.get((shard_id, standby.node))

    def owner(self, shard_id: int) -> _Process:
        found = self._owner_or_none(shard_id)
        assert found is not None
        return found

    def standby(self, shard_id: int) -> _Process:
        found = self._standby_or_none(shard_id)
        assert found is not None
        return found

    async def _place(self) -> None:
        """As Fleet: sees to it that shards and standbys have machines, and processes there."""
        assert self.coordinator is not None
        while True:
            for shard_id in list(self.coordinator.ownership.shard_ids):
                with contextlib.suppress(OSError):
                    await self._settle(shard_id)
            await asyncio.sleep(0.2)

    async def _settle(self, shard_id: int) -> None:
        world, register = self._world, self._register
        if shard_id not in register.places.homes:
            chosen = world.random.choice(MACHINES)
            world.disks.setdefault((shard_id, chosen), CrashingFileSystem(world.random.getrandbits(32)))
            await register.change(lambda places: places.with_home(shard_id, chosen))
        home, standby = register.places.homes[shard_id], register.places.standbys.get(shard_id)
        self._ensure(shard_id, home)
        if not world.has_standbys:
            return
        burnt = standby is not None and (shard_id, standby.node) not in world.disks
        if standby is None or (burnt and not standby.in_sync):
            other = world.random.choice([machine for machine in MACHINES if machine != home])
            world.disks.setdefault((shard_id, other), CrashingFileSystem(world.random.getrandbits(32)))
            await register.change(
                lambda places: places.with_standby(shard_id, other) if places.homes[shard_id] != other else places
            )
        if (standby := register.places.standbys.get(shard_id)) is not None:
            self._ensure(shard_id, standby.node)

    async def topology(self) -> Topology:
        """As CoordinatorActor.topology."""
        assert self.coordinator is not None
        if not self.alive or self.coordinator.topology.epoch <= 1:
            raise Lost("no coordinator")
        async with self.coordinator.changing:
            return self.coordinator.topology

    async def do(self, change: Callable[[], Awaitable[Any]]) -> None:
        """A change that somebody asks for; returns when it has ended, or this process."""
        assert self._started is not None
        task = self._world.loop.create_task(self._attempt(change, after=self._started), context=self._context)
        await asyncio.wait([task])

    async def _attempt(self, change: Callable[[], Awaitable[Any]], after: asyncio.Task[None] | None = None) -> None:
        if after is not None:
            await asyncio.wait([after])
        world = self._world
        try:
            await change()
            world.seen["changes done"] += 1
        except ProfileServiceError as error:
            world.trace(f"a change is not done: {error}")
            world.seen["changes not done"] += 1
        except OSError as error:
            world.trace(f"a change is not done: {error}")
        except Undecided:
            world.seen["undecided"] += 1
            self._restarting = world.loop.create_task(self._restart(), context=contextvars.Context())

    async def _restart(self) -> None:
        if self.alive:
            await self.kill()
            await self._world.start_coordinator()

    async def settled(self) -> None:
        """Returns when every shard serves, has its lease, and nothing is left to be done."""
        world = self._world
        assert self.coordinator is not None
        assert self.mover is not None
        while True:
            await asyncio.sleep(0.2)
            shard_ids = self.coordinator.ownership.shard_ids
            processes = [self._owner_or_none(shard_id) for shard_id in shard_ids]
            epoch = self.coordinator.topology.epoch
            ready = all(p and p.shard and p.shard.epoch == epoch and p.lease.is_held for p in processes)
            if ready and self._started is not None and self._started.done():
                await self.mover.resume()
                if self.coordinator.ownership.leftovers or self.coordinator.topology.epoch != epoch:
                    continue
                standbys = [self._register.places.standbys.get(shard_id) for shard_id in shard_ids]
                if not world.has_standbys or all(standby is not None and standby.in_sync for standby in standbys):
                    return

    async def kill(self) -> None:
        self.alive = False
        self._world.dead.add(self._number)
        await _end_tasks(self._world.loop, self._number)

    # `ShardFactory`

    def create(self, shard_id: int) -> _Control:
        self._world.seen["shards added"] += 1
        return self._control(shard_id)

    def _ensure(self, shard_id: int, machine: str) -> None:
        place = shard_id, machine
        if place not in self._world.current and place in self._world.disks:
            self._world.start_shard(*place)

    async def remove(self, shard_id: int) -> None:
        self._world.seen["shards retired"] += 1
        for place in [place for place in self._world.current if place[0] == shard_id]:
            process = self._world.current.pop(place)
            # From outside: what ends a process is not part of it.
            ending = self._world.loop.create_task(process.end(power=False), context=contextvars.Context())
            await asyncio.wait([ending])
        for place in [place for place in self._world.disks if place[0] == shard_id]:
            del self._world.disks[place]
        with contextlib.suppress(OSError):
            await self._register.change(lambda places: places.without(shard_id))


class _Sender:
    """Whoever sends batches, one after the other, each until it is acknowledged by all owners."""

    def __init__(self, world: _World, name: str, batches: int) -> None:
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

        async def read(process: _Process) -> int:
            (encoded,) = process.running.read([user], [], topology.epoch)
            return profile_pb2.Profile.FromString(encoded).event_count

        try:
            count = await world.deliver(lambda: world.by_address.get(place), read)
        except (Lost, ProfileServiceError):
            return
        world.seen["reads"] += 1
        if count < self._acknowledged[user]:
            raise Violation(f"{user} has {count} events, {self._acknowledged[user]} were acknowledged to {self.name}")


class _Producer(_Sender):
    """Names itself and numbers its batches."""

    def part(self, number: int, events: Sequence[tuple[str, str]]) -> ApplyPart:
        return _part(events, producer_id=self.name, sequence=number, acknowledged=number - 1)


class _Caller(_Sender):
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


async def _end_tasks(loop: SimulatedLoop, number: int) -> None:
    for _ in range(100):
        left = [task for task, context in loop.live_tasks() if context.get(_PROCESS) == number]
        if not left:
            return
        for task in left:
            task.cancel()
        await asyncio.sleep(0)
    raise Violation(f"tasks of a dead process go on: {left}")
