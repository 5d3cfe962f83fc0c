"""Ray by the arguments that `serve` gives it, whole, and nothing else: what `bench startup` compares a start of the
service with.

Prints `ready: ray.init took … s`, and ends when it is asked to.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from profile_service.cluster.embedded_ray import arguments, prepare_environment
from profile_service.cluster.scratch import ScratchDirectory


def main(workers: int) -> None:
    """Starts Ray for so many actors, and stops it at SIGTERM."""
    prepare_environment()
    # Any free port: another Ray may run on the machine.
    os.environ.setdefault("AUTOSCALER_METRIC_PORT", "0")
    # What imports cost is not what `ray.init` takes.
    import ray

    scratch = ScratchDirectory()
    started = time.monotonic()
    ray.init(**arguments(workers, scratch.path))
    took_s = time.monotonic() - started
    stopped = threading.Event()
    # In place of Ray's handler, which ends the process at once in whatever thread of Ray's hears it.
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    print(f"ready: ray.init took {took_s:.3f} s", flush=True)
    stopped.wait()
    ray.shutdown()
    scratch.remove()


if __name__ == "__main__":
    main(int(sys.argv[1]))
