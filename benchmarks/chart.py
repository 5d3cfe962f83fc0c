"""Small drawings of figures as SVG: bars, stacked bars, lines from step to step, and a curve over time with stretches
marked.

Everything is a few rectangles, lines and texts, so they are written as they are; a plotting library would take more
than a second to import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 150, 30, 44, 46
_ROW = 30
_PLOT_HEIGHT = 220
_STEPS_HEIGHT = 130
COLORS = ("#4269d0", "#efb118", "#6cc5b0", "#ff725c", "#9c6b4e", "#a463f2")
_GRID, _TEXT, _BOUND, _MARK = "#dddddd", "#333333", "#c0392b", "#efe6d2"
_LETTER = 7.2
"""A letter's width, about: fonts differ."""


@dataclass(frozen=True)
class Bar:
    """A bar, and a dot for each of the figures that it stands for."""

    label: str
    value: float
    dots: Sequence[float]


@dataclass(frozen=True)
class Stack:
    """A bar of pieces, one after the other."""

    label: str
    values: Sequence[float]


@dataclass(frozen=True)
class Span:
    """A marked stretch of time."""

    start: float
    stop: float


def bars(title: str, rows: Sequence[Bar], *, unit: str, scale: float = 1.0) -> str:
    """A horizontal bar for each row."""
    most = max(max([row.value, *row.dots]) for row in rows) * scale
    left = _beside([row.label for row in rows])
    axis = _Axis.fit(most, left, WIDTH - _RIGHT)
    height = _TOP + _ROW * len(rows) + _BOTTOM
    parts = [_title(title), *_vertical_grid(axis, height, unit)]
    for number, row in enumerate(rows):
        y = _TOP + _ROW * number
        parts.append(_text(left - 8, y + 19, row.label, anchor="end"))
        parts.append(_box(left, y + 5, axis.at(row.value * scale) - left, _ROW - 10, COLORS[0]))
        parts += [
            f'<circle cx="{axis.at(dot * scale):.1f}" cy="{y + _ROW / 2:.1f}" r="3" fill="{COLORS[1]}"/>'
            for dot in row.dots
        ]
    return _svg(height, parts)


def stacks(title: str, pieces: Sequence[str], rows: Sequence[Stack], *, unit: str, bound: float) -> str:
    """A horizontal bar of pieces for each row, and a line at `bound`, which none should reach."""
    left = _beside([row.label for row in rows])
    axis = _Axis.fit(max([bound, *(sum(row.values) for row in rows)]), left, WIDTH - _RIGHT)
    height = _TOP + 24 + _ROW * len(rows) + _BOTTOM
    parts = [_title(title), *_vertical_grid(axis, height, unit)]
    parts += _legend(left, pieces)
    for number, row in enumerate(rows):
        y = _TOP + 24 + _ROW * number
        parts.append(_text(left - 8, y + 19, row.label, anchor="end"))
        done = 0.0
        for color, value in enumerate(row.values):
            start, stop = axis.at(done), axis.at(done + value)
            parts.append(_box(start, y + 5, stop - start, _ROW - 10, COLORS[color % len(COLORS)]))
            done += value
    parts.append(_line(axis.at(bound), _TOP + 20, axis.at(bound), height - _BOTTOM, _BOUND))
    parts.append(_text(axis.at(bound) - 4, height - _BOTTOM - 4, "bound", anchor="end", color=_BOUND))
    return _svg(height, parts)


