"""`move`, `scale`, `drain`: have a running service give users to other shards, while it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from profile_service.commands.options import DEFAULT_ADDRESS, Address, Json, flag

if TYPE_CHECKING:
    from collections.abc import Callable

    from userprofile.v1 import admin_service_pb2 as admin
    from userprofile.v1.admin_service_pb2_grpc import AdminServiceStub


def move(
    partitions: Annotated[
        list[str], typer.Argument(help="Partitions, or ranges of them: 7 12-15.", metavar="PARTITION…")
    ],
    to: Annotated[int, flag("--to", "The shard that is to own them.", metavar="SHARD", min=0)],
    address: Address = DEFAULT_ADDRESS,
    as_json: Json = False,
) -> None:
    """Gives partitions to another shard, a few at a time; returns when it owns all of them.

    Events and reads go on meanwhile; writes to the few wait for some milliseconds. `status` shows who owns what.

    Example:  profile-service move 0-31 40 --to 2
    """
    from userprofile.v1 import admin_service_pb2 as admin

    request = admin.MovePartitionsRequest(partitions=_numbers(partitions), target_shard_id=to)
    _change(address, as_json, lambda stub: stub.MovePartitions(request), "moving partitions")


def scale(
    shards: Annotated[int, flag("--shards", "How many shards there are to be.", min=1)],
    address: Address = DEFAULT_ADDRESS,
    as_json: Json = False,
) -> None:
    """Has so many shards share the users; starts new ones, or empties the last ones and ends them.

    Events and reads go on meanwhile. Interrupted, it goes on from where it is when it is asked again.

    Example:  profile-service scale --shards 4
    """
    from userprofile.v1 import admin_service_pb2 as admin

    request = admin.ScaleShardsRequest(shard_count=shards)
    _change(address, as_json, lambda stub: stub.ScaleShards(request), f"scaling to {shards} shards")


def drain(
    node: Annotated[str, typer.Argument(help="The node's address, as `status` shows it, or its name.")],
    address: Address = DEFAULT_ADDRESS,
    as_json: Json = False,
) -> None:
    """Moves everything away from the shards of a node, and ends them: before maintenance.

    Example:  profile-service drain 10.0.0.7
    """
    from userprofile.v1 import admin_service_pb2 as admin

    request = admin.DrainNodeRequest(node=node)
    _change(address, as_json, lambda stub: stub.DrainNode(request), f"moving users away from {node}")


def _change(address: str, as_json: bool, ask: Callable[[AdminServiceStub], Any], what: str) -> None:
    import json
    import time

    from profile_service.commands.connection import connect
    from profile_service.commands.terminal import stderr
    from userprofile.v1 import admin_service_pb2 as admin
    from userprofile.v1 import admin_service_pb2_grpc

    with connect(address) as channel, stderr().status(what):
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        # As long as it takes: how much there is to move is known there only.
        began_s = time.monotonic()
        changed = ask(stub)
        seconds = time.monotonic() - began_s
        topology = stub.GetTopology(admin.GetTopologyRequest())
    owned, moved = _owned(topology), changed.moved
    if as_json:
        sent = {"partitions": moved.partition_count, "rows": moved.row_count, "bytes": moved.byte_count}
        print(json.dumps({"epoch": changed.epoch, "partitions": owned, "moved": sent, "seconds": seconds}))
        return
    print(
        f"moved {moved.partition_count} partitions: {moved.row_count:,} rows, {moved.byte_count / 1e6:,.1f} MB, in "
        f"{seconds:.1f} s"
    )
    print(f"epoch {changed.epoch}: " + ", ".join(f"shard {shard_id} owns {count}" for shard_id, count in owned.items()))


def _owned(topology: admin.GetTopologyResponse) -> dict[int, int]:
    """By shard: how many partitions it owns."""
    owned = {shard.shard_id: 0 for shard in topology.shards}
    for held in topology.ranges:
        owned[held.shard_id] += held.last_partition - held.first_partition + 1
    return owned


def _numbers(given: list[str]) -> list[int]:
    """Of numbers and ranges.

    >>> _numbers(["7", "12-14"])
    [7, 12, 13, 14]
    """
    numbers: list[int] = []
    for text in given:
        first, dash, last = text.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise typer.BadParameter(f"{text} is neither a partition nor a range of them, such as 7 or 12-15")
        numbers += range(int(first), int(last if dash else first) + 1)
    return numbers
