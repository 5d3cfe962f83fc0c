"""What the service is, where its parts are, and how they do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence

from profile_service import __version__
from profile_service.clock import Clock
from profile_service.cluster.changes import Changed, Changes
from profile_service.cluster.coordinator import reason_of
from profile_service.cluster.plan import Layout as ServiceLayout
from profile_service.cluster.plan import NodeStanding
from profile_service.cluster.router import Router
from profile_service.cluster.topology import ShardLocation
from profile_service.config import Settings
from profile_service.domain.layout import Layout
from profile_service.domain.schema import Schema
from profile_service.errors import DeadlineExceeded, InvalidArgument
from profile_service.rpc.requests import parse
from profile_service.shard.store_opening import shown_store
from userprofile.internal.v1 import shard_pb2
from userprofile.v1 import admin_service_pb2

REFRESH_INTERVAL_S = 2.0
"""How old the shards' figures may be that `/metrics` shows."""

RETURN_INTERVAL_S = 0.1
"""How often a shard that does not serve is asked whether it does."""

READING_STATES = ("serving", "full", "stalled")

NODES_TIMEOUT_S = 2.0
"""While the coordinator is away, the nodes are shown as they were."""

ShardStatus = admin_service_pb2.GetStatusResponse.ShardStatus
NodeStatus = admin_service_pb2.GetStatusResponse.NodeStatus

logger = logging.getLogger(__name__)


