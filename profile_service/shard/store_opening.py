"""A store, as the settings name it. Whoever never names one needs nothing of what it takes to reach one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from profile_service.config import Settings
from profile_service.errors import StartupError

if TYPE_CHECKING:
    from profile_service.storage.redis_store import RedisStore


def open_store(settings: Settings) -> RedisStore:
    """A client of the store that the settings name, in the event loop that runs; it connects when it is used.

    Raises StartupError where the URL is none, or what it takes is not installed.
    """
    try:
        from profile_service.storage.redis_client import StoreUrl
        from profile_service.storage.redis_store import RedisStore
    except ModuleNotFoundError as error:
        raise StartupError(
            f"--store {settings.storage.store.partition(':')[0]}://… needs the package {error.name}: install "
            "profile-service[redis]"
        ) from None
    return RedisStore(StoreUrl.parse(settings.storage.store), settings.fixed.partition_bits)


def shown_store(settings: Settings) -> str:
    """Where profiles live, as it may be shown: without the password."""
    if settings.storage.is_local:
        return settings.storage.store
    from profile_service.storage.redis_client import StoreUrl

    return StoreUrl.parse(settings.storage.store).shown
