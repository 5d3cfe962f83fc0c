"""Decides which shards there are and who owns what, and keeps that true: the control plane's logic, without Ray (see
`actor.py`).

watch       every shard is asked where it is and how it does, each on its own, so that one that does not answer holds up
            none of the others; one that is back elsewhere gets a place in a new epoch, told to the shards first
population  the shards' sums are gathered and given to all of them, one round after the other

How a shard stands, as the coordinator knows it:

    starting ──▶ recovering ──▶ serving ◀──▶ full, stalled
                     ▲  │          │
                     │  └─▶ failed │ the process ends, or does not answer
                     └─── away ◀───┘

Each look also carries the shard's lease (`leases.py`), which it must have to acknowledge anything: one process of a
shard at a time has it.

Epochs never go back: each is made durable before anyone hears of it, and a coordinator begins after the last one that
is durable, and after every one that a shard has heard of. A shard's process starts without an epoch and without
partitions: it takes nothing before a coordinator of now has told it what it owns.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from profile_service.cluster.leases import Holder, Leases
from profile_service.cluster.topology import ShardLocation, Topology
from profile_service.shard.lease import Grant

WATCH_INTERVAL_S = 0.5
"""Between two looks at a shard that serves."""

RETURN_INTERVAL_S = 0.1
"""Between two looks at one that does not, yet."""

FIRST_LOOK_S = 10.0
"""The first topology waits so long for every shard to say where it is; whoever is later gets a place in a later one."""

DESCRIBE_TIMEOUT_S = 5.0
"""A shard that does not answer for so long is away."""

TELL_TIMEOUT_S = 1.0
"""A shard that does not answer for so long is told of an epoch, or of the population, in a later round."""

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Standing:
    """How a shard stands."""

    state: str
    """ "starting", "recovering", "serving", "full", "stalled", "failed" or "away"."""
    progress: float = 0.0
    """How much of its recovery is done, 0 to 1."""
    message: str = ""
    """What the state is about, for people."""

    @property
    def reads(self) -> bool:
        """Whether it answers questions."""
        return self.state in ("serving", "full", "stalled")


class ShardDead(Exception):
    """The shard is away, and will not be back by itself."""


class Located(Protocol):
    """What a shard says of itself."""

    @property
    def address(self) -> str:
        """host:port; empty until it listens."""

    @property
    def node(self) -> str:
        """Node it runs on."""

    @property
    def epoch(self) -> int:
        """The epoch that it goes by."""

    @property
    def state(self) -> str:
        """As in `Standing`."""

    @property
    def progress(self) -> float:
        """As in `Standing`."""

    @property
    def message(self) -> str:
        """As in `Standing`."""

    @property
    def incarnation(self) -> str:
        """Tells this process from those before it."""

    @property
    def lock(self) -> str:
        """Identity of the lock that it has on its directory; empty before it has it."""

    @property
    def asked_ns(self) -> int:
        """When it asked for a lease, by its own clock."""


class Memory(Protocol):
    """What outlasts a coordinator: each call returns when it is durable, or raises OSError."""

    async def epoch(self, epoch: int) -> None:
        """The epoch is given out."""

    async def holders(self, holders: Mapping[int, Holder]) -> None:
        """These hold the shards' leases."""


class ShardControl(Protocol):
    """The calls that the coordinator makes to one shard. Each raises whatever the transport raises where the shard is
    away, and ShardDead where it stays so."""

    async def describe(self, grant: Grant | None) -> Located:
        """Where it is, and how it does; `grant` is its lease."""

    async def update_topology(self, epoch: int, owned: Sequence[int]) -> None:
        """Tells it what it owns."""

    async def population_state(self) -> bytes:
        """Its sums."""

    async def set_population(self, states: Sequence[bytes]) -> None:
        """Gives it the sums of all."""


