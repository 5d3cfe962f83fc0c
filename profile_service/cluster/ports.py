"""Ports to listen on: taken, checked, said of plainly when they cannot be had; and whether anybody listens there."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
from pathlib import Path

from profile_service.config import Settings
from profile_service.errors import StartupError

LOWEST_PORT = 20_000
"""Ray takes those below for its own processes."""

_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES = 20

PROBE_TIMEOUT_S = 0.5


async def listens(address: str) -> bool:
    """Whether anybody may listen at host:port: False where the connection is refused, which takes no time."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except ConnectionRefusedError:
        return False
    except OSError:
        # Nothing is known: TimeoutError is one of them.
        return True
    writer.close()
    return True


def bind(settings: Settings, port: int, flag: str) -> socket.socket:
    """A TCP socket bound to settings.host:port, not listening yet; for port 0 to a free one.

    A free port is one that outgoing connections are not given: it is closed again until the frontend's process opens
    it, and whenever that process is restarted, and in between any connection of the machine could take it away.

    Raises StartupError that names the port and the flag that gives another.
    """
    if port == 0:
        listening = range(LOWEST_PORT, _lowest_ephemeral_port())
        for drawn in random.SystemRandom().choices(listening, k=_TRIES) if listening else ():
            try:
                return _bind(settings, drawn, flag)
            except StartupError:
                continue
    return _bind(settings, port, flag)


def _lowest_ephemeral_port() -> int:
    try:
        return int(_EPHEMERAL_RANGE.read_text().split()[0])
    except OSError:  # not Linux: the range that is registered for it
        return 49_152


def _bind(settings: Settings, port: int, flag: str) -> socket.socket:
    try:
        family = socket.getaddrinfo(settings.host, port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise StartupError(f"--host {settings.host}: {error.strerror}; give an address of this machine") from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Connections of a server that has just ended may linger; they are no reason not to start.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((settings.host, port))
    except OSError as error:
        bound.close()
        raise StartupError(port_fault(settings, port, flag, error.strerror, error.errno)) from None
    return bound


def port_fault(settings: Settings, port: int, flag: str, reason: str | None, number: int | None = None) -> str:
    """What is wrong with a port, and what to do."""
    address = settings.address(port)
    match number:
        case errno.EACCES:
            return f"{address} needs more rights than this user has; give another port with {flag}"
        case errno.EADDRNOTAVAIL:
            return f"{settings.host} is not an address of this machine; give one with --host"
    return f"{address} cannot be listened on ({reason}); stop what listens there, or give another port with {flag}"
