"""What a store keeps in its bounded lists beside rows: chunks of entries that came together.

    chunk        u4 seconds since 1970, u4 entries, then the entries
    event ids    u8 key of each, then i8 of each: when it came, ns since 1970
    requests     i8 when, u2 bytes of the id, u2 partitions, the id, u2 of each partition that it has reached

All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.decay import NS

_HEAD = struct.Struct("<II")
_REQUEST = struct.Struct("<qHH")


def encode_event_ids(keys: NDArray[np.uint64], times_ns: NDArray[np.int64]) -> bytes:
    """A chunk of event ids' keys."""
    return _head(times_ns, len(keys)) + keys.tobytes() + times_ns.tobytes()


def decode_event_ids(chunk: bytes) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The keys of a chunk, and when each came."""
    _, count = _HEAD.unpack_from(chunk)
    keys = np.frombuffer(chunk, np.uint64, count, _HEAD.size)
    return keys, np.frombuffer(chunk, np.int64, count, _HEAD.size + keys.nbytes)


def encode_requests(requests: Sequence[tuple[str, Sequence[int], int]]) -> bytes:
    """A chunk of (request id, partitions, time in ns)."""
    pieces = [_head(np.array([when for _, _, when in requests], np.int64), len(requests))]
    for request_id, partitions, when in requests:
        encoded = request_id.encode()
        pieces += (
            _REQUEST.pack(when, len(encoded), len(partitions)),
            encoded,
            np.array(partitions, np.uint16).tobytes(),
        )
    return b"".join(pieces)


def decode_requests(chunk: bytes) -> Iterator[tuple[str, NDArray[np.int64], int]]:
    """(request id, partitions, time in ns) of each request of a chunk."""
    _, count = _HEAD.unpack_from(chunk)
    at = _HEAD.size
    for _ in range(count):
        when, size, partitions = _REQUEST.unpack_from(chunk, at)
        at += _REQUEST.size
        request_id = chunk[at : at + size].decode()
        at += size
        yield request_id, np.frombuffer(chunk, np.uint16, partitions, at).astype(np.int64), when
        at += 2 * partitions


def merged_event_ids(chunks: Iterable[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The keys of many chunks in the order of their coming."""
    decoded = [decode_event_ids(chunk) for chunk in chunks]
    keys = np.concatenate([np.zeros(0, np.uint64), *(keys for keys, _ in decoded)])
    times = np.concatenate([np.zeros(0, np.int64), *(times for _, times in decoded)])
    order = np.argsort(times, kind="stable")
    return keys[order], times[order]


def _head(times_ns: NDArray[np.int64], count: int) -> bytes:
    return _HEAD.pack(int(times_ns.max()) // NS, count)
