"""The coordinator's process as `coordination` runs it: the real coordinator, mover and replicas; and, in place of the
fleet, what gives shards their machines."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from profile_service.cluster.coordinator import Coordinator
from profile_service.cluster.leases import Leases
from profile_service.cluster.mover import Mover, Undecided
from profile_service.cluster.ownership import Ownership
from profile_service.cluster.places import PlaceRegister
from profile_service.cluster.replicas import Replicas
from profile_service.cluster.topology import Topology
from profile_service.errors import ProfileServiceError
from profile_service.storage.crashing_fs import CrashingFileSystem
from tests.simulation.coordination_parts import (
    LEASE_S,
    MACHINES,
    PARTITION_BITS,
    PROCESS,
    Control,
    Lost,
    ShardProcess,
    end_tasks,
)

if TYPE_CHECKING:
    from tests.simulation.coordination import World


class CoordinatorProcess:
    """One process of the coordinator."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._number = next(world.numbers)
        self._context = contextvars.copy_context()
        self._context.run(PROCESS.set, self._number)
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
        replicas = Replicas(self._register, lambda shard_id: Control(world, lambda: self._standby_or_none(shard_id)))
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

    def _control(self, shard_id: int) -> Control:
        return Control(self._world, lambda: self._owner_or_none(shard_id))

    def _owner_or_none(self, shard_id: int) -> ShardProcess | None:
        home = self._register.places.homes.get(shard_id)
        return None if home is None else self._world.current.get((shard_id, home))

    def _standby_or_none(self, shard_id: int) -> ShardProcess | None:
        standby = self._register.places.standbys.get(shard_id)
        return None if standby is None else self._world.current.get((shard_id, standby.node))

    def owner(self, shard_id: int) -> ShardProcess:
        found = self._owner_or_none(shard_id)
        assert found is not None
        return found

    def standby(self, shard_id: int) -> ShardProcess:
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
        await end_tasks(self._world.loop, self._number)

    # `ShardFactory`

    def create(self, shard_id: int) -> Control:
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
