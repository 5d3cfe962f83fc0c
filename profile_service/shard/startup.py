"""How long a shard's process takes until it serves, phase by phase: what its log says, and what `bench recovery` reads.

    code ─▶ kernels ─▶ snapshot ─▶ log ─▶ serving

Phases may overlap: each counts from when those before it were all done.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal, get_args

Phase = Literal["code", "kernels", "snapshot", "log", "serving"]
"""The interpreter and our modules; the compiled kernels; the newest snapshot; the log behind it; the rest."""


def process_age_s() -> float:
    """Seconds since this process was started, to a hundredth."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


class Startup:
    """The phases of one start."""

    def __init__(self) -> None:
        self._done_s: dict[Phase, float] = {}

    def done(self, phase: Phase) -> None:
        """The phase ends now."""
        self._done_s[phase] = process_age_s()

    def __str__(self) -> str:
        """`2.31 s: code 1.12, kernels 0.45, …`"""
        parts, before = [], 0.0
        for phase in get_args(Phase):
            done = max(before, self._done_s.get(phase, before))
            parts.append(f"{phase} {done - before:.2f}")
            before = done
        return f"{before:.2f} s: {', '.join(parts)}"
