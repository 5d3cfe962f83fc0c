"""`inspect`: what a data directory holds, what of it is damaged, and, when told, making it startable again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from profile_service.commands.options import Json, flag
from profile_service.commands.terminal import CommandError, plain

if TYPE_CHECKING:
    from rich.console import Console

    from profile_service.domain.schema import Schema
    from profile_service.shard.inspection import ShardFinding
    from profile_service.storage.data_directory import DataDirectory
    from profile_service.storage.fs import FileSystem

BACKUP_PREFIX = "salvaged-"
"""Of the directory below DATA_DIR that keeps the originals of what a salvage changes."""


def inspect(
    data_dir: Annotated[
        Path, typer.Argument(help="The directory that `serve --data-dir` was given.", show_default=False)
    ],
    salvage: Annotated[
        bool, flag("--salvage", "Give up what is damaged, so that the service starts; keeps the originals.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Shows what a data directory holds: each shard's log and snapshots, and what of them is damaged.

    It reads every byte, changes nothing without --salvage, and refuses while a service holds the directory. It ends
    with status 1 when something is damaged.

    Example:  profile-service inspect /var/lib/profiles
    """
    from profile_service.commands.terminal import stderr, stdout
    from profile_service.storage.data_directory import DataDirectory, Holder
    from profile_service.storage.fs import LockHeld, RealFileSystem

    fs = RealFileSystem()
    try:
        directory = DataDirectory.open_existing(fs, data_dir.absolute())
    except LockHeld as held:
        raise CommandError(f"{data_dir} is in use by {Holder.describe(held.holder)}; stop that service first") from None
    backup: Path | None = None
    try:
        damages, schema = _own_files(directory)
        with stderr().status("reading"):
            found = _inspect_all(fs, directory)
        damaged = bool(damages) or any(shard.damages or shard.refusals for shard in found)
        if salvage and damaged:
            backup = directory.path / _backup_name()
            with stderr().status("salvaging"):
                if damages:
                    directory.mend_epoch(backup)
                found = _salvage_all(fs, directory, found, backup, schema)
    finally:
        directory.release()
    if as_json:
        import json

        print(json.dumps(_as_json(directory, damages, found, backup), indent=2))
    else:
        _print(stdout(), directory, damages, found, backup)
    if damaged and backup is None:
        raise typer.Exit(1)


def _inspect_all(fs: FileSystem, directory: DataDirectory) -> list[ShardFinding]:
    from profile_service.shard.inspection import inspect_shard

    found = []
    for shard_id in directory.shard_ids():
        if holder := directory.shard_in_use(shard_id):
            raise CommandError(f"shard {shard_id} is still in use by {holder}; wait for it to end")
        identity = directory.manifest.identity(shard_id)
        found.append(inspect_shard(fs, shard_id, directory.shard_directory(shard_id), identity))
    return found


def _salvage_all(
    fs: FileSystem, directory: DataDirectory, found: list[ShardFinding], backup: Path, schema: Schema | None
) -> list[ShardFinding]:
    from profile_service.shard.inspection import inspect_shard, salvage_shard

    before = []
    for shard in found:
        identity = directory.manifest.identity(shard.shard_id)
        salvaged = salvage_shard(
            fs,
            shard.shard_id,
            shard.directory,
            identity,
            backup=backup / shard.directory.name,
            schema=schema,
            partitions=1 << directory.manifest.partition_bits,
        )
        before.append(salvaged)
        after = inspect_shard(fs, shard.shard_id, shard.directory, identity)
        if after.refusals:
            raise CommandError(
                f"shard {shard.shard_id} would not start even now: {'; '.join(after.refusals)}; "
                f"the originals are in {backup}"
            )
    return before


def _own_files(directory: DataDirectory) -> tuple[list[str], Schema | None]:
    """What is wrong with the directory's own files; and the schema last served with, where it can be read."""
    from profile_service.domain.schema import parse_schema
    from profile_service.errors import DataLoss, SchemaError

    damages: list[str] = []
    try:
        directory.epoch()
    except DataLoss as error:
        damages.append(error.message)
    try:
        text = directory.schema_text()
        return damages, parse_schema(text) if text is not None else None
    except (SchemaError, UnicodeDecodeError):
        # It is for an early check only; each shard knows its own.
        return damages, None


def _backup_name() -> str:
    from datetime import UTC, datetime

    return f"{BACKUP_PREFIX}{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}"


