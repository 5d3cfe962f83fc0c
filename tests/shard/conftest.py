"""Servers that hold what shards have counted: each test of a store runs with Redis, and with Valkey."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.redis_process import SERVERS, RedisProcess


@pytest.fixture(scope="module", params=SERVERS)
def program(request: pytest.FixtureRequest) -> str:
    """What to run."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def server(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """One for the module; each test has a prefix of its own."""
    with RedisProcess(tmp_path_factory.mktemp(program), server=program) as process:
        yield process


@pytest.fixture
def url(server: RedisProcess, request: pytest.FixtureRequest) -> str:
    return f"{server.url}?prefix={request.function.__name__}"


@pytest.fixture
def own_server(program: str, tmp_path: Path) -> Iterator[RedisProcess]:
    """For a test that ends it, or what it holds."""
    with RedisProcess(tmp_path / program, server=program) as process:
        yield process
