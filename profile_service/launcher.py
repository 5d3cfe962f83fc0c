"""Starts and stops the whole service on this machine: Ray, coordinator, shards and frontend, as processes below this
one.

Everything that can be wrong with settings is found before the first process starts.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Any

from profile_service.cluster.embedded_ray import EmbeddedRay
from profile_service.config import Settings
from profile_service.domain.schema import Schema, load_schema
from profile_service.errors import StartupError
from profile_service.frontends.ports import bind

DEFAULT_SCHEMA = "marketplace"
START_TIMEOUT_S = 120.0
SHARD_GRACE_S = 1.0

logger = logging.getLogger(__name__)


class Service:
    """A running service; made by `Service.start`. As a context manager it stops at the end."""

    def __init__(self) -> None:
        self.grpc_address = ""
        """host:port of gRPC."""
        self.http_address = ""
        """host:port of REST, metrics and docs."""
        self._ray: EmbeddedRay | None = None
        self._coordinator: Any = None
        self._frontend: Any = None
        self._drain_timeout_s = 0.0

    @classmethod
    def start(cls, settings: Settings, progress: Callable[[str], None] = lambda _: None) -> Service:
        """Starts the service and returns when it is ready.

        Args:
            settings: what to serve, where.
            progress: hears what is being done, in a few words.

        Raises:
            StartupError: it cannot start here; says why and what to do.
            SchemaError: the schema file has faults.
        """
        schema = load_schema(settings.schema_path if settings.schema_path is not None else DEFAULT_SCHEMA)
        _check_data_dir(settings)
        settings = _with_ports(settings)
        service = cls()
        service._drain_timeout_s = settings.drain_timeout_s
        try:
            service._start(schema, settings, progress)
        except BaseException:
            service.stop()
            raise
        return service

    def stop(self) -> None:
        """Answers everything accepted, then ends every process. May be called more than once."""
        if self._ray is None:
            return
        import ray

        try:
            if self._frontend is not None:
                self._ask(self._frontend.drain.remote(), self._drain_timeout_s + 5.0, "the frontend")
            if self._coordinator is not None:
                self._ask(self._coordinator.drain.remote(SHARD_GRACE_S), self._drain_timeout_s, "the shards")
            for actor in (self._frontend, self._coordinator):
                if actor is not None:
                    ray.kill(actor)
        finally:
            self._frontend = self._coordinator = None
            embedded, self._ray = self._ray, None
            embedded.stop()

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, schema: Schema, settings: Settings, progress: Callable[[str], None]) -> None:
        progress("compiling kernels, which takes about a minute the first time, and starting Ray")
        warm = _in_thread(lambda: _warm(schema))
        self._ray = EmbeddedRay(workers=settings.shard_count + 2)
        warm.result()
        # These import Ray, which reads its environment then.
        import ray

        from profile_service.cluster.actor import COORDINATOR_NAME, CoordinatorActor, create_actor, create_shards
        from profile_service.frontends.actor import FrontendActor

        progress(f"starting {settings.shard_count} shard{'s' if settings.shard_count > 1 else ''} and a frontend")
        # The coordinator would create the shards, too; so all processes start side by side.
        create_shards(schema, settings)
        self._coordinator = create_actor(CoordinatorActor, COORDINATOR_NAME, schema, settings)
        self._frontend = create_actor(FrontendActor, "frontend", schema, settings, self._coordinator)
        try:
            self.grpc_address, self.http_address = ray.get(
                self._frontend.wait_until_ready.remote(), timeout=START_TIMEOUT_S
            )
        except ray.exceptions.GetTimeoutError:
            raise StartupError(f"the shards were not ready within {START_TIMEOUT_S:g} s") from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StartupError):
                raise StartupError(error.cause.message) from None
            raise
        except ray.exceptions.RayActorError as error:
            raise StartupError(f"a process of the service cannot start: {error}") from None

    def _ask(self, answer: Any, timeout_s: float, who: str) -> None:
        import ray

        try:
            ray.get(answer, timeout=timeout_s)
        except Exception as error:  # noqa: BLE001  # Whatever it is, the rest has to be stopped.
            logger.warning("%s could not be drained: %s", who, error)


def _check_data_dir(settings: Settings) -> None:
    data_dir = settings.storage.data_dir
    if data_dir is None:
        return
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=data_dir):
            pass
    except OSError as error:
        raise StartupError(
            f"{data_dir} cannot be written to ({error.strerror}); "
            "give another directory with --data-dir, or change its owner or permissions"
        ) from None


def _with_ports(settings: Settings) -> Settings:
    """Settings whose ports are free just now and not 0, so that a restarted frontend is found where it was."""
    with (
        bind(settings, settings.grpc_port, "--grpc-port") as grpc_socket,
        bind(settings, settings.http_port, "--http-port") as http_socket,
    ):
        return replace(settings, grpc_port=grpc_socket.getsockname()[1], http_port=http_socket.getsockname()[1])


def _warm(schema: Schema) -> None:
    from profile_service.shard.warm import warm_kernels

    warm_kernels(schema)


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
