"""What outlasts a coordinator, in the data directory: `coordinator.Memory` on a file system.

    epoch.json     the highest epoch ever given out
    leases.json    {"holders": {"0": ["incarnation", "identity of the directory's lock"], …}}
    owners.json    an `Ownership`; before there is one partitions are spread evenly over the shards of `data.json`
    places.json    `Places`, where the service is on several machines
    schema.yaml    the schema that is served with

A coordinator has the lock COORDINATOR for as long as it lives: two never write here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from profile_service.cluster.leases import Holder
from profile_service.cluster.ownership import Ownership
from profile_service.cluster.places import Places
from profile_service.storage.data_directory import (
    COORDINATOR_LOCK,
    LEASES,
    PLACES,
    EpochFile,
    Manifest,
    owners_document,
    write_schema,
)
from profile_service.storage.data_directory import Holder as LockHolder
from profile_service.storage.document import Document
from profile_service.storage.fs import FileSystem

if TYPE_CHECKING:
    from profile_service.storage.redis_store import RedisStore


class CoordinatorMemory:
    """The memory of the service whose data directory this is.

    Args:
        fs: where the directory is.
        directory: the service's.
        store: what holds the profiles, where that is not the shards' directories; it knows the epoch, too.

    Raises LockHeld while another coordinator has it.
    """

    def __init__(self, fs: FileSystem, directory: Path, store: RedisStore | None = None) -> None:
        self._fs = fs
        self._directory = directory
        self._store = store
        self._lock = fs.lock(directory / COORDINATOR_LOCK, LockHolder.this_process().encode())
        self._fs = fs
        self._directory = directory
        self._epochs = EpochFile(fs, directory)
        self._owners = owners_document(fs, directory)
        self._places = Document(fs, directory / PLACES, "put back the one of a backup that knows of every shard")
        self._leases = Document(
            fs, directory / LEASES, "remove it while nothing runs that was part of this service, on any machine"
        )

    def last_epoch(self) -> int:
        """The highest epoch ever given out; 0 before the first. Raises DataLoss."""
        return self._epochs.read()

    def last_holders(self) -> dict[int, Holder]:
        """Who may still hold a lease. Raises DataLoss."""
        fields = self._leases.read() or {"holders": {}}
        return {int(shard_id): Holder(*holder) for shard_id, holder in fields["holders"].items()}

    def last_ownership(self, manifest: Manifest) -> Ownership:
        """Who owns what. It is durable from now on, whatever became of the last write of it. Raises DataLoss,
        OSError."""
        self._owners.make_durable()
        return stored_ownership(self._fs, self._directory, manifest)

    def last_places(self) -> Places:
        """Where the shards' directories are. They are durable from now on, whatever became of the last write of them.
        Raises DataLoss, OSError."""
        self._places.make_durable()
        return Places.decode(self._places.read() or {"homes": {}})

    async def places(self, places: Places) -> None:
        """The shards' directories are there. Returns when that is durable, or raises OSError."""
        await asyncio.to_thread(self._places.write, places.encode())

    async def schema(self, text: str) -> None:
        """The service runs with this schema; it lets a start say earlier what the shards would say then. Raises
        OSError."""
        await asyncio.to_thread(write_schema, self._fs, self._directory, text)

    async def epoch(self, epoch: int) -> None:
        """As Memory.epoch."""
        await asyncio.to_thread(self._epochs.write, epoch)
        if self._store is not None:
            from profile_service.storage.redis_client import StoreFault

            # For the next service, which has nothing else of this one.
            try:
                await self._store.raise_epoch(epoch)
            except StoreFault as fault:
                raise OSError(fault.message) from None

    async def holders(self, holders: Mapping[int, Holder]) -> None:
        """As Memory.holders."""
        encoded = {str(shard_id): [holder.incarnation, holder.lock] for shard_id, holder in sorted(holders.items())}
        await asyncio.to_thread(self._leases.write, {"holders": encoded})

    async def ownership(self, ownership: Ownership) -> None:
        """As Memory.ownership."""
        await asyncio.to_thread(self._owners.write, ownership.encode())

    def release(self) -> None:
        """Lets the next one have it."""
        self._lock.release()


def stored_ownership(fs: FileSystem, directory: Path, manifest: Manifest) -> Ownership:
    """Who owns what, as a data directory says. Raises DataLoss."""
    fields = owners_document(fs, directory).read()
    if fields is None:
        return Ownership.even(manifest.partition_bits, manifest.shards)
    return Ownership.decode(fields)
