"""Arrays in reserved address space: room for the largest size is reserved at once, pages come as they are touched.

Growth therefore never copies and never doubles the memory in use, which matters where one array holds most of a
machine's memory.
"""

from __future__ import annotations

import mmap
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named by the standard library from Python 3.13 on


class Space(Protocol):
    """Memory that somebody brings in ahead of whoever fills it from its beginning on."""

    region: mmap.mmap
    """Zeros, as far as they are not claimed."""

    def claim(self, stop: int) -> None:
        """From now on nobody else writes to the bytes below `stop`."""


def reserve(count: int, dtype: DTypeLike) -> NDArray[Any]:
    """An array of `count` zeros of `dtype` whose pages are not in memory until they are touched.

    Raises:
        OSError: the machine does not grant that much address space.
    """
    size = max(1, count) * np.dtype(dtype).itemsize
    # The mapping lives as long as the array: NumPy keeps the buffer's owner.
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return np.frombuffer(region, dtype=dtype, count=count)


def release(part: NDArray[Any]) -> None:
    """Gives the pages back to the machine that lie wholly within `part`, a contiguous piece of what `reserve` returned;
    they hold zeros when they are touched again.
    """
    assert part.flags.c_contiguous
    whole: Any = part
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    region = whole.base.obj
    assert isinstance(region, mmap.mmap)
    start = -(-(part.ctypes.data - whole.ctypes.data) // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (part.ctypes.data - whole.ctypes.data + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        region.madvise(mmap.MADV_DONTNEED, start, end - start)
