"""Rows of earlier versions are brought into this version's layout, or refused: never misread."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from profile_service.domain.features.base import VIEW_DTYPES
from profile_service.domain.layout import Layout
from profile_service.domain.schema import parse_schema
from profile_service.shard.old_layouts import OldLayout, describe

SCHEMA = parse_schema(
    """
name: old
events: {view: {weight: 1}}
features:
  makes:  {kind: distinct, attribute: make, precision: 5}
  colors: {kind: distinct, attribute: color, precision: 6}
  views:  {kind: counter, half_life: 1d}
  top:    {kind: top_k, attribute: make, k: 3}
"""
)
LAYOUTS = {"users": Layout.compile(SCHEMA), "population": Layout.compile(SCHEMA, population=True)}
REGISTERS = {"makes": 24, "colors": 48}
"""Bytes of each `distinct`; at first there was one more."""


def first_version() -> dict[str, Any]:
    """What the first version said of its layout."""
    said = {name: copy.deepcopy(describe(layout)) for name, layout in LAYOUTS.items()}
    for layout in said.values():
        layout["slots"]["u1"] = 25 + 49
        layout["features"]["makes"]["u1"] = [0, 25]
        layout["features"]["colors"]["u1"] = [25, 49]
    return said


def parse(said: dict[str, Any]) -> OldLayout:
    return OldLayout.parse(json.dumps(said).encode(), *LAYOUTS.values())


def test_registers_lose_the_byte_behind_them() -> None:
    layout = LAYOUTS["users"]
    start = sum(layout.counts[view] * dtype.itemsize for view, dtype in VIEW_DTYPES.items() if view != "u1")
    rows = np.random.default_rng(7).integers(0, 256, (5, layout.row_bytes), np.uint8)
    rows[:, start + 72 :] = 0
    zero: NDArray[np.uint8] = np.zeros((5, 1), np.uint8)
    written = np.hstack([rows[:, : start + 24], zero, rows[:, start + 24 : start + 72], zero])
    padding: NDArray[np.uint8] = np.zeros((5, -written.shape[1] % 8), np.uint8)
    old = parse(first_version()).users
    assert old.row_bytes == written.shape[1] + padding.shape[1]
    assert np.array_equal(old.convert(np.hstack([written, padding]), layout.row_bytes), rows)


def test_the_population_loses_them_too() -> None:
    counts = LAYOUTS["population"].counts
    start = sum(counts[view] * (8 if view == "f4" else VIEW_DTYPES[view].itemsize) for view in counts if view != "u1")
    copied = np.random.default_rng(7).integers(0, 256, start + 72, np.uint8)
    written = np.concatenate([copied[: start + 24], [np.uint8(0)], copied[start + 24 :], [np.uint8(0)]])
    old = parse(first_version())
    assert old.population_bytes(memoryview(written.tobytes())) == copied.tobytes()
    with pytest.raises(ValueError, match="not a population"):
        old.population_bytes(memoryview(written[:-2].tobytes()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda users: users["features"].pop("top"), "are not those of the schema"),
        (lambda users: users["slots"].pop("f4"), "are not those of the schema"),
        (lambda users: users["features"]["top"].update(u4=[0, 4]), "top had 4 slots of u4, has 3"),
        (lambda users: users["features"]["views"].update(u1=[74, 1]), "views had slots of u1, has none"),
        (lambda users: users["features"]["makes"].update(u1=[0, 26]), "makes had 26 slots of u1, has 24"),
        (lambda users: users["slots"].update(u1=60), "has 60 slots of u1, needs 73"),
    ],
)
def test_what_no_version_wrote_is_refused(change: Any, reason: str) -> None:
    said = first_version()
    change(said["users"])
    with pytest.raises(ValueError, match=reason):
        parse(said)
