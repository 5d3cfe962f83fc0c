"""Time as an argument: whoever needs the time takes a `Clock`, and a test passes its own."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Returns nanoseconds since 1970, UTC."""


def system_clock() -> int:
    """The machine's clock in nanoseconds since 1970, UTC."""
    return time.time_ns()


def boot_clock() -> int:
    """Nanoseconds since the machine was started: never set, and it goes on while the machine, or the process,
    sleeps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
