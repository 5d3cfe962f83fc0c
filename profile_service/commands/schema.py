"""`schema check`: whether a schema file is right, and what a user then costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from profile_service.commands.options import Json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from profile_service.domain.layout import Layout
    from profile_service.domain.schema import Schema

HEADER_BYTES = 32
"""Of every row: events, first seen, last seen, last received."""

INDEX_BYTES = 36
"""An entry of 16 bytes, and slots of 8 that are at least two fifths full."""

USER_ID_BYTES = 16
"""Taken for the length of an id."""


def check(
    file: Annotated[str, typer.Argument(help="Schema file, or the name of a shipped one: marketplace, retail.")],
    as_json: Json = False,
) -> None:
    """Says every fault of a schema file with its line, or what a row of it holds and costs.

    Example:  profile-service schema check marketplace
    """
    from profile_service.commands.terminal import stdout
    from profile_service.domain.layout import Layout
    from profile_service.domain.schema import load_schema

    schema = load_schema(file)
    layout = Layout.compile(schema)
    if as_json:
        import json

        print(json.dumps(describe(schema, layout), indent=2, ensure_ascii=False))
    else:
        stdout().print(render_layout(schema, layout))


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
