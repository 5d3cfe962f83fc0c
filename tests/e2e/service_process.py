"""The service as a process of its own, as a user starts it: on free ports, stopped by SIGTERM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

READY = re.compile(r"ready: gRPC (\S+), REST (http://\S+)")
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
COMMAND = [sys.executable, "-m", "profile_service"]


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    status: int
    out: str
    err: str


def run(*arguments: str, timeout_s: float = START_TIMEOUT_S, **environment: str) -> Finished:
    """Runs `profile-service` with the arguments to its end."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "COLUMNS": "200", **environment},
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


class ServiceProcess:
    """`profile-service serve` with the given arguments, and ports of its own; as a context manager it is started and
    stopped, and the stop must be clean: exit status 0, and no process left."""

    def __init__(self, *arguments: str, command: str = "serve", directory: Path) -> None:
        self._arguments = [command, *arguments, "--grpc-port", "0", "--http-port", "0"]
        self._log = directory / "stderr.txt"
        self._lines: list[str] = []
        self._ready = threading.Event()
        self.grpc_address = ""
        """host:port."""
        self.url = ""
        """http://host:port."""

    @property
    def output(self) -> str:
        """What it has printed to stdout so far."""
        return "".join(self._lines)

    @property
    def log(self) -> str:
        """What it has printed to stderr so far."""
        return self._log.read_text()

    def start(self) -> None:
        """Returns when it is ready."""
        with self._log.open("w") as log:
            self.process = subprocess.Popen([*COMMAND, *self._arguments], stdout=subprocess.PIPE, stderr=log, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(START_TIMEOUT_S), f"not ready in time\n{self.output}\n{self.log}"
        assert self.grpc_address, f"ended with {self.process.wait()}\n{self.output}\n{self.log}"

    def family(self) -> list[psutil.Process]:
        """The process and all below it."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Asks it to stop, and checks that it stops as it should."""
        family = self.family()
        self.process.send_signal(number)
        status = self.process.wait(STOP_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)
        assert status == 0, f"exit status {status}\n{self.output}\n{self.log}"
        _, left = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        assert not left, f"processes left: {left}"
        assert "Traceback" not in self.log, self.log

    def __enter__(self) -> ServiceProcess:
        try:
            self.start()
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)
            if found := READY.search(line):
                self.grpc_address, self.url = found.groups()
                self._ready.set()
        self._ready.set()
