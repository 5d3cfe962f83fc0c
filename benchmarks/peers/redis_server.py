"""A Redis server for a benchmark, on a free port and on a socket in a directory of its own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Literal

import psutil
import redis

from benchmarks.processes import BenchmarkError

_START_TIMEOUT_S = 20.0

Persistence = Literal["always", "everysec", "none"]
"""When what it answers is on its disk: before it answers, within a second, or never."""

_FLAGS: dict[Persistence, list[str]] = {
    "always": ["--appendonly", "yes", "--appendfsync", "always"],
    "everysec": ["--appendonly", "yes", "--appendfsync", "everysec"],
    "none": ["--appendonly", "no"],
}


class RedisServer:
    """One server; `directory` is where it makes one of its own."""

    def __init__(self, persistence: Persistence = "everysec", directory: Path | None = None) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise BenchmarkError("this needs redis-server: make bench-tools installs it")
        self._directory = tempfile.TemporaryDirectory(prefix="profile-service-bench-", dir=directory or Path.cwd())
        # Apart from what is stored: the path of a socket may have a hundred bytes only.
        self._socket_directory = tempfile.TemporaryDirectory(prefix="redis-")
        self.socket = str(Path(self._socket_directory.name) / "socket")
        self.port = _free_port()
        where = ["--bind", "127.0.0.1", "--port", str(self.port), "--unixsocket", self.socket]
        flags = [*where, "--dir", self._directory.name, "--save", "", *_FLAGS[persistence]]
        self._popen = subprocess.Popen([program, *flags], stdout=subprocess.DEVNULL)
        self.process = psutil.Process(self._popen.pid)
        self.client = redis.Redis(unix_socket_path=self.socket)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self.client.ping()
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    @property
    def url(self) -> str:
        """For `serve --store`."""
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends it, and removes what it has stored."""
        self.client.close()
        self._popen.terminate()
        self._popen.wait()
        self._directory.cleanup()
        self._socket_directory.cleanup()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
