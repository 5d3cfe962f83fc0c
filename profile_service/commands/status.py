"""`status`: how a running service does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from profile_service.commands.options import DEFAULT_ADDRESS, Address, Json
from profile_service.commands.terminal import plain

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp
    from rich.console import RenderableType
    from rich.table import Table

    from userprofile.v1 import admin_service_pb2

_SYNC_MODES = {
    "always": "synced to disk before each acknowledgement",
    "interval": "synced to disk at intervals",
    "never": "left to the operating system",
}
_STORE_SYNC_MODES = {
    "always": "on its disk before each acknowledgement (appendfsync always)",
    "everysec": "on its disk within a second (appendfsync everysec)",
    "no": "left to its operating system (appendfsync no)",
    "none": "in its memory only (appendonly no)",
    "unknown": "it does not say how it keeps what it acknowledges",
}


def status(address: Address = DEFAULT_ADDRESS, as_json: Json = False) -> None:
    """Shows how a running service does: users, events, bytes, and each shard.

    Example:  profile-service status --address localhost:50051
    """
    from profile_service.commands.connection import CALL_TIMEOUT_S, connect
    from profile_service.commands.terminal import stdout
    from userprofile.v1 import admin_service_pb2 as admin
    from userprofile.v1 import admin_service_pb2_grpc

    with connect(address) as channel:
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        answer = stub.GetStatus(admin.GetStatusRequest(), timeout=CALL_TIMEOUT_S)
    if as_json:
        from google.protobuf.json_format import MessageToJson

        print(MessageToJson(answer, always_print_fields_with_no_presence=True))
    else:
        stdout().print(render_status(answer))


def render_status(answer: admin_service_pb2.GetStatusResponse) -> RenderableType:
    """The answer as tables."""
    from rich.console import Group
    from rich.table import Table

    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="bold cyan")
    facts.add_column()
    for name, value in (
        ("state", answer.state),
        ("version", answer.version),
        ("schema", answer.schema_name),
        ("started", _time(answer.start_time)),
        ("users", f"{answer.user_count:,}"),
        ("events", f"{answer.event_count:,}"),
        *_where(answer),
        ("event ids", f"{answer.dedupe_window_seconds / 3600:g} h, {answer.dedupe_capacity:,} a shard at most"),
        ("topology", f"epoch {answer.epoch}, {len(answer.shards)} shards"),
    ):
        facts.add_row(name, plain(value))
    # One table would not fit into 80 columns.
    tables: list[RenderableType] = [_nodes(answer), "", _processes(answer), "", _counted(answer)]
    if answer.replicas:
        tables += ["", _standbys(answer)]
    if answer.store in ("", "local"):
        tables += ["", _stored(answer)]
    return Group(facts, "", *tables, *_remarks(answer))


def _where(answer: admin_service_pb2.GetStatusResponse) -> list[tuple[str, str]]:
    """Where profiles live, and how safely."""
    if answer.store in ("", "local"):
        kept = _SYNC_MODES.get(answer.sync_mode, answer.sync_mode)
        return [("bytes a user", f"{answer.bytes_per_user:,.0f}"), ("data directory", answer.data_dir), ("log", kept)]
    return [("store", answer.store), ("kept", _STORE_SYNC_MODES.get(answer.sync_mode, answer.sync_mode))]


def _nodes(answer: admin_service_pb2.GetStatusResponse) -> Table:
    """What is where."""
    table = _table(("node", "state", "shards", "gRPC", "REST"), ())
    for node in answer.nodes:
        table.add_row(
            plain(node.address or node.name),
            plain(node.state),
            " ".join(map(str, node.shard_ids)) or "none",
            plain(node.grpc_address),
            plain(node.http_address),
        )
    return table


def _processes(answer: admin_service_pb2.GetStatusResponse) -> Table:
    """Where each shard is, and how it does."""
    table = _table(("shard", "state", "address"), ("pid", "resident MB", "CPU s"))
    for shard in answer.shards:
        recovering = shard.state == "recovering"
        table.add_row(
            str(shard.shard_id),
            plain(f"{shard.state}, {shard.recovery_progress:.0%}" if recovering else shard.state),
            plain(shard.address),
            str(shard.pid),
            f"{shard.resident_bytes / 1e6:,.0f}",
            f"{shard.cpu_seconds:,.1f}",
        )
    return table


def _standbys(answer: admin_service_pb2.GetStatusResponse) -> Table:
    """Where each shard's standby is, and whether it has everything."""
    addresses = {node.name: node.address for node in answer.nodes}
    table = _table(("shard", "standby", "node"), ())
    for shard in answer.shards:
        node = shard.standby_node
        table.add_row(str(shard.shard_id), plain(shard.standby_state), plain(addresses.get(node) or node or "none"))
    return table


def _counted(answer: admin_service_pb2.GetStatusResponse) -> Table:
    """What each shard has counted, and what is on its way."""
    table = _table(("shard",), ("users", "events", "duplicates", "state MB", "queued kB"))
    for shard in answer.shards:
        table.add_row(
            str(shard.shard_id),
            f"{shard.user_count:,}",
            f"{shard.event_count:,}",
            f"{shard.duplicate_count:,}",
            f"{shard.state_bytes / 1e6:,.1f}",
            f"{shard.queued_bytes / 1e3:,.1f}",
        )
    return table


def _stored(answer: admin_service_pb2.GetStatusResponse) -> Table:
    """What each shard has on disk, and how much of it a recovery would replay."""
    table = _table(("shard",), ("log position", "log MB", "to replay MB", "last snapshot"))
    for shard in answer.shards:
        table.add_row(
            str(shard.shard_id),
            f"{shard.log_position:,}",
            f"{shard.log_bytes / 1e6:,.1f}",
            f"{(shard.log_position - shard.snapshot_position) / 1e6:,.1f}",
            _time(shard.snapshot_time) if shard.HasField("snapshot_time") else "none yet",
        )
    return table


def _remarks(answer: admin_service_pb2.GetStatusResponse) -> list[RenderableType]:
    """What the shards have to say."""
    from rich.text import Text

    nodes = [(node.address or node.name, node.message) for node in answer.nodes]
    said = [Text(f"node {plain(name)}: {plain(message)}") for name, message in nodes if message]
    said += [Text(f"shard {shard.shard_id}: {plain(shard.message)}") for shard in answer.shards if shard.message]
    said += [
        Text(f"shard {shard.shard_id} has no standby that is in sync: {plain(shard.standby_message)}")
        for shard in answer.shards
        if shard.standby_message
    ]
    return ["", *said] if said else []


def _table(left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan")
    for title in left:
        table.add_column(title)
    for title in right:
        table.add_column(title, justify="right")
    return table


def _time(timestamp: Timestamp) -> str:
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(timestamp.seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
