"""`ray up` brings the service up on machines reached by SSH, and `ray down` takes it down: scripts/try_ray_up.py, which
says what it does, and ends with 1 where something is not as it should be.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 400.0
"""Six starts of Ray, one after the other, on a machine that may be busy with other tests."""


@pytest.mark.long
@pytest.mark.timeout(TIMEOUT_S + 20)
def test_ray_up_serves_through_the_loss_of_a_node_and_ray_down_leaves_nothing() -> None:
    network = set(psutil.net_if_addrs())
    run = subprocess.run(
        [sys.executable, "-u", "-m", "scripts.try_ray_up"],
        cwd=REPOSITORY,
        check=False,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT_S,
    )
    assert run.returncode == 0, run.stdout
    assert run.stdout.rstrip().endswith("done: nothing is left of it"), run.stdout
    assert set(psutil.net_if_addrs()) == network
