"""`migrate`: all profiles from a data directory to a store, or back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from profile_service.commands.options import Json, flag


def migrate(
    source: Annotated[str, typer.Argument(metavar="FROM", help="A data directory, or the URL of a store.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The other kind, holding nothing yet.")],
    shards: Annotated[int | None, flag("--shards", "Shards of a new data directory, as for serve.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Takes everything that a service knows from its data directory to a Redis or Valkey, or back: profiles, counters,
    and what makes events count once. The source stays as it is. No service may run on either.

    At the end the target is read anew: its users, events, and a digest over all its rows have to be those of what was
    sent. Run it again after an interruption: it begins anew.

    Example:  profile-service migrate ./profiles redis://localhost:6379/0
    """
    import asyncio
    import json
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from profile_service.cluster.migration import to_directory, to_store
    from profile_service.commands.terminal import stderr, stdout
    from profile_service.config import default_shards
    from profile_service.errors import StartupError
    from profile_service.storage.redis_client import StoreUrl

    if ("://" in source) == ("://" in target):
        raise StartupError("one of FROM and TO must be a data directory, and the other the URL of a store (redis://…)")
    if shards is not None and "://" in target:
        raise StartupError("--shards: a store has none; it is for a new data directory")
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr()) as bar:
        task = bar.add_task("starting", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        if "://" in source:
            moving = to_directory(StoreUrl.parse(source), Path(target), shards or default_shards(), progress)
        else:
            moving = to_store(Path(source), StoreUrl.parse(target), progress)
        tally = asyncio.run(moving)
    seconds = time.monotonic() - began
    if as_json:
        said = {"users": tally.users, "events": tally.events, "digest": f"{tally.digest:016x}"}
        print(json.dumps({**said, "expiring": tally.expiring, "seconds": seconds}))
    else:
        stdout().print(f"{tally}: the same on both sides, in {seconds:.1f} s", highlight=False)
