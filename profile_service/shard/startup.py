"""The start of a shard's process: how long each phase takes until it serves, which its log says and `bench recovery`
reads, and how its threads share the interpreter meanwhile.

    code ─▶ kernels ─▶ snapshot ─▶ log ─▶ serving

Phases may overlap: each counts from when those before it were all done.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Literal, get_args

Phase = Literal["code", "kernels", "snapshot", "log", "serving"]
"""The interpreter and our modules; the compiled kernels; the newest snapshot; the log behind it; the rest."""


SWITCH_INTERVAL_S = 0.0001
"""How long a thread waits for the interpreter's lock before it asks for it. Importing and loading kernels hold the lock
for as long as they are let; the threads beside them need it for microseconds, a thousand times."""


def process_age_s() -> float:
    """Seconds since this process was started, to a hundredth."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


class Startup:
    """One start. Until `over`, threads wait but shortly for the interpreter's lock."""

    def __init__(self) -> None:
        self._done_s: dict[Phase, float] = {}
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)

    def done(self, phase: Phase) -> None:
        """The phase ends now."""
        self._done_s[phase] = process_age_s()

    def over(self) -> None:
        """It serves, or will not."""
        sys.setswitchinterval(self._switch_interval_s)

    def __str__(self) -> str:
        """`2.31 s: code 1.12, kernels 0.45, …`"""
        parts, before = [], 0.0
        for phase in get_args(Phase):
            done = max(before, self._done_s.get(phase, before))
            parts.append(f"{phase} {done - before:.2f}")
            before = done
        return f"{before:.2f} s: {', '.join(parts)}"
