"""XXH64 over a slice of bytes, for kernels: the hash by which users are routed, indexed and their texts compared.

Every language has XXH64, so clients compute the same partition. The algorithm is the xxHash specification's
(https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md); the `xxhash` package gives the same number for the
same bytes:

    >>> import numpy as np
    >>> import xxhash
    >>> text = np.frombuffer(b"u1", np.uint8)
    >>> int(xxh64(text, 0, 2, 0)) == xxhash.xxh64_intdigest(b"u1")
    True
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profile_service.domain.kernel import inlined_kernel, load_u8, load_u32, load_u64, to_i64

_PRIME_1 = np.uint64(0x9E3779B185EBCA87)
_PRIME_2 = np.uint64(0xC2B2AE3D27D4EB4F)
_PRIME_3 = np.uint64(0x165667B19E3779F9)
_PRIME_4 = np.uint64(0x85EBCA77C2B2AE63)
_PRIME_5 = np.uint64(0x27D4EB2F165667C5)
_SIXTY_FOUR = np.uint64(64)
_SHORT = 16


@inlined_kernel
def xxh64(buffer: NDArray[np.uint8], start: int, length: int, seed: int | np.uint64) -> np.uint64:
    """XXH64 of `buffer[start : start + length]`, which the caller knows to lie within the buffer."""
    pos = to_i64(start)
    end = pos + to_i64(length)
    base = np.uint64(seed)
    if length < _SHORT and pos + _SHORT <= buffer.size:
        return _finish(_short(buffer, pos, to_i64(length), base + _PRIME_5 + np.uint64(length)))
    if length >= 32:
        a = base + _PRIME_1 + _PRIME_2
        b = base + _PRIME_2
        c = base
        d = base - _PRIME_1
        while pos + 32 <= end:
            a = _round(a, load_u64(buffer, pos))
            b = _round(b, load_u64(buffer, pos + 8))
            c = _round(c, load_u64(buffer, pos + 16))
            d = _round(d, load_u64(buffer, pos + 24))
            pos += 32
        acc = (
            _rotate(a, np.uint64(1)) + _rotate(b, np.uint64(7)) + _rotate(c, np.uint64(12)) + _rotate(d, np.uint64(18))
        )
        acc = _merge(_merge(_merge(_merge(acc, a), b), c), d)
    else:
        acc = base + _PRIME_5
    acc += np.uint64(length)
    while pos + 8 <= end:
        acc = _eight(acc, load_u64(buffer, pos))
        pos += 8
    if pos + 4 <= end:
        acc = _four(acc, load_u32(buffer, pos))
        pos += 4
    while pos < end:
        acc = _one(acc, load_u8(buffer, pos))
        pos += 1
    return _finish(acc)


@inlined_kernel
def _short(buffer: NDArray[np.uint8], pos: int, length: int, acc: np.uint64) -> np.uint64:
    """Takes in up to 15 bytes, without a branch on how many they are, which no processor could foresee: every step is
    taken, and counts or not."""
    after = _eight(acc, load_u64(buffer, pos))
    acc = after if length & 8 else acc
    pos += length & 8
    after = _four(acc, load_u32(buffer, pos))
    acc = after if length & 4 else acc
    pos += length & 4
    rest = length & 3
    after = _one(acc, load_u8(buffer, pos))
    acc = after if rest > 0 else acc
    after = _one(acc, load_u8(buffer, pos + 1))
    acc = after if rest > 1 else acc
    after = _one(acc, load_u8(buffer, pos + 2))
    return after if rest > 2 else acc


@inlined_kernel
def _eight(acc: np.uint64, lane: np.uint64) -> np.uint64:
    return _rotate(acc ^ _round(np.uint64(0), lane), np.uint64(27)) * _PRIME_1 + _PRIME_4


@inlined_kernel
def _four(acc: np.uint64, lane: np.uint64) -> np.uint64:
    return _rotate(acc ^ lane * _PRIME_1, np.uint64(23)) * _PRIME_2 + _PRIME_3


@inlined_kernel
def _one(acc: np.uint64, lane: int) -> np.uint64:
    return _rotate(acc ^ np.uint64(lane) * _PRIME_5, np.uint64(11)) * _PRIME_1


@inlined_kernel
def _finish(acc: np.uint64) -> np.uint64:
    acc ^= acc >> np.uint64(33)
    acc *= _PRIME_2
    acc ^= acc >> np.uint64(29)
    acc *= _PRIME_3
    return acc ^ acc >> np.uint64(32)


@inlined_kernel
def _rotate(value: np.uint64, bits: np.uint64) -> np.uint64:
    return (value << bits) | (value >> (_SIXTY_FOUR - bits))


@inlined_kernel
def _round(acc: np.uint64, lane: np.uint64) -> np.uint64:
    return _rotate(acc + lane * _PRIME_2, np.uint64(31)) * _PRIME_1


@inlined_kernel
def _merge(acc: np.uint64, lane: np.uint64) -> np.uint64:
    return (acc ^ _round(np.uint64(0), lane)) * _PRIME_1 + _PRIME_4
