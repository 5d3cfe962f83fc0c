"""Starts and stops the whole service on this machine: Ray, coordinator, shards and frontend, as processes below this
one.

Everything that can be wrong with settings, and with the data directory, is found before the first process starts. The
directory is locked from then on until the last process has ended. How long shards may take to recover depends on what
they hold: they are waited for as long as anything moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from profile_service import kernel_cache
from profile_service.cluster.embedded_ray import EmbeddedRay
from profile_service.cluster.plan import Node, Plan, Progress
from profile_service.cluster.ports import bind
from profile_service.cluster.scratch import ScratchDirectory
from profile_service.config import Fixed, Settings
from profile_service.domain.migrate import compare
from profile_service.domain.schema import Schema, load_schema, parse_schema
from profile_service.errors import SchemaError, StartupError
from profile_service.shard.store_opening import open_store
from profile_service.storage.data_directory import DataDirectory, Holder, Manifest
from profile_service.storage.fs import DiskFull, LockHeld, RealFileSystem

if TYPE_CHECKING:
    from profile_service.cluster.coordinator import Standing
    from profile_service.storage.redis_store import RedisStore

DEFAULT_SCHEMA = "marketplace"
RAY_WORKERS = 2
"""Ray's processes for a service beside those of its shards: coordinator and frontend."""

STALL_TIMEOUT_S = 120.0
"""A start in which nothing has moved for so long is given up."""

MOST_DEATHS = 3
"""A shard that has died so often while it recovered would do so again."""

LEFTOVER_TIMEOUT_S = 30.0
"""How long the processes of a service that was killed may take to end."""

PORT_PATIENCE_S = 5.0
"""The same for the frontend's ports, after its shards have ended."""

DRAIN_GRACE_S = 10.0
"""What a drain may take beyond what it waits for."""

POLL_S = 0.1

logger = logging.getLogger(__name__)

Tell = Callable[[str], None]


