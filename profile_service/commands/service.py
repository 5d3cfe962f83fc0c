"""Runs the service inside a command: from the settings to a clean stop on SIGINT or SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from profile_service.commands.terminal import stderr

if TYPE_CHECKING:
    from profile_service.config import Settings
    from profile_service.launcher import Service


class StopSignal:
    """SIGINT and SIGTERM: the first asks for a clean stop, the second ends the process at once."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for."""
        return self._asked.is_set()

    def listen(self) -> None:
        """Takes the signals over."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def wait(self) -> None:
        """Returns when a stop is asked for."""
        self._asked.wait()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._asked.is_set():
            os.write(2, b"stopped at once: what was not yet acknowledged is not kept\n")
            os._exit(128 + number)
        self._asked.set()


@contextmanager
def running(settings: Settings, stop: StopSignal) -> Iterator[Service]:
    """The service, started; drained and stopped at the end."""
    stop.listen()
    with stderr().status("starting") as progress:
        from profile_service.launcher import Service

        service = Service.start(settings, progress.update, lambda: stop.asked)
    try:
        yield service
    finally:
        if stop.asked:
            print("stopping: what was accepted is being answered", file=sys.stderr, flush=True)
        service.stop()


def free_port(host: str, port: int, tell: Callable[[str], None]) -> int:
    """`port` if nothing listens there, else 0, which takes a free one."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            tell(f"port {port} is taken; a free one is used")
            return 0
    return port
