"""The kernels alone, on one core, without a service around them: what a frontend and a shard do with the bytes of a
batch, and a table of profiles with as many users as there is memory for."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numba
import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.load import SCHEMAS
from profile_service.config import Limits
from profile_service.domain.index import Strings
from profile_service.domain.schema import load_schema
from profile_service.domain.table import ProfileTable
from profile_service.shard.shard import SLICE_EVENTS
from profile_service.wire.decode import decode_events
from profile_service.wire.frame import COUNT, as_buffer, check_frame
from profile_service.wire.gather import gather
from profile_service.wire.plan import WirePlan
from profile_service.wire.scan import scan_batch

_LINE_BYTES = 64
"""Of a cache line."""


class BareTable:
    """What is inside a shard that counts events, and nothing else: no log, no network, no event ids."""

    def __init__(self, schema: str) -> None:
        """`schema` is a key of `SCHEMAS`."""
        self._schema = load_schema(SCHEMAS[schema])
        self._plan = WirePlan.compile(
            self._schema.event_type_names, self._schema.text_attributes, self._schema.number_attributes
        )
        self._table = ProfileTable(self._schema)
        self._now_ns = time.time_ns()

    def __len__(self) -> int:
        return len(self._table)

    @property
    def row_bytes(self) -> int:
        """Bytes of a user's row."""
        return self._table.layout.row_bytes

    @property
    def state_bytes(self) -> int:
        """What a shard says it has in use: rows, index and texts."""
        return self._table.memory_bytes

    def count(self, batch: bytes) -> tuple[int, float, float]:
        """Counts a batch as a shard does; how many events it had, and the CPU time of decoding and of applying, in s.

        Raises:
            OverflowError: the table is full.
        """
        # Whoever sends to a shard says the number of events.
        events = int(check_frame(as_buffer(batch), len(batch), events_only=True)[COUNT])
        began = time.thread_time()
        columns = decode_events(batch, self._plan, self._now_ns, count=events)
        decoded = time.thread_time()
        if not self._table.has_room(columns.count, len(batch)):
            raise OverflowError(f"the table is full with {len(self._table):,} users")
        for start in range(0, columns.count, SLICE_EVENTS):
            self._table.apply(columns, start, min(start + SLICE_EVENTS, columns.count), self._now_ns)
        return columns.count, decoded - began, time.thread_time() - decoded

    def count_all(self, batches: Iterable[bytes]) -> dict[str, float]:
        """CPU time of `decode` and of `apply`, in µs an event, over all batches."""
        events, decode_s, apply_s = 0, 0.0, 0.0
        for batch in batches:
            counted, decoding, applying = self.count(batch)
            events, decode_s, apply_s = events + counted, decode_s + decoding, apply_s + applying
        return {"decode": decode_s / events * 1e6, "apply": apply_s / events * 1e6}

    def receive(self, batch: bytes) -> tuple[int, float, float]:
        """What a frontend does with a batch; how many events it had, and the CPU time of scanning and of gathering."""
        began = time.thread_time()
        scanned = scan_batch(batch, self._plan, Limits(), self._now_ns)
        marked = time.thread_time()
        gather(scanned.buffer, scanned.offset, scanned.length, np.arange(scanned.count))
        return scanned.count, marked - began, time.thread_time() - marked

    def read(self, user_ids: list[str]) -> float:
        """CPU time of finding a user and writing the profile's bytes, in µs, each asked for alone."""
        asked = [Strings.join([user_id.encode()]) for user_id in user_ids]
        read_ns = time.time_ns()
        began = time.thread_time()
        for strings in asked:
            self._table.profiles(strings, read_ns)
        return (time.thread_time() - began) / len(asked) * 1e6

    def touch(self, user_ids: list[str]) -> float:
        """CPU time of reading and writing one word of every cache line of the users' rows, one row after the other, in
        µs a user: what the caches alone make of so many rows."""
        rows = self._table.users.get_many(Strings.join([user_id.encode() for user_id in user_ids]))
        words = self._table.rows.view(np.uint64)
        began = time.thread_time()
        _touch(words, rows, np.uint64(0))
        return (time.thread_time() - began) / len(rows) * 1e6


@numba.njit(nogil=True)
def _touch(words: NDArray[np.uint64], rows: NDArray[np.int64], nothing: np.uint64) -> None:
    for row in rows:
        for word in range(0, words.shape[1], _LINE_BYTES // 8):
            words[row, word] += nothing


def measure_kernels(schema: str, batches: list[bytes], rounds: int = 3) -> dict[str, float]:
    """What each kernel costs for a load, in µs of CPU time an event: the median round. Each has had the whole load
    before, so no user is new."""
    table = BareTable(schema)
    found: dict[str, list[float]] = {"scan": [], "gather": [], "decode": [], "apply": []}
    for number in range(rounds + 1):
        received = np.array([table.receive(batch) for batch in batches])
        counted = table.count_all(batches)
        if number > 0:
            events, scan_s, gather_s = received.sum(axis=0)
            round_us = {"scan": scan_s / events * 1e6, "gather": gather_s / events * 1e6, **counted}
            for name, costs in found.items():
                costs.append(round_us[name])
    return {name: float(np.median(costs)) for name, costs in found.items()}


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)
