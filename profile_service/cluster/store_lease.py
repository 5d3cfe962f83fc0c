"""Which service has a store: a lease in the store itself, renewed as long as the service's first process lives.

It keeps a second service from starting on the same store by mistake. What keeps two from writing is the fence in every
write; so a lease that cannot be renewed in time stops nobody.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable

from profile_service.errors import StartupError
from profile_service.storage.data_directory import Holder
from profile_service.storage.redis_client import StoreFault, StoreUrl
from profile_service.storage.redis_store import LEASE_MS, RedisStore

RENEW_S = 1.0
POLL_S = 0.1
RELEASE_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


class StoreLease:
    """The lease of one service; made by `take`."""

    def __init__(self, url: StoreUrl) -> None:
        self._url = url
        # Of a host and a process there may be two, one after the other.
        self._who = f"{Holder.this_process().encode()} {secrets.token_hex(4)}"
        self._released = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._renew()), name="store lease", daemon=True)

    @classmethod
    async def take(
        cls, store: RedisStore, progress: Callable[[str], None], stopped: Callable[[], bool]
    ) -> tuple[StoreLease, bool]:
        """Takes the lease, and renews it from now on; returns whether it was waited for as well. A service that was
        killed has it a while longer.

        Raises:
            StartupError: another service has the store, and renews its lease.
            StoreFault: the store cannot be asked.
        """
        lease = cls(store.url)
        give_up_at = time.monotonic() + LEASE_MS / 1000 + RENEW_S
        waited = False
        while (other := await store.take_lease(lease._who)) is not None and not stopped():
            holder = Holder.describe(other.rpartition(" ")[0])
            if time.monotonic() > give_up_at:
                raise StartupError(
                    f"{store.url.shown} is in use by {holder}; stop that service, or give another prefix: "
                    "--store redis://…?prefix=NAME"
                )
            progress(f"waiting for {holder}, which had the store, to end")
            waited = True
            await asyncio.sleep(POLL_S)
        lease._thread.start()
        return lease, waited

    def release(self) -> None:
        """Gives it back. May be called more than once."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join(RELEASE_TIMEOUT_S)

    async def _renew(self) -> None:
        store = RedisStore(self._url)
        try:
            while not await asyncio.to_thread(self._released.wait, RENEW_S):
                try:
                    other = await store.take_lease(self._who)
                except StoreFault as fault:
                    logger.warning("the lease of the store cannot be renewed: %s", fault.message)
                    continue
                if other is not None:
                    logger.error("%s is in use by %s, too", self._url.shown, Holder.describe(other.rpartition(" ")[0]))
            await store.release_lease(self._who)
        except StoreFault as fault:
            logger.info("the lease of the store is left to expire: %s", fault.message)
        finally:
            await store.close()
