"""The processes under measurement: the service as users start it, a bare echo beside it, and the CPU time of each; and
the disk that they write to."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import psutil
from numpy.typing import NDArray

from profile_service.errors import ProfileServiceError

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 120.0
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


class BenchmarkError(ProfileServiceError):
    """The benchmark cannot run here, or what it measured is not what it should have been."""


_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")


def describe_machine() -> dict[str, str]:
    """What the figures depend on: processor, memory, kernel, and the versions of what is measured."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    packages = ("profile-service", "grpcio", "protobuf", "ray", "numpy", "numba", "uvloop")
    return {
        "processor": f"{os.cpu_count()} x {model}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": platform.release(),
        # Some pace what they send, also on one machine.
        "TCP congestion control": _CONGESTION_CONTROL.read_text().strip(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


@dataclass(frozen=True)
class Disk:
    """Where files go."""

    file_system: str
    device: str
    mounted_at: str

    @classmethod
    def below(cls, directory: Path) -> Disk:
        """The one that holds `directory`."""
        path = directory.resolve()
        mounts = {Path(mount.mountpoint): mount for mount in psutil.disk_partitions(all=True)}
        for above in (path, *path.parents):
            if above in mounts:
                return cls(mounts[above].fstype, mounts[above].device, mounts[above].mountpoint)
        return cls("unknown", "unknown", "/")

    def __str__(self) -> str:
        return f"{self.file_system} on {self.device}, mounted at {self.mounted_at}"


@contextmanager
def data_directory(parent: Path | None, size_bytes: int) -> Iterator[Path]:
    """A new directory below `parent`, or else below the current directory; it is removed at the end.

    Raises:
        BenchmarkError: fewer than `size_bytes` are free, or the current directory is in memory, where a sync is free.
    """
    chosen = parent if parent is not None else Path.cwd()
    chosen.mkdir(parents=True, exist_ok=True)
    disk = Disk.below(chosen)
    if parent is None and disk.file_system in IN_MEMORY:
        raise BenchmarkError(f"{chosen} lies in memory ({disk}): name a directory on a disk with --data-dir")
    free = psutil.disk_usage(str(chosen)).free
    if free < size_bytes:
        raise BenchmarkError(
            f"{chosen} has {free / 1e9:.1f} GB left and this takes {size_bytes / 1e9:.1f} GB: "
            "name another directory with --data-dir"
        )
    with tempfile.TemporaryDirectory(prefix="profile-service-bench-", dir=chosen) as name:
        yield Path(name)


class Child:
    """A process that says `ready: …` when it can be used. What it prints is kept, and shown if it fails."""

    def __init__(self, arguments: list[str]) -> None:
        self._name = " ".join(arguments[2:4])
        self._popen = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment(),
            # Ctrl-C is ours: it ends the benchmark, and that ends the child.
            start_new_session=True,
        )
        self.process = psutil.Process(self._popen.pid)
        self._printed: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, name=f"output of {self._name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as lines:
            for line in lines:
                with self._changed:
                    self._printed.append(line)
                    self._changed.notify_all()

    @property
    def output(self) -> str:
        """Everything printed so far."""
        with self._changed:
            return "".join(self._printed)

    def wait_for(self, pattern: str, timeout_s: float, after: int = 0) -> re.Match[str]:
        """The first match in what was printed from character `after` on, once there is one.

        Raises:
            BenchmarkError: the process ended, or the time passed, without it.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (found := re.compile(pattern, re.MULTILINE).search("".join(self._printed), after)) is None:
                ended = self._popen.poll() is not None and not self._reader.is_alive()
                if ended or time.monotonic() > deadline:
                    why = f"ended with {self._popen.returncode}" if ended else f"took more than {timeout_s:g} s"
                    tail = "".join(self._printed[-30:])
                    raise BenchmarkError(f"{self._name} {why} without saying {pattern!r}; it printed:\n{tail}")
                self._changed.wait(0.5)
        return found

    @property
    def address(self) -> str:
        """host:port of the first thing that it serves, once it is ready."""
        return self.wait_for(r"^ready: \w+ (\S+:\d+)", START_TIMEOUT_S)[1]

    @property
    def rest_address(self) -> str:
        """host:port of the service's REST, once it is ready."""
        return self.wait_for(r"^ready: .* REST http://(\S+:\d+)", START_TIMEOUT_S)[1]

    def stop(self) -> None:
        """Asks it to end, and waits. Raises `BenchmarkError` unless it ends with status 0."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)
        try:
            status = self._popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise BenchmarkError(f"{self._name} did not stop within {STOP_TIMEOUT_S:g} s") from None
        if status:
            raise BenchmarkError(f"{self._name} ended with exit status {status}; it printed:\n{self.output[-3000:]}")

    def kill(self) -> None:
        """Ends it and every process below it without grace."""
        tree = [self.process]
        with suppress(psutil.NoSuchProcess):
            tree += self.process.children(recursive=True)
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=STOP_TIMEOUT_S)
        self._popen.wait(STOP_TIMEOUT_S)


@contextmanager
def started(arguments: list[str]) -> Iterator[Child]:
    """Runs `python -m ARGUMENTS` until it is ready; it has to end well when asked to, at the end."""
    child = Child([sys.executable, "-m", *arguments])
    try:
        _ = child.address
        yield child
    except BaseException:
        child.kill()
        raise
    child.stop()


def serve(schema: str, *flags: str) -> list[str]:
    """The command that starts the service on free ports; `schema` is a file or the name of a shipped one."""
    return ["profile_service", "serve", "--schema", schema, "--grpc-port", "0", "--http-port", "0", *flags]


def _environment() -> dict[str, str]:
    """Ours, but no setting of the service comes from it, and compiled code is kept."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PROFILE_SERVICE_", "RAY_"))}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return kept


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


