"""One running service for all end-to-end tests that need no other settings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.service_process import ServiceProcess


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """`serve` with the marketplace schema and two shards. It is shared: tests use users of their own.

    It ends by SIGTERM, and has to end with exit status 0 and leave no process.
    """
    directory = tmp_path_factory.mktemp("service")
    with ServiceProcess("--shards", "2", "--data-dir", str(directory / "data"), directory=directory) as running:
        yield running