class Service:
    """A running service; made by `Service.start`. As a context manager it stops at the end."""

    def __init__(self) -> None:
        self.grpc_address = ""
        """host:port of gRPC."""
        self.http_address = ""
        """host:port of REST, metrics and docs."""
        self._held = ExitStack()
        """What is given back when the last process has ended."""
        self._ray: EmbeddedRay | None = None
        self._coordinator: Any = None
        self._drain_timeout_s = 0.0

    @classmethod
    def start(
        cls,
        settings: Settings,
        progress: Tell = lambda _: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Service:
        """Starts the service and returns when it is ready, or when it is told to stop before that.

        Args:
            settings: what to serve, where.
            progress: hears what is being done, in a few words.
            stopped: whether it is told to stop; asked while shards are waited for.

        Raises:
            StartupError: it cannot start here; says why and what to do.
            SchemaError: the schema file has faults.
            DataLoss: the data directory's own files are damaged.
        """
        schema = load_schema(settings.schema_path if settings.schema_path is not None else DEFAULT_SCHEMA)
        faults = settings.storage.validate()
        if not settings.storage.is_local and settings.storage.data_dir is not None:
            faults.append("--data-dir: with --store everything is in the store; leave it out")
        if faults:
            raise StartupError("; ".join(faults))
        service = cls()
        service._drain_timeout_s = settings.drain_timeout_s
        try:
            followed, first_epoch = False, 0
            if not settings.storage.is_local:
                settings, first_epoch, followed = asyncio.run(service._open_store(settings, schema, progress, stopped))
            directory = service._open_directory(settings)
            if settings.storage.is_local:
                check_schema(schema, directory.schema_text(), settings)
                _wait_for_leftovers(directory, progress, stopped)
            settings = replace(
                _with_ports(settings, PORT_PATIENCE_S if directory.killed or followed else 0.0),
                storage=replace(settings.storage, data_dir=directory.path),
            )
            service._start(schema, settings, directory, first_epoch, progress, stopped)
        except BaseException:
            service.stop()
            raise
        return service

    def stop(self) -> None:
        """Answers everything accepted, then ends every process. May be called more than once."""
        try:
            if self._ray is not None:
                self._stop_processes()
        finally:
            self._held.close()

    def _stop_processes(self) -> None:
        try:
            if self._coordinator is not None:
                drain(self._coordinator, self._drain_timeout_s)
        finally:
            self._coordinator = None
            embedded, self._ray = self._ray, None
            if embedded is not None:
                embedded.stop()

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    async def _open_store(
        self, settings: Settings, schema: Schema, progress: Tell, stopped: Callable[[], bool]
    ) -> tuple[Settings, int, bool]:
        """Takes the store for this service, and makes it ready for the schema. Returns the settings with what is fixed
        in the store, the highest epoch that it knows of, and whether another service had it until a moment ago."""
        async with opened_store(settings) as store:
            from profile_service.cluster.store_lease import StoreLease

            lease = StoreLease(store.url)
            followed = await lease.take(store, progress, stopped)
            self._held.callback(lease.release)
            bits, epoch = await prepare_store(store, schema, settings, progress)
        return replace(settings, fixed=Fixed(bits)), epoch, followed

    def _open_directory(self, settings: Settings) -> DataDirectory:
        path = settings.storage.data_dir
        if path is None:
            scratch = ScratchDirectory()
            self._held.callback(scratch.remove)
            path = scratch.path / "data"
        new = Manifest.new(settings.fixed.partition_bits, settings.shard_count)
        try:
            directory = DataDirectory.open(RealFileSystem(), path.absolute(), new)
            self._held.callback(directory.release)
            directory.epoch()
        except LockHeld as held:
            raise StartupError(
                f"{path} is in use by {Holder.describe(held.holder)}; "
                "stop that service, or give another directory with --data-dir"
            ) from None
        except DiskFull:
            raise StartupError(f"the disk of {path} has no room; make some, or give another directory") from None
        except OSError as error:
            raise StartupError(
                f"{path} cannot be written to ({error.strerror}); "
                "give another directory with --data-dir, or change its owner or permissions"
            ) from None
        return directory

    def _start(
        self,
        schema: Schema,
        settings: Settings,
        directory: DataDirectory,
        first_epoch: int,
        progress: Tell,
        stopped: Callable[[], bool],
    ) -> None:
        is_local = settings.storage.is_local
        warm: Future[None] | None = None
        if kernel_cache.is_complete(schema.fingerprint, is_local=is_local):
            progress("starting Ray")
        else:
            progress("compiling kernels, which takes about a minute the first time, and starting Ray")
            warm = _in_thread(lambda: _warm(schema, is_local=is_local))
        shard_ids = directory.shard_ids()
        shards = len(shard_ids)
        self._ray = EmbeddedRay(workers=shards + RAY_WORKERS)
        if warm is not None:
            warm.result()
        # These import Ray, which reads its environment then.
        import ray

        from profile_service.cluster.actor import CoordinatorActor
        from profile_service.cluster.processes import create_coordinator, create_frontend, create_shard
        from profile_service.frontends.actor import FrontendActor

        progress(f"starting {shards} shard{'s' if shards > 1 else ''} and a frontend")
        node = Node(
            node_id=ray.get_runtime_context().get_node_id(),
            name=directory.manifest.id,
            address=settings.host,
            data_dir=directory.path,
            cpus=1,
            share=1,
            grpc_port=settings.grpc_port,
            http_port=settings.http_port,
        )
        plan = Plan(
            schema.text, settings, directory.manifest, FrontendActor, generation="", node=node, first_epoch=first_epoch
        )
        # The coordinator would create the others, too; so all processes start side by side.
        for shard_id in shard_ids:
            create_shard(plan, shard_id, node)
        self._coordinator = create_coordinator(CoordinatorActor, plan, node.cpus)
        create_frontend(plan, node)
        ready = wait_until_ready(self._coordinator, progress, stopped)
        if ready is not None:
            self.grpc_address, self.http_address = ready.nodes[0].grpc_address, ready.nodes[0].http_address
            if settings.shards not in (None, shards):
                # While it serves: it says in its log how it ends.
                self._coordinator.scale.remote(settings.shards)


@contextlib.asynccontextmanager
async def opened_store(settings: Settings) -> AsyncIterator[RedisStore]:
    """A client of the store that the settings name. Raises StartupError where it cannot be asked."""
    store = open_store(settings)
    from profile_service.storage.redis_client import StoreFault

    try:
        yield store
    except StoreFault as fault:
        raise StartupError(f"--store: {fault.message}") from None
    finally:
        await store.close()


async def prepare_store(store: RedisStore, schema: Schema, settings: Settings, progress: Tell) -> tuple[int, int]:
    """Makes a store ready for the schema, whose lease is held; returns its partition bits, and the highest epoch that
    it knows of. Raises as `stored_schema.prepare`."""
    from profile_service.shard.stored_schema import prepare

    meta = await prepare(
        store,
        schema,
        reset_features=settings.storage.reset_features,
        partition_bits=settings.fixed.partition_bits,
        progress=progress,
    )
    return meta.partition_bits, await store.epoch()


def drain(coordinator: Any, timeout_s: float) -> None:
    """Has every process answer what it has accepted, and ends them all, the coordinator last.

    Args:
        coordinator: the CoordinatorActor.
        timeout_s: for the frontends, and again for the shards.
    """
    import ray

    try:
        ray.get(coordinator.drain.remote(timeout_s), timeout=2 * timeout_s + DRAIN_GRACE_S)
    except Exception as error:  # noqa: BLE001  # Whatever it is, the rest has to be stopped.
        logger.warning("the service could not be drained: %s", error)
    ray.kill(coordinator)


def wait_until_ready(coordinator: Any, progress: Tell, stopped: Callable[[], bool]) -> Progress | None:
    """How it all stands once everything serves as it was asked for; None where it was told to stop before. Raises
    StartupError where a process cannot start, or nothing moves any more."""
    import ray

    asked = coordinator.progress.remote()
    seen: Progress | None = None
    deaths: Counter[int] = Counter()
    moved_at = time.monotonic()
    try:
        while not stopped():
            answered, _ = ray.wait([asked], timeout=POLL_S)
            if answered:
                now: Progress = ray.get(asked)
                if now.done:
                    ray.get(coordinator.remember_schema.remote())
                    return now
                before = seen.shards if seen is not None else {}
                deaths.update(
                    shard_id
                    for shard_id, standing in now.shards.items()
                    if standing.state == "away" and shard_id in before and before[shard_id].state == "recovering"
                )
                _check(now, deaths)
                if now != seen:
                    seen, moved_at = now, time.monotonic()
                    progress(describe(now))
                time.sleep(POLL_S)
                asked = coordinator.progress.remote()
            if time.monotonic() - moved_at > STALL_TIMEOUT_S:
                raise StartupError(f"nothing has moved for {STALL_TIMEOUT_S:g} s: {_all_remarks(seen)}")
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, StartupError):
            raise StartupError(error.cause.message) from None
        raise
    except ray.exceptions.RayActorError as error:
        raise StartupError(f"a process of the service cannot start: {error}") from None
    return None


