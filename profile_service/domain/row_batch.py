"""Rows on their way from one table to another one of the same layout: with their users' ids, and with the texts that
they refer to, for each table has its own numbers of texts.

    table ─▶ take_rows ─▶ RowBatch: texts numbered anew, 1 to n ─▶ put_rows ─▶ another table
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.features.base import Feature
from profile_service.domain.index import MOST_BYTES
from profile_service.domain.layout import Layout
from profile_service.domain.table import ProfileTable


class RowBatch(NamedTuple):
    """Some users, each once."""

    lengths: NDArray[np.int32]
    """Of their ids."""
    ids: NDArray[np.uint8]
    """Joined."""
    rows: NDArray[np.uint8]
    """(users, row_bytes); a slot that holds a text's number holds 1 + its place in `texts`, or 0."""
    text_lengths: NDArray[np.int32]
    texts: NDArray[np.uint8]
    """Joined."""


def take_rows(table: ProfileTable, numbers: NDArray[np.int64]) -> RowBatch:
    """A copy of the rows with these numbers; those that nobody has are left out."""
    lengths, ids = table.users.copy_chosen(numbers)
    numbers, lengths = numbers[lengths >= 0], lengths[lengths >= 0]
    rows = table.rows[numbers]
    slots = _text_slots(table.layout, rows)
    held = np.unique(np.concatenate([np.zeros(1, np.uint32), *(part.reshape(-1) for part in slots)]))
    for part in slots:
        part[:] = np.searchsorted(held, part)
    # The first one is 0, which is no text.
    text_lengths, texts = table.texts.copy_chosen(held[1:].astype(np.int64) - 1)
    assert (text_lengths >= 0).all()
    return RowBatch(lengths, ids, rows, text_lengths, texts)


def has_room(table: ProfileTable, batch: RowBatch) -> bool:
    """Whether `put_rows` finds room for all of it, were every user and every text new."""
    users = table.users.make_room(len(batch.lengths), len(batch.ids))
    return users and table.texts.make_room(len(batch.text_lengths), len(batch.texts))


def check_rows(layout: Layout, batch: RowBatch) -> None:
    """Raises ValueError where the batch is not one of this layout, and `put_rows` would not know what to do."""
    if batch.rows.shape != (len(batch.lengths), layout.row_bytes):
        raise ValueError(f"rows of shape {batch.rows.shape}, for {len(batch.lengths)} of {layout.row_bytes} bytes")
    for name, lengths, joined in (("ids", batch.lengths, batch.ids), ("texts", batch.text_lengths, batch.texts)):
        if (lengths < 0).any() or (lengths > MOST_BYTES).any() or lengths.sum(dtype=np.int64) != len(joined):
            raise ValueError(f"the lengths of the {name} do not add up to {len(joined)} bytes")
    highest = max((int(part.max()) for part in _text_slots(layout, batch.rows) if part.size), default=0)
    if highest > len(batch.text_lengths):
        raise ValueError(f"the rows refer to text {highest} of {len(batch.text_lengths)}")


def put_rows(table: ProfileTable, batch: RowBatch) -> NDArray[np.int64]:
    """Puts the rows in place of those that their users have in the table, or adds them; returns their numbers. The
    population stays as it is. `check_rows` and `has_room` have been asked."""
    rows = np.array(batch.rows)
    numbers = table.texts.load(batch.text_lengths, batch.texts)
    here = np.concatenate([np.zeros(1, np.uint32), (numbers + 1).astype(np.uint32)])
    for part in _text_slots(table.layout, rows):
        part[:] = here[part]
    table.mark_texts(table.layout.views_of(rows).u4, table.layout)
    return table.load_rows(batch.lengths, batch.ids, rows)


def _text_slots(layout: Layout, rows: NDArray[np.uint8]) -> list[NDArray[np.uint32]]:
    """Views of the slots that hold numbers of texts, (rows, slots) each."""
    u4 = layout.views_of(rows).u4
    features: tuple[Feature, ...] = layout.features
    return [u4[:, first : first + count] for feature in features for first, count in feature.strings()]
