"""Rows of the table of costs in docs/performance.md: what was promised, what was measured, and the floor under it in
the same run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

HEAD = "| what | bound | figure | floor in the same run | ratio |\n|---|---|---|---|---|"


def cost(what: str, *, bound: str, figure: str, floor: str, ratio: float | None, held: bool) -> dict[str, Any]:
    """One row; `ratio` is figure to floor, None where there is no floor."""
    return {"what": what, "bound": bound, "figure": figure, "floor": floor, "ratio": ratio, "held": held}


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [HEAD]
    for row in rows:
        figure = row["figure"] if row["held"] else f"**{row['figure']}** (missed)"
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"| {row['what']} | {row['bound']} | {figure} | {row['floor']} | {ratio} |")
    return "\n".join(lines)
