"""Where profiles live, as a parameter: what users see has to be the same with each store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.redis_process import RedisProcess

STORES = ("local", pytest.param("redis", marks=pytest.mark.long))
"""Of a test that starts services of its own: with Redis it is one of those that `make test-long` runs."""

IN_BOTH_STORES = pytest.mark.parametrize("service", ["local", "redis"], indirect=True, scope="session")
"""Of a test, or a module, that uses the shared `service`."""


@contextmanager
def stored_in(store: str, directory: Path) -> Iterator[tuple[str, ...]]:
    """The flags of a service whose profiles are in a data directory, or in a Redis that runs meanwhile."""
    if store == "local":
        yield ("--data-dir", str(directory / "data"))
    else:
        with RedisProcess(directory / "redis") as redis:
            yield ("--store", redis.url)
