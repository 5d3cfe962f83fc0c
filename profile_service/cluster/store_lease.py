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
    """The lease of one service.

    Args:
        url: of the store.
        who: the service, as others are told of it, then a blank and what tells it from all others; None takes this
            process.
    """

    def __init__(self, url: StoreUrl, who: str | None = None) -> None:
        self._url = url
        # Of a host and a process there may be two, one after the other.
        self._who = who or f"{Holder.this_process().encode()} {secrets.token_hex(4)}"
        self._released = threading.Event()
        self._gives_back = True
        self._thread = threading.Thread(target=lambda: asyncio.run(self._renew()), name="store lease", daemon=True)

    @classmethod
    def of_deployment(cls, url: StoreUrl, service: str) -> StoreLease:
        """That of a service on a Ray cluster, whichever of its processes has it; `service` is the id of its
        manifest."""
        return cls(url, f"the service {service} on a Ray cluster {service}")

    async def take(self, store: RedisStore, progress: Callable[[str], None], stopped: Callable[[], bool]) -> bool:
        """Takes the lease, and renews it from now on; returns whether it was waited for. A service that was killed has
        it a while longer.

        Raises:
            StartupError: another service has the store, and renews its lease; or this one is told to stop before it is
                known to.
            StoreFault: the store cannot be asked.
        """
        give_up_at = time.monotonic() + LEASE_MS / 1000 + RENEW_S
        waited = False
        while (other := await store.take_lease(self._who)) is not None:
            holder = Holder.describe(other.rpartition(" ")[0])
            if stopped():
                raise StartupError(f"stopped while {store.url.shown} was in use by {holder}")
            if time.monotonic() > give_up_at:
                raise StartupError(
                    f"{store.url.shown} is in use by {holder}; stop that service, or give another prefix: "
                    "--store redis://…?prefix=NAME"
                )
            progress(f"waiting for {holder}, which had the store, to end")
            waited = True
            await asyncio.sleep(POLL_S)
        self.keep()
        return waited

    def keep(self) -> None:
        """Renews it from now on, and takes it where nobody has it."""
        self._thread.start()

    def pass_on(self) -> None:
        """Renews it no longer: another process of the same service does from now on."""
        self._gives_back = False
        self.release()

    def release(self) -> None:
        """Gives it back. May be called more than once."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join(RELEASE_TIMEOUT_S)

    async def _renew(self) -> None:
        store = RedisStore(self._url)
        try:
            while True:
                try:
                    other = await store.take_lease(self._who)
                except StoreFault as fault:
                    logger.warning("the lease of the store cannot be renewed: %s", fault.message)
                else:
                    if other is not None:
                        holder = Holder.describe(other.rpartition(" ")[0])
                        logger.error("%s is in use by %s, too", self._url.shown, holder)
                if await asyncio.to_thread(self._released.wait, RENEW_S):
                    break
            if self._gives_back:
                await store.release_lease(self._who)
        except StoreFault as fault:
            logger.info("the lease of the store is left to expire: %s", fault.message)
        finally:
            await store.close()