def _check(now: Progress, deaths: Mapping[int, int]) -> None:
    """Raises StartupError where something will not come to serve."""
    if now.fault:
        raise StartupError(now.fault)
    if not now.outdated:
        # Until then they are those of before, and others are about to take their places.
        _check_standings(now.shards, deaths)
    for node in now.nodes:
        if node.state == "faulty":
            raise StartupError(node.message if len(now.nodes) == 1 else f"node {node.address}: {node.message}")


def _check_standings(standings: Mapping[int, Standing], deaths: Mapping[int, int]) -> None:
    """Raises StartupError where a shard will not come to serve. `deaths` says how often each has died."""
    for shard_id, standing in standings.items():
        if standing.state == "failed":
            raise StartupError(f"shard {shard_id} cannot start: {standing.message}")
        if deaths.get(shard_id, 0) >= MOST_DEATHS:
            raise StartupError(
                f"shard {shard_id} has died {deaths[shard_id]} times while it recovered, the last time with: "
                f"{standing.message}; is there enough memory for it?"
            )


def describe_start(standings: Mapping[int, Standing]) -> str:
    """How far the shards are, in a few words."""
    recovering = [
        f"shard {shard_id} recovers: {standing.progress:.0%}{f' ({standing.message})' if standing.message else ''}"
        for shard_id, standing in sorted(standings.items())
        if standing.state == "recovering"
    ]
    absent = sum(standing.state in ("starting", "away") for standing in standings.values())
    if absent:
        recovering.append(f"{absent} of {len(standings)} shards {'is' if absent == 1 else 'are'} starting")
    return ", ".join(recovering) or "waiting for the frontend"


