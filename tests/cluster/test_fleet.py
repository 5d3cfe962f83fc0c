"""The tests of the fleet load Ray, which no process may have loaded that starts a service later: they run in one of
their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("fleet_cases.py")


def test_every_shard_has_a_process_whatever_becomes_of_other_nodes(seed: int) -> None:
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "--seed", str(seed), "--timeout", "60"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
