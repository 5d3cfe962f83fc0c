"""The service on a Ray cluster that runs already: started, updated, stopped. What is started stays when this process
ends.

    nothing runs yet    the coordinator's directory is made or opened on the head node, and a store is made ready; the
                        coordinator is started there, and starts the rest (`cluster.fleet`)
    it runs already     a coordinator with the new plan takes the place of the one that is there, which callers do not
                        notice, and replaces frontends and shards one by one

The same launcher as `serve`'s, but for what one machine's service does in its own process: the embedded Ray, the lock
on the directory, the choice of ports.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profile_service.cluster.plan import NodeStanding, Plan
from profile_service.config import LOCAL, Fixed, Settings
from profile_service.domain.schema import Schema, load_schema, parse_schema
from profile_service.errors import StartupError
from profile_service.launcher import (
    DEFAULT_SCHEMA,
    Tell,
    check_schema,
    drain,
    opened_store,
    prepare_store,
    wait_until_ready,
)
from profile_service.shard.store_opening import shown_store

if TYPE_CHECKING:
    from profile_service.storage.data_directory import Manifest

DEFAULT_DATA_DIR = Path("~/profile-service-data")
"""On each node."""

TASK_TIMEOUT_S = 120.0
"""For a look at the head node's directory: Ray may have to start a process for it."""

NAME_TIMEOUT_S = 30.0
"""How long Ray may take to forget a coordinator that was ended."""

POLL_S = 0.1
NODES_POLL_S = 1.0


def deploy(
    address: str,
    settings: Settings,
    store: str | None,
    resource: str,
    nodes: int,
    tell: Tell,
    stopped: Callable[[], bool],
) -> list[NodeStanding]:
    """Starts the service on the cluster, or brings the one that runs there to these settings; returns when all of it
    serves, or when it is told to stop waiting.

    Args:
        address: of the Ray cluster: "auto", or host:port of its head.
        settings: `storage.data_dir` is the directory on each node, where None takes DEFAULT_DATA_DIR there.
        store: as `storage.store`; None takes what the running service has, and LOCAL where none runs.
        resource: of Ray, by which shards are spread.
        nodes: so many are waited for before anything is spread over them.
        tell: hears what is being done, in a few words.
        stopped: whether it is told to stop waiting. What was begun goes on.

    Raises:
        StartupError: it cannot be done; says why and what to do.
        SchemaError: the schema file has faults.
    """
    schema = load_schema(settings.schema_path if settings.schema_path is not None else DEFAULT_SCHEMA)
    settings = replace(settings, storage=replace(settings.storage, store=store or LOCAL))
    if faults := settings.storage.validate():
        raise StartupError("; ".join(faults))
    with _connected(address):
        from profile_service.cluster.actor import CoordinatorActor
        from profile_service.cluster.processes import create_coordinator
        from profile_service.frontends.actor import FrontendActor

        _wait_for_nodes(nodes, tell, stopped)
        if stopped():
            return []
        head = _head()
        running = _coordinator()
        first_epoch = 0
        if running is None:
            tell("looking at the head node's directory")
            data_dir = settings.storage.data_dir or DEFAULT_DATA_DIR
            settings = replace(settings, storage=replace(settings.storage, data_dir=data_dir))
            if settings.storage.is_local:
                manifest, served = _prepare(head, settings, resource)
                check_schema(schema, served, settings)
            else:
                _check_nothing_runs()
                settings = replace(settings, fixed=asyncio.run(_fixed_by_store(settings)))
                manifest, _ = _prepare(head, settings, resource)
                first_epoch = asyncio.run(_take_store(settings, schema, manifest, tell, stopped))
        else:
            tell("asking the running service what it runs with")
            manifest, settings, served = _as_running(running, settings, store)
            _check_change(schema, served, settings)
            _end(running)
        generation = f"{time.time_ns():x}"
        plan = Plan(
            schema.text, settings, manifest, FrontendActor, generation, first_epoch=first_epoch, resource=resource
        )
        tell("starting the coordinator")
        coordinator = create_coordinator(CoordinatorActor, plan, head["Resources"].get("CPU", 0.0))
        ready = wait_until_ready(coordinator, tell, stopped)
        if ready is not None and settings.shards not in (None, len(ready.shards)):
            tell(f"scaling from {len(ready.shards)} to {settings.shards} shards")
            _scale(coordinator, settings.shards)
            ready = wait_until_ready(coordinator, tell, stopped)
    return list(ready.nodes) if ready is not None else []


