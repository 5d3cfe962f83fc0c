"""The processes under measurement: the service as users start it, a bare echo beside it, and the CPU time of each."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import psutil


def describe_machine() -> dict[str, str]:
    """What the figures depend on: processor, memory, kernel, and the versions of what is measured."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    packages = ("grpcio", "protobuf", "ray", "numpy", "numba", "uvloop")
    return {
        "processor": f"{os.cpu_count()} x {model}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


@contextmanager
def started(arguments: list[str]) -> Iterator[tuple[psutil.Process, str]]:
    """Runs a command until its first line that begins with `ready:`; yields the process and the rest of that line.

    It is asked to stop by SIGTERM at the end, and must exit with status 0.
    """
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("ready:"):
                yield psutil.Process(child.pid), line.removeprefix("ready:").strip()
                break
        else:
            raise RuntimeError(f"{' '.join(arguments)} ended without being ready, exit status {child.wait()}")
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        status = child.wait(timeout=60)
    if status:
        raise RuntimeError(f"{' '.join(arguments)} ended with exit status {status}")


def serve(schema: str, shards: int | None) -> list[str]:
    """The command that starts the service on free ports."""
    command = [
        sys.executable,
        "-m",
        "profile_service",
        "serve",
        "--schema",
        schema,
        "--grpc-port",
        "0",
        "--http-port",
        "0",
    ]
    return [*command, "--shards", str(shards)] if shards else command


def cpu_seconds(root: psutil.Process) -> dict[str, float]:
    """User and system time of the process and of each below it, by what it is."""
    answer: dict[str, float] = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
            name = f"{_role(process)} ({process.pid})"
        except psutil.Error:
            continue
        answer[name] = times.user + times.system
    return answer


def _role(process: psutil.Process) -> str:
    command = process.cmdline()
    title = command[0] if command else process.name()
    if title.startswith("ray::"):
        return title.removeprefix("ray::").split(".")[0]
    if "profile_service" in command:
        return "serve"
    return (
        Path(title).name
        if "python" not in title
        else next((Path(a).name for a in command if a.endswith(".py")), "python")
    )
