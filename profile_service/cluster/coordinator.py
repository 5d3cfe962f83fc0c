"""Decides which shards there are and who owns what, and keeps that true: the control plane's logic, without Ray (see
`actor.py`).

watch       every shard is asked where it is and how it does, each on its own, so that one that does not answer holds up
            none of the others; one that is back elsewhere gets a place in a new epoch, told to the shards first
standbys    are built, and promoted when their owners are away (`replicas.py`)
moves       partitions change owners, shards come and go (`mover.py`)
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
from profile_service.cluster.ownership import Ownership
from profile_service.cluster.replicas import Replicas
from profile_service.cluster.shard_control import Located, ShardControl, ShardDead
from profile_service.cluster.topology import ShardLocation, Topology
from profile_service.errors import Unavailable

WATCH_INTERVAL_S = 0.5
"""Between two looks at a shard that serves."""

RETURN_INTERVAL_S = 0.1
"""Between two looks at one that does not, yet."""

FIRST_LOOK_S = 10.0
"""The first topology waits so long for every shard to say where it is; whoever is later gets a place in a later one."""

DESCRIBE_TIMEOUT_S = 5.0
"""A shard that does not answer for so long is away."""

PROBE_INTERVAL_S = 0.2
"""How long a look waits before it finds out whether anybody still listens where the shard was, and again after that."""

MOST_ASKED = 16
"""Calls to a shard that is away, of one look at it."""

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


class Memory(Protocol):
    """What outlasts a coordinator: each call returns when it is durable, or raises OSError."""

    async def epoch(self, epoch: int) -> None:
        """The epoch is given out."""

    async def holders(self, holders: Mapping[int, Holder]) -> None:
        """These hold the shards' leases."""

    async def ownership(self, ownership: Ownership) -> None:
        """This is who owns what."""