class Coordinator:
    """Owns the topology of the shards given to it.

    Args:
        topology: who owns what, at the last epoch known; the addresses are found by asking.
        memory: where epochs are made durable. An OSError is logged: a disk that fails keeps no shard from being found.
        leases: of the shards.
    """

    def __init__(
        self,
        topology: Topology,
        shards: Mapping[int, ShardControl],
        population_interval_s: float,
        memory: Memory,
        leases: Leases,
    ) -> None:
        self._topology = topology
        self._shards = dict(shards)
        self._population_interval_s = population_interval_s
        self._memory = memory
        self._leases = leases
        self._standings = dict.fromkeys(self._shards, Standing("starting"))
        self._populations: dict[int, bytes] = {}
        self._changing = asyncio.Lock()
        self._holding = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def topology(self) -> Topology:
        """The topology of now."""
        return self._topology

    @property
    def standings(self) -> dict[int, Standing]:
        """How each shard stands, as last heard."""
        return dict(self._standings)

    async def start(self) -> None:
        """Finds every shard that can be found within FIRST_LOOK_S, then begins to watch."""
        found = await self._ask_all(self._shards, self._ask, FIRST_LOOK_S)
        for shard_id, located in found.items():
            self._stands(shard_id, Standing(located.state, located.progress, located.message))
        epochs = [located.epoch for located in found.values()]
        self._topology = replace(self._topology, epoch=max([self._topology.epoch, *epochs]))
        await self._relocate(found, always=True)
        self._tasks = [asyncio.create_task(self._watch(shard_id)) for shard_id in self._shards]
        self._tasks.append(asyncio.create_task(self._gather_population()))

    async def close(self) -> None:
        """Stops watching."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def look(self) -> None:
        """One look at every shard."""
        await asyncio.gather(*(self._look_at(shard_id) for shard_id in self._shards))

    async def share_population(self) -> None:
        """One round of the population. Of a shard that is away the sums are those of before."""
        shards = self._shards
        reading = [shard_id for shard_id in shards if self._standings[shard_id].reads]
        self._populations |= await self._ask_all(
            reading, lambda shard_id: shards[shard_id].population_state(), TELL_TIMEOUT_S
        )
        merged = [state for _, state in sorted(self._populations.items())]
        if merged:
            await self._ask_all(reading, lambda shard_id: shards[shard_id].set_population(merged), TELL_TIMEOUT_S)

    async def _look_at(self, shard_id: int) -> None:
        try:
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                located = await self._ask(shard_id)
        except ShardDead as error:
            self._stands(shard_id, Standing("failed", message=str(error)))
        except Exception as error:  # noqa: BLE001  # The call is remote: whatever it is, the shard did not answer.
            self._stands(shard_id, Standing("away", message=reason_of(error)))
        else:
            self._stands(shard_id, Standing(located.state, located.progress, located.message))
            await self._relocate({shard_id: located})

    async def _ask(self, shard_id: int) -> Located:
        """Asks the shard where it is, and gives it its lease."""
        shard = self._shards[shard_id]
        located = await shard.describe(self._leases.grant(shard_id))
        if await self._hear(shard_id, located):
            # Its first lease is not to wait for the next look.
            located = await shard.describe(self._leases.grant(shard_id))
            await self._hear(shard_id, located)
        return located

    async def _hear(self, shard_id: int, located: Located) -> bool:
        """The shard's process asks for a lease; returns whether it has become the holder just now."""
        asking = Holder(located.incarnation, located.lock)
        held = self._leases.holders.get(shard_id)
        new = held is None or held.incarnation != asking.incarnation
        if held != asking and not await self._take_as_holder(shard_id, asking):
            return False
        self._leases.heard(shard_id, asking, located.asked_ns)
        return new

    async def _take_as_holder(self, shard_id: int, asking: Holder) -> bool:
        async with self._holding:
            if not self._leases.may_hold(shard_id, asking):
                return False
            try:
                await self._memory.holders({**self._leases.holders, shard_id: asking})
            except OSError as error:
                logger.warning("shard %d gets no lease: its holder cannot be made durable: %s", shard_id, error)
                return False
            self._leases.hold(shard_id, asking)
            return True

    def _stands(self, shard_id: int, standing: Standing) -> None:
        if standing.state != self._standings[shard_id].state:
            level = logging.WARNING if standing.state in ("away", "failed", "full", "stalled") else logging.INFO
            logger.log(
                level, "shard %d is %s%s", shard_id, standing.state, standing.message and f": {standing.message}"
            )
        self._standings[shard_id] = standing

    async def _relocate(self, found: Mapping[int, Located], *, always: bool = False) -> None:
        """Takes the places in; where one is new, or a shard goes by another epoch, all shards hear of it before anyone
        else. `always` makes a new epoch even where nothing is new."""
        async with self._changing:
            places = {
                shard_id: ShardLocation(shard_id, located.address, located.node)
                for shard_id, located in found.items()
                if located.address
            }
            current = {shard.shard_id: shard for shard in self._topology.shards}
            taken = {place.address for place in places.values()}
            for shard_id, shard in current.items():
                if shard_id not in places and shard.address in taken:
                    # It is away, and another shard was given its port.
                    places[shard_id] = replace(shard, address="")
            if always or any(places[shard_id] != current[shard_id] for shard_id in places):
                topology = self._topology.with_shards(places)
                try:
                    await self._memory.epoch(topology.epoch)
                except OSError as error:
                    logger.warning("epoch %d cannot be made durable: %s", topology.epoch, error)
                logger.info(
                    "epoch %d: %s", topology.epoch, ", ".join(f"{s.shard_id} at {s.address}" for s in topology.shards)
                )
                await self._tell(topology, list(self._shards))
                self._topology = topology
            else:
                await self._tell(
                    self._topology,
                    [shard_id for shard_id, located in found.items() if located.epoch != self._topology.epoch],
                )

    async def _tell(self, topology: Topology, shard_ids: Sequence[int]) -> None:
        # Whoever misses it is told after the next look: its epoch gives it away.
        def tell(shard_id: int) -> Awaitable[None]:
            return self._shards[shard_id].update_topology(topology.epoch, topology.owned_by(shard_id))

        await self._ask_all(shard_ids, tell, TELL_TIMEOUT_S)

    async def _ask_all(
        self, shard_ids: Iterable[int], call: Callable[[int], Awaitable[Answer]], timeout_s: float
    ) -> dict[int, Answer]:
        """The answers of those that answer in time, by shard id."""

        async def ask(shard_id: int) -> tuple[int, Answer] | None:
            try:
                async with asyncio.timeout(timeout_s):
                    return shard_id, await call(shard_id)
            except Exception as error:  # noqa: BLE001  # The calls are remote: whatever it is, the shard did not answer.
                logger.debug("shard %d does not answer: %s", shard_id, reason_of(error))
                return None

        answered = await asyncio.gather(*map(ask, shard_ids))
        return dict(answer for answer in answered if answer is not None)

    async def _watch(self, shard_id: int) -> None:
        while True:
            await self._look_at(shard_id)
            settled = self._standings[shard_id].state in ("serving", "full", "stalled", "failed")
            await asyncio.sleep(WATCH_INTERVAL_S if settled else RETURN_INTERVAL_S)

    async def _gather_population(self) -> None:
        while True:
            await self.share_population()
            await asyncio.sleep(self._population_interval_s)


def reason_of(error: Exception) -> str:
    """What went wrong in a remote call, in one line; Ray says more."""
    return str(error).strip().split("\n")[0] or type(error).__name__
