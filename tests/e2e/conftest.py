"""Running services for all end-to-end tests that need no other settings: one whose profiles are local, one on Redis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.serving import ServeProcess
from tests.redis_process import RedisProcess


@pytest.fixture(scope="session")
def service(request: pytest.FixtureRequest) -> ServeProcess:
    """`serve` with the marketplace schema, two shards and ports of its own. It is shared: tests use users of their own.

    Profiles are local; with the mark `IN_BOTH_STORES` a test runs again with profiles on Redis.
    """
    shared: ServeProcess = request.getfixturevalue(f"{getattr(request, 'param', 'local')}_service")
    return shared


@pytest.fixture(scope="session")
def local_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    # Standbys are asked for although there is no other node: everything else has to be as without them.
    with _running("--data-dir", str(tmp_path_factory.mktemp("data")), "--replicas", "1") as process:
        yield process


@pytest.fixture(scope="session")
def redis_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    with RedisProcess(tmp_path_factory.mktemp("redis")) as redis, _running("--store", redis.url) as process:
        yield process


@contextmanager
def _running(*flags: str) -> Iterator[ServeProcess]:
    """It is ended by SIGTERM, and has to end with exit status 0 and leave no process."""
    with ServeProcess("--shards", "2", *flags) as process:
        yield process
        assert process.stop() == 0, process.output
        assert process.left_over() == []
        assert "Traceback" not in process.output, process.output