class Admin:
    """Answers questions about the service.

    Args:
        changes: what is asked of the coordinator.
    """

    def __init__(self, router: Router, schema: Schema, settings: Settings, clock: Clock, changes: Changes) -> None:
        self._router = router
        self._changes = changes
        self._last_layout = ServiceLayout()
        self._schema = schema
        self._settings = settings
        self._start_ns = clock()
        self._encoded_schema = _describe(schema).SerializeToString()
        self.draining = False
        self.last_shards: list[ShardStatus] = []
        """The shards as last asked."""

    async def get_schema(self, request: bytes, deadline_s: float | None) -> bytes:
        """An encoded GetSchemaResponse."""
        parse(admin_service_pb2.GetSchemaRequest, request)
        return self._encoded_schema

    async def get_topology(self, request: bytes, deadline_s: float | None) -> bytes:
        """An encoded GetTopologyResponse: the topology by which this frontend routes."""
        parse(admin_service_pb2.GetTopologyRequest, request)
        topology = self._router.topology
        response = admin_service_pb2.GetTopologyResponse(epoch=topology.epoch, partition_count=topology.partition_count)
        for shard in topology.shards:
            response.shards.add(shard_id=shard.shard_id, address=shard.address, node=shard.node)
        for owned in topology.ranges():
            response.ranges.add(first_partition=owned.first, last_partition=owned.last, shard_id=owned.shard_id)
        return response.SerializeToString()

    async def get_status(self, request: bytes, deadline_s: float | None) -> bytes:
        """An encoded GetStatusResponse: asks every shard."""
        parse(admin_service_pb2.GetStatusRequest, request)
        answers, layout = await asyncio.gather(self._router.status(), self._layout())
        self.last_shards = [_shard_status(location, status, layout) for location, status in answers]
        response = admin_service_pb2.GetStatusResponse(
            version=__version__,
            schema_name=self._schema.name,
            state="draining" if self.draining else "serving",
            user_count=sum(shard.user_count for shard in self.last_shards),
            event_count=sum(shard.event_count for shard in self.last_shards),
            epoch=self._router.topology.epoch,
            shards=self.last_shards,
            nodes=map(_node_status, layout.nodes),
            replicas=self._settings.storage.replicas,
            sync_mode=self._sync_mode(answers),
            dedupe_window_seconds=self._settings.capacity.event_id_window_s,
            dedupe_capacity=self._settings.capacity.event_ids_per_shard,
            data_dir=str(self._settings.storage.data_dir or "") if self._settings.storage.is_local else "",
            store=shown_store(self._settings),
        )
        response.start_time.FromNanoseconds(self._start_ns)
        if response.user_count and self._settings.storage.is_local:
            response.bytes_per_user = sum(shard.state_bytes for shard in self.last_shards) / response.user_count
        return response.SerializeToString()

    def _sync_mode(self, answers: Sequence[tuple[ShardLocation, shard_pb2.GetShardStatusResponse | None]]) -> str:
        """A store's own is what the shards have heard of it."""
        if self._settings.storage.is_local:
            return self._settings.storage.sync
        known = (status.sync_mode for _, status in answers if status is not None)
        return next((mode for mode in known if mode != "unknown"), "unknown")

    async def create_snapshot(self, request: bytes, deadline_s: float | None) -> bytes:
        """An encoded CreateSnapshotResponse, once every shard has published a snapshot: it takes as long as it takes,
        or as the caller waits."""
        parse(admin_service_pb2.CreateSnapshotRequest, request)
        positions = await self._router.create_snapshot(deadline_s)
        return admin_service_pb2.CreateSnapshotResponse(log_positions=positions).SerializeToString()

    async def move_partitions(self, request: bytes, deadline_s: float | None) -> bytes:
        """An encoded MovePartitionsResponse, once the target owns all of them."""
        asked = parse(admin_service_pb2.MovePartitionsRequest, request)
        epoch, moved = await self._changed(
            self._changes.move(list(asked.partitions), asked.target_shard_id), deadline_s
        )
        return admin_service_pb2.MovePartitionsResponse(epoch=epoch, moved=moved).SerializeToString()

    async def scale_shards(self, request: bytes, deadline_s: float | None) -> bytes:
        """An encoded ScaleShardsResponse, once there are so many."""
        asked = parse(admin_service_pb2.ScaleShardsRequest, request)
        epoch, moved = await self._changed(self._changes.scale(asked.shard_count), deadline_s)
        return admin_service_pb2.ScaleShardsResponse(epoch=epoch, moved=moved).SerializeToString()

    async def drain_node(self, request: bytes, deadline_s: float | None) -> bytes:
        """An encoded DrainNodeResponse, once no shard is there any more."""
        asked = parse(admin_service_pb2.DrainNodeRequest, request)
        node_id = _node_called(asked.node, await self._layout())
        epoch, moved = await self._changed(self._changes.drain_node(node_id), deadline_s)
        return admin_service_pb2.DrainNodeResponse(epoch=epoch, moved=moved).SerializeToString()

    async def _changed(
        self, change: Awaitable[Changed], deadline_s: float | None
    ) -> tuple[int, admin_service_pb2.MovedState]:
        """The epoch after a change that was asked for, and what was sent for it; it goes on where the caller's deadline
        passes."""
        try:
            async with asyncio.timeout(deadline_s):
                changed = await change
        except TimeoutError:
            raise DeadlineExceeded("it goes on: see the topology, or ask again") from None
        changed.raise_fault()
        # Whoever asks this frontend next is told what has become of it.
        await self._router.refresh()
        moved = changed.moved
        return changed.epoch, admin_service_pb2.MovedState(
            partition_count=moved.partitions, row_count=moved.rows, byte_count=moved.size_bytes
        )

    async def _layout(self) -> ServiceLayout:
        try:
            async with asyncio.timeout(NODES_TIMEOUT_S):
                self._last_layout = await self._changes.layout()
        except Exception as error:  # noqa: BLE001  # The call is remote: whatever it is, there is no answer just now.
            logger.info("the coordinator does not say what runs where: %s", reason_of(error))
        return self._last_layout

    @property
    def shards_read(self) -> bool:
        """Whether every shard answered reads when it was last asked."""
        return bool(self.last_shards) and all(shard.state in READING_STATES for shard in self.last_shards)

    async def watch(self) -> None:
        """Keeps `last_shards` fresh, until it is cancelled; asks often as long as a shard is away or recovers."""
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            if clock() >= due or not (self._router.ready and self.shards_read):
                due = clock() + REFRESH_INTERVAL_S
                # Of nodes nobody has to know here.
                layout = self._layout() if self._settings.storage.replicas else _nothing()
                answers, found = await asyncio.gather(self._router.status(), layout)
                self.last_shards = [_shard_status(location, status, found) for location, status in answers]
            await asyncio.sleep(RETURN_INTERVAL_S)


