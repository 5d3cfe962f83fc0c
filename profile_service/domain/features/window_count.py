"""`window_count`: events in the window that ends at the read, to the bucket.

Buckets of equal width are numbered from 1970. The row holds the newest bucket's number (`head`) and a ring of counts,
long enough for the window and for the five minutes that an event may lie in the future. Counted is every bucket `b`
with `floor(T / bucket) - ceil(window / bucket) < b <= floor(T / bucket)`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from profile_service.domain.decay import NO_LANDMARK, NS
from profile_service.domain.duration import Duration
from profile_service.domain.encoding import HEAD_BYTES, NUMBER_BYTES, Reading, put_head, put_int
from profile_service.domain.features.base import (
    OWN,
    WEIGHTS,
    Constants,
    Events,
    Feature,
    FeatureInput,
    FeatureKind,
    KindOptions,
    RowViews,
    SlotAllocator,
    SlotStarts,
    Tables,
    entry,
)
from profile_service.domain.kernel import inlined_kernel, to_i64
from userprofile.v1 import profile_pb2

FUTURE_S = 300.0
MOST_BUCKETS = 10_000


class WindowCountOptions(KindOptions):
    """How long the window is, and how finely it slides."""

    window: Duration
    bucket: Duration

    @model_validator(mode="after")
    def _check(self) -> WindowCountOptions:
        if self.bucket > self.window:
            raise ValueError("bucket must not be longer than window")
        if self.window / self.bucket > MOST_BUCKETS:
            raise ValueError(f"window holds more than {MOST_BUCKETS} buckets: take longer ones")
        return self


RING, LENGTH, HEAD, BUCKET_NS, BUCKETS = range(OWN, OWN + 5)

_FIELD = profile_pb2.Feature.WINDOW_COUNT_FIELD_NUMBER
_VALUE = profile_pb2.WindowCount.VALUE_FIELD_NUMBER


@inlined_kernel
def update(
    views: RowViews, operation: NDArray[np.int64], tables: Tables, events: Events, rows: NDArray[np.int64]
) -> None:
    """Counts the events in their buckets."""
    u4, i8 = views.u4, views.i8
    ring, length, head = entry(operation, RING), entry(operation, LENGTH), entry(operation, HEAD)
    bucket_ns = operation[BUCKET_NS]
    weight = tables.reals[operation[WEIGHTS] :]
    bucket = begin = 0
    for i in range(len(rows)):
        row = rows[i]
        if row < 0 or weight[events.types[i]] == 0.0:
            continue
        # Neighbours in time spare each other the division.
        if not begin <= events.time_ns[i] < begin + bucket_ns:
            bucket = events.time_ns[i] // bucket_ns
            begin = bucket * bucket_ns
        newest = i8[row, head]
        if newest == NO_LANDMARK:
            newest = bucket
            i8[row, head] = bucket
        if bucket > newest:
            for j in range(min(bucket - newest, length)):
                u4[row, ring + (bucket - j) % length] = 0
            i8[row, head] = bucket
        elif bucket <= newest - length:
            continue
        u4[row, ring + bucket % length] += np.uint32(1)


@inlined_kernel
def encode(
    views: RowViews, row: int, operation: NDArray[np.int64], reading: Reading, out: NDArray[np.uint8], at: int
) -> int:
    """Writes a WindowCount before `at`; returns where it begins."""
    ring, length = entry(operation, RING), entry(operation, LENGTH)
    last, newest, count = reading.read_ns // operation[BUCKET_NS], views.i8[row, entry(operation, HEAD)], 0
    if newest != NO_LANDMARK:
        first = max(last - operation[BUCKETS] + 1, newest - length + 1)
        for bucket in range(first, min(last, newest) + 1):
            count += to_i64(views.u4[row, ring + bucket % length])
    return put_head(out, put_int(out, at, _VALUE, count), _FIELD, at)


class WindowCountFeature(Feature):
    """A ring of counts and the number of its newest bucket."""

    def __init__(self, given: FeatureInput, slots: SlotAllocator) -> None:
        super().__init__(given)
        options: WindowCountOptions = given.options
        self.bucket_ns = max(1, round(options.bucket * NS))
        self.window_buckets = -(-round(options.window * NS) // self.bucket_ns)
        ahead = -(-round(FUTURE_S * NS) // self.bucket_ns)
        self.length = self.window_buckets + min(ahead, MOST_BUCKETS)
        self.ring = slots.take("u4", self.length)
        self.head = slots.take("i8", initial=NO_LANDMARK)

    def operation(self, starts: SlotStarts, constants: Constants) -> list[int]:
        return [starts.u4 + self.ring, self.length, starts.i8 + self.head, self.bucket_ns, self.window_buckets]

    def _count_of(self, views: RowViews, row: int, bucket: int) -> int:
        newest = int(views.i8[row, self.head])
        if newest == NO_LANDMARK or not newest - self.length < bucket <= newest:
            return 0
        return int(views.u4[row, self.ring + bucket % self.length])

    def merge(self, target: RowViews, row: int, source: RowViews, source_row: int) -> None:
        newest = max(int(target.i8[row, self.head]), int(source.i8[source_row, self.head]))
        if newest == NO_LANDMARK:
            return
        counts = {
            bucket: self._count_of(target, row, bucket) + self._count_of(source, source_row, bucket)
            for bucket in range(newest - self.length + 1, newest + 1)
        }
        for bucket, count in counts.items():
            target.u4[row, self.ring + bucket % self.length] = count
        target.i8[row, self.head] = newest

    def answer_bytes(self) -> int:
        # An int64 takes a byte more than a double.
        return HEAD_BYTES + NUMBER_BYTES + 2


class WindowCount(FeatureKind):
    """Events in a sliding window."""

    name = "window_count"
    Options = WindowCountOptions
    reads = None
    decays = False

    def bind(self, given: FeatureInput, slots: SlotAllocator) -> Feature:
        return WindowCountFeature(given, slots)
