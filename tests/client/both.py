"""One scenario for both clients: written with awaits, run as it is on asyncio, and on the synchronous client too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from profile_client import AsyncProfileClient, ProfileClient

Scenario = Callable[[Any], Awaitable[None]]


class Both:
    """Runs scenarios on one of the clients."""

    def __init__(self, address: str, *, use_asyncio: bool) -> None:
        self.address = address
        self.use_asyncio = use_asyncio

    def run(self, scenario: Scenario, *, address: str | None = None, **options: Any) -> None:
        """Runs a scenario with a client for the fake, or for another address."""
        asyncio.run(self._run(scenario, address or self.address, options))

    async def _run(self, scenario: Scenario, address: str, options: dict[str, Any]) -> None:
        if self.use_asyncio:
            async with AsyncProfileClient(address, **options) as client:
                await scenario(client)
        else:
            with ProfileClient(address, **options) as client:
                await scenario(_Awaitable(client))


def awaitable(client: ProfileClient) -> Any:
    """A synchronous client whose calls can be awaited: they run in threads."""
    return _Awaitable(client)


class _Awaitable:
    """A synchronous object whose calls can be awaited."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._held, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "producer":
                return _Awaitable(value(*args, **kwargs))
            if name == "watch":
                return _iterate(value(*args, **kwargs))

            # In a thread, as a blocked caller is: the scenario may then bring about what the call waits for.
            return asyncio.to_thread(value, *args, **kwargs)

        return call

    async def __aenter__(self) -> Any:
        self._held.__enter__()
        return self

    async def __aexit__(self, *details: Any) -> None:
        await asyncio.to_thread(self._held.__exit__, *details)


async def _iterate(values: Iterator[Any]) -> AsyncIterator[Any]:
    for value in values:
        yield value
