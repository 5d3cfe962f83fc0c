"""How kernels are compiled, and how they read bytes.

Numba keeps what it compiled beside the module, so that only the first process compiles. It looks at the date of the
kernel's own module alone: after a change to a kernel that others call, their `__pycache__/*.nbi` have to go.
A process that finds all kernels there loads nothing that only compiling needs (`_KernelCache`).

Loads and stores are of several bytes at once, unaligned. They check nothing: the caller has made sure of the bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numba.extending
import numpy as np
from numba import types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.runtime.nrt import rtsys
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])

to_i64: Callable[[Any], int] = cast("Any", np.int64)
"""Conversion to i8 inside a kernel, where `int` would leave u8 as it is."""

_njit = cast("Any", numba.njit)
_raw_memcpy = cast("Any", cgutils.raw_memcpy)
_pointer_add = cast("Any", cgutils.pointer_add)
_intrinsic = cast("Any", numba.extending.intrinsic)
_ir = cast("Any", cgutils).ir


class _KernelCache(cast("Any", FunctionCache)):  # type: ignore[misc]  # numba is untyped
    """Numba's cache of one function, without what makes the first load of a process slow: it would import and register
    all that numba can compile, which takes longer than to load all of our kernels. What is compiled needs nothing of it
    but the runtime; compiling registers it by itself."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


def _compiled(function: F, **options: bool) -> F:
    dispatcher = _njit(nogil=True, **options)(function)
    dispatcher._cache = _KernelCache(function)
    return cast("F", dispatcher)


def kernel(function: F) -> F:
    """Compiles a function of numbers and arrays; it runs without the interpreter's lock."""
    return _compiled(function)


def leaf_kernel(function: F) -> F:
    """A kernel without numba's runtime: it borrows its arrays and can make none.

    Otherwise numba counts references to every array, atomically, in a function that returns from many places, which
    costs a parser of short messages several times what the parsing costs.
    """
    return _compiled(function, _nrt=False)


def inlined_kernel(function: F) -> F:
    """A leaf kernel that is always put into its caller: for what runs once an event and has many arguments."""
    return _compiled(function, _nrt=False, forceinline=True)


def _load_u64(typingctx: Any, buffer: Any, offset: Any) -> Any:
    return _load(buffer, offset, types.uint64, types.uint64)


def _load_u32(typingctx: Any, buffer: Any, offset: Any) -> Any:
    return _load(buffer, offset, types.uint32, types.uint64)


def _load_u8(typingctx: Any, buffer: Any, offset: Any) -> Any:
    return _load(buffer, offset, types.uint8, types.int64)


def _load_f64(typingctx: Any, buffer: Any, offset: Any) -> Any:
    return _load(buffer, offset, types.float64, types.float64)


load_u64: Callable[[NDArray[np.uint8], int], np.uint64] = _intrinsic(_load_u64)
"""The 8 bytes at an offset of a contiguous u1 array, little-endian, as u8."""

load_u32: Callable[[NDArray[np.uint8], int], np.uint64] = _intrinsic(_load_u32)
"""The 4 bytes at an offset of a contiguous u1 array, little-endian, as u8."""

load_u8: Callable[[NDArray[np.uint8], int], int] = _intrinsic(_load_u8)
"""The byte at an offset of a contiguous u1 array, as i8: the offset is never taken from the end, as an index would be.
"""

load_f64: Callable[[NDArray[np.uint8], int], float] = _intrinsic(_load_f64)
"""The 8 bytes at an offset of a contiguous u1 array, little-endian, as f8."""


def _is_bytes(array: Any) -> bool:
    return isinstance(array, types.Array) and array.dtype == types.uint8 and array.ndim == 1 and array.layout == "C"


