"""What the schema asks of an event's bytes, compiled to NumPy tables that the kernels look names up in.

A name table is open addressing with linear probing, at most a quarter full, one row of four u8 an entry:

    [0] first 8 bytes of the name (zero-padded)   [2] length << 32 | index + 1; 0 where the row is free
    [1] last 8 bytes, 0 for names up to 8 bytes   [3] where the name is in `names`

Names of up to 16 bytes are compared by [0], [1] and the length alone; only longer ones are compared byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.kernel import inlined_kernel, leaf_kernel, load_u8, load_u64, to_i64

MAX_TYPES = 32_767
"""Type indexes are i2."""

_MIX_FIRST = np.uint64(0x9E3779B97F4A7C15)
_MIX_LAST = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True)
class WirePlan:
    """Event types and attributes by name. Attributes are numbered texts first: attribute `text_count + i` is number
    attribute `i`.
    """

    event_types: tuple[str, ...]
    text_attributes: tuple[str, ...]
    number_attributes: tuple[str, ...]
    types_table: NDArray[np.uint64]
    attributes_table: NDArray[np.uint64]
    names: NDArray[np.uint8]
    """The bytes of all names, one after the other."""

    @classmethod
    def compile(
        cls, event_types: Sequence[str], text_attributes: Sequence[str], number_attributes: Sequence[str]
    ) -> WirePlan:
        """Tables for these names, in this order. Raises ValueError on a name that is empty or given twice."""
        attributes = [*text_attributes, *number_attributes]
        for subject, given in (("event type", event_types), ("attribute", attributes)):
            if "" in given:
                raise ValueError(f"an {subject} has an empty name")
            twice = sorted({name for name in given if list(given).count(name) > 1})
            if twice:
                raise ValueError(f"{subject} {twice[0]!r} is given twice")
        if len(event_types) > MAX_TYPES:
            raise ValueError(f"at most {MAX_TYPES} event types, got {len(event_types)}")
        encoded_types = [name.encode() for name in event_types]
        encoded_attributes = [name.encode() for name in attributes]
        names = np.frombuffer(b"".join([*encoded_types, *encoded_attributes, bytes(8)]), np.uint8)
        return cls(
            event_types=tuple(event_types),
            text_attributes=tuple(text_attributes),
            number_attributes=tuple(number_attributes),
            types_table=_build_table(encoded_types, 0, names),
            attributes_table=_build_table(encoded_attributes, sum(map(len, encoded_types)), names),
            names=names,
        )

    @property
    def text_count(self) -> int:
        """How many text attributes there are."""
        return len(self.text_attributes)

    @property
    def number_count(self) -> int:
        """How many number attributes there are."""
        return len(self.number_attributes)

    def attribute(self, index: int) -> str:
        """Name of an attribute by its number among texts and numbers together."""
        texts = len(self.text_attributes)
        return self.text_attributes[index] if index < texts else self.number_attributes[index - texts]


@inlined_kernel
def find_name(
    table: NDArray[np.uint64], names: NDArray[np.uint8], buffer: NDArray[np.uint8], offset: int, length: int
) -> int:
    """Index of the name that the slice of `buffer` holds, -1 where the table does not have it."""
    row = find_row(table, names, buffer, offset, length)
    return to_i64(-1) if row < 0 else name_index(table, row)


@inlined_kernel
def find_row(
    table: NDArray[np.uint64], names: NDArray[np.uint8], buffer: NDArray[np.uint8], offset: int, length: int
) -> int:
    """The table's row that has the name, -1 where none has."""
    if length == 0:
        return to_i64(-1)
    first = _first_bytes(buffer, offset, length)
    last = load_u64(buffer, offset + length - 8) if length > 8 else np.uint64(0)
    mask = table.shape[0] - 1
    row = _home_row(first, last, length, mask)
    while True:
        entry = table[row, 2]
        if entry == np.uint64(0):
            return to_i64(-1)
        same = table[row, 0] == first and table[row, 1] == last and to_i64(entry >> np.uint64(32)) == length
        if same and (length <= 16 or _same_bytes(names, to_i64(table[row, 3]), buffer, offset, length)):
            return row
        row = (row + 1) & mask


@inlined_kernel
def is_short_name(table: NDArray[np.uint64], row: int, buffer: NDArray[np.uint8], offset: int, length: int) -> bool:
    """Whether the row has the name, which then has 1 to 16 bytes; of a longer one it does not say so."""
    if length == 0 or length > 16:
        return False
    last = load_u64(buffer, offset + length - 8) if length > 8 else np.uint64(0)
    return bool(
        table[row, 0] == _first_bytes(buffer, offset, length)
        and table[row, 1] == last
        and to_i64(table[row, 2] >> np.uint64(32)) == length
    )


@inlined_kernel
def name_index(table: NDArray[np.uint64], row: int) -> int:
    """Index of the name in a row that has one."""
    return to_i64(table[row, 2] & np.uint64(0xFFFFFFFF)) - 1


def _build_table(encoded: list[bytes], start: int, names: NDArray[np.uint8]) -> NDArray[np.uint64]:
    size = 8
    while size < 4 * len(encoded):
        size *= 2
    table = np.zeros((size, 4), np.uint64)
    offset = start
    for index, name in enumerate(encoded):
        _insert_name(table, names, offset, len(name), index)
        offset += len(name)
    return table


@leaf_kernel
def _insert_name(table: NDArray[np.uint64], names: NDArray[np.uint8], offset: int, length: int, index: int) -> None:
    first = _first_bytes(names, offset, length)
    last = load_u64(names, offset + length - 8) if length > 8 else np.uint64(0)
    mask = table.shape[0] - 1
    row = _home_row(first, last, length, mask)
    while table[row, 2] != np.uint64(0):
        row = (row + 1) & mask
    table[row, 0] = first
    table[row, 1] = last
    table[row, 2] = (np.uint64(length) << np.uint64(32)) | np.uint64(index + 1)
    table[row, 3] = np.uint64(offset)


@inlined_kernel
def _home_row(first: np.uint64, last: np.uint64, length: int, mask: int) -> int:
    """The row where the search begins. The product's upper half is the well-mixed one."""
    mixed = (first + np.uint64(length)) * _MIX_FIRST ^ last * _MIX_LAST
    return to_i64(mixed >> np.uint64(40)) & mask


@inlined_kernel
def _first_bytes(buffer: NDArray[np.uint8], offset: int, length: int) -> np.uint64:
    """Up to 8 bytes of at least one, zero-padded; reads beyond the slice only where the buffer goes on."""
    if offset + 8 <= buffer.size:
        others = np.uint64(64 - 8 * min(length, 8))
        return load_u64(buffer, offset) << others >> others
    value = np.uint64(0)
    for i in range(length):
        value |= np.uint64(load_u8(buffer, offset + i)) << np.uint64(8 * i)
    return value


@leaf_kernel
def _same_bytes(a: NDArray[np.uint8], a_offset: int, b: NDArray[np.uint8], b_offset: int, length: int) -> bool:
    done = 0
    while done + 8 <= length:
        if load_u64(a, a_offset + done) != load_u64(b, b_offset + done):
            return False
        done += 8
    # The last 8 bytes, which may overlap those compared here, were compared by the caller.
    return True
