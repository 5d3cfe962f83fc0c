"""The processes of the service on the nodes of the Ray cluster: a frontend on each node, each shard on the node that
has its data. Made true again and again, whatever dies, comes or goes (`processes.py` says what these processes are).

    node joins    surveyed (`survey.py`), gets a frontend; if it has a shard's data, gets the shard. One that cannot be
                  used is surveyed again after a while
    node leaves   its frontend is forgotten; shards whose home it is, and that have no standby, wait for it. Where
                  profiles are in a store they get another home instead
    new shard     gets a home: the node that is least laden for what it has. Durable before its process starts
    standby       gets another node in the same way, where there is one: a second process of the shard (`replicas.py`).
                  One whose node stays away gets yet another, unless it may have to be promoted
    process dies  Ray starts it again, on the same node
    deployment    processes of another generation are replaced one by one, each when the one before serves

Where the data is does not follow Ray's node ids, which change with each start of a node, but the name in the data
directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from profile_service.cluster.calls import run_on_node
from profile_service.cluster.coordinator import reason_of
from profile_service.cluster.places import PlaceRegister, Places
from profile_service.cluster.plan import (
    FrontendDescription,
    Node,
    NodeStanding,
    Plan,
    home_of_new_shard,
    home_of_standby,
)
from profile_service.cluster.processes import Process, create_frontend, create_shard, find_processes
from profile_service.cluster.survey import Survey, make_shard_directory, remove_shard_directory, survey
from profile_service.storage.data_directory import shard_directory

FOLLOW_INTERVAL_S = 1.0
"""Between two looks at the nodes and their frontends."""

START_INTERVAL_S = 0.1
"""The same while something starts."""

SURVEY_TIMEOUT_S = 60.0
"""Ray may have to start a process on the node for it."""

SURVEY_PATIENCE_S = 3.0
"""A look waits so long for surveys: a node that does not answer, and that Ray has not given up yet, is no reason to let
those that do wait for it."""

RESURVEY_S = 10.0
"""How soon a node that could not be used is tried again."""

DESCRIBE_TIMEOUT_S = 2.0
REPLACED_S = 0.2
"""Between two looks at a shard that has just been replaced."""

SHARD_GRACE_S = 1.0

STANDBY_PATIENCE_S = 30.0
"""A standby whose node is away for so long gets another one: it may have been started anew only. So does a shard whose
profiles are in a store, where nobody has seen its node leave."""

logger = logging.getLogger(__name__)


class Away(Exception):
    """There is no process to ask, and why."""


class Fleet:
    """All processes but the coordinator's.

    Args:
        plan: what is to run.
        register: where shards are, where they are on several nodes.
    """

    def __init__(self, plan: Plan, register: PlaceRegister, shard_ids: Iterable[int]) -> None:
        self._plan = plan
        self._register = register
        self._shard_ids = list(shard_ids)
        self._nodes: dict[str, Node] = {}
        """By Ray's id: those that are part of the cluster now, and surveyed."""
        self._surveying: dict[str, asyncio.Task[Node]] = {}
        """By Ray's id: those that are not surveyed yet."""
        self._unreachable: set[str] = set()
        """Ids of nodes that could not be surveyed: what is there stays as it is."""
        self._refused_at: dict[str, float] = {}
        """Ids of nodes on which a directory could not be made: when, by the loop's clock."""
        self._surveyed_at: dict[str, float] = {}
        """By Ray's id: when, by the loop's clock."""
        self._away: dict[str, Node] = {}
        """By name: those that were, as they were."""
        self._away_since: dict[str, float] = {}
        """By name: when they were first missed, by the loop's clock."""
        self._shards: dict[tuple[int, str], Process] = {}
        """By shard and node id."""
        self._frontends: dict[str, Process] = {}
        """By node id."""
        self._described: dict[str, FrontendDescription] = {}
        """By node id."""
        self._faults: dict[int, str] = {}
        """By shard: why it has no process."""
        self._standby_faults: dict[int, str] = {}
        """By shard: why it has no standby."""
        self._changing = asyncio.Lock()
        self._wake = asyncio.Event()
        """Something is to be made true soon."""
        self._looked = asyncio.Condition()
        """Notified after each look."""
        self.update_fault = ""
        """Why a deployment has stopped before its end; empty where it has not."""

    @property
    def _places(self) -> Places:
        """Where shards are."""
        if self._plan.node is not None:
            return Places(dict.fromkeys(self._shard_ids, self._plan.node.name))
        return self._register.places

    @property
    def _is_stored(self) -> bool:
        """Whether profiles are in a store, and so a shard can run anywhere."""
        return not self._plan.settings.storage.is_local

    def shard(self, shard_id: int) -> ActorHandle[Any]:
        """The actor of the shard's home. Raises Away where it has none."""
        if fault := self._faults.get(shard_id):
            raise Away(fault)
        if shard_id not in self._places.homes:
            raise Away("it has no process yet")
        return self._process_at(shard_id, self._places.homes[shard_id])

    def standby(self, shard_id: int) -> ActorHandle[Any]:
        """The actor of the shard's standby. Raises Away where it has none."""
        standby = self._places.standbys.get(shard_id)
        if standby is None:
            raise Away(self.standby_fault(shard_id))
        return self._process_at(shard_id, standby.node)

    def standby_fault(self, shard_id: int) -> str:
        """Why the shard has no standby; empty where nothing is known of it."""
        return self._standby_faults.get(shard_id, "")

    def _process_at(self, shard_id: int, name: str) -> ActorHandle[Any]:
        node = self._node_named(name)
        if node is None:
            before = self._away.get(name)
            where = f"{before.address} ({before.name})" if before else name
            raise Away(f"its data is on the node {where}, which is not part of the cluster now")
        process = self._shards.get((shard_id, node.node_id))
        if process is None:
            raise Away("it has no process yet")
        return process.handle

    @property
    def outdated(self) -> int:
        """How many processes are of another generation."""
        processes = [*self._frontends.values(), *self._shards.values()]
        return sum(process.generation != self._plan.generation for process in processes)

    def standings(self) -> list[NodeStanding]:
        """How the nodes do, by address."""
        held: dict[str, list[int]] = {}
        for shard_id, name in sorted(self._places.homes.items()):
            held.setdefault(name, []).append(shard_id)
        standbys: dict[str, list[int]] = {}
        for shard_id, standby in sorted(self._places.standbys.items()):
            standbys.setdefault(standby.node, []).append(shard_id)
        found = [
            self._standing(node, held.pop(node.name, []), standbys.pop(node.name, [])) for node in self._nodes.values()
        ]
        for name in held.keys() | standbys.keys():
            before = self._away.get(name)
            address, data_dir = (before.address, str(before.data_dir)) if before else ("", "")
            message = "not part of the cluster now" + ("; its shards wait for it" if name in held else "")
            found.append(
                NodeStanding(
                    name,
                    "",
                    address,
                    "away",
                    tuple(held.get(name, [])),
                    data_dir=data_dir,
                    message=message,
                    standby_ids=tuple(standbys.get(name, [])),
                )
            )
        return sorted(found, key=lambda standing: (standing.address, standing.name))

    async def adopt(self) -> None:
        """Finds the processes that are there, and creates those that are not, as far as it can be done now."""
        found = await asyncio.to_thread(find_processes)
        # Where an update was interrupted, one that is just ending may still be listed: the later one counts.
        for process in sorted(found, key=lambda process: process.generation == self._plan.generation):
            if process.role == "frontend":
                self._frontends[process.node_id] = process
            else:
                self._shards[int(process.role.removeprefix("shard-")), process.node_id] = process
        await self.look()

    async def follow(self) -> None:
        """Keeps it all true, until it is cancelled."""
        while True:
            settled = all(standing.state == "serving" for standing in self.standings())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FOLLOW_INTERVAL_S if settled else START_INTERVAL_S):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self.look()
            except Exception as error:  # noqa: BLE001  # Ray's head may be away: there is nothing to follow then.
                logger.warning("the nodes cannot be looked at: %s", reason_of(error))

    async def look(self) -> None:
        """One look at the nodes, and at what runs there."""
        async with self._changing:
            await self._look_at_nodes()
            for shard_id in list(self._shard_ids):
                try:
                    await self._settle_both(shard_id)
                except Exception as error:  # noqa: BLE001  # A node, a disk: the other shards are seen to all the same.
                    logger.warning("shard %d cannot be seen to now: %s", shard_id, reason_of(error))
            for node in self._nodes.values():
                if node.node_id not in self._frontends and node.node_id not in self._unreachable:
                    self._frontends[node.node_id] = create_frontend(self._plan, node)
        await self._describe_frontends()
        async with self._looked:
            self._looked.notify_all()

    async def _settle_both(self, shard_id: int) -> None:
        await self._settle(shard_id)
        if self._plan.settings.storage.replicas:
            await self._settle_standby(shard_id)
        elif shard_id in self._places.standbys:
            await self._register.change(lambda places: places.without_standby(shard_id))
        self._end_strays(shard_id)

    def add(self, shard_id: int) -> None:
        """There is a shard more: it gets a home and a process soon."""
        self._shard_ids.append(shard_id)
        self._wake.set()

    async def remove(self, shard_id: int) -> None:
        """The shard is no more: ends its process, if there is one, and removes what it has stored."""
        async with self._changing:
            if shard_id in self._shard_ids:
                self._shard_ids.remove(shard_id)
            for place in [place for place in self._shards if place[0] == shard_id]:
                ray.kill(self._shards.pop(place).handle)
            if self._plan.node is not None:
                await asyncio.to_thread(remove_shard_directory, self._plan.node.data_dir, shard_id)
                return
            places = self._places
            held = [places.homes.get(shard_id, "")]
            if shard_id in places.standbys:
                held.append(places.standbys[shard_id].node)
            for node in filter(None, map(self._node_named, held)):
                async with asyncio.timeout(SURVEY_TIMEOUT_S):
                    await run_on_node(node.node_id, remove_shard_directory, node.data_dir, shard_id)
                self._nodes[node.node_id] = replace(node, shards=node.shards - {shard_id})
            await self._register.change(lambda places: places.without(shard_id))

    async def update(self) -> None:
        """Replaces processes of another generation, one after the other; stops where one does not come to serve."""
        while self.outdated and not self.update_fault:
            await self._replace_outdated()
            # Some may be on nodes that are not surveyed yet.
            async with self._looked:
                await self._looked.wait()

    async def _replace_outdated(self) -> None:
        generation = self._plan.generation
        for node_id, process in sorted(self._frontends.items()):
            if process.generation != generation and self._is_reachable(node_id):
                await self._replace_frontend(process)
        homes = self._places.homes
        # Standbys first: those that can take over then do, of the schema of now.
        shards = sorted(self._shards.items(), key=lambda item: homes.get(item[0][0]) == self._name_of(item[0][1]))
        for (shard_id, _), process in shards:
            if process.generation == generation or not self._is_reachable(process.node_id):
                continue
            if self._shards.get((shard_id, process.node_id)) is not process:
                # Ended meanwhile, as it is meant to be elsewhere.
                continue
            if fault := await self._replace_shard(shard_id, process):
                self.update_fault = f"shard {shard_id} does not start as deployed: {fault}"
                logger.error("the update stops: %s", self.update_fault)
                return

    async def drain_frontends(self, timeout_s: float) -> None:
        """Has the frontends answer everything accepted, and ends them."""
        async with self._changing:
            await asyncio.gather(*(self._end(process, timeout_s) for process in self._frontends.values()))
            self._frontends.clear()

    async def drain_shards(self, timeout_s: float) -> None:
        """The same with the shards."""
        async with self._changing:
            await asyncio.gather(*(self._end(process, timeout_s) for process in self._shards.values()))
            self._shards.clear()

    def _is_reachable(self, node_id: str) -> bool:
        """Whether it is known what the node has, so that processes can be started there."""
        return node_id in self._nodes and node_id not in self._unreachable

    def _name_of(self, node_id: str) -> str:
        return self._nodes[node_id].name if node_id in self._nodes else ""

    def _node_named(self, name: str) -> Node | None:
        return next((node for node in self._nodes.values() if node.name == name and not node.fault), None)

    def _is_ready(self, node_id: str) -> bool:
        return node_id in self._described and self._described[node_id].ready

    def _standing(self, node: Node, shard_ids: list[int], standby_ids: list[int]) -> NodeStanding:
        described = self._described.get(node.node_id, FrontendDescription())
        fault = node.fault or described.fault
        return NodeStanding(
            node.name,
            node.node_id,
            node.address,
            "faulty" if fault else "serving" if described.ready else "starting",
            tuple(shard_ids),
            described.grpc_address,
            described.http_address,
            str(node.data_dir),
            fault,
            tuple(standby_ids),
        )

    async def _look_at_nodes(self) -> None:
        if self._plan.node is not None:
            node = self._plan.node
            self._nodes = {node.node_id: node}
            return
        alive = await asyncio.to_thread(_alive_nodes)
        for node_id in self._nodes.keys() - alive.keys():
            node = self._nodes.pop(node_id)
            self._away[node.name] = node
            logger.warning("node %s at %s has left", node_id, node.address)
            self._described.pop(node_id, None)
            # One that shared its directory may have been the same, started anew: it is looked at again.
            self._nodes = {known: other for known, other in self._nodes.items() if other.name != node.name}
        for node_id in self._frontends.keys() - alive.keys():
            ray.kill(self._frontends.pop(node_id).handle)
        for place in [place for place in self._shards if place[1] not in alive]:
            # Its processes may go on, cut off: without a lease, in a while.
            ray.kill(self._shards.pop(place).handle)
        for node_id in self._surveying.keys() - alive.keys():
            self._surveying.pop(node_id).cancel()
        now_s = asyncio.get_running_loop().time()
        for node_id, found in alive.items():
            known = self._nodes.get(node_id)
            again = known is not None and known.fault and now_s >= self._surveyed_at[node_id] + RESURVEY_S
            if (known is None or again) and node_id not in self._surveying:
                self._surveying[node_id] = asyncio.create_task(self._survey(found))
        if not self._surveying:
            return
        await asyncio.wait(self._surveying.values(), timeout=SURVEY_PATIENCE_S)
        for node_id in [node_id for node_id, task in self._surveying.items() if task.done()]:
            self._take_in(self._surveying.pop(node_id).result())

    def _take_in(self, node: Node) -> None:
        """The node is part of the cluster, and surveyed."""
        before = self._nodes.get(node.node_id)
        twin = self._node_named(node.name)
        if twin is not None and twin.node_id != node.node_id and not node.fault:
            fault = f"{node.data_dir} is also that of node {twin.node_id}: each needs its own"
            node = replace(node, fault=fault)
        self._nodes[node.node_id] = node
        self._surveyed_at[node.node_id] = asyncio.get_running_loop().time()
        self._away.pop(node.name, None)
        if before is None or before.fault != node.fault:
            logger.info("node %s at %s is there%s", node.node_id, node.address, node.fault and f": {node.fault}")

    async def _survey(self, found: Mapping[str, Any]) -> Node:
        node_id, address, resources = found["NodeID"], found["NodeManagerAddress"], found["Resources"]
        try:
            async with asyncio.timeout(SURVEY_TIMEOUT_S):
                seen: Survey = await run_on_node(node_id, survey, self._plan.settings, self._plan.manifest, address)
        except Exception as error:  # noqa: BLE001  # Whatever it is, the node is looked at again.
            self._unreachable.add(node_id)
            data_dir = self._plan.settings.storage.data_dir or Path()
            seen = Survey("", data_dir, fault=f"it cannot be looked at: {reason_of(error) or 'no answer'}")
        else:
            self._unreachable.discard(node_id)
        return Node(
            node_id=node_id,
            name=seen.name,
            address=address,
            data_dir=seen.data_dir,
            cpus=resources.get("CPU", 0.0),
            share=resources.get(self._plan.resource, 0.0),
            grpc_port=seen.grpc_port,
            http_port=seen.http_port,
            shards=seen.shards,
            fault=seen.fault,
        )

    async def _settle(self, shard_id: int) -> None:
        """Sees to it that the shard has a process where its data is, or anywhere if that is in a store."""
        homes = self._places.homes
        home = self._node_named(homes[shard_id]) if shard_id in homes else None
        if home is None and (shard_id not in homes or (self._is_stored and self._will_not_return(homes[shard_id]))):
            home = await self._give_home(shard_id)
        if home is None:
            return
        if self._plan.node is None and not self._is_stored and shard_id not in home.shards:
            self._faults[shard_id] = f"{shard_directory(home.data_dir, shard_id)} is missing on {home.address}"
            return
        self._faults.pop(shard_id, None)
        self._run(shard_id, home)

    async def _settle_standby(self, shard_id: int) -> None:
        """Sees to it that the shard has a standby, and that a process where it is to be."""
        if shard_id not in self._places.homes:
            return
        standby = self._places.standbys.get(shard_id)
        node = None if standby is None else self._node_named(standby.node)
        if standby is None or (node is None and not standby.in_sync and self._has_left(standby.node)):
            chosen = home_of_standby(self._able(), self._places, shard_id)
            if chosen is None:
                fault = "no other node can take one: what is acknowledged is on one machine only"
                if self._standby_faults.get(shard_id) != fault:
                    logger.warning("shard %d has no standby: %s", shard_id, fault)
                self._standby_faults[shard_id] = fault
                return
            await self._make_directory(chosen, shard_id)
            await self._register.change(
                lambda places: (
                    places.with_standby(shard_id, chosen.name) if places.standbys.get(shard_id) == standby else places
                )
            )
            node = self._node_named(self._places.standbys[shard_id].node)
        self._standby_faults.pop(shard_id, None)
        if node is None:
            return
        if shard_id not in node.shards:
            # Nothing in it is needed: a standby is built from its owner.
            if self._places.standbys[shard_id].in_sync:
                self._standby_faults[shard_id] = f"{shard_directory(node.data_dir, shard_id)} is missing"
                return
            node = await self._make_directory(node, shard_id)
        self._run(shard_id, node)

    def _will_not_return(self, name: str) -> bool:
        """Whether the node has left, so that what can be anywhere goes elsewhere. A coordinator that has just begun may
        only not have found it yet."""
        return name in self._away or self._has_left(name)

    def _able(self) -> list[Node]:
        """The nodes that may be given something new."""
        before_s = asyncio.get_running_loop().time() - RESURVEY_S
        return [node for node in self._nodes.values() if self._refused_at.get(node.node_id, before_s) <= before_s]

    def _has_left(self, name: str) -> bool:
        """Whether the node has been away for so long that its standbys go elsewhere."""
        now_s = asyncio.get_running_loop().time()
        return now_s >= self._away_since.setdefault(name, now_s) + STANDBY_PATIENCE_S

    def _run(self, shard_id: int, node: Node) -> None:
        """The shard has a process on that node."""
        self._away_since.pop(node.name, None)
        if (shard_id, node.node_id) not in self._shards:
            self._shards[shard_id, node.node_id] = create_shard(self._plan, shard_id, node)

    def _end_strays(self, shard_id: int) -> None:
        """Ends the shard's processes where neither its home is nor its standby; what they have stored stays."""
        places = self._places
        if shard_id not in places.homes:
            return
        meant = {places.homes[shard_id]}
        if shard_id in places.standbys:
            meant.add(places.standbys[shard_id].node)
        for place in [place for place in self._shards if place[0] == shard_id]:
            # Of a node that is not surveyed, or cannot be, it is not known what it is meant to have.
            name = self._name_of(place[1])
            if name and name not in meant:
                ray.kill(self._shards.pop(place).handle)

    async def _give_home(self, shard_id: int) -> Node | None:
        """The shard's home from now on, where it had none that is there; None where it can have none just now."""
        if self._surveying:
            self._faults[shard_id] = "not every node is known yet"
            return None
        found = [node for node in self._nodes.values() if shard_id in node.shards and not node.fault]
        if len(found) > 1:
            where = ", ".join(node.address for node in found)
            self._faults[shard_id] = f"there is a directory of it on each of {where}; which one is right is not known"
            return None
        # A directory that no home was given to: of a service of one machine, or of a home that was not yet durable.
        home = found[0] if found else home_of_new_shard(self._able(), self._places)
        if home is None:
            self._faults[shard_id] = f"no node can take it: none has {self._plan.resource} and a usable data directory"
            return None
        if not self._is_stored:
            home = await self._make_directory(home, shard_id)
        elif shard_id in self._places.homes:
            logger.warning("shard %d goes on at %s: its node has left", shard_id, home.address)
        await self._register.change(lambda places: places.with_home(shard_id, home.name))
        return home

    async def _make_directory(self, node: Node, shard_id: int) -> Node:
        try:
            async with asyncio.timeout(SURVEY_TIMEOUT_S):
                await run_on_node(node.node_id, make_shard_directory, node.data_dir, shard_id)
        except Exception as error:
            # What is there already goes on; what is new goes elsewhere for a while.
            self._refused_at[node.node_id] = asyncio.get_running_loop().time()
            logger.warning("%s: a directory for shard %d cannot be made: %s", node.address, shard_id, reason_of(error))
            raise
        self._nodes[node.node_id] = made = replace(node, shards=node.shards | {shard_id})
        return made

    async def _describe_frontends(self) -> None:
        async def describe(process: Process) -> None:
            try:
                async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                    self._described[process.node_id] = await process.handle.describe.remote()
            except Exception as error:  # noqa: BLE001  # The call is remote: whatever it is, it did not answer.
                known = self._described.get(process.node_id, FrontendDescription())
                self._described[process.node_id] = replace(known, ready=False)
                logger.debug("%s does not answer: %s", process.name, reason_of(error))

        await asyncio.gather(*(describe(process) for process in self._frontends.values()))

    async def _replace_frontend(self, process: Process) -> None:
        node = self._nodes[process.node_id]
        was_ready = self._is_ready(node.node_id)
        logger.info("the frontend on %s is replaced", node.address)
        await self._end(process, self._plan.settings.drain_timeout_s)
        async with self._changing:
            self._described.pop(node.node_id, None)
            self._frontends[node.node_id] = create_frontend(self._plan, node)

        def is_back() -> bool:
            # Its node may leave meanwhile. And it is ready when every shard is: one that fails may be what this update
            # is to mend.
            described = self._described.get(node.node_id)
            answers = described is not None and bool(described.grpc_address)
            return node.node_id not in self._nodes or self._is_ready(node.node_id) or (answers and not was_ready)

        async with self._looked:
            await self._looked.wait_for(is_back)

    async def _replace_shard(self, shard_id: int, process: Process) -> str:
        """Returns why it does not come to serve; empty where it does."""
        node = self._nodes[process.node_id]
        logger.info("shard %d on %s is replaced", shard_id, node.address)
        await self._end(process, self._plan.settings.drain_timeout_s)
        async with self._changing:
            self._shards[shard_id, node.node_id] = process = create_shard(self._plan, shard_id, node)
        while node.node_id in self._nodes:
            try:
                async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                    described = await process.handle.describe.remote(None)
            except ray.exceptions.ActorDiedError as error:
                return reason_of(error)
            except Exception as error:  # noqa: BLE001  # The call is remote: it will answer, or be found to have died.
                logger.debug("%s does not answer: %s", process.name, reason_of(error))
            else:
                if described.state == "failed":
                    return str(described.message)
                if described.state in ("serving", "full"):
                    return ""
            await asyncio.sleep(REPLACED_S)
        return ""

    async def _end(self, process: Process, timeout_s: float) -> None:
        """Has it answer what it has accepted, and ends it."""
        try:
            async with asyncio.timeout(timeout_s + SHARD_GRACE_S):
                await process.handle.drain.remote(*(() if process.role == "frontend" else (SHARD_GRACE_S,)))
        except Exception as error:  # noqa: BLE001  # Whatever it is, the rest has to be stopped.
            logger.warning("%s could not be drained: %s", process.name, reason_of(error))
        ray.kill(process.handle)


def _alive_nodes() -> dict[str, Mapping[str, Any]]:
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
