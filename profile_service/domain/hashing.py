""")
def _check_frameH64 over a slice of bytes, for kernels: the hash by which users are routed, indexed and their texts compared.

Every language has )
def _check_frameH64, so clients compute the same partition. The algorithm is the xxHash specification's
(https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md); the `xxhash` package gives the same number for the same bytes:

    >>> import numpy as np
    >>> import xxhash
    >>> text = np.frombuffer(b"u1", np.uint8)
    >>> int(xxh64(text, 0, 2, 0)) == xxhash.xxh64_intdigest(b"u1")
    True

The loads below are unaligned reads of several bytes at once. They check nothing: the caller has made sure of the bounds.

Kernels are compiled without numba's runtime (`_nrt=False`): they make no arrays, and so need no counting of references.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

_PRIME_1 = np.uint64(0x9E3779B185EBCA87)
_PRIME_2 = np.uint64(0xC2B2AE3D27D4EB4F)
_PRIME_3 = np.uint64(0x165667B19E3779F9)
_PRIME_4 = np.uint64(0x85EBCA77C2B2AE63)
_PRIME_5 = np.uint64(0x27D4EB2F165667C5)
_SIXTY_FOUR = np.uint64(64)


@njit(cache=True, nogil=True, _nrt=False)
def xxh64(buffer: NDArray[np.uint8], start: int, length: int, seed: int) -> np.uint64:
    """)
    def _check_frameH64 of `buffer[start : start + length]`, which the caller knows to lie within the buffer."""
    pos = np.int64(start)
    end = pos + np.int64(length)
    base = np.uint64(seed)
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
        acc ^= _round(np.uint64(0), load_u64(buffer, pos))
        acc = _rotate(acc, np.uint64(27)) * _PRIME_1 + _PRIME_4
        pos += 8
    if pos + 4 <= end:
        acc ^= load_u32(buffer, pos) * _PRIME_1
        acc = _rotate(acc, np.uint64(23)) * _PRIME_2 + _PRIME_3
        pos += 4
    while pos < end:
        acc ^= np.uint64(load_u8(buffer, pos)) * _PRIME_5
        acc = _rotate(acc, np.uint64(11)) * _PRIME_1
        pos += 1
    acc ^= acc >> np.uint64(33)
    acc *= _PRIME_2
    acc ^= acc >> np.uint64(29)
    acc *= _PRIME_3
    acc ^= acc >> np.uint64(32)
    return acc


@intrinsic
def load_u64(typingctx: Any, buffer: Any, offset: Any) -> Any:
    """The 8 bytes at `offset` of a contiguous u1 array, little-endian, as u8."""
    return _load(buffer, offset, 64, types.uint64)


@intrinsic
def load_u32(typingctx: Any, buffer: Any, offset: Any) -> Any:
    """The 4 bytes at `offset` of a contiguous u1 array, little-endian, as u8."""
    return _load(buffer, offset, 32, types.uint64)


@intrinsic
def load_u8(typingctx: Any, buffer: Any, offset: Any) -> Any:
    """The byte at `offset` of a contiguous u1 array as i8: an index that is never taken from the end, as Python's would be."""
    return _load(buffer, offset, 8, types.int64)


@intrinsic
def load_f64(typingctx: Any, buffer: Any, offset: Any) -> Any:
    """The 8 bytes at `offset` of a contiguous u1 array, little-endian, as f8."""
    return _load(buffer, offset, 64, types.float64)


def _load(buffer: Any, offset: Any, bits: int, result: Any) -> Any:
    """Typing and code of one load: an address without numba's wraparound of negative indexes, read with alignment 1."""
    if not (
        isinstance(buffer, types.Array) and buffer.dtype == types.uint8 and buffer.ndim == 1 and buffer.layout == "C"
    ):
        return None
    if not isinstance(offset, types.Integer):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        index = context.cast(builder, args[1], signature.args[1], types.int64)
        address = builder.inttoptr(
            builder.add(builder.ptrtoint(array.data, ir.IntType(64)), index), ir.PointerType(ir.IntType(bits))
        )
        if result == types.float64:
            address = builder.bitcast(address, ir.PointerType(ir.DoubleType()))
            return builder.load(address, align=1, typ=ir.DoubleType())
        value = builder.load(address, align=1, typ=ir.IntType(bits))
        return value if bits == 64 else builder.zext(value, ir.IntType(64))

    return result(buffer, offset), codegen


@njit(cache=True, nogil=True, _nrt=False)
def _rotate(value: np.uint64, bits: np.uint64) -> np.uint64:
    return (value << bits) | (value >> (_SIXTY_FOUR - bits))


@njit(cache=True, nogil=True, _nrt=False)
def _round(acc: np.uint64, lane: np.uint64) -> np.uint64:
    return _rotate(acc + lane * _PRIME_2, np.uint64(31)) * _PRIME_1


@njit(cache=True, nogil=True, _nrt=False)
def _merge(acc: np.uint64, lane: np.uint64) -> np.uint64:
    return (acc ^ _round(np.uint64(0), lane)) * _PRIME_1 + _PRIME_4