def _print(
    console: Console, directory: DataDirectory, damages: list[str], found: list[ShardFinding], backup: Path | None
) -> None:
    from rich.table import Table

    manifest = directory.manifest
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="bold cyan")
    facts.add_column()
    for name, value in (
        ("directory", str(directory.path)),
        ("id", manifest.id),
        ("made", manifest.created),
        ("format", str(manifest.format)),
        ("shards", str(manifest.shards)),
        ("partitions", str(1 << manifest.partition_bits)),
    ):
        facts.add_row(name, plain(value))
    console.print(facts)
    for shard in found:
        _print_shard(console, shard)
    _print_verdict(console, damages, found, backup)


def _print_shard(console: Console, shard: ShardFinding) -> None:
    from datetime import UTC, datetime

    from rich.table import Table

    console.print()
    console.print(f"shard {shard.shard_id}", style="bold")
    segments = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan")
    for title in ("segment", ""):
        segments.add_column(title)
    for title in ("to position", "records", "MB"):
        segments.add_column(title, justify="right")
    for segment in shard.segments:
        state = "whole" if segment.whole else "damaged"
        if segment.torn_bytes:
            state = f"{state}, a torn tail"
        elif segment.hole_bytes:
            state = f"{state}, holes"
        segments.add_row(
            segment.path.name,
            state,
            f"{segment.end:,}",
            f"{segment.record_count:,}",
            f"{segment.size_bytes / 1e6:,.1f}",
        )
    console.print(segments)
    snapshots = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan")
    for title in ("snapshot", ""):
        snapshots.add_column(title)
    for title in ("replay from", "blocks", "MB", "written"):
        snapshots.add_column(title, justify="right")
    for snapshot in shard.snapshots:
        info = snapshot.info
        snapshots.add_row(
            info.path.name,
            "damaged" if snapshot.faults else "whole",
            f"{info.replay_position:,}",
            f"{snapshot.block_count:,}",
            f"{info.size_bytes / 1e6:,.1f}",
            f"{datetime.fromtimestamp(info.created_ns / 1e9, UTC):%Y-%m-%d %H:%M:%S}",
        )
    console.print(snapshots if shard.snapshots else "no snapshot")


def _print_verdict(console: Console, damages: list[str], found: list[ShardFinding], backup: Path | None) -> None:
    def say(title: str, lines: list[str]) -> None:
        if lines:
            console.print()
            console.print(title, style="bold")
            for line in lines:
                console.print(f"  {plain(line)}", markup=False, soft_wrap=True)

    refusals = [*damages, *_of_all(found, "refusals")]
    losses = _of_all(found, "losses")
    say("damaged", [*damages, *_of_all(found, "damages")])
    if backup is not None:
        say("lost", losses or ["nothing: a whole snapshot holds what the damaged parts of the log held"])
        say("the originals of what was changed", [str(backup)])
        say("the service starts again", ["profile-service serve --data-dir DATA_DIR, with the flags that it had"])
    elif refusals:
        say("the service does not start", refusals)
        say("with --salvage it does; lost is then", losses or ["nothing"])
    elif _of_all(found, "damages"):
        say("the service starts, and loses nothing", ["--salvage takes away what is damaged"])
    else:
        console.print()
        console.print("nothing is damaged", style="bold")


def _of_all(found: list[ShardFinding], name: str) -> list[str]:
    return [f"shard {shard.shard_id}: {text}" for shard in found for text in getattr(shard, name)]


def _as_json(
    directory: DataDirectory, damages: list[str], found: list[ShardFinding], backup: Path | None
) -> dict[str, Any]:
    manifest = directory.manifest
    return {
        "directory": str(directory.path),
        "id": manifest.id,
        "created": manifest.created,
        "format": manifest.format,
        "shards": manifest.shards,
        "partitions": 1 << manifest.partition_bits,
        "damages": damages,
        "starts": backup is not None or not (damages or any(shard.refusals for shard in found)),
        "backup": None if backup is None else str(backup),
        "shardFindings": [
            {
                "shardId": shard.shard_id,
                "damages": shard.damages,
                "refusals": shard.refusals,
                "losses": shard.losses,
                "segments": [
                    {
                        "file": segment.path.name,
                        "sizeBytes": segment.size_bytes,
                        "firstPosition": segment.first,
                        "endPosition": segment.end,
                        "records": segment.record_count,
                        "holeBytes": segment.hole_bytes,
                        "tornBytes": segment.torn_bytes,
                        "whole": segment.whole,
                    }
                    for segment in shard.segments
                ],
                "snapshots": [
                    {
                        "file": snapshot.info.path.name,
                        "sizeBytes": snapshot.info.size_bytes,
                        "replayPosition": snapshot.info.replay_position,
                        "createdNs": snapshot.info.created_ns,
                        "blocks": snapshot.block_count,
                        "whole": not snapshot.faults,
                    }
                    for snapshot in shard.snapshots
                ],
            }
            for shard in found
        ],
    }
