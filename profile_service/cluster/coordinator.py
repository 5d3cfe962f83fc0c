"""Decides which shards there are and who owns what, and keeps that true: the control plane's logic, without Ray (see
`actor.py`).

watch       every shard is asked where it is; one that is back elsewhere gets a place in a new epoch, told to the shards
first population  the shards' sums are gathered and given to all of them, one round after the other
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from profile_service.cluster.topology import ShardLocation, Topology

WATCH_INTERVAL_S = 0.5
CONTROL_TIMEOUT_S = 5.0
"""A shard that does not answer for so long is passed over in this round."""

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class Located(Protocol):
    """What a shard says of itself."""

    @property
    def address(self) -> str:
        """host:port."""

    @property
    def node(self) -> str:
        """Node it runs on."""

    @property
    def epoch(self) -> int:
        """The epoch that it goes by."""


class ShardControl(Protocol):
    """The calls that the coordinator makes to one shard. Each raises whatever the transport raises where the shard is
    away."""

    async def describe(self) -> Located:
        """Where it is."""

    async def update_topology(self, epoch: int, owned: Sequence[int]) -> None:
        """Tells it what it owns."""

    async def population_state(self) -> bytes:
        """Its sums."""

    async def set_population(self, states: Sequence[bytes]) -> None:
        """Gives it the sums of all."""


class Coordinator:
    """Owns the topology of the shards given to it.

    Args:
        topology: who owns what; the addresses are found by asking.
    """

    def __init__(self, topology: Topology, shards: Mapping[int, ShardControl], population_interval_s: float) -> None:
        self._topology = topology
        self._shards = dict(shards)
        self._population_interval_s = population_interval_s
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def topology(self) -> Topology:
        """The topology of now."""
        return self._topology

    async def start(self) -> None:
        """Finds every shard, then begins to watch. Raises what a shard raises that cannot start."""
        found = await asyncio.gather(*(shard.describe() for shard in self._shards.values()))
        # Shards that an earlier coordinator has told of later epochs must be given a later one still.
        self._topology = replace(self._topology, epoch=max(located.epoch for located in found))
        await self._relocate(dict(zip(self._shards, found, strict=True)))
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._gather_population())]

    async def close(self) -> None:
        """Stops watching."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def look(self) -> None:
        """One round of watching: asks every shard where it is."""
        answers = await self._ask_all({shard_id: shard.describe() for shard_id, shard in self._shards.items()})
        if answers:
            await self._relocate(answers)

    async def share_population(self) -> None:
        """One round of the population. The sums of a shard that is away are missing from it."""
        states = await self._ask_all({shard_id: shard.population_state() for shard_id, shard in self._shards.items()})
        merged = [states[shard_id] for shard_id in sorted(states)]
        if merged:
            await self._ask_all({shard_id: shard.set_population(merged) for shard_id, shard in self._shards.items()})

    async def _relocate(self, found: Mapping[int, Located]) -> None:
        """Takes the places in; where one is new, or a shard goes by another epoch, all shards hear of it before anyone
        else."""
        places = {
            shard_id: ShardLocation(shard_id, located.address, located.node) for shard_id, located in found.items()
        }
        current = {shard.shard_id: shard for shard in self._topology.shards}
        taken = {place.address for place in places.values()}
        for shard_id, shard in current.items():
            if shard_id not in places and shard.address in taken:
                # It is away, and another shard was given its port.
                places[shard_id] = replace(shard, address="")
        if any(places[shard_id] != current[shard_id] for shard_id in places):
            topology = self._topology.with_shards(places)
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
        # Whoever misses it is told in the next round: its epoch gives it away.
        await self._ask_all(
            {
                shard_id: self._shards[shard_id].update_topology(topology.epoch, topology.owned_by(shard_id))
                for shard_id in shard_ids
            }
        )

    async def _ask_all(self, calls: Mapping[int, Awaitable[Answer]]) -> dict[int, Answer]:
        """The answers of those that answer in time, by shard id."""

        async def ask(shard_id: int, call: Awaitable[Answer]) -> tuple[int, Answer] | None:
            try:
                async with asyncio.timeout(CONTROL_TIMEOUT_S):
                    return shard_id, await call
            except Exception as error:  # noqa: BLE001  # The calls are remote: whatever it is, the shard did not answer.
                logger.warning("shard %d does not answer: %s", shard_id, error)
                return None

        answered = await asyncio.gather(*(ask(shard_id, call) for shard_id, call in calls.items()))
        return dict(answer for answer in answered if answer is not None)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            await self.look()

    async def _gather_population(self) -> None:
        while True:
            await self.share_population()
            await asyncio.sleep(self._population_interval_s)
