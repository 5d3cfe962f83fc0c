"""`ingest`: files of events into a running service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from profile_service.commands.options import DEFAULT_ADDRESS, Address, Json, flag

if TYPE_CHECKING:
    from rich.console import Console

    from profile_service.files.tally import Tally

_COLUMNS = "Columns: which of them is what"
_SENDING = "Sending"

DEFAULT_BATCH = 4_000
DEFAULT_GIVE_UP_S = 600.0


def ingest(
    files: Annotated[list[Path], typer.Argument(help="Parquet, CSV with a header, or NDJSON.", metavar="FILE")],
    address: Address = DEFAULT_ADDRESS,
    user_column: Annotated[str | None, flag("--user-column", "User id (user_id).", panel=_COLUMNS)] = None,
    type_column: Annotated[
        str | None, flag("--type-column", "Event type (event_type or type).", panel=_COLUMNS)
    ] = None,
    type_value: Annotated[str | None, flag("--type-value", "The event type of every row.", panel=_COLUMNS)] = None,
    time_column: Annotated[
        str | None, flag("--time-column", "Event time (event_time, time or timestamp).", panel=_COLUMNS)
    ] = None,
    untimed: Annotated[
        bool, flag("--untimed", "Count events without a time as of their arrival; else refuse them.", panel=_COLUMNS)
    ] = False,
    event_id_column: Annotated[str | None, flag("--event-id-column", "Event id (event_id).", panel=_COLUMNS)] = None,
    attribute: Annotated[
        list[str] | None,
        flag(
            "--attribute",
            "An attribute's column, unless of the same name; `name=` leaves it out. May be given again.",
            panel=_COLUMNS,
            metavar="NAME=COLUMN",
        ),
    ] = None,
    mapping: Annotated[Path | None, flag("--mapping", "YAML file that names the columns.", panel=_COLUMNS)] = None,
    format_name: Annotated[
        str | None, flag("--format", "parquet, csv or ndjson; by the file's suffix otherwise.", panel=_COLUMNS)
    ] = None,
    delimiter: Annotated[str | None, flag("--delimiter", "Between the fields of CSV.", panel=_COLUMNS)] = None,
    batch: Annotated[int, flag("--batch", "Rows a batch.", panel=_SENDING, min=1, max=10_000)] = DEFAULT_BATCH,
    producer_id: Annotated[
        str | None,
        flag("--producer-id", "Who sends: by another name the same files count anew.", panel=_SENDING),
    ] = None,
    give_up_s: Annotated[
        float, flag("--give-up-s", "Seconds to wait for a service that is away or full.", panel=_SENDING, min=0)
    ] = DEFAULT_GIVE_UP_S,
    strict: Annotated[bool, flag("--strict", "Exit status 1 when any row was refused.", panel=_SENDING)] = False,
    as_json: Json = False,
) -> None:
    """Sends files of events to a running service, and says at the end what was refused, and why.

    Example:  profile-service ingest events.parquet --attribute price=price_eur

    Every attribute that the service's schema declares is taken from the column of its name. Times are timestamps,
    dates, ISO 8601, or numbers since 1970: below 1e11 seconds, below 1e14 milliseconds, below 1e17 microseconds, else
    nanoseconds; without a zone they are UTC. An NDJSON line is an event as the REST API takes it, or a flat row. Null
    is the same as absent.

    After an interruption of any kind, of this command or of the service, the same command goes on: rows that the
    service holds already are not counted again, and the summary is that of the whole file. So a file counts once, by
    its content and whatever its name, for as long as the service knows who sent it: 7 days after the last time.

    It counts anew, from its first row, by another --producer-id, with other flags for its columns or another --batch,
    and when a single byte of it has changed. So of a file to which rows were added send only those, as a file of their
    own. Rows with an event id count once in any case, for as long as the service remembers the id (24 hours).
    """
    from profile_service.commands.send import Sending, send_files
    from profile_service.commands.terminal import CommandError, say_error, stderr
    from profile_service.files.mapping import Wanted, read_mapping
    from profile_service.files.tally import Tally

    wanted = Wanted(
        user_column, type_column, time_column, event_id_column, type_value, _attributes(attribute or []), untimed
    )
    if mapping is not None:
        wanted = wanted.over(read_mapping(mapping))
    if delimiter is not None:
        delimiter = delimiter.replace("\\t", "\t")
        if len(delimiter) != 1:
            raise typer.BadParameter("must be one character", param_hint="--delimiter")
    tally = Tally()
    try:
        sending = Sending(batch, producer_id, give_up_s)
        send_files(files, address, wanted, format_name, delimiter, sending, tally, stderr())
    except (CommandError, KeyboardInterrupt):
        if tally.read:
            _print_tally(tally, as_json)
            say_error("stopped before the end; the same command goes on where it stopped")
        raise
    _print_tally(tally, as_json)
    for error in tally.errors:
        say_error(error)
    if tally.errors or (strict and tally.rejected):
        raise typer.Exit(1)


def _print_tally(tally: Tally, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(tally.as_json(), indent=2, ensure_ascii=False))
    else:
        from profile_service.commands.terminal import stdout

        render_tally(tally, stdout())


def render_tally(tally: Tally, console: Console) -> None:
    """What became of the rows."""
    from rich.table import Table

    from profile_service.commands.terminal import plain

    accepted = f"{tally.accepted:,} event{'' if tally.accepted == 1 else 's'} accepted"
    held = f", {tally.held:,} held already from an earlier run" if tally.held else ""
    open_ = f", {tally.unanswered:,} not sent or not acknowledged" if tally.unanswered else ""
    console.print(f"{tally.read:,} rows: {accepted}, {tally.rejected:,} refused{held}{open_}", soft_wrap=True)
    if not tally.groups:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan")
    table.add_column("refused", justify="right")
    table.add_column("field")
    table.add_column("reason", overflow="fold")
    table.add_column("first rows", style="dim", overflow="fold")
    files = {file for group in tally.groups.values() for file, _ in group.rows}
    for group in tally.ordered():
        rows = ", ".join(f"{row:,}" if len(files) == 1 else f"{file}:{row}" for file, row in group.rows)
        reason = group.reason + (" (the first; the value varies)" if group.varies else "")
        table.add_row(f"{group.count:,}", plain(group.field), plain(reason), rows)
    console.print(table)


def _attributes(given: list[str]) -> dict[str, str | None]:
    attributes: dict[str, str | None] = {}
    for pair in given:
        name, separator, column = pair.partition("=")
        if not separator or not name:
            raise typer.BadParameter(f"must be NAME=COLUMN, is {pair}", param_hint="--attribute")
        attributes[name] = column or None
    return attributes
