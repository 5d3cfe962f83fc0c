"""One running service for all end-to-end tests that need no other settings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.serving import ServeProcess


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """`serve` with the marketplace schema, two shards and ports of its own. It is shared: tests use users of their own.

    It is ended by SIGTERM, and has to end with exit status 0 and leave no process.
    """
    data_dir = tmp_path_factory.mktemp("data")
    with ServeProcess("--shards", "2", "--data-dir", str(data_dir)) as process:
        yield process
        assert process.stop() == 0, process.output
        assert process.left_over() == []
        assert "Traceback" not in process.output, process.output
