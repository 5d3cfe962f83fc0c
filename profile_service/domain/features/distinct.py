"""`distinct`: how many different values were seen, by HyperLogLog.

Flajolet et al., 2007, with registers of six bits packed four to three bytes, and the estimator of Ertl, New cardinality
estimation algorithms for HyperLogLog sketches (2017), which needs no tables of empirical bias and holds from 0 upwards.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from profile_service.domain.encoding import HEAD_BYTES, NUMBER_BYTES, Reading, put_double, put_head
from profile_service.domain.features.base import (
    ATTRIBUTE,
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
from profile_service.domain.kernel import inlined_kernel, kernel, leading_zeros, leaf_kernel, to_i64
from userprofile.v1 import profile_pb2


class DistinctOptions(KindOptions):
    """Which attribute, and how precisely: 2**precision registers, a standard error of 1.04 / sqrt(2**precision)."""

    attribute: str = Field(min_length=1)
    precision: int = Field(default=8, ge=4, le=16)


REGISTERS, PRECISION = range(OWN, OWN + 2)

_FIELD = profile_pb2.Feature.DISTINCT_FIELD_NUMBER
_ESTIMATE = profile_pb2.Distinct.ESTIMATE_FIELD_NUMBER


@inlined_kernel
def _bytes(precision: int) -> int:
    """Of all registers: every four of them take three bytes, the last of which no other register has a share in."""
    return to_i64((6 << precision) >> 3)


@inlined_kernel
def update(
    views: RowViews, operation: NDArray[np.int64], tables: Tables, events: Events, rows: NDArray[np.int64]
) -> None:
    """Raises the register of each event's value to its rank."""
    u1 = views.u1
    registers, precision = entry(operation, REGISTERS), entry(operation, PRECISION)
    end = registers + _bytes(precision)
    weight = tables.reals[operation[WEIGHTS] :]
    lengths = events.text_lengths[operation[ATTRIBUTE]][events.first :]
    hashes = events.text_hashes[operation[ATTRIBUTE]][events.first :]
    for i in range(len(rows)):
        row = rows[i]
        if row < 0 or lengths[i] < 0 or weight[events.types[i]] == 0.0:
            continue
        index = np.int64(hashes[i] >> np.uint64(64 - precision))
        rank = 1 + min(leading_zeros(hashes[i] << np.uint64(precision)), 64 - precision)
        bit = 6 * index
        place = registers + (bit >> 3)
        following = to_i64(min(place + 1, end - 1))
        shift = bit & 7
        pair = np.int64(u1[row, place]) | (np.int64(u1[row, following]) << 8)
        if rank > (pair >> shift) & 63:
            pair = (pair & ~(63 << shift)) | (rank << shift)
            # In this order: of the last register, which lies in the last byte alone, both are one.
            u1[row, following] = np.uint8(pair >> 8)
            u1[row, place] = np.uint8(pair & 255)


@kernel
def _unpack(packed: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    registers = np.empty(count, dtype=np.uint8)
    for index in range(count):
        bit = 6 * index
        following = min((bit >> 3) + 1, len(packed) - 1)
        pair = np.int64(packed[bit >> 3]) | (np.int64(packed[following]) << 8)
        registers[index] = (pair >> (bit & 7)) & 63
    return registers


@leaf_kernel
def _pack(registers: NDArray[np.uint8], packed: NDArray[np.uint8]) -> None:
    packed[:] = 0
    for index in range(len(registers)):
        bit = 6 * index
        pair = np.int64(registers[index]) << (bit & 7)
        packed[bit >> 3] |= np.uint8(pair & 255)
        # The last register has no bits there.
        packed[min((bit >> 3) + 1, len(packed) - 1)] |= np.uint8(pair >> 8)


@inlined_kernel
def _sigma(x: float) -> float:
    if x == 1.0:
        return math.inf
    y, z = 1.0, x
    while True:
        x *= x
        previous = z
        z += x * y
        y += y
        if z == previous:
            return z


@inlined_kernel
def _tau(x: float) -> float:
    if x == 0.0 or x == 1.0:
        return 0.0
    y, z = 1.0, 1.0 - x
    while True:
        x = math.sqrt(x)
        previous = z
        y *= 0.5
        z -= (1.0 - x) ** 2 * y
        if z == previous:
            return z / 3.0


@inlined_kernel
def estimate(counts: NDArray[np.int64], precision: int) -> float:
    """Ertl's improved raw estimate of how many values were seen, from how many registers hold each rank."""
    m = 1 << precision
    highest = 64 - precision
    z = m * _tau(1.0 - counts[highest + 1] / m)
    for k in range(highest, 0, -1):
        z = 0.5 * (z + counts[k])
    z += m * _sigma(counts[0] / m)
    return m * m / (2.0 * math.log(2.0) * z)


@inlined_kernel
def encode(
    views: RowViews, row: int, operation: NDArray[np.int64], reading: Reading, out: NDArray[np.uint8], at: int
) -> int:
    """Writes a Distinct before `at`; returns where it begins."""
    precision, registers = operation[PRECISION], entry(operation, REGISTERS)
    end = registers + _bytes(precision)
    counts = reading.order
    counts[: 64 - precision + 2] = 0
    for index in range(1 << precision):
        bit = 6 * index
        place = registers + (bit >> 3)
        pair = np.int64(views.u1[row, place]) | (np.int64(views.u1[row, min(place + 1, end - 1)]) << 8)
        counts[(pair >> (bit & 7)) & 63] += 1
    return put_head(out, put_double(out, at, _ESTIMATE, estimate(counts, precision)), _FIELD, at)


class DistinctFeature(Feature):
    """2**precision registers of six bits."""

    def __init__(self, given: FeatureInput, slots: SlotAllocator) -> None:
        super().__init__(given)
        options: DistinctOptions = given.options
        self.precision = options.precision
        self.bytes = (6 << self.precision) // 8
        self.registers = slots.take("u1", self.bytes)

    def standard_error(self) -> float:
        return 1.04 / math.sqrt(2**self.precision)

    def operation(self, starts: SlotStarts, constants: Constants) -> list[int]:
        return [starts.u1 + self.registers, self.precision]

    def _read(self, views: RowViews, row: int) -> NDArray[np.uint8]:
        packed = views.u1[row, self.registers : self.registers + self.bytes]
        answer: NDArray[np.uint8] = _unpack(packed, 1 << self.precision)
        return answer

    def merge(self, target: RowViews, row: int, source: RowViews, source_row: int) -> None:
        merged = np.maximum(self._read(target, row), self._read(source, source_row))
        _pack(merged, target.u1[row, self.registers : self.registers + self.bytes])

    def answer_bytes(self) -> int:
        return HEAD_BYTES + NUMBER_BYTES


class Distinct(FeatureKind):
    """How many different values."""

    name = "distinct"
    Options = DistinctOptions
    reads = "text"
    decays = False

    def bind(self, given: FeatureInput, slots: SlotAllocator) -> Feature:
        return DistinctFeature(given, slots)