async def _nothing() -> ServiceLayout:
    return ServiceLayout()


def _shard_status(
    location: ShardLocation, status: shard_pb2.GetShardStatusResponse | None, layout: ServiceLayout
) -> ShardStatus:
    if status is None:
        answer = ShardStatus(shard_id=location.shard_id, address=location.address, state="unreachable")
    else:
        answer = _told(location, status)
    if (standby := layout.standbys.get(location.shard_id)) is not None:
        answer.standby_state, answer.standby_node = standby.state, standby.node
        answer.standby_message = standby.message
    return answer


def _told(location: ShardLocation, status: shard_pb2.GetShardStatusResponse) -> ShardStatus:
    answer = ShardStatus(
        shard_id=location.shard_id,
        address=location.address,
        state=status.state,
        user_count=status.user_count,
        event_count=status.event_count,
        state_bytes=status.state_bytes,
        log_position=status.log_position,
        queued_bytes=status.queued_bytes,
        duplicate_count=status.duplicate_count,
        event_id_count=status.event_id_count,
        resident_bytes=status.resident_bytes,
        cpu_seconds=status.cpu_seconds,
        pid=status.pid,
        recovery_progress=status.recovery_progress,
        message=status.message,
        log_bytes=status.log_bytes,
        snapshot_position=status.snapshot_position,
    )
    if status.snapshot_time_ns:
        answer.snapshot_time.FromNanoseconds(status.snapshot_time_ns)
    return answer


def _node_status(standing: NodeStanding) -> NodeStatus:
    return NodeStatus(
        name=standing.name,
        node=standing.node_id,
        address=standing.address,
        state=standing.state,
        shard_ids=standing.shard_ids,
        grpc_address=standing.grpc_address,
        http_address=standing.http_address,
        data_dir=standing.data_dir,
        message=standing.message,
        standby_shard_ids=standing.standby_ids,
    )


def _describe(schema: Schema) -> admin_service_pb2.GetSchemaResponse:
    layout = Layout.compile(schema)
    response = admin_service_pb2.GetSchemaResponse(
        name=schema.name,
        ttl_seconds=schema.ttl_s or 0.0,
        row_bytes=layout.row_bytes,
        fingerprint=schema.fingerprint,
        yaml=schema.text,
    )
    for event_type in schema.event_types:
        response.events.add(name=event_type.name, weight=event_type.weight)
    for feature, row_bytes in zip(schema.features, layout.feature_bytes, strict=True):
        response.features.add(
            name=feature.name,
            kind=feature.kind,
            # Kinds that read no attribute, or a number without a unit, have no such option.
            attribute=getattr(feature.options, "attribute", ""),
            unit=getattr(feature.options, "unit", None) or "",
            events=feature.events,
            half_life_seconds=feature.half_life_s or 0.0,
            row_bytes=row_bytes,
        )
    return response


def _node_called(called: str, layout: ServiceLayout) -> str:
    """The id of the node that is called so: by its id, its name, or its address where it is the only one there. What
    nobody is called is given back.

    Raises:
        InvalidArgument: several are.
    """
    found = [node for node in layout.nodes if called and called in (node.node_id, node.name, node.address)]
    if len(found) > 1:
        names = ", ".join(sorted(node.name for node in found))
        raise InvalidArgument("node", f"several nodes are at {called}: name one of {names}")
    return found[0].node_id if found else called