def undeploy(address: str, tell: Tell) -> None:
    """Has the service answer everything accepted, and ends it on every node; its data stays. Raises StartupError where
    none runs."""
    import ray

    with _connected(address):
        from profile_service.cluster.processes import find_processes

        coordinator = _coordinator()
        if coordinator is None and not find_processes():
            raise StartupError(f"no service is deployed on the Ray cluster at {address}")
        if coordinator is not None:
            tell("stopping: what was accepted is being answered")
            _, settings, _ = ray.get(coordinator.deployed.remote())
            drain(coordinator, settings.drain_timeout_s)
        for process in find_processes():
            # There is none, but where the coordinator could not be asked.
            ray.kill(process.handle)


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """A connection to the cluster. Raises StartupError where there is none."""
    # A driver started by `uv run` would have every worker started by it, too.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    from profile_service.cluster.calls import NAMESPACE

    try:
        ray.init(address=address, namespace=NAMESPACE, configure_logging=False, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise StartupError(
            f"no Ray cluster can be reached at {address} from this machine: {reason}; "
            "run this on a node of the cluster, such as with `ray exec cluster.yaml 'profile-service deploy …'`"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _wait_for_nodes(count: int, tell: Tell, stopped: Callable[[], bool]) -> None:
    """Returns when there are so many nodes, or when it is told to stop. It may take as long as machines take."""
    import ray

    while (there := sum(node["Alive"] for node in ray.nodes())) < count and not stopped():
        tell(f"waiting for nodes: {there} of {count} are there")
        time.sleep(NODES_POLL_S)


def _head() -> dict[str, Any]:
    import ray

    for node in ray.nodes():
        if node["Alive"] and "node:__internal_head__" in node["Resources"]:
            return dict(node)
    raise StartupError("the Ray cluster has no head node just now; try again")


def _coordinator() -> Any:
    """The coordinator's actor; None where there is none."""
    from profile_service.cluster.calls import find_coordinator

    try:
        return find_coordinator()
    except ValueError:
        return None


def _prepare(head: dict[str, Any], settings: Settings, resource: str) -> tuple[Manifest, str | None]:
    """The head node's directory: what it was made with, and the schema last served with."""
    import ray

    from profile_service.cluster.calls import run_on_node
    from profile_service.cluster.survey import prepare_head

    try:
        found: tuple[Manifest, str | None] = ray.get(
            run_on_node(
                head["NodeID"],
                prepare_head,
                settings,
                settings.shards or _default_shards(resource),
                shown_store(settings),
            ),
            timeout=TASK_TIMEOUT_S,
        )
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, StartupError):
            raise StartupError(error.cause.message) from None
        raise StartupError(
            f"the head node cannot run the service: {str(error).strip().splitlines()[-1]}; is it installed there?"
        ) from None
    except ray.exceptions.GetTimeoutError:
        raise StartupError(f"the head node has not answered for {TASK_TIMEOUT_S:g} s") from None
    return found


def _check_nothing_runs() -> None:
    """Shards that have outlived their coordinator go on: what is stored must not change under them."""
    from profile_service.cluster.processes import find_processes

    if find_processes():
        raise StartupError(
            "processes of a service are there, and no coordinator: end them with `profile-service undeploy` first"
        )


async def _fixed_by_store(settings: Settings) -> Fixed:
    """What a store was made with; the settings' where it never was."""
    async with opened_store(settings) as store:
        meta = await store.read_meta()
    return settings.fixed if meta is None else Fixed(meta.partition_bits)


async def _take_store(
    settings: Settings, schema: Schema, manifest: Manifest, tell: Tell, stopped: Callable[[], bool]
) -> int:
    """Makes the store ready for the schema, while no other service has it; returns the highest epoch that it knows
    of."""
    async with opened_store(settings) as store:
        from profile_service.cluster.store_lease import StoreLease

        lease = StoreLease.of_deployment(store.url, manifest.id)
        await lease.take(store, tell, stopped)
        try:
            _, epoch = await prepare_store(store, schema, settings, tell)
        finally:
            # The coordinator renews it, as the same service.
            await asyncio.to_thread(lease.pass_on)
    return epoch


def _check_change(schema: Schema, served: str, settings: Settings) -> None:
    """Refuses a schema that a running service cannot be brought to."""
    if settings.storage.is_local:
        check_schema(schema, served, settings)
    elif parse_schema(served, "the schema that is served").fingerprint != schema.fingerprint:
        raise StartupError(
            "the schema has changed, and rows in a store are brought to it while no service runs: run "
            "`profile-service undeploy`, then `profile-service deploy` with --store"
        )
    else:
        asyncio.run(_check_layout(schema, settings))


async def _check_layout(schema: Schema, settings: Settings) -> None:
    """Refuses a version of the package that lays rows out otherwise than those that are stored."""
    async with opened_store(settings) as store:
        from profile_service.shard.stored_schema import check_layout

        meta = await store.read_meta()
        if meta is not None:
            check_layout(store, meta, schema)


def _default_shards(resource: str) -> int:
    """Three for every four of the resource that the cluster has now, at least one: as `serve` does."""
    import ray

    amount: float = ray.cluster_resources().get(resource, 0.0)
    return max(1, round(0.75 * amount))


def _as_running(coordinator: Any, settings: Settings, store: str | None) -> tuple[Manifest, Settings, str]:
    """The settings for an update, and what the service runs with. Raises StartupError where that cannot change."""
    import ray

    manifest, before, schema = ray.get(coordinator.deployed.remote())
    data_dir = settings.storage.data_dir
    if data_dir is not None and data_dir != before.storage.data_dir:
        raise StartupError(
            f"the running service has its data in {before.storage.data_dir}, not in {data_dir}; leave --data-dir out"
        )
    kept = before.storage.store if store is None else store
    if shown_store(replace(before, storage=replace(before.storage, store=kept))) != shown_store(before):
        raise StartupError(
            f"the running service has its profiles in {shown_store(before)}; leave --store out, or take them elsewhere "
            "with `profile-service migrate` while it does not run"
        )
    storage = replace(settings.storage, data_dir=before.storage.data_dir, store=kept)
    if faults := storage.validate():
        raise StartupError("; ".join(faults))
    return manifest, replace(settings, storage=storage, fixed=before.fixed), schema


def _scale(coordinator: Any, shards: int | None) -> None:
    """Returns when there are so many shards. Raises StartupError where there cannot be."""
    import ray

    changed = ray.get(coordinator.scale.remote(shards))
    if changed.reason:
        raise StartupError(f"there cannot be {shards} shards: {changed.reason}")


def _end(coordinator: Any) -> None:
    """Ends the coordinator and nothing else, and waits until its name is free."""
    import ray

    ray.kill(coordinator)
    give_up_at = time.monotonic() + NAME_TIMEOUT_S
    while _coordinator() is not None:
        if time.monotonic() > give_up_at:
            raise StartupError(f"the coordinator has not ended within {NAME_TIMEOUT_S:g} s; try again")
        time.sleep(POLL_S)
