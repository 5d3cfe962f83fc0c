"""`deploy`, `undeploy`: the service on a Ray cluster that runs already."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from profile_service.commands.options import flag
from profile_service.commands.settings import STORE, with_settings
from profile_service.config import Settings

# Not from PROFILE_SERVICE_ADDRESS, which is that of the service; for "auto" Ray reads its own RAY_ADDRESS.
RayAddress = Annotated[
    str,
    typer.Option(
        "--address", help="The Ray cluster: auto is the one that this machine is part of.", metavar="auto|HOST:PORT"
    ),
]


@with_settings
def deploy(
    settings: Settings,
    address: RayAddress = "auto",
    data_dir: Annotated[
        Path | None,
        flag(
            "--data-dir",
            "Directory of log and snapshots on each node, with its variables; by default ~/profile-service-data.",
        ),
    ] = None,
    store: Annotated[str | None, STORE] = None,
    resource: Annotated[
        str, flag("--resource", "Ray's resource by which shards are spread over the nodes.", metavar="NAME")
    ] = "CPU",
    nodes: Annotated[
        int, flag("--nodes", "Wait for so many nodes before anything is spread over them.", metavar="COUNT", min=1)
    ] = 1,
) -> None:
    """Starts the service on a running Ray cluster, where it stays: shards spread over the nodes, a frontend on each.

    Example:  profile-service deploy --address auto --shards 8

    Run again it is a rolling update: each process is ended cleanly and started anew with the flags and the schema of
    now, one after the other; the data stays. A node that joins later gets a frontend by itself. Ctrl-C stops waiting,
    not the service.

    With --store profiles are in a Redis that every node reaches, the directories say only who owns what, and the shards
    of a node that leaves go on elsewhere.
    """
    from profile_service.commands.service import StopSignal
    from profile_service.commands.terminal import stderr
    from profile_service.deployment import deploy as deploy_service

    settings = replace(settings, storage=replace(settings.storage, data_dir=data_dir))
    stop = StopSignal()
    stop.listen()
    with stderr().status("starting") as progress:
        standings = deploy_service(address, settings, store, resource, nodes, progress.update, lambda: stop.asked)
    if stop.asked:
        print("no longer waited for; what was begun goes on: see profile-service status", file=sys.stderr)
        return
    for node in standings:
        held = ", ".join(map(str, node.shard_ids)) or "none"
        if node.standby_ids:
            held += f", standbys {', '.join(map(str, node.standby_ids))}"
        print(f"node {node.address}: gRPC {node.grpc_address}, REST http://{node.http_address}, shards {held}")
    if settings.storage.replicas:
        shards = {shard_id for node in standings for shard_id in node.shard_ids}
        alone = sorted(shards - {shard_id for node in standings for shard_id in node.standby_ids})
        if alone:
            print(
                f"note: no other node can take a standby of shards {', '.join(map(str, alone))}; what they acknowledge "
                "is on one machine only",
                file=sys.stderr,
            )
    print("ready", flush=True)


def undeploy(address: RayAddress = "auto") -> None:
    """Stops the service that `deploy` has started, on every node: answers what was accepted, and keeps the data.

    Example:  profile-service undeploy --address auto
    """
    from profile_service.commands.terminal import stderr
    from profile_service.deployment import undeploy as undeploy_service

    with stderr().status("stopping") as progress:
        undeploy_service(address, progress.update)
    print("stopped; the data is where it was")
