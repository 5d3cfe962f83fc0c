"""Rows as the answers to reads: encoded userprofile.v1.Profile messages, many in one call.

rows, ids ─▶ | free ...... | third profile | second profile | first profile |     each from its end to its start
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.encoding import (
    HEAD_BYTES,
    NO_ROOM,
    Reading,
    put_bytes,
    put_head,
    put_int,
    put_time,
)
from profile_service.domain.features import encode
from profile_service.domain.features.base import NAME, NAME_BYTES, RowViews, Weights
from profile_service.domain.index import Strings
from profile_service.domain.kernel import leaf_kernel, to_i64
from profile_service.domain.layout import EVENT_COUNT, FIRST_SEEN, LAST_RECEIVED, LAST_SEEN, Layout
from userprofile.v1 import profile_pb2

EVERY_TIME = np.iinfo(np.int64).min
"""For `Encoder.encode`: profiles of users who were not heard of for any time."""

_USER_ID = profile_pb2.Profile.USER_ID_FIELD_NUMBER
_EVENT_COUNT = profile_pb2.Profile.EVENT_COUNT_FIELD_NUMBER
_FIRST_SEEN = profile_pb2.Profile.FIRST_SEEN_TIME_FIELD_NUMBER
_LAST_SEEN = profile_pb2.Profile.LAST_SEEN_TIME_FIELD_NUMBER
_READ_TIME = profile_pb2.Profile.READ_TIME_FIELD_NUMBER
_FEATURES = profile_pb2.Profile.FEATURES_FIELD_NUMBER
_KEY, _VALUE = 1, 2
"""Fields of a map's entry."""

_USUAL_TEXT_BYTES = 4096
_RANKS = 66
"""Space that `distinct` needs."""


@leaf_kernel
def encode_profiles(
    f8: NDArray[np.float64],
    i8: NDArray[np.int64],
    f4: Weights,
    u4: NDArray[np.uint32],
    u1: NDArray[np.uint8],
    header: int,
    operations: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    reals: NDArray[np.float64],
    codes: NDArray[np.int64],
    labels: NDArray[np.uint8],
    text_entries: NDArray[np.uint64],
    text_arena: NDArray[np.uint8],
    prior_weights: NDArray[np.float64],
    prior_landmarks: NDArray[np.int64],
    keys: NDArray[np.float64],
    order: NDArray[np.int64],
    beside: NDArray[np.int64],
    answer_bytes: int,
    rows: NDArray[np.int64],
    first: int,
    ids: NDArray[np.uint8],
    id_offset: NDArray[np.int64],
    id_length: NDArray[np.int32],
    least_events: int,
    heard_ns: int,
    read_ns: int,
    out: NDArray[np.uint8],
    starts: NDArray[np.int64],
) -> int:
    """Writes the profiles of rows from `first` on into `out`, the first one last; returns where to go on. Each begins
    at its `starts` and ends where the one before begins.

    One is empty where the row is below 0, has fewer events than `least_events`, or was not heard of since `heard_ns`.
    The users' ids lie in `ids`. Of the features those are written that are `chosen`.
    """
    views = RowViews(f8, i8, f4, u4, u1)
    at = len(out)
    for n in range(first, len(rows)):
        row = rows[n]
        if row < 0 or i8[row, header + EVENT_COUNT] < least_events or i8[row, header + LAST_RECEIVED] < heard_ns:
            starts[n] = at
            continue
        id_bytes = to_i64(id_length[n])
        reserve = answer_bytes + HEAD_BYTES + id_bytes
        if at < reserve:
            return n
        reading = Reading(
            read_ns,
            reals,
            codes,
            labels,
            text_entries,
            text_arena,
            prior_weights,
            prior_landmarks,
            keys,
            order,
            beside,
            reserve,
        )
        for f in range(len(operations) - 1, -1, -1):
            if chosen[f]:
                end = at
                at = encode(views, row, operations[f], reading, out, at)
                if at == NO_ROOM:
                    return n
                at = put_head(out, at, _VALUE, end)
                at = put_bytes(out, at, _KEY, labels, operations[f, NAME], operations[f, NAME_BYTES])
                at = put_head(out, at, _FEATURES, end)
        at = put_time(out, at, _READ_TIME, read_ns)
        if i8[row, header + EVENT_COUNT] > 0:
            at = put_time(out, at, _LAST_SEEN, i8[row, header + LAST_SEEN])
            at = put_time(out, at, _FIRST_SEEN, i8[row, header + FIRST_SEEN])
        at = put_int(out, at, _EVENT_COUNT, i8[row, header + EVENT_COUNT])
        at = put_bytes(out, at, _USER_ID, ids, id_offset[n], id_bytes)
        starts[n] = at
    return len(rows)


class Priors:
    """The population's values as categoricals need them: stored weights, one feature behind the other, and a landmark
    for each."""

    def __init__(self, weights: NDArray[np.float64], landmarks: NDArray[np.int64]) -> None:
        self.weights = weights
        self.landmarks = landmarks


UNKNOWN = Priors(np.zeros(0, np.float64), np.zeros(0, np.int64))
"""Before anything is known of the population: every value of a list is as likely as the others."""


class Encoder:
    """Writes the rows of one layout.

    Args:
        views: whole rows, or the population's.
        text_entries, text_arena: the interned texts, as `ByteIndex` has them.
    """

    def __init__(
        self, layout: Layout, views: RowViews, text_entries: NDArray[np.uint64], text_arena: NDArray[np.uint8]
    ) -> None:
        self._layout = layout
        self._all = np.ones(len(layout.features), np.bool_)
        places = max(_RANKS, layout.counts["f4"])
        self._rows = (*views, layout.header, layout.operations)
        self._constants = (*layout.tables, layout.labels, text_entries, text_arena)
        scratch = (np.empty(places, np.float64), np.empty(places, np.int64), np.empty(places, np.int64))
        self._scratch = (*scratch, layout.answer_bytes)
        self._out = np.empty(layout.answer_bytes + _USUAL_TEXT_BYTES, np.uint8)

    def encode(
        self,
        rows: NDArray[np.int64],
        user_ids: Strings,
        read_ns: int,
        names: Sequence[str] = (),
        priors: Priors = UNKNOWN,
        least_events: int = 0,
        heard_ns: int = EVERY_TIME,
    ) -> list[bytes]:
        """Encoded Profiles as of `read_ns` in the order of `rows`, of the features named, or of all where none is.

        One is empty where the row is below 0, has fewer events than `least_events`, or was not heard of since
        `heard_ns`.
        """
        chosen = self._all
        if names:
            wanted = set(names)
            chosen = np.array([feature.name in wanted for feature in self._layout.features], np.bool_)
        starts = np.empty(len(rows), np.int64)
        profiles: list[bytes] = []
        while len(profiles) < len(rows):
            first = len(profiles)
            done = encode_profiles(
                *self._rows,
                chosen,
                *self._constants,
                priors.weights,
                priors.landmarks,
                *self._scratch,
                rows,
                first,
                user_ids.buffer,
                user_ids.offset,
                user_ids.length,
                least_events,
                heard_ns,
                read_ns,
                self._out,
                starts,
            )
            end = len(self._out)
            written = self._out.data
            for start in starts[first:done].tolist():
                profiles.append(bytes(written[start:end]))
                end = start
            if done < min(len(rows), first + _MANY):
                self._out = np.empty(2 * len(self._out), np.uint8)
        return profiles


_MANY = 16
"""Profiles that one call should write at least."""
