"""What batches pass through is not given back to the system between two of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

ROUNDS = 50
SCRIPT = f"""
import resource, sys
from profile_service.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()

def batch():
    # Several blocks at a time, as a batch takes them.
    return [bytearray(600_000) for _ in range(8)]

for _ in range(3):
    batch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    batch()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / {ROUNDS})
"""


def faults(mode: str) -> float:
    """Page faults a batch."""
    return float(subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_batch_meets_no_page_faults() -> None:
    assert faults("leave") > 100
    assert faults("keep") < 10
