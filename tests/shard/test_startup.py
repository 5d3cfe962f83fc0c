"""A start's phases, as they are told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

from profile_service.shard.startup import Phase, Startup, process_age_s


def test_a_process_knows_its_age() -> None:
    before = process_age_s()
    time.sleep(0.05)
    assert 0.03 < process_age_s() - before < 5
    assert 0 < before < 24 * 3600


def test_phases_that_overlap_add_up_to_the_whole() -> None:
    before = sys.getswitchinterval()
    startup = Startup()
    assert sys.getswitchinterval() < before
    phases: tuple[Phase, ...] = ("code", "snapshot", "kernels", "log", "serving")
    for phase in phases:
        startup.done(phase)
        time.sleep(0.02)
    startup.over()
    assert sys.getswitchinterval() == before
    said = str(startup)
    match = re.fullmatch(r"([\d.]+) s: (.*)", said)
    assert match is not None
    whole, parts = match.groups()
    found = dict(part.split() for part in parts.split(", "))
    assert list(found) == ["code", "kernels", "snapshot", "log", "serving"]
    assert found["snapshot"] == "0.00", "it was done before the kernels, and nobody waited for it"
    assert abs(sum(map(float, found.values())) - float(whole)) < 0.06


LOAD_KERNELS = """
import sys
from profile_service.domain.schema import load_schema
from profile_service.shard.warm import warm_kernels
from profile_service.wire.warm import warm_scanning
warm_kernels(load_schema("marketplace"))
warm_scanning()
print(*(name for name in ("numba.np.linalg", "numba.typed.typeddict", "numba.np.npyimpl") if name in sys.modules))
"""


def test_a_process_that_finds_its_kernels_loads_nothing_that_only_compiling_needs() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for last in (False, True):
        command = [sys.executable, "-c", LOAD_KERNELS]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        if last:
            assert done.stdout.split() == [], "the first process left all kernels compiled"
