"""A Ray of our own inside this process's tree, for a service on one machine. It listens on the loopback interface only,
whatever the service itself listens on. It ends with this process, however that ends; after a SIGKILL two agents of Ray,
which hold nothing of ours, look for the rest of it for another minute.

Nothing of it is shared: another Ray on the machine, or in the environment's RAY_ADDRESS, is left alone.

Two of Ray's processes are not started, by what is inside of the Ray that is pinned, for which there are no arguments:
the autoscaler, of which one machine has no use, and the API server, which without the dashboard has none either, but is
waited for.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from profile_service.cluster.scratch import ScratchDirectory
from profile_service.config import MIB
from profile_service.errors import StartupError

OBJECT_STORE_BYTES = 100 * MIB
"""Only control goes through Ray; the populations of the shards are the largest of it."""

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""At 0 Ray takes 127.0.0.1 for its address, as it does where clusters are not supported, and binds everything to it."""


class EmbeddedRay:
    """Ray, started for `workers` actors.

    Raises StartupError where this process runs a Ray already, or has imported it before: it reads its environment then.
    """

    def __init__(self, workers: int) -> None:
        if "ray" in sys.modules and os.environ.get(LOOPBACK_VARIABLE) != "0":
            raise StartupError("Ray is imported in this process already; start the service before `import ray`")
        prepare_environment()
        import ray

        if ray.is_initialized():
            raise StartupError("this process runs a Ray already; one process starts one service")
        self._scratch = ScratchDirectory()
        # Ray takes SIGTERM for itself; signals belong to whoever started the service.
        on_main_thread = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGTERM) if on_main_thread else None
        try:
            with _without_unused_processes():
                ray.init(**arguments(workers, self._scratch.path))
        except BaseException:
            self._scratch.remove()
            raise
        finally:
            if handler is not None:
                signal.signal(signal.SIGTERM, handler)

    def stop(self) -> None:
        """Ends every process of it and removes its files."""
        import ray

        ray.shutdown()
        self._scratch.remove()


def arguments(workers: int, directory: Path) -> dict[str, Any]:
    """What `ray.init` is told."""
    return {
        "address": "local",
        # One started worker process for each actor: they wait for the actors, not the other way round.
        "num_cpus": workers,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "configure_logging": False,
        "log_to_driver": True,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(directory),
    }


@contextmanager
def _without_unused_processes() -> Iterator[None]:
    """Has `ray.init` start a head without autoscaler and API server."""
    from ray._private import node

    class Head(node.Node):  # type: ignore[misc]
        def start_monitor(self) -> None:
            pass

        def start_api_server(self, **_: object) -> None:
            self._webui_url = ""

    before, node.Node = node.Node, Head
    try:
        yield
    finally:
        node.Node = before


def prepare_environment() -> None:
    """What Ray has no arguments for. Its processes and the actors inherit it."""
    for name, value in {
        LOOPBACK_VARIABLE: "0",
        # Other users of the machine reach the loopback interface too: a token that only this tree of processes has.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # A driver started by `uv run` would have every worker started by it, too.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # Ray would have actors yield to everything else on the machine, a producer beside them first.
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Our processes' log lines say themselves where they are from.
        "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
    }.items():
        os.environ.setdefault(name, value)