class ResidentMemory:
    """Resident memory of a process and of those below it, looked at again and again while the `with` lasts."""

    def __init__(self, root: psutil.Process, interval_s: float) -> None:
        self._root = root
        self._interval_s = interval_s
        self._at: list[float] = []
        self._seen: list[dict[str, int]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="resident memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _look(self) -> None:
        # Who is below changes only where something dies; asking costs more than looking.
        processes = [(process, _named(process)) for process in [self._root, *self._root.children(recursive=True)]]
        while True:
            seen = {}
            for process, name in processes:
                with suppress(psutil.Error):
                    seen[name] = process.memory_info().rss
            self._at.append(time.monotonic())
            self._seen.append(seen)
            if self._stopped.wait(self._interval_s):
                return

    def series(self) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        """When it looked (`time.monotonic`), and the bytes of each process that was there all the time."""
        seen = self._seen[: len(self._at)]
        names = [name for name in seen[0] if all(name in one for one in seen)]
        return np.array(self._at[: len(seen)]), {name: np.array([one[name] for one in seen], float) for name in names}


def _named(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"{_role(process)} ({process.pid})"
    return f"gone ({process.pid})"


def is_ours(name: str) -> bool:
    """Whether a process, by its name in `cpu_seconds` or `ResidentMemory`, runs code of the service: not Ray's."""
    return name.startswith(("serve ", "FrontendActor ", "ShardActor ", "CoordinatorActor "))


def role_names(names: Iterable[str]) -> dict[str, str]:
    """What the service's processes are called in a drawing, by their names in `ResidentMemory`.

    >>> role_names(["ShardActor (71)", "ShardActor (72)", "FrontendActor (80)"])
    {'ShardActor (71)': 'shard 1', 'ShardActor (72)': 'shard 2', 'FrontendActor (80)': 'frontend'}
    """
    roles = {name: name.partition(" (")[0].removesuffix("Actor").lower() for name in names}
    kinds = list(roles.values())
    seen: Counter[str] = Counter()
    shown = {}
    for name, role in roles.items():
        seen[role] += 1
        shown[name] = f"{role} {seen[role]}" if kinds.count(role) > 1 else role
    return shown


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
