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
from collections.abc import Awaitable, Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from profile_service.cluster import coordinator as coordinator_module
from profile_service.cluster import mover as mover_module
from profile_service.cluster import replicas as replicas_module
from profile_service.cluster.ownership import Ownership
from profile_service.cluster.places import Places
from profile_service.domain.population import Population
from profile_service.errors import ProfileServiceError
from profile_service.shard import moves as moves_module
from profile_service.shard import replication as replication_module
from profile_service.shard import transfer as transfer_module
from profile_service.shard.reports import IN_SYNC
from profile_service.shard.shard import Shard
from profile_service.shard.state import ShardState
from profile_service.storage.crashing_fs import CrashingFileSystem
from profile_service.storage.fs import DiskFull
from tests.shard.test_shard import SCHEMA
from tests.simulation.coordination_coordinator import CoordinatorProcess
from tests.simulation.coordination_parts import (
    BEGINNING_NS,
    LEASE_S,
    PARTITION_BITS,
    PARTITIONS,
    PROCESS,
    USERS,
    Lost,
    Memory,
    ShardProcess,
    partition_of,
)
from tests.simulation.coordination_senders import Caller, Producer
from tests.simulation.loop import SimulatedLoop
from tests.simulation.model import Violation
from tests.simulation.run import Report
from userprofile.v1 import profile_pb2

PATIENCE_S = 300.0
"""Made-up seconds after which whoever waits waits in vain."""


def run(seed: int, *, traced: bool = False, standbys: bool | None = None) -> Report:
    """One run, with standbys or without; by default the seed decides. Never raises what goes wrong: the report says
    it."""
    report = Report(seed)
    loop = SimulatedLoop()
    try:
        world = World(seed, loop, report, traced=traced, standbys=standbys)
        with world.small_parts():
            try:
                loop.run_until_complete(world.run())
            except Exception as error:  # noqa: BLE001  whatever it is, the run has found it
                report.fault = "".join(traceback.format_exception(error))
            loop.end_tasks()
    finally:
        loop.close()
    return report


class World:
    def __init__(self, seed: int, loop: SimulatedLoop, report: Report, *, traced: bool, standbys: bool | None) -> None:
        self.random = Random(seed)
        self.loop = loop
        self.seen = report.seen
        self._report = report
        self._traced = traced
        self.calm = False
        """Whether nothing goes wrong any more."""
        self.failure: Exception | None = None
        """Of a shard that has ended by itself, to which nothing gave a reason."""
        self.numbers = itertools.count(1)
        self.dead: set[int] = set()
        """Processes that have ended. Their tasks are cancelled, and what they would do then is not done."""
        self.loss = self.random.choice((0.0, 0.01, 0.05))
        self.slowest_s = self.random.choice((0.002, 0.02))
        drawn = self.random.random() < 0.7
        self.has_standbys = drawn if standbys is None else standbys
        self.memory = Memory(self)
        self.disks: dict[tuple[int, str], CrashingFileSystem] = {}
        """By shard and machine."""
        self.current: dict[tuple[int, str], ShardProcess] = {}
        """By shard and machine: the process that the coordinator reaches."""
        self.handed_over: set[str] = set()
        """Replications whose standbys were promoted."""
        self.by_address: dict[str, ShardProcess] = {}
        self.coordinator: CoordinatorProcess | None = None
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

    async def deliver(
        self, find: Callable[[], ShardProcess | None], work: Callable[[ShardProcess], Awaitable[Any]]
    ) -> Any:
        """Has a process do something, as a message to it does: the message or the answer may get lost, or come late.
        Who no longer waits for the answer does not keep the work from being done."""
        self.check_alive()
        return await asyncio.shield(self.loop.create_task(self._deliver(find, work), context=contextvars.Context()))

    def check_alive(self) -> None:
        """Ends the task where its process has ended."""
        if PROCESS.get() in self.dead:
            raise asyncio.CancelledError

    async def _deliver(
        self, find: Callable[[], ShardProcess | None], work: Callable[[ShardProcess], Awaitable[Any]]
    ) -> Any:
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
        senders = [Producer(self, f"p{n}", random.randint(5, 25)) for n in range(2)]
        callers = [Caller(self, f"c{n}", random.randint(3, 10)) for n in range(2)]
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
        self.coordinator = CoordinatorProcess(self)
        await self.coordinator.start()

    def start_shard(self, shard_id: int, machine: str, lock: str = "") -> None:
        process = ShardProcess(self, shard_id, machine, lock or f"lock of {shard_id} on {machine}")
        self.current[shard_id, machine] = process
        self.by_address[process.address] = process
        process.start()

    def restart(self, process: ShardProcess) -> None:
        """The process ends by itself, and is started again."""

        async def restart() -> None:
            await process.end(power=False)
            self._start_again(process)

        self._restarting = self.loop.create_task(restart(), context=contextvars.Context())

    def _start_again(self, process: ShardProcess) -> None:
        place = process.shard_id, process.machine
        if process.shard_id in self.memory.shard_ids() and place in self.disks and self.current.get(place) is process:
            self.start_shard(*place)

    async def _trouble(self) -> None:
        random = self.random
        kinds = ["kill", "crash", "stop", "replace", "coordinator", "memory", "snapshot", "nothing"]
        if self.has_standbys:
            kinds += ["burn", "burn", "twice"]
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

    async def _hurt(self, process: ShardProcess, what: str) -> None:
        random = self.random
        self.trace(f"{what} of shard {process.shard_id} at {process.address}")
        if what in ("kill", "crash"):
            self.seen[f"shards: {what}"] += 1
            await process.end(power=what == "crash")
            await asyncio.sleep(random.random())
            self._start_again(process)
        elif what == "twice":
            # Back before anyone has taken its place, and gone again before all is as it was.
            self.seen["shards killed twice"] += 1
            await process.end(power=False)
            self._start_again(process)
            await asyncio.sleep(0.2 + random.random() * 0.3)
            again = self.current.get((process.shard_id, process.machine))
            if again is not None and again.alive:
                await self._hurt(again, "kill")
        elif what == "stop":
            self.seen["shards stopped"] += 1
            self._stopped = process.stop_for(random.random() * 2 * LEASE_S)
        elif what == "snapshot" and process.shard is not None:
            with contextlib.suppress(ProfileServiceError):
                self.seen["snapshots"] += 1
                await process.shard.create_snapshot()
        elif what == "replace" and process.shard is not None and self._is_at_home(process):
            # Stopped, then another process is started from a copy of its disk; it wakes when its lease has run out. A
            # standby has no lease, and one that was in sync is taken to have everything: of it there may be no copy.
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

    def _is_at_home(self, process: ShardProcess) -> bool:
        places: Places = self.memory.state["places"]
        return places.homes.get(process.shard_id) == process.machine

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

    def note_acknowledged(self, process: ShardProcess, users: Sequence[str], epoch: int) -> None:
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
