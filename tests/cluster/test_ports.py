"""Ports that a frontend listens on."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from profile_service.cluster.ports import LOWEST_PORT, bind, listens
from profile_service.config import Settings
from profile_service.errors import StartupError


def test_no_outgoing_connection_can_be_given_a_port_that_was_drawn() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(20):
        with bind(Settings(), 0, "--http-port") as bound:
            assert LOWEST_PORT <= bound.getsockname()[1] < lowest


def test_a_drawn_port_is_not_one_that_is_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with bind(Settings(), 0, "--grpc-port") as taken:
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("profile_service.cluster.ports.LOWEST_PORT", port)
        monkeypatch.setattr("profile_service.cluster.ports._lowest_ephemeral_port", lambda: port + 1)
        # Nothing else is left to draw, so the system is asked for one.
        with bind(Settings(), 0, "--grpc-port") as other:
            assert other.getsockname()[1] != port


def test_a_port_that_is_listened_on_is_refused_by_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"127.0.0.1:{port} cannot be listened on .* --http-port"):
            bind(Settings(), port, "--http-port")


async def test_whether_anybody_listens_shows_at_once() -> None:
    with bind(Settings(), 0, "--grpc-port") as taken:
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert await listens(address)
    assert not await listens(address)
