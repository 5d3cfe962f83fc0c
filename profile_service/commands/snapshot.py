"""`snapshot`: has a running service write a snapshot of every shard now."""

from __future__ import annotations

from profile_service.commands.options import DEFAULT_ADDRESS, Address, Json


def snapshot(address: Address = DEFAULT_ADDRESS, as_json: Json = False) -> None:
    """Has a running service write a snapshot of every shard, and returns when all are published.

    Snapshots are written by themselves, too; one at hand makes the next start quick. Large shards take minutes.

    Example:  profile-service snapshot --address localhost:50051
    """
    from profile_service.commands.connection import connect
    from profile_service.commands.terminal import stderr, stdout
    from userprofile.v1 import admin_service_pb2 as admin
    from userprofile.v1 import admin_service_pb2_grpc

    with connect(address) as channel, stderr().status("writing snapshots"):
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        # As long as it takes: how much a shard holds, and how fast its disk is, is known there only.
        answer = stub.CreateSnapshot(admin.CreateSnapshotRequest())
    if as_json:
        from google.protobuf.json_format import MessageToJson

        print(MessageToJson(answer, always_print_fields_with_no_presence=True))
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan")
    table.add_column("shard")
    table.add_column("log position", justify="right")
    for shard_id, position in sorted(answer.log_positions.items()):
        table.add_row(str(shard_id), f"{position:,}")
    stdout().print(table)
