"""Memory of a process through which batches pass: the C library's allocator, and Python's garbage collector.

A batch takes a few hundred kilobytes several times on its way, as gRPC's slices, as the message, as columns, for
milliseconds each. glibc gives blocks of that size back to the system as soon as they are free, and the next batch meets
every page of them as a fault. To keep them costs a few megabytes, and halves the CPU time of receiving 600 kB messages.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc

KEPT_BYTES = 32 << 20
"""Free memory at the end of a heap is kept up to so much, and larger blocks are mapped each by itself: more than what
one group of batches takes, and the most that glibc allows as a threshold."""

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """From now on blocks of batches' sizes are kept when they are freed. Does nothing where the C library is not
    glibc."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        # Both: once either is set, glibc adjusts neither by itself.
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


def spare_what_stays() -> None:
    """What there is now is left out of garbage collections from now on: modules, classes, schemas. A collection then
    looks at what calls have left behind, and does not stop the loop for long."""
    gc.freeze()