def _load(buffer: Any, offset: Any, loaded: Any, result: Any) -> Any:
    """Typing and code of one load: an address without numba's wraparound of negative indexes, read with alignment 1."""
    if not (_is_bytes(buffer) and isinstance(offset, types.Integer)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index = context.cast(builder, args[1], signature.args[1], types.int64)
        address = _address(context, builder, signature.args[0], args[0], index)
        what = context.get_value_type(loaded)
        value = builder.load(builder.bitcast(address, what.as_pointer()), align=1, typ=what)
        return value if loaded.bitwidth == 64 else builder.zext(value, context.get_value_type(result))

    return result(buffer, offset), codegen


def _store_u64(typingctx: Any, buffer: Any, offset: Any, value: Any) -> Any:
    if not (_is_bytes(buffer) and isinstance(offset, types.Integer) and value == types.uint64):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index = context.cast(builder, args[1], signature.args[1], types.int64)
        address = _address(context, builder, signature.args[0], args[0], index)
        builder.store(args[2], builder.bitcast(address, args[2].type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(buffer, offset, value), codegen


store_u64: Callable[[NDArray[np.uint8], int, np.uint64], None] = _intrinsic(_store_u64)
"""Writes 8 bytes at an offset of a contiguous u1 array, little-endian."""


def _copy_bytes(typingctx: Any, target: Any, target_offset: Any, source: Any, source_offset: Any, size: Any) -> Any:
    if not (_is_bytes(target) and _is_bytes(source)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to = _address(context, builder, signature.args[0], args[0], args[1])
        origin = _address(context, builder, signature.args[2], args[2], args[3])
        _raw_memcpy(builder, to, origin, args[4], 1)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64, types.int64), codegen


copy_bytes: Callable[[NDArray[np.uint8], int, NDArray[np.uint8], int, int], None] = _intrinsic(_copy_bytes)
"""memcpy between contiguous u1 arrays: target, offset, source, offset, size. An assignment of slices costs several
times more.
"""


def _prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    if not (isinstance(array, types.Array) and array.layout == "C" and isinstance(index, types.Integer)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = context.make_array(signature.args[0])(context, builder, args[0]).data
        element = builder.gep(first, [context.cast(builder, args[1], signature.args[1], types.int64)])
        address = builder.bitcast(element, _ir.IntType(8).as_pointer())
        flag = _ir.IntType(32)
        declared = _ir.FunctionType(_ir.VoidType(), [address.type, flag, flag, flag])
        ask = builder.module.declare_intrinsic("llvm.prefetch", (address.type,), declared)
        # To read; to keep near; data rather than code.
        builder.call(ask, [address, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(array, index), codegen


prefetch: Callable[[NDArray[Any], int], None] = _intrinsic(_prefetch)
"""Asks for the cache line of the element at an index of a contiguous array, seen flat. Never waits and never fails,
wherever the index points."""


def _leading_zeros(typingctx: Any, value: Any) -> Any:
    if value != types.uint64:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctlz(args[0], _ir.IntType(1)(0))

    return types.int64(value), codegen


leading_zeros: Callable[[np.uint64], int] = _intrinsic(_leading_zeros)
"""How many of a u8's upper bits are 0: 64 for 0."""


def _multiply_high(typingctx: Any, one: Any, other: Any) -> Any:
    if not (one == types.uint64 and other == types.uint64):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = _ir.IntType(128)
        product = builder.mul(builder.zext(args[0], wide), builder.zext(args[1], wide))
        return builder.trunc(builder.lshr(product, wide(64)), _ir.IntType(64))

    return types.uint64(one, other), codegen


multiply_high: Callable[[np.uint64, np.uint64], np.uint64] = _intrinsic(_multiply_high)
"""The upper half of the 128-bit product of two u8."""


LANES = 8
"""How many elements `equal_lanes` and `least_lane` look at."""


def _equal_lanes(typingctx: Any, array: Any, row: Any, column: Any, value: Any) -> Any:
    if not (_is_matrix(array) and value == array.dtype):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        held = _lanes(context, builder, signature.args[0], *args[:3])
        wanted = _ir.Constant(held.type, _ir.Undefined)
        for lane in range(LANES):
            wanted = builder.insert_element(wanted, args[3], _ir.IntType(32)(lane))
        is_real = isinstance(array.dtype, types.Float)
        equal = builder.fcmp_ordered("==", held, wanted) if is_real else builder.icmp_unsigned("==", held, wanted)
        return builder.zext(builder.bitcast(equal, _ir.IntType(LANES)), _ir.IntType(64))

    return types.int64(array, types.int64, types.int64, value), codegen


equal_lanes: Callable[[NDArray[Any], int, int, Any], int] = _intrinsic(_equal_lanes)
"""Which of the `LANES` elements of a contiguous matrix from a row and column on equal a value of its type: a bit each,
the first the lowest. One comparison of the processor's vectors, and nothing for it to foresee."""


def _least_lane(typingctx: Any, array: Any, row: Any, column: Any) -> Any:
    if not (_is_matrix(array) and isinstance(array.dtype, types.Float)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        least = _lanes(context, builder, signature.args[0], *args)
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            halves = [
                builder.shuffle_vector(
                    least,
                    _ir.Constant(least.type, _ir.Undefined),
                    _ir.Constant(_ir.VectorType(_ir.IntType(32), lanes), list(range(first, first + lanes))),
                )
                for first in (0, lanes)
            ]
            least = builder.select(builder.fcmp_ordered("<", *halves), *halves)
        return builder.extract_element(least, _ir.IntType(32)(0))

    return array.dtype(array, types.int64, types.int64), codegen


least_lane: Callable[[NDArray[Any], int, int], float] = _intrinsic(_least_lane)
"""The least of the `LANES` floats of a contiguous matrix from a row and column on."""


def _trailing_zeros(typingctx: Any, value: Any) -> Any:
    if value != types.int64:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], _ir.IntType(1)(0))

    return types.int64(value), codegen


trailing_zeros: Callable[[int], int] = _intrinsic(_trailing_zeros)
"""How many of an i8's lower bits are 0: 64 for 0."""


def _is_matrix(array: Any) -> bool:
    return isinstance(array, types.Array) and array.ndim == 2 and array.layout == "C"


def _lanes(context: Any, builder: Any, array_type: Any, array: Any, row: Any, column: Any) -> Any:
    made = context.make_array(array_type)(context, builder, array)
    width = builder.extract_value(made.shape, 1)
    first = builder.gep(made.data, [builder.add(builder.mul(row, width), column)])
    lanes = _ir.VectorType(context.get_value_type(array_type.dtype), LANES)
    size = array_type.dtype.bitwidth // 8
    return builder.load(builder.bitcast(first, lanes.as_pointer()), align=size, typ=lanes)


def _address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    return _pointer_add(builder, context.make_array(array_type)(context, builder, array).data, offset)
