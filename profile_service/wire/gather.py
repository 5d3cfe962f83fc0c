"""Chosen events of a batch put together again: split by owner, and joined to bytes that are a request of their own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.kernel import copy_bytes, kernel, to_i64
from profile_service.wire.frame import as_buffer, next_event
from profile_service.wire.work import LAST


def gather(
    buffer: NDArray[np.uint8], offset: NDArray[np.int64], length: NDArray[np.int32], selection: NDArray[np.int64]
) -> memoryview:
    """The selected extents one after the other: an encoded IngestEventsRequest that holds just these events, in this
    order. A view into `buffer` where they follow each other there.

    Raises IndexError where the selection or an extent is out of bounds.
    """
    size = _gathered_size(buffer, offset, length, selection)
    if size < 0:
        raise IndexError(f"selection[{-1 - size}] is not an event of the batch")
    if size:
        begin, last = int(offset[selection[0]]), selection[-1]
        in_order = bool((selection[1:] > selection[:-1]).all())
        if in_order and int(offset[last]) + int(length[last]) - begin == size:
            return buffer.data[begin : begin + size]
    joined = np.empty(size, np.uint8)
    _gather(buffer, offset, length, selection, joined)
    return joined.data


def gather_events(events: bytes | memoryview, selection: NDArray[np.int64]) -> memoryview:
    """The selected events, by index, of an encoded IngestEventsRequest that holds events alone, as another one.

    Raises IndexError where the selection is out of bounds.
    """
    buffer = as_buffer(events)
    offset, length = _extents(buffer, 1 + int(selection.max(initial=-1)))
    return gather(buffer, offset, length, selection)


def split_by_owner(
    user_hash: NDArray[np.uint64],
    status: NDArray[np.uint8],
    owner_of_partition: NDArray[np.int32],
    partition_bits: int,
    owners: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indexes of the valid events by owner, each owner's in their order: owner `k`'s are `order[start[k] : start[k +
    1]]`.

    `owner_of_partition` has 2**partition_bits entries in [0, owners). Raises ValueError where it has not.
    """
    if owner_of_partition.size != 1 << partition_bits:
        raise ValueError(f"owner_of_partition must have {1 << partition_bits} entries, has {owner_of_partition.size}")
    order = np.empty(user_hash.size, np.int64)
    start = np.zeros(owners + 1, np.int64)
    if not _split_by_owner(user_hash, status, owner_of_partition, partition_bits, order, start):
        raise ValueError(f"owner_of_partition must hold owners from 0 to {owners - 1}")
    return order[: start[owners]], start


@kernel
def _extents(buffer: NDArray[np.uint8], most: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Offset and length, tag included, of the first `most` events, or of as many as there are."""
    offset = np.empty(most, np.int64)
    length = np.empty(most, np.int32)
    work = np.zeros(LAST, np.int64)
    count = 0
    pos = 0
    while count < most and pos < buffer.size:
        start, _, end = next_event(buffer, pos, work)
        if start >= buffer.size:
            break
        offset[count] = start
        length[count] = end - start
        count += 1
        pos = end
    return offset[:count], length[:count]


@kernel
def _gathered_size(
    buffer: NDArray[np.uint8], offset: NDArray[np.int64], length: NDArray[np.int32], selection: NDArray[np.int64]
) -> int:
    """Bytes of the extents together; -1 - i where the i-th selected is out of bounds."""
    size = 0
    for i in range(selection.size):
        event = selection[i]
        if event < 0 or event >= offset.size or event >= length.size:
            return -1 - i
        if offset[event] < 0 or length[event] < 0 or offset[event] > buffer.size - length[event]:
            return -1 - i
        size += length[event]
    return size


@kernel
def _gather(
    buffer: NDArray[np.uint8],
    offset: NDArray[np.int64],
    length: NDArray[np.int32],
    selection: NDArray[np.int64],
    joined: NDArray[np.uint8],
) -> None:
    """Copies the extents; neighbours that follow each other in the buffer are copied in one piece."""
    pos = 0
    i = 0
    while i < selection.size:
        begin = offset[selection[i]]
        end = begin + length[selection[i]]
        i += 1
        while i < selection.size and offset[selection[i]] == end:
            end += length[selection[i]]
            i += 1
        copy_bytes(joined, pos, buffer, begin, end - begin)
        pos += end - begin


@kernel
def _split_by_owner(
    user_hash: NDArray[np.uint64],
    status: NDArray[np.uint8],
    owner_of_partition: NDArray[np.int32],
    partition_bits: int,
    order: NDArray[np.int64],
    start: NDArray[np.int64],
) -> bool:
    """Counting sort, stable; False where an owner is out of bounds. `start` comes in zeroed."""
    owners = start.size - 1
    for partition in range(owner_of_partition.size):
        if owner_of_partition[partition] < 0 or owner_of_partition[partition] >= owners:
            return False
    # With one partition the shift would be by 64, which is none at all.
    shift = np.uint64(64 - partition_bits) if partition_bits > 0 else np.uint64(63)
    mask = np.uint64((1 << partition_bits) - 1)
    for i in range(user_hash.size):
        if status[i] == 0:
            start[owner_of_partition[to_i64((user_hash[i] >> shift) & mask)] + 1] += 1
    for owner in range(owners):
        start[owner + 1] += start[owner]
    place = start.copy()
    for i in range(user_hash.size):
        if status[i] == 0:
            owner = owner_of_partition[to_i64((user_hash[i] >> shift) & mask)]
            order[place[owner]] = i
            place[owner] += 1
    return True
