"""A Redis server for a peer, on a socket in a directory of its own."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import redis

from benchmarks.processes import BenchmarkError

_START_TIMEOUT_S = 20.0


class RedisServer:
    """It appends to its log, and syncs that every second."""

    def __init__(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise BenchmarkError("the peer needs redis-server: make bench-tools installs it")
        self._directory = tempfile.TemporaryDirectory(prefix="profile-service-bench-", dir=Path.cwd())
        # Apart from what is stored: the path of a socket may have a hundred bytes only.
        self._socket_directory = tempfile.TemporaryDirectory(prefix="redis-")
        self.socket = str(Path(self._socket_directory.name) / "socket")
        flags = ["--port", "0", "--unixsocket", self.socket, "--dir", self._directory.name, "--save", ""]
        self._popen = subprocess.Popen(
            [program, *flags, "--appendonly", "yes", "--appendfsync", "everysec"], stdout=subprocess.DEVNULL
        )
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

    def close(self) -> None:
        """Ends it, and removes what it has stored."""
        self.client.close()
        self._popen.terminate()
        self._popen.wait()
        self._directory.cleanup()
        self._socket_directory.cleanup()