class Coordinator:
    """Owns the topology of the shards given to it.

    Args:
        ownership: who owns what.
        partition_bits: 2**partition_bits partitions.
        epoch: the last one known.
        shards: by shard id, as many as there are at first.
        memory: where epochs are made durable. An OSError is logged: a disk that fails keeps no shard from being found.
        leases: of the shards.
        replicas: their standbys; None where no shard has one.
        listens: whether anybody may listen at an address, host:port. None where that cannot be told.
    """

    def __init__(
        self,
        ownership: Ownership,
        partition_bits: int,
        epoch: int,
        shards: Mapping[int, ShardControl],
        population_interval_s: float,
        memory: Memory,
        leases: Leases,
        replicas: Replicas | None = None,
        listens: Callable[[str], Awaitable[bool]] | None = None,
    ) -> None:
        self._ownership = ownership
        self._topology = ownership.topology(partition_bits, epoch)
        self._shards = dict(shards)
        self._population_interval_s = population_interval_s
        self._memory = memory
        self._leases = leases
        self._replicas = replicas
        self._listens = listens
        self._answered: set[int] = set()
        """Shards that this coordinator has heard of: one that it has not may just be on its way."""
        self._patient_until_s = 0.0
        self._standings = dict.fromkeys(self._shards, Standing("starting"))
        self._populations: dict[int, bytes] = {}
        self.changing = asyncio.Lock()
        """Held while there is no saying which topology counts: `install` needs it."""
        self._changed = asyncio.Condition()
        self._holding = asyncio.Lock()
        self._watching: dict[int, asyncio.Task[None]] = {}
        self._gathering: asyncio.Task[None] | None = None

    @property
    def topology(self) -> Topology:
        """The topology of now."""
        return self._topology

    @property
    def standings(self) -> dict[int, Standing]:
        """How each shard stands, as last heard."""
        return dict(self._standings)

    async def start(self) -> None:
        """Finds every shard that can be found within FIRST_LOOK_S, or half a lease, then begins to watch."""
        self._patient_until_s = asyncio.get_running_loop().time() + FIRST_LOOK_S
        # Those that answer have a lease from then on, and must get the next one in time.
        found = await self._ask_all(self._shards, self._ask, min(FIRST_LOOK_S, self._leases.duration_s / 2))
        for shard_id, located in found.items():
            await self._stand(shard_id, Standing(located.state, located.progress, located.message))
        epochs = [located.epoch for located in found.values()]
        self._topology = replace(self._topology, epoch=max([self._topology.epoch, *epochs]))
        await self._relocate(found, always=True)
        for shard_id in self._shards:
            self._watching[shard_id] = asyncio.create_task(self._watch(shard_id))
        self._gathering = asyncio.create_task(self._gather_population())

    async def close(self) -> None:
        """Stops watching."""
        tasks = [*self._watching.values(), *filter(None, [self._gathering])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def look(self) -> None:
        """One look at every shard."""
        await asyncio.gather(*(self._look_at(shard_id) for shard_id in self._shards))

    async def share_population(self) -> None:
        """One round of the population. Of a shard that is away the sums are those of before."""
        shards = self._shards
        retiring = self._ownership.retiring
        reading = [shard_id for shard_id in shards if self._standings[shard_id].reads]
        if retiring is not None and retiring.shard_id in reading:
            # Its sums no longer change, and count once: as those that were gathered before, or with its heir's.
            reading.remove(retiring.shard_id)
        self._populations |= await self._ask_all(
            reading, lambda shard_id: shards[shard_id].population_state(), TELL_TIMEOUT_S
        )
        merged = [state for _, state in sorted(self._populations.items())]
        if merged:
            await self._ask_all(reading, lambda shard_id: shards[shard_id].set_population(merged), TELL_TIMEOUT_S)

    @property
    def ownership(self) -> Ownership:
        """Who owns what, and what is under way."""
        return self._ownership

    @property
    def shards(self) -> Mapping[int, ShardControl]:
        """The shards, by id."""
        return self._shards

    async def remember(self, ownership: Ownership) -> None:
        """Makes durable what is under way; the owners are as before. Raises OSError."""
        await self._memory.ownership(ownership)
        self._ownership = ownership

    async def install(self, topology: Topology, ownership: Ownership, first: Sequence[int] = ()) -> None:
        """Makes a later topology the one that counts; the caller holds `changing`. The shards `first` hear of it before
        the others: what they no longer own, they no longer answer for when its owner begins.

        Raises:
            Unavailable: the epoch cannot be made durable; everything is as it was.
            OSError: the owners cannot be made durable; whether they are is then not known.
        """
        assert self.changing.locked()
        if ownership is self._ownership:
            await self._give_out(topology.epoch)
        else:
            try:
                await self._memory.epoch(topology.epoch)
            except OSError as error:
                raise Unavailable(f"an epoch cannot be made durable: {error}", retry_after_s=1.0) from None
            await self._memory.ownership(ownership)
            self._ownership = ownership
        logger.info("epoch %d: %d shards, %d ranges", topology.epoch, len(topology.shards), len(topology.starts))
        if first:
            await self._tell(topology, first)
        await self._tell(topology, [shard_id for shard_id in self._shards if shard_id not in first])
        self._topology = topology

    def add_shard(self, shard_id: int, shard: ShardControl) -> None:
        """There is a shard more, which has begun to start."""
        self._shards[shard_id] = shard
        self._standings[shard_id] = Standing("starting")
        self._watching[shard_id] = asyncio.create_task(self._watch(shard_id))

    async def remove_shard(self, shard_id: int) -> None:
        """The shard is no more, and no topology has it."""
        watching = self._watching.pop(shard_id)
        watching.cancel()
        await asyncio.wait([watching])
        del self._shards[shard_id], self._standings[shard_id]
        self._populations.pop(shard_id, None)
        self._leases.forget(shard_id)
        if self._replicas is not None:
            self._replicas.forget(shard_id)

    def forget_population(self, shard_id: int) -> None:
        """The shard's sums count as another's from now on."""
        self._populations.pop(shard_id, None)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns when the condition holds; it is looked at whenever a shard stands otherwise than before."""
        async with self._changed:
            await self._changed.wait_for(condition)

    async def _look_at(self, shard_id: int) -> None:
        try:
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                located = await self._ask_while_there(shard_id)
        except ShardDead as error:
            await self._stand(shard_id, Standing("failed", message=str(error)))
            await self._replace(shard_id)
        except Exception as error:  # noqa: BLE001  # The call is remote: whatever it is, the shard did not answer.
            await self._stand(shard_id, Standing("away", message=reason_of(error)))
            await self._replace(shard_id)
        else:
            await self._stand(shard_id, Standing(located.state, located.progress, located.message))
            await self._relocate({shard_id: located})
            if located.state == "failed" or (
                located.state == "recovering" and self._follows_another(shard_id, located)
            ):
                await self._replace(shard_id)
            elif self._replicas is not None and self._standings[shard_id].reads and self._holds(shard_id, located):
                await self._replicas.heard(shard_id, self._shards[shard_id], located)

    def _follows_another(self, shard_id: int, located: Located) -> bool:
        """Whether the process is there because the one that had the lease has ended."""
        held = self._leases.holders.get(shard_id)
        return held is not None and held.incarnation != located.incarnation

    def _holds(self, shard_id: int, located: Located) -> bool:
        held = self._leases.holders.get(shard_id)
        return held is not None and held.incarnation == located.incarnation

    async def _replace(self, shard_id: int) -> None:
        """The shard is away, or not back yet: its standby takes its place, if it has one that can."""
        if self._replicas is None:
            return
        if shard_id not in self._answered and asyncio.get_running_loop().time() < self._patient_until_s:
            return
        if await self._replicas.promote(shard_id):
            await self._look_at(shard_id)

    async def _ask_while_there(self, shard_id: int) -> Located:
        """As `_ask`. As soon as nobody listens at the shard's address any more, which shows before a call fails, it
        raises ConnectionError where a standby could take over. Else the process is waited for, which may be on its way:
        it is asked anew, as a call to the one before fails long after the new one serves."""
        known = [shard.address for shard in self._topology.shards if shard.shard_id == shard_id and shard.address]
        asking = [asyncio.ensure_future(self._ask(shard_id))]
        try:
            while True:
                answered, _ = await asyncio.wait(asking, timeout=PROBE_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
                if answered:
                    return await min(answered, key=lambda asked: asked.exception() is not None)
                if not known or self._listens is None or await self._listens(known[0]):
                    continue
                if self._replicas is not None and self._replicas.may_promote(shard_id):
                    raise ConnectionError(f"nobody listens at {known[0]}")
                if len(asking) < MOST_ASKED:
                    asking.append(asyncio.ensure_future(self._ask(shard_id)))
        finally:
            for asked in asking:
                asked.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def _ask(self, shard_id: int) -> Located:
        """Asks the shard where it is, and gives it its lease."""
        shard = self._shards[shard_id]
        grant = self._leases.grant(shard_id)
        located = await shard.describe(grant)
        self._answered.add(shard_id)
        if await self._hear(shard_id, located) or (grant is None and self._holds(shard_id, located)):
            # Its first lease, or the first of this coordinator's, is not to wait for the next look.
            located = await shard.describe(self._leases.grant(shard_id))
            await self._hear(shard_id, located)
        return located

    async def _hear(self, shard_id: int, located: Located) -> bool:
        """The shard's process asks for a lease; returns whether it has become the holder just now."""
        asking = Holder(located.incarnation, located.lock)
        held = self._leases.holders.get(shard_id)
        new = held is None or held.incarnation != asking.incarnation
        if held != asking and not await self._take_as_holder(shard_id, asking, located.promoted):
            return False
        self._leases.heard(shard_id, asking, located.asked_ns)
        return new

    async def _take_as_holder(self, shard_id: int, asking: Holder, promoted: bool) -> bool:
        async with self._holding:
            if not self._leases.may_hold(shard_id, asking, promoted=promoted):
                return False
            held = self._leases.holders.get(shard_id)
            try:
                if self._replicas is not None and (held is None or held.incarnation != asking.incarnation):
                    await self._replicas.new_owner(shard_id)
                await self._memory.holders({**self._leases.holders, shard_id: asking})
            except OSError as error:
                logger.warning("shard %d gets no lease: its holder cannot be made durable: %s", shard_id, error)
                return False
            self._leases.hold(shard_id, asking)
            return True

    async def _stand(self, shard_id: int, standing: Standing) -> None:
        if standing.state != self._standings[shard_id].state:
            level = logging.WARNING if standing.state in ("away", "failed", "full", "stalled") else logging.INFO
            logger.log(
                level, "shard %d is %s%s", shard_id, standing.state, standing.message and f": {standing.message}"
            )
        self._standings[shard_id] = standing
        async with self._changed:
            self._changed.notify_all()

    async def _relocate(self, found: Mapping[int, Located], *, always: bool = False) -> None:
        """Takes the places in; where one is new, or a shard goes by another epoch, all shards hear of it before anyone
        else. `always` makes a new epoch even where nothing is new."""
        async with self.changing:
            places = {
                shard_id: ShardLocation(shard_id, located.address, located.node)
                for shard_id, located in found.items()
                if located.address and shard_id in self._ownership.shard_ids
            }
            current = {shard.shard_id: shard for shard in self._topology.shards}
            taken = {place.address for place in places.values()}
            for shard_id, shard in current.items():
                if shard_id not in places and shard.address in taken:
                    # It is away, and another shard was given its port.
                    places[shard_id] = replace(shard, address="")
            if always or any(places[shard_id] != current[shard_id] for shard_id in places):
                topology = self._topology.with_shards(places)
                await self._give_out(topology.epoch)
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

    async def _give_out(self, epoch: int) -> None:
        """Makes an epoch durable by which nobody owns anything else than before: it is no harm if it is not."""
        try:
            await self._memory.epoch(epoch)
        except OSError as error:
            logger.warning("epoch %d cannot be made durable: %s", epoch, error)

    async def _tell(self, topology: Topology, shard_ids: Sequence[int]) -> None:
        # Whoever misses it is told after the next look: its epoch gives it away. Those that are away hold nobody up.
        async def tell(shard_id: int) -> None:
            update = self._shards[shard_id].update_topology(topology.epoch, topology.owned_by(shard_id))
            telling, going = asyncio.ensure_future(update), asyncio.ensure_future(self.until(lambda: is_away(shard_id)))
            try:
                await asyncio.wait([telling, going], return_when=asyncio.FIRST_COMPLETED)
                if telling.done():
                    await telling
            finally:
                telling.cancel()
                going.cancel()

        def is_away(shard_id: int) -> bool:
            standing = self._standings.get(shard_id)
            return standing is None or standing.state in ("away", "failed")

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
            try:
                await self._look_at(shard_id)
            except Exception:  # Whatever it is, the shard is looked at again: without that it has no lease.
                logger.exception("shard %d cannot be looked at", shard_id)
            settled = self._standings[shard_id].state in ("serving", "full", "stalled", "failed")
            await asyncio.sleep(WATCH_INTERVAL_S if settled else RETURN_INTERVAL_S)

    async def _gather_population(self) -> None:
        while True:
            await self.share_population()
            await asyncio.sleep(self._population_interval_s)


def reason_of(error: Exception) -> str:
    """What went wrong in a remote call, in one line; Ray says more."""
    return str(error).strip().split("\n")[0] or type(error).__name__