def describe(now: Progress) -> str:
    """How far a start or an update is, in a few words."""
    said = describe_start(now.shards)
    if now.outdated:
        said = f"{now.outdated} {'process is' if now.outdated == 1 else 'processes are'} still to be replaced; {said}"
    return said


def _all_remarks(now: Progress | None) -> str:
    if now is None:
        return "the coordinator does not answer"
    shards = [f"shard {shard_id}: {s.message}" for shard_id, s in sorted(now.shards.items()) if s.message]
    nodes = [f"node {node.address or node.name}: {node.message}" for node in now.nodes if node.message]
    return "; ".join([describe(now), *shards, *nodes])


def check_schema(schema: Schema, served: str | None, settings: Settings) -> None:
    """Refuses a schema that stored profiles cannot be carried over to. The shards would, too, each by what its own log
    says; here it is said before anything starts.

    Args:
        schema: what is to be served.
        served: the schema last served with, as text; None before the first time.
        settings: name the features that may start empty.
    """
    try:
        before = schema if served is None else parse_schema(served, "the schema last served with")
    except SchemaError:
        # Another version of the service wrote it. Its shards will know.
        return
    compare(before, schema, settings.storage.reset_features).raise_faults()


def _wait_for_leftovers(directory: DataDirectory, progress: Tell, stopped: Callable[[], bool]) -> None:
    """Processes of a service that was killed a moment ago end by themselves; each holds its shard until it has."""
    give_up_at = time.monotonic() + LEFTOVER_TIMEOUT_S
    for shard_id in directory.shard_ids():
        while (holder := directory.shard_in_use(shard_id)) and not stopped():
            if time.monotonic() > give_up_at:
                raise StartupError(f"{directory.shard_directory(shard_id)} is still in use by {holder}; end it first")
            progress(f"waiting for {holder}, which had shard {shard_id}, to end")
            time.sleep(POLL_S)


def _with_ports(settings: Settings, patience_s: float) -> Settings:
    """Settings whose ports are free just now and not 0, so that a restarted frontend is found where it was."""
    give_up_at = time.monotonic() + patience_s
    while True:
        try:
            with (
                bind(settings, settings.grpc_port, "--grpc-port") as grpc_socket,
                bind(settings, settings.http_port, "--http-port") as http_socket,
            ):
                return replace(settings, grpc_port=grpc_socket.getsockname()[1], http_port=http_socket.getsockname()[1])
        except StartupError:
            if time.monotonic() > give_up_at:
                raise
        time.sleep(POLL_S)


def _warm(schema: Schema, *, is_local: bool) -> None:
    from profile_service.shard.warm import warm_kernels, warm_stored_kernels
    from profile_service.wire.warm import warm_scanning

    warm_kernels(schema)
    if not is_local:
        warm_stored_kernels(schema)
    warm_scanning()
    kernel_cache.note_complete(schema.fingerprint, is_local=is_local)


def _in_thread(work: Callable[[], None]) -> Future[None]:
    """Runs the work beside the caller. The thread keeps no process from ending."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # It is the caller's to handle.
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="warm kernels", daemon=True).start()
    return done
