"""Rows as earlier versions laid them out, brought into the layout of this one: a snapshot must load for ever.

    at first   the registers of a `distinct` were followed by a byte that was always 0

Everything else has stayed where it was. So what differs is the length of runs of `u1` slots, and with it what comes
after them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.features.base import VIEW_DTYPES
from profile_service.domain.features.distinct import DistinctFeature
from profile_service.domain.layout import Layout


def describe(layout: Layout) -> dict[str, Any]:
    """Where everything is in a row: slots by view, and by feature the first slot and the number of slots in each."""
    return {
        "slots": layout.counts,
        "features": {feature.name: owned for feature, owned in zip(layout.features, layout.slots, strict=True)},
    }


@dataclass(frozen=True)
class OldRows:
    """How bytes of rows, views one after the other, become those of this version's layout."""

    row_bytes: int
    """Of a row with its padding."""
    kept: NDArray[np.int64]
    """(bytes of a row without padding,) which of the old bytes each is."""

    @classmethod
    def of(cls, written: Mapping[str, Any], layout: Layout, itemsize: Mapping[str, int]) -> OldRows:
        """From what `describe` said when the rows were written.

        Raises:
            ValueError: no version of this schema's rows has been like that.
        """
        old = {view: int(count) for view, count in written["slots"].items()}
        if old.keys() != VIEW_DTYPES.keys() or list(written["features"]) != [f.name for f in layout.features]:
            raise ValueError("its features or views are not those of the schema")
        slots = {view: np.arange(layout.counts[view]) for view in VIEW_DTYPES}
        for feature, owned in zip(layout.features, layout.slots, strict=True):
            then = {view: tuple(run) for view, run in written["features"][feature.name].items()}
            for view, (first, count) in owned.items():
                at, held = then.pop(view, (0, 0))
                if held != count + (view == "u1" and isinstance(feature, DistinctFeature)):
                    raise ValueError(f"feature {feature.name} had {held} slots of {view}, has {count}")
                slots[view][first : first + count] = at + np.arange(count)
            if then:
                raise ValueError(f"feature {feature.name} had slots of {', '.join(then)}, has none")
        kept, start = [], 0
        for view, chosen in slots.items():
            if len(chosen) and chosen.max() >= old[view]:
                raise ValueError(f"has {old[view]} slots of {view}, needs {chosen.max() + 1}")
            size = itemsize[view]
            kept.append((start + chosen[:, None] * size + np.arange(size)).reshape(-1))
            start += old[view] * size
        return cls(-(-start // 8) * 8, np.concatenate(kept))

    def convert(self, rows: NDArray[np.uint8], row_bytes: int) -> NDArray[np.uint8]:
        """(rows, row_bytes) what (rows, `self.row_bytes`) hold."""
        converted: NDArray[np.uint8] = np.zeros((len(rows), row_bytes), np.uint8)
        np.take(rows, self.kept, axis=1, out=converted[:, : len(self.kept)])
        return converted


@dataclass(frozen=True)
class OldLayout:
    """What a snapshot of an earlier version says its rows are like."""

    users: OldRows
    population: OldRows
    """The population's `f4` view has 64 bits, and its row no padding at the end."""

    @classmethod
    def parse(cls, written: bytes, users: Layout, population: Layout) -> OldLayout:
        """From the snapshot's block.

        Raises:
            ValueError: no version has laid out the rows of this schema like that.
        """
        narrow = {view: dtype.itemsize for view, dtype in VIEW_DTYPES.items()}
        wide = {**narrow, "f4": 8}
        try:
            said = json.loads(written)
            return cls(
                OldRows.of(said["users"], users, narrow),
                OldRows.of(said["population"], population, wide),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the version that wrote it laid out rows otherwise than this one does: {error}"
            ) from error

    def population_bytes(self, copied: memoryview) -> bytes:
        """What `PopulationRow.load` takes."""
        row = np.frombuffer(copied, np.uint8)
        if len(row) > self.population.row_bytes or len(row) <= self.population.kept.max():
            raise ValueError(f"{len(row)} bytes are not a population of this schema")
        return row[self.population.kept].tobytes()
