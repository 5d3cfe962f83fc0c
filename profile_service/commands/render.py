"""A profile as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profile_service.commands.terminal import plain
from userprofile.v1 import profile_pb2

_BAR_CELLS = 16
_SHOWN_VALUES = 8
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HEIGHTS = " ▁▂▃▄▅▆▇█"


def render_profile(profile: profile_pb2.Profile, order: Sequence[str], units: dict[str, str]) -> RenderableType:
    """The whole profile; features in `order`, with the `units` that the schema gives."""
    read = profile.read_time
    head = Text.assemble(
        (plain(profile.user_id) or "population", "bold"),
        f"   {profile.event_count:,} events, first {_ago(profile.first_seen_time, read)}, ",
        f"last {_ago(profile.last_seen_time, read)}",
    )
    table = Table(show_header=False, box=None, padding=(0, 2, 1, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    named = [name for name in order if name in profile.features]
    for name in [*named, *sorted(set(profile.features) - set(named))]:
        table.add_row(plain(name), render_feature(profile.features[name], units.get(name, ""), read))
    return Group(head, Text(), table)


def render_feature(feature: profile_pb2.Feature, unit: str, read: Timestamp) -> RenderableType:
    """One feature's value."""
    match feature.WhichOneof("kind"):
        case "counter":
            return Text(number(feature.counter.value))
        case "categorical":
            return _categorical(feature.categorical)
        case "distribution":
            return _distribution(feature.distribution, unit)
        case "top_k":
            return _top_k(feature.top_k)
        case "window_count":
            return Text(f"{feature.window_count.value:,}")
        case "latest":
            latest = feature.latest
            return Text(f"{plain(latest.value)}   {_ago(latest.time, read)}") if latest.HasField("time") else _nothing()
        case "recent":
            return _recent(feature.recent, read)
        case "distinct":
            return Text(f"about {number(feature.distinct.estimate)}")
        case None:
            return Text("of a kind that this version does not know", style="dim")


def number(value: float) -> str:
    """A number as people read it.

    >>> number(12900.4), number(0.1234), number(3.0)
    ('12,900', '0.123', '3')
    """
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _categorical(value: profile_pb2.Categorical) -> RenderableType:
    table = _lines()
    highest = max((entry.likelihood for entry in value.values), default=1.0) or 1.0
    for entry in value.values[:_SHOWN_VALUES]:
        lift_style = "green" if entry.lift >= 1.5 else "dim" if entry.lift < 1 else ""
        table.add_row(
            plain(entry.value),
            Text(_bar(entry.likelihood / highest), style="magenta"),
            f"{entry.likelihood:.1%}",
            Text(f"lift {entry.lift:.2f}", style=lift_style),
        )
    return Group(table, _remark(f"weight {number(value.weight)}, confidence {value.confidence:.0%}", value.values))


def _distribution(value: profile_pb2.Distribution, unit: str) -> RenderableType:
    if value.weight <= 0:
        return _nothing()
    at = {round(quantile.probability, 2): quantile.value for quantile in value.quantiles}
    unit = f" {plain(unit)}" if unit else ""
    lines = [
        Text.assemble(
            ("median ", "dim"), (number(at.get(0.5, value.mean)) + unit, "bold"),
            ("   half of it ", "dim"), f"{number(at.get(0.25, value.min))} – {number(at.get(0.75, value.max))}",
            ("   nine tenths ", "dim"), f"{number(at.get(0.05, value.min))} – {number(at.get(0.95, value.max))}",
        ),
        _histogram(value.histogram),
        Text(
            f"mean {number(value.mean)}, deviation {number(value.stddev)}, "
            f"lowest {number(value.min)}, highest {number(value.max)}, weight {number(value.weight)}",
            style="dim",
        ),
    ]  # fmt: skip
    return Group(*lines)


def _histogram(histogram: profile_pb2.Distribution.Histogram) -> Text:
    """The bins that hold something, and their neighbours up to the ends of it, as columns of eight heights."""
    weights, edges = list(histogram.weights), list(histogram.edges)
    filled = [place for place, weight in enumerate(weights) if weight > 0]
    if not filled:
        return Text()
    first, last = filled[0], filled[-1]
    top = max(weights)
    columns = "".join(
        _HEIGHTS[max(1, round(weight / top * 8)) if weight > 0 else 0] for weight in weights[first : last + 1]
    )
    left = f"under {number(edges[0])}" if first == 0 else number(edges[first - 1])
    right = f"over {number(edges[-1])}" if last == len(weights) - 1 else number(edges[last])
    return Text.assemble((f"{left} ", "dim"), (columns, "magenta"), (f" {right}", "dim"))


def _top_k(value: profile_pb2.TopK) -> RenderableType:
    if not value.entries:
        return _nothing()
    table = _lines()
    highest = value.entries[0].weight or 1.0
    for entry in value.entries[:_SHOWN_VALUES]:
        error = f"± {number(entry.error)}" if entry.error > 0 else ""
        table.add_row(
            plain(entry.value),
            Text(_bar(entry.weight / highest), style="magenta"),
            f"{entry.share:.1%}",
            Text(f"weight {number(entry.weight)} {error}", style="dim"),
        )
    return Group(table, _remark(f"weight {number(value.weight)}", value.entries))


def _recent(value: profile_pb2.Recent, read: Timestamp) -> RenderableType:
    if not value.entries:
        return _nothing()
    table = _lines()
    for entry in value.entries[:_SHOWN_VALUES]:
        table.add_row(plain(entry.value), Text(_ago(entry.time, read), style="dim"))
    return Group(table, _remark("", value.entries))


def _lines() -> Table:
    return Table(show_header=False, box=None, padding=(0, 2, 0, 0))


def _remark(text: str, entries: Sequence[object]) -> Text:
    more = len(entries) - _SHOWN_VALUES
    parts = [text, f"{more} more with --json"] if more > 0 else [text]
    return Text("; ".join(part for part in parts if part), style="dim")


def _nothing() -> Text:
    return Text("nothing seen", style="dim")


def _bar(share: float) -> str:
    eighths = round(max(0.0, min(1.0, share)) * _BAR_CELLS * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(_BAR_CELLS)


def _ago(time: Timestamp, read: Timestamp) -> str:
    """A moment, as its distance from `read` while that is short, and as a date beyond."""
    passed = read.seconds - time.seconds
    for size, name in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        if abs(passed) >= size or size == 1:
            if abs(passed) >= 100 * 86_400:
                break
            return f"{passed // size} {name} ago"
    return datetime.fromtimestamp(time.seconds, UTC).strftime("%Y-%m-%d %H:%M")