def curves(
    title: str,
    at: Sequence[float],
    series: dict[str, Sequence[float]],
    *,
    unit: str,
    spans: Sequence[Span] = (),
    spans_are: str = "",
) -> str:
    """Curves over seconds. Stretches `spans`, explained by `spans_are`, are marked behind them."""
    height = _TOP + 20 + _PLOT_HEIGHT + _BOTTOM
    across = _Axis(at[0], at[-1], 64, WIDTH - _RIGHT)
    most = max(max(values) for values in series.values())
    up = _Axis.fit(most, height - _BOTTOM, _TOP + 20)
    parts = [_title(title)]
    for span in spans:
        start, stop = across.at(max(span.start, at[0])), across.at(min(span.stop, at[-1]))
        parts.append(_box(start, _TOP + 20, stop - start, _PLOT_HEIGHT, _MARK))
    for tick in up.ticks():
        parts.append(_line(64, up.at(tick), WIDTH - _RIGHT, up.at(tick), _GRID))
        parts.append(_text(58, up.at(tick) + 4, f"{tick:g}", anchor="end"))
    parts += [_text(across.at(tick), height - _BOTTOM + 16, f"{tick:g}", anchor="middle") for tick in across.ticks()]
    parts.append(_text((64 + WIDTH - _RIGHT) / 2, height - 8, "seconds", anchor="middle"))
    parts.append(_text(8, _TOP + 9, unit))
    for number, values in enumerate(series.values()):
        points = " ".join(f"{across.at(t):.1f},{up.at(value):.1f}" for t, value in zip(at, values, strict=True))
        color = COLORS[number % len(COLORS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.4"/>')
    parts += _legend(64.0, [*series], spans_are)
    return _svg(height, parts)


def steps(title: str, at: Sequence[str], series: Mapping[str, Sequence[float]], *, unit: str) -> str:
    """Lines from step to step, each with a dot and its figure; the steps stand at equal distances."""
    top, bottom = _TOP + 34, _TOP + 34 + _STEPS_HEIGHT
    across = [120 + number * (WIDTH - 120 - 60) / max(1, len(at) - 1) for number in range(len(at))]
    up = _Axis.fit(max(max(values) for values in series.values()), bottom, top)
    parts = [_title(title), _text(8, _TOP + 9, unit)]
    for tick in up.ticks():
        parts.append(_line(64, up.at(tick), WIDTH - _RIGHT, up.at(tick), _GRID))
        parts.append(_text(58, up.at(tick) + 4, f"{tick:g}", anchor="end"))
    parts += [_text(x, bottom + 16, label, anchor="middle") for x, label in zip(across, at, strict=True)]
    for number, values in enumerate(series.values()):
        color = COLORS[number % len(COLORS)]
        places = [(x, up.at(value), value) for x, value in zip(across, values, strict=True)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.4"/>')
        for place, y, value in places:
            parts.append(f'<circle cx="{place:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
            parts.append(_text(place, y - 7, f"{value:.3g}" if value < 1000 else f"{value:,.0f}", anchor="middle"))
    parts += _legend(64.0 + _LETTER * len(unit), [*series])
    return _svg(bottom + 30, parts)


def below(upper: str, lower: str) -> str:
    """Two drawings as one."""
    heights = [float(drawing.split('height="', 1)[1].split('"', 1)[0]) for drawing in (upper, lower)]
    return _svg(sum(heights), [upper, f'<g transform="translate(0 {heights[0]:.0f})">', lower, "</g>"])


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` between two places on the drawing."""

    low: float
    high: float
    start: float
    stop: float

    @classmethod
    def fit(cls, most: float, start: float, stop: float) -> _Axis:
        """From 0 to a little more than `most`."""
        return cls(0.0, most * 1.05 if most > 0 else 1.0, start, stop)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values, five or so."""
        rough = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def _beside(labels: Sequence[str]) -> float:
    """Where bars begin that have these labels on their left."""
    return max(_LEFT, 16 + _LETTER * max(map(len, labels)))


def _legend(x: float, names: Sequence[str], mark: str = "") -> list[str]:
    """What each colour stands for; `mark` is what marked stretches are."""
    parts = []
    keys = [(name, COLORS[number % len(COLORS)]) for number, name in enumerate(names)]
    for name, color in [*keys, *([(mark, _MARK)] if mark else [])]:
        parts += [_box(x, _TOP, 10, 10, color), _text(x + 14, _TOP + 9, name)]
        x += 14 + _LETTER * len(name) + 12
    return parts


def _vertical_grid(axis: _Axis, height: float, unit: str) -> list[str]:
    parts = []
    for tick in axis.ticks():
        parts.append(_line(axis.at(tick), _TOP, axis.at(tick), height - _BOTTOM, _GRID))
        parts.append(_text(axis.at(tick), height - _BOTTOM + 16, f"{tick:g}", anchor="middle"))
    parts.append(_text((axis.start + axis.stop) / 2, height - 8, unit, anchor="middle"))
    return parts


def _title(text: str) -> str:
    return _text(8, 22, text, size=14)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, color: str = _TEXT) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _box(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" fill="{color}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def _svg(height: float, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif">'
    )
    return "\n".join([head, _box(0, 0, WIDTH, height, "#ffffff"), *parts, "</svg>", ""])
