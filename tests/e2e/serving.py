"""A service of a test's own: `profile-service serve` as a user starts it, with its whole tree of processes in view."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import psutil

START_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 60.0
READY = re.compile(r"^ready: gRPC (\S+), REST http://(\S+)$", re.MULTILINE)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `profile-service ARGUMENTS` to its end."""
    return run_python("-m", "profile_service", *arguments)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python command of the project to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        env=environment(),
    )


def environment() -> dict[str, str]:
    """Of a process: ours, but bytecode and kernels are kept, and no setting of the service comes from outside."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PROFILE_SERVICE_", "RAY_"))}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    root = Path(__file__).parents[2]
    path = [str(root), str(root / "clients" / "python"), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "COLUMNS": "200"}


@contextlib.contextmanager
def _turn_to_start() -> Iterator[None]:
    """One service starts at a time, whoever tests: a start keeps every processor busy, and Ray gives up after 30 s."""
    with (Path(tempfile.gettempdir()) / "profile-service-tests.start").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class ServeProcess:
    """`profile-service serve` on free ports, ready to be used; ended at the end of a `with`, tree and all.

    `output` is what it has printed so far, both streams together. `prefix` is a command that runs the service's.
    """

    def __init__(self, *flags: str, prefix: Sequence[str] = ()) -> None:
        with _turn_to_start():
            self._start(flags, prefix)
        self.tree()

    def _start(self, flags: Sequence[str], prefix: Sequence[str]) -> None:
        arguments = ("-m", "profile_service", "serve", "--grpc-port", "0", "--http-port", "0", *flags)
        self._process = subprocess.Popen(
            [*prefix, sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        self._known: dict[int, psutil.Process] = {}
        self._printed: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="output of serve", daemon=True)
        self._reader.start()
        try:
            self.grpc_address, self.http_address = self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    @property
    def output(self) -> str:
        """Everything printed so far."""
        with self._changed:
            return "".join(self._printed)

    def tree(self) -> list[psutil.Process]:
        """The living processes of the service, the command's own first; from now on they are known to belong to it."""
        try:
            root = psutil.Process(self._process.pid)
            found = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            found = []
        for process in found:
            self._known.setdefault(process.pid, process)
        return found

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signals the command, not its children, as a shell or a supervisor does; returns its exit status."""
        self.tree()
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The command's exit status, once it has ended."""
        status = self._process.wait(STOP_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)
        return status

    def signal(self, number: signal.Signals) -> None:
        """Signals the command and does not wait."""
        self.tree()
        self._process.send_signal(number)

    def left_over(self) -> list[str]:
        """What is still there of the service's processes, some seconds after it has ended."""
        _, alive = psutil.wait_procs(list(self._known.values()), timeout=5.0)
        return [f"{process.pid} {' '.join(_command_line(process))}" for process in alive]

    def kill(self) -> None:
        """Ends whatever is left, without grace."""
        self.tree()
        for process in self._known.values():
            if process.is_running():
                process.kill()
        psutil.wait_procs(list(self._known.values()), timeout=STOP_TIMEOUT_S)
        self._process.wait(STOP_TIMEOUT_S)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._changed:
                    self._printed.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _wait_until_ready(self) -> tuple[str, str]:
        deadline = time.monotonic() + START_TIMEOUT_S
        with self._changed:
            while (found := READY.search("".join(self._printed))) is None:
                left_s = deadline - time.monotonic()
                ended = self._process.poll() is not None and not self._reader.is_alive()
                assert not ended, f"serve ended with {self._process.returncode}:\n{''.join(self._printed)}"
                assert left_s > 0, f"serve is not ready after {START_TIMEOUT_S:g} s:\n{''.join(self._printed)}"
                self._changed.wait(min(left_s, 1.0))
        return found[1], found[2]

    def __enter__(self) -> ServeProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        if error is not None:
            error.add_note(f"output of serve:\n{self.output}")


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
