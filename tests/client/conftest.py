from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.both import Both
from tests.client.fake_service import FakeService, serving


@pytest.fixture
def fake() -> FakeService:
    return FakeService()  # type: ignore[abstract]  # what it leaves out answers UNIMPLEMENTED


@pytest.fixture(params=[False, True], ids=["sync", "asyncio"])
def both(request: pytest.FixtureRequest, fake: FakeService) -> Iterator[Both]:
    with serving(fake) as address:
        yield Both(address, use_asyncio=request.param)
