"""The command line, `profile-service`. A command is a module of `commands` and imports what it needs when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from profile_service import __version__
from profile_service.commands import bench
from profile_service.commands.demo import demo
from profile_service.commands.deploy import deploy, undeploy
from profile_service.commands.get import get
from profile_service.commands.ingest import ingest
from profile_service.commands.inspect import inspect
from profile_service.commands.migrate import migrate
from profile_service.commands.move import drain, move, scale
from profile_service.commands.schema import check
from profile_service.commands.serve import serve
from profile_service.commands.snapshot import snapshot
from profile_service.commands.status import status
from profile_service.commands.terminal import exit_status_of

app = typer.Typer(
    name="profile-service",
    help="Real-time user profiles: events stream in, and a profile is right the moment its events are acknowledged.",
    epilog="Any flag may come from the environment: --grpc-port is PROFILE_SERVICE_GRPC_PORT.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(
    help="Benchmarks: what this machine does. They start services of their own.", no_args_is_help=True
)
schema_app = typer.Typer(help="What a profile is: the schema file.", no_args_is_help=True)

for command in (
    serve,
    demo,
    deploy,
    undeploy,
    ingest,
    get,
    status,
    snapshot,
    move,
    scale,
    drain,
    inspect,
    migrate,
):
    app.command()(command)
for benchmark in (
    bench.ingest,
    bench.read,
    bench.memory,
    bench.growth,
    bench.recovery,
    bench.snapshot,
    bench.startup,
    bench.flood,
    bench.mixed,
    bench.soak,
    bench.stores,
    bench.scale,
):
    bench_app.command()(benchmark)
app.add_typer(bench_app, name="bench")
schema_app.command()(check)
app.add_typer(schema_app, name="schema")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"profile-service {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command; ends with 0 when it did what was asked, 1 when it could not, 2 when it was asked wrongly."""
    try:
        app()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # Nobody should ever be shown a traceback.
        sys.exit(exit_status_of(error))
