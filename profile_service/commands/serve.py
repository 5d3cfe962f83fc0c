"""`serve`: the whole service on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from profile_service.commands.options import flag
from profile_service.commands.settings import STORE, with_settings
from profile_service.config import Settings

if TYPE_CHECKING:
    from profile_service.launcher import Service

TEMPORARY = "note: no --data-dir; profiles and log are in a temporary directory, and gone when the service ends"


@with_settings
def serve(
    settings: Settings,
    data_dir: Annotated[
        Path | None,
        flag("--data-dir", "Directory of log and snapshots; made if missing. Without it nothing is kept after a stop."),
    ] = None,
    store: Annotated[str, STORE] = "local",
    host: Annotated[str, flag("--host", "Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
) -> None:
    """Runs the whole service on this machine. Ctrl-C drains and stops it; a second one stops it at once.

    Example:  profile-service serve --schema retail --grpc-port 50051 --http-port 8080

    It prints `ready: gRPC HOST:PORT, REST http://HOST:PORT` once it can be used.
    """
    from profile_service.commands.service import StopSignal, running

    settings = replace(settings, host=host, storage=replace(settings.storage, data_dir=data_dir, store=store))
    if data_dir is None and store == "local":
        print(TEMPORARY, flush=True)
    stop = StopSignal()
    with running(settings, stop) as service:
        if not stop.asked:
            print(ready_line(service), flush=True)
        stop.wait()


def ready_line(service: Service) -> str:
    """The line that says that the service can be used, and where."""
    return f"ready: gRPC {service.grpc_address}, REST http://{service.http_address}"
