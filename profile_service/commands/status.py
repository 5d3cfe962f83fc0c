"""`status`: how a running service does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from profile_service.commands.options import DEFAULT_ADDRESS, Address, Json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from userprofile.v1 import admin_service_pb2

_SYNC_MODES = {
    "always": "synced to disk before each acknowledgement",
    "interval": "synced to disk at intervals",
    "never": "left to the operating system",
    "memory": "in memory: nothing outlasts a stop",
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
    from datetime import UTC, datetime

    from rich.console import Group
    from rich.table import Table

    from profile_service.commands.terminal import plain

    started = datetime.fromtimestamp(answer.start_time.seconds, UTC)
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="bold cyan")
    facts.add_column()
    for name, value in (
        ("state", answer.state),
        ("version", answer.version),
        ("schema", answer.schema_name),
        ("started", f"{started:%Y-%m-%d %H:%M:%S} UTC"),
        ("users", f"{answer.user_count:,}"),
        ("events", f"{answer.event_count:,}"),
        ("bytes a user", f"{answer.bytes_per_user:,.0f}"),
        ("log", _SYNC_MODES.get(answer.sync_mode, answer.sync_mode)),
        ("event ids", f"{answer.dedupe_window_seconds / 3600:g} h, {answer.dedupe_capacity:,} a shard at most"),
        ("topology", f"epoch {answer.epoch}, {len(answer.shards)} shards"),
    ):
        facts.add_row(name, plain(value))
    shards = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan")
    for title in ("shard", "state", "address"):
        shards.add_column(title)
    for title in (
        "users",
        "events",
        "duplicates",
        "state MB",
        "queued kB",
        "log position",
        "resident MB",
        "CPU s",
        "pid",
    ):
        shards.add_column(title, justify="right")
    for shard in answer.shards:
        shards.add_row(
            str(shard.shard_id),
            plain(shard.state),
            plain(shard.address),
            f"{shard.user_count:,}",
            f"{shard.event_count:,}",
            f"{shard.duplicate_count:,}",
            f"{shard.state_bytes / 1e6:,.1f}",
            f"{shard.queued_bytes / 1e3:,.1f}",
            f"{shard.log_position:,}",
            f"{shard.resident_bytes / 1e6:,.0f}",
            f"{shard.cpu_seconds:,.1f}",
            str(shard.pid),
        )
    return Group(facts, "", shards)
