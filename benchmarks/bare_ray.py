"""Ray as `serve` starts it, and nothing else: what `bench startup` compares a start of the service with.

Prints `ready: ray.init took … s`, and ends when it is asked to.
"""

from __future__ import annotations

import signal
import sys
import time

from profile_service.cluster.embedded_ray import EmbeddedRay, prepare_environment


def main(workers: int) -> None:
    """Starts Ray for so many actors, and stops it at SIGTERM."""
    prepare_environment()
    # What imports cost is not what `ray.init` takes.
    import ray  # noqa: F401

    started = time.monotonic()
    embedded = EmbeddedRay(workers)
    took_s = time.monotonic() - started
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    print(f"ready: ray.init took {took_s:.3f} s", flush=True)
    signal.sigwait({signal.SIGTERM})
    embedded.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]))
