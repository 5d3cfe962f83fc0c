"""The flags of the commands that start a service, and the settings that they make."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from profile_service.commands.options import flag
from profile_service.config import MOST_MESSAGE_BYTES, Capacity, Limits, Settings, Storage, SyncMode

LIMITS, CAPACITY, STORAGE, LEASE_S = Limits(), Capacity(), Storage(), Settings().lease_s
_LIMITS = "Limits: beyond them a request, or one event of it, is refused"
_CAPACITY = "Capacity: beyond it callers are told to wait"
_STORAGE = "Storage: what a crash can cost, and how long a restart takes"

Schema = Annotated[str, flag("--schema", "Schema file, or a shipped schema: marketplace, retail.", metavar="FILE")]
Shards = Annotated[
    int | None,
    flag("--shards", "Shards; by default what the data directory has, or three for every four cores.", min=1, max=256),
]
GrpcPort = Annotated[int, flag("--grpc-port", "Port of gRPC; 0 takes a free one.", min=0, max=65535)]
HttpPort = Annotated[int, flag("--http-port", "Port of REST; 0 takes a free one.", min=0, max=65535)]

STORE = flag(
    "--store",
    "Where profiles live: local, or redis://[[user]:password@]host[:port][/db], rediss:// for TLS.",
    metavar="local|URL",
)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `settings` is made of flags: those of `service_settings`, after its own."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    shared = inspect.signature(service_settings, eval_str=True).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:
        flags = {name: given.pop(name) for name in shared}
        command(settings=service_settings(**flags), **given)

    parameters = [parameter for parameter in own if parameter.name != "settings"] + list(shared.values())
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def service_settings(
    schema: Schema = "marketplace",
    shards: Shards = None,
    grpc_port: GrpcPort = 50051,
    http_port: HttpPort = 8080,
    drain_timeout_s: Annotated[
        float, flag("--drain-timeout-s", "Seconds that a stop waits for what was accepted.", min=0.0)
    ] = 30.0,
    lease_s: Annotated[
        float, flag("--lease-s", "Seconds that a shard acknowledges without hearing from the coordinator.", min=1.0)
    ] = LEASE_S,
    sync: Annotated[
        SyncMode,
        flag(
            "--sync",
            "When the log reaches the disk: before each acknowledgement, at intervals, or when the system likes.",
            panel=_STORAGE,
        ),
    ] = STORAGE.sync,
    sync_interval_s: Annotated[
        float, flag("--sync-interval-s", "Seconds between two syncs with --sync interval.", panel=_STORAGE)
    ] = STORAGE.sync_interval_s,
    segment_bytes: Annotated[int, flag("--segment-bytes", "Size of a file of the log.", panel=_STORAGE)] = (
        STORAGE.segment_bytes
    ),
    snapshot_log_bytes: Annotated[
        int, flag("--snapshot-log-bytes", "Bytes logged by a shard between two snapshots.", panel=_STORAGE)
    ] = STORAGE.snapshot_log_bytes,
    snapshot_interval_s: Annotated[
        float, flag("--snapshot-interval-s", "Seconds between two snapshots of a shard.", panel=_STORAGE)
    ] = STORAGE.snapshot_interval_s,
    replicas: Annotated[
        int,
        flag(
            "--replicas",
            "Standbys of each shard, on other nodes: with 1 a node can be lost, and nothing that was acknowledged.",
            panel=_STORAGE,
            min=0,
            max=1,
        ),
    ] = STORAGE.replicas,
    reset_feature: Annotated[
        list[str],
        flag(
            "--reset-feature",
            "Start this feature empty if the schema changes it, which may be refused otherwise; repeatable.",
            panel=_STORAGE,
            metavar="NAME",
        ),
    ] = [],  # noqa: B006  typer makes a new one
    user_id_bytes: Annotated[int, flag("--user-id-bytes", "Longest user id.", panel=_LIMITS, min=1)] = (
        LIMITS.user_id_bytes
    ),
    event_id_bytes: Annotated[int, flag("--event-id-bytes", "Longest event id.", panel=_LIMITS, min=1)] = (
        LIMITS.event_id_bytes
    ),
    producer_id_bytes: Annotated[int, flag("--producer-id-bytes", "Longest producer id.", panel=_LIMITS, min=1)] = (
        LIMITS.producer_id_bytes
    ),
    attributes_per_event: Annotated[
        int, flag("--attributes-per-event", "Most attributes of an event.", panel=_LIMITS, min=0)
    ] = LIMITS.attributes_per_event,
    attribute_bytes: Annotated[
        int, flag("--attribute-bytes", "Longest name or value of an attribute.", panel=_LIMITS, min=1)
    ] = LIMITS.attribute_bytes,
    message_bytes: Annotated[
        int, flag("--message-bytes", "Largest message.", panel=_LIMITS, min=1024, max=MOST_MESSAGE_BYTES)
    ] = LIMITS.message_bytes,
    events_per_batch: Annotated[int, flag("--events-per-batch", "Most events of a batch.", panel=_LIMITS, min=1)] = (
        LIMITS.events_per_batch
    ),
    users_per_read: Annotated[int, flag("--users-per-read", "Most users of a batch read.", panel=_LIMITS, min=1)] = (
        LIMITS.users_per_read
    ),
    future_s: Annotated[
        float, flag("--future-s", "Seconds that an event's time may lie ahead.", panel=_LIMITS, min=0.0)
    ] = LIMITS.future_s,
    shard_queue_bytes: Annotated[
        int, flag("--shard-queue-bytes", "Event bytes that may wait in a shard.", panel=_CAPACITY, min=1024)
    ] = CAPACITY.shard_queue_bytes,
    stream_window_bytes: Annotated[
        int, flag("--stream-window-bytes", "Unacknowledged bytes of a producer's stream.", panel=_CAPACITY, min=1024)
    ] = CAPACITY.stream_window_bytes,
    owner_window_bytes: Annotated[
        int, flag("--owner-window-bytes", "Unacknowledged bytes to one shard.", panel=_CAPACITY, min=1024)
    ] = CAPACITY.owner_window_bytes,
    event_ids_per_shard: Annotated[
        int, flag("--event-ids-per-shard", "Event ids that a shard remembers.", panel=_CAPACITY, min=0)
    ] = CAPACITY.event_ids_per_shard,
    event_id_window_s: Annotated[
        float, flag("--event-id-window-s", "Seconds that an event id is remembered.", panel=_CAPACITY, min=0.0)
    ] = CAPACITY.event_id_window_s,
    producer_window_s: Annotated[
        float, flag("--producer-window-s", "Seconds that an idle producer is remembered.", panel=_CAPACITY, min=0.0)
    ] = CAPACITY.producer_window_s,
    cached_users_per_shard: Annotated[
        int,
        flag("--cached-users-per-shard", "Rows of an external store that a shard keeps near.", panel=_CAPACITY, min=0),
    ] = CAPACITY.cached_users_per_shard,
) -> Settings:
    """The settings that the flags say, but for where data is and which address is listened on. Raises SchemaError."""
    return Settings(
        schema_path=schema_file(schema),
        storage=Storage(
            sync=sync,
            sync_interval_s=sync_interval_s,
            segment_bytes=segment_bytes,
            snapshot_log_bytes=snapshot_log_bytes,
            snapshot_interval_s=snapshot_interval_s,
            replicas=replicas,
            reset_features=tuple(reset_feature),
        ),
        shards=shards,
        grpc_port=grpc_port,
        http_port=http_port,
        limits=Limits(
            user_id_bytes=user_id_bytes,
            event_id_bytes=event_id_bytes,
            producer_id_bytes=producer_id_bytes,
            attributes_per_event=attributes_per_event,
            attribute_bytes=attribute_bytes,
            message_bytes=message_bytes,
            events_per_batch=events_per_batch,
            users_per_read=users_per_read,
            future_s=future_s,
        ),
        capacity=Capacity(
            shard_queue_bytes=shard_queue_bytes,
            stream_window_bytes=stream_window_bytes,
            owner_window_bytes=owner_window_bytes,
            event_ids_per_shard=event_ids_per_shard,
            event_id_window_s=event_id_window_s,
            producer_window_s=producer_window_s,
            cached_users_per_shard=cached_users_per_shard,
        ),
        drain_timeout_s=drain_timeout_s,
        lease_s=lease_s,
    )


def schema_file(schema: str) -> Path:
    """The path of a schema given as a file or by the name of a shipped one; raises `SchemaError` on any fault."""
    from profile_service.domain.schema import load_schema

    load_schema(schema)
    return Path(schema)
