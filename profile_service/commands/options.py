"""Flags that several commands have. Any may come from the environment: `--grpc-port` is PROFILE_SERVICE_GRPC_PORT."""

from __future__ import annotations

from typing import Annotated, Any

import typer

DEFAULT_ADDRESS = "localhost:50051"


def flag(name: str, help_text: str, *, panel: str | None = None, metavar: str | None = None, **more: Any) -> Any:
    """A typer option `--name` with its name in the environment."""
    environment = "PROFILE_SERVICE_" + name.lstrip("-").split("/")[0].replace("-", "_").upper()
    return typer.Option(
        name, help=help_text, envvar=environment, show_envvar=False, rich_help_panel=panel, metavar=metavar, **more
    )


Address = Annotated[str, flag("--address", "Where the service's gRPC listens.", metavar="HOST:PORT")]
Json = Annotated[bool, flag("--json", "JSON for machines.")]
