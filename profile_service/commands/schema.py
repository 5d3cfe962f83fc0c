"""`schema check`: whether a schema file is right, what a user then costs, and what a change does to stored profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from profile_service.commands.options import Json, flag

if TYPE_CHECKING:
    from rich.console import RenderableType

    from profile_service.domain.layout import Layout
    from profile_service.domain.migrate import Changes
    from profile_service.domain.schema import Schema

HEADER_BYTES = 32
"""Of every row: events, first seen, last seen, last received."""

INDEX_BYTES = 21
"""An entry of 8 bytes, and slots of 8 for a table that has just grown."""

USER_ID_BYTES = 16
"""Taken for the length of an id."""


def check(
    file: Annotated[str, typer.Argument(help="Schema file, or the name of a shipped one: marketplace, retail.")],
    against: Annotated[
        str,
        flag("--against", "The schema that profiles are stored under: what would become of them?", metavar="OLD_FILE"),
    ] = "",
    reset_feature: Annotated[
        list[str], flag("--reset-feature", "As for `serve`, with --against; repeatable.", metavar="NAME")
    ] = [],  # noqa: B006  typer makes a new one
    as_json: Json = False,
) -> None:
    """Says every fault of a schema file with its line, or what a row of it holds and costs.

    With --against it says what a restart makes of profiles that are stored under another schema, and fails where the
    restart would be refused. DATA_DIR/schema.yaml is the one that a data directory was last served with.

    Example:  profile-service schema check marketplace
    Example:  profile-service schema check mine.yaml --against data/schema.yaml
    """
    from profile_service.commands.terminal import CommandError, stdout
    from profile_service.domain.layout import Layout
    from profile_service.domain.schema import load_schema

    schema = load_schema(file)
    changes = None
    if against:
        from profile_service.domain.migrate import compare

        changes = compare(load_schema(against), schema, reset_feature)
    elif reset_feature:
        raise CommandError("--reset-feature: says something together with --against OLD_FILE only")
    layout = Layout.compile(schema)
    if as_json:
        import json

        said = describe(schema, layout) | ({} if changes is None else {"changes": describe_changes(changes)})
        print(json.dumps(said, indent=2, ensure_ascii=False))
    else:
        stdout().print(render_layout(schema, layout))
        if changes is not None:
            stdout().print(render_changes(changes))
    if changes is not None:
        changes.raise_faults()


def describe(schema: Schema, layout: Layout) -> dict[str, object]:
    """What the table shows, for machines."""
    return {
        "name": schema.name,
        "fingerprint": schema.fingerprint,
        "features": [
            {
                "name": spec.name,
                "kind": spec.kind,
                "attribute": getattr(spec.options, "attribute", None),
                "events": list(spec.events),
                "halfLifeSeconds": spec.half_life_s,
                "rowBytes": size,
                "standardError": feature.standard_error(),
            }
            for spec, size, feature in zip(schema.features, layout.feature_bytes, layout.features, strict=True)
        ],
        "rowBytes": layout.row_bytes,
        "indexBytes": INDEX_BYTES,
        "userIdBytes": USER_ID_BYTES,
        "bytesPerUser": layout.row_bytes + INDEX_BYTES + USER_ID_BYTES,
    }


def describe_changes(changes: Changes) -> dict[str, object]:
    """What the table of changes shows, for machines: features, by name where there is more to say."""
    return {
        "kept": dict(changes.kept),
        "converted": dict(changes.converted),
        "added": list(changes.added),
        "reset": dict(changes.reset),
        "dropped": list(changes.dropped),
        "refused": dict(changes.refused),
        "faults": list(changes.faults),
    }


def render_changes(changes: Changes) -> RenderableType:
    """What becomes of each feature of the stored profiles."""
    from rich.table import Table

    from profile_service.commands.terminal import plain

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan", title_justify="left", title_style="")
    table.title = "\nstored profiles, feature by feature:"
    for title in ("feature", "what a restart does"):
        table.add_column(title, no_wrap=True)
    table.add_column("what differs", style="dim", overflow="fold")
    groups = (
        ("keeps", changes.kept),
        ("converts", changes.converted),
        ("starts empty, being new", dict.fromkeys(changes.added, "")),
        ("starts empty, as told", changes.reset),
        ("drops", dict.fromkeys(changes.dropped, "")),
        ("refuses", changes.refused),
    )
    for what, features in groups:
        for name, remark in features.items():
            table.add_row(plain(name), what, plain(remark))
    return table


def render_layout(schema: Schema, layout: Layout) -> RenderableType:
    """The row, feature by feature, and its cost."""
    from rich.console import Group
    from rich.table import Table

    from profile_service.commands.terminal import plain
    from profile_service.domain.duration import format_duration

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan")
    for title in ("feature", "kind", "attribute", "half-life"):
        table.add_column(title)
    table.add_column("bytes", justify="right")
    table.add_column("remark", style="dim")
    table.add_row("(header)", "", "", "", str(HEADER_BYTES), "event count, first and last seen, last received")
    for spec, size, feature in zip(schema.features, layout.feature_bytes, layout.features, strict=True):
        error = feature.standard_error()
        table.add_row(
            plain(spec.name),
            spec.kind,
            plain(str(getattr(spec.options, "attribute", ""))),
            "" if spec.half_life_s is None else format_duration(spec.half_life_s),
            str(size),
            "" if error is None else f"standard error {error:.1%}",
        )
    rest = layout.row_bytes - HEADER_BYTES - sum(layout.feature_bytes)
    if rest:
        table.add_row("(padding)", "", "", "", str(rest), "to whole 8 bytes")
    total = layout.row_bytes + INDEX_BYTES + USER_ID_BYTES
    events = ", ".join(f"{plain(event.name)} ({event.weight:g})" for event in schema.event_types)
    ttl = "never" if schema.ttl_s is None else f"after {format_duration(schema.ttl_s)} untouched"
    return Group(
        f"schema {plain(schema.name)}: {len(schema.features)} features, no faults",
        f"events and their weights: {events}",
        f"a profile is forgotten: {ttl}",
        "",
        table,
        "",
        f"bytes a user: {total:,} = row {layout.row_bytes:,} + index {INDEX_BYTES} + user id {USER_ID_BYTES}",
        "(the index at its emptiest, an id of 16 bytes; texts of open vocabularies are held once a shard)",
    )
