"""A service's directory: what it was made with, who uses it, and where each shard's files are.

    DATA_DIR/
      LOCK          held by the service for as long as it lives; says who that is
      data.json     the manifest: format, id, partition bits, number of shards at first, when it was made; never changes
      epoch.json    the highest epoch ever given out (see `EpochFile`)
      owners.json   the shards there are and who owns which partition, once that has changed; a `Document`
      leases.json   which process of each shard holds its lease; a `Document`, as of the coordinator
      COORDINATOR   held by the coordinator for as long as it lives
      places.json   of a service on several machines: on which each shard's directory is; a `Document`
      store.json    of one whose profiles are in a store: which; a `Document`, see `cluster.survey`
      node.json     of a machine of such a service: its name there; a `Document`, see `cluster.survey`
      schema.yaml   the schema last served with, for a check before any process starts
      shard-0/ …    a shard's log and snapshots

`data.json` is written last when a directory is made, so one without it was never used, unless a shard has files. It
ends with a checksum of all the rest, for a wrong number of partitions would send users to the wrong shards:

    {"format": 1, "id": "5f0c…", "partition_bits": 8, "shards": 2, "created": "2026-11-22T10:00:00Z", "checksum": "…"}

The identity of a shard's directory stands in every file of its log and snapshots, so that files of another shard, or of
another service, are never taken for its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from profile_service.errors import DataLoss, StartupError
from profile_service.storage.document import NEW_SUFFIX, Document, checksum, read_file, write_atomically
from profile_service.storage.fs import FileSystem, Lock, LockHeld

FORMAT = 1
"""Version of the directory's layout."""

MANIFEST, LOCK, EPOCH, SCHEMA = "data.json", "LOCK", "epoch.json", "schema.yaml"
OWNERS, LEASES, COORDINATOR_LOCK = "owners.json", "leases.json", "COORDINATOR"
PLACES, NODE, STORE = "places.json", "node.json", "store.json"
SHARD_PREFIX = "shard-"
IDENTITY_BYTES = 16

SECTOR_BYTES = 512
"""What a disk writes whole or not at all."""

_UNUSED = re.compile(rf"{LOCK}|lost\+found|.*\{NEW_SUFFIX}|{EPOCH}|{SCHEMA}|{PLACES}|{STORE}")
"""What may stand in a directory whose making was interrupted, and at the root of a file system."""


@dataclass(frozen=True)
class Holder:
    """A process that has a directory locked, as the lock's file tells others."""

    pid: int
    host: str
    started: str
    """UTC, ISO 8601."""

    @classmethod
    def this_process(cls) -> Holder:
        """Who we are."""
        return cls(os.getpid(), socket.gethostname(), _utc_now())

    def encode(self) -> str:
        """As the lock's file has it."""
        return json.dumps(asdict(self))

    @staticmethod
    def describe(encoded: str) -> str:
        """What a lock's file says, for people.

        >>> Holder.describe(Holder(7, "shop", "2026-11-22T10:00:00Z").encode())
        'process 7 on shop since 2026-11-22T10:00:00Z'
        >>> Holder.describe("")
        'a process that does not say who it is'
        """
        try:
            holder = Holder(**json.loads(encoded))
        except (ValueError, TypeError):
            return encoded or "a process that does not say who it is"
        return f"process {holder.pid} on {holder.host} since {holder.started}"


@dataclass(frozen=True)
class Manifest:
    """What a directory was made with."""

    id: str
    """32 hex digits, another for each directory."""
    partition_bits: int
    shards: int
    created: str
    """UTC, ISO 8601."""
    format: int = FORMAT

    @classmethod
    def new(cls, partition_bits: int, shards: int) -> Manifest:
        """Of a directory that is made now."""
        return cls(uuid.uuid4().hex, partition_bits, shards, _utc_now())

    def identity(self, shard_id: int) -> bytes:
        """16 bytes that stand in every file of the shard's log and snapshots."""
        return hashlib.blake2b(f"{self.id}/{shard_id}".encode(), digest_size=IDENTITY_BYTES).digest()

    def encode(self) -> bytes:
        """As `data.json` has it."""
        fields = asdict(self)
        return json.dumps({**fields, "checksum": checksum(fields)}, indent=2).encode() + b"\n"

    @classmethod
    def decode(cls, encoded: bytes, path: Path) -> Manifest:
        """Raises DataLoss where it is damaged, StartupError where it is of a later format."""
        try:
            fields: dict[str, Any] = json.loads(encoded)
            found = fields.pop("checksum")
            whole = found == checksum(fields)
        except (ValueError, AttributeError, KeyError, TypeError):
            whole = False
        if not whole:
            raise DataLoss(f"{path} is damaged; put back the one of a backup, it never changes")
        if fields["format"] != FORMAT:
            raise StartupError(
                f"{path} is of format {fields['format']}, this version reads format {FORMAT}: use a newer one"
            )
        return cls(**fields)


class DataDirectory:
    """A directory that this process has locked; made by `open`."""

    def __init__(self, fs: FileSystem, path: Path, manifest: Manifest, lock: Lock, *, killed: bool) -> None:
        self._fs = fs
        self._lock = lock
        self.path = path
        self.manifest = manifest
        self.killed = killed
        """Whether the last one to have it locked never gave it back: it was killed, or the machine went down."""

    @classmethod
    def open(cls, fs: FileSystem, path: Path, new: Manifest, *, spread: bool = False) -> DataDirectory:
        """Locks a directory, and makes it where there is none.

        Args:
            fs: where it is.
            path: an absolute path.
            new: what it is made with where there is none.
            spread: it is the coordinator's, and its shards' directories are, or will be, on several machines.

        Raises:
            LockHeld: another process uses it; says who.
            StartupError: it is not one of ours, of a later format, or of another number of partitions.
            DataLoss: its manifest is damaged or missing.
            OSError: it cannot be read or written.
        """
        fs.make_directory(path)
        # Nothing is left behind in a directory that turns out to be somebody else's.
        _check_ours(fs, path)
        killed = _has_holder(fs, path)
        lock = fs.lock(path / LOCK, Holder.this_process().encode())
        try:
            if MANIFEST in fs.names(path):
                manifest = read_manifest(fs, path)
                _check_same(path, manifest, new)
                if not spread:
                    _check_not_spread(fs, path)
                if PLACES not in fs.names(path):
                    _check_whole(fs, path, manifest)
            else:
                manifest = new
                _make(fs, path, manifest, spread)
        except BaseException:
            lock.release()
            raise
        return cls(fs, path, manifest, lock, killed=killed)

    @classmethod
    def open_existing(cls, fs: FileSystem, path: Path) -> DataDirectory:
        """Locks a directory to look into it, or to mend it. Raises as `open` does."""
        manifest = read_manifest(fs, path)
        killed = _has_holder(fs, path)
        return cls(fs, path, manifest, fs.lock(path / LOCK, Holder.this_process().encode()), killed=killed)

    def shard_ids(self) -> list[int]:
        """The shards that there are, ascending. Raises DataLoss."""
        return shard_ids(self._fs, self.path, self.manifest)

    def shard_directory(self, shard_id: int) -> Path:
        """Where a shard's files are."""
        return shard_directory(self.path, shard_id)

    def shard_in_use(self, shard_id: int) -> str:
        """Who still has a shard's directory locked, such as a process of a service that was killed a moment ago; empty
        when nobody has."""
        if self.shard_directory(shard_id).name not in self._fs.names(self.path):
            return ""
        try:
            self._fs.lock(self.shard_directory(shard_id) / LOCK, "").release()
        except LockHeld as held:
            return Holder.describe(held.holder)
        return ""

    def epoch(self) -> int:
        """The highest epoch ever given out, 0 before the first. Raises DataLoss."""
        return EpochFile(self._fs, self.path).read()

    def write_epoch(self, epoch: int) -> None:
        """No epoch up to this one is given out any more."""
        EpochFile(self._fs, self.path).write(epoch)

    def mend_epoch(self, backup: Path) -> None:
        """Replaces a damaged epoch by one that is higher than any that was given out, and keeps the old file in
        `backup`."""
        if EPOCH in self._fs.names(self.path):
            self._fs.make_directory(backup)
            write_atomically(self._fs, backup / EPOCH, read_file(self._fs, self.path / EPOCH))
        # Epochs rise by one with each start and each shard that is lost: never once a second.
        write_atomically(self._fs, self.path / EPOCH, _epoch_sector(int(time.time())))

    def schema_text(self) -> str | None:
        """The schema last served with; None before the first."""
        if SCHEMA not in self._fs.names(self.path):
            return None
        return read_file(self._fs, self.path / SCHEMA).decode()

    def write_schema(self, text: str) -> None:
        """Remembers the schema that is served with from now on. Raises DiskFull."""
        write_schema(self._fs, self.path, text)

    def release(self) -> None:
        """Lets others use it. May be called more than once."""
        self._lock.release()


class EpochFile:
    """The highest epoch ever given out. An epoch is written here before anyone hears of it, so none is given out twice,
    whatever is killed and started again.

    It is one sector, written over in place: whole or not at all, and a full disk has room for it.
    """

    def __init__(self, fs: FileSystem, directory: Path) -> None:
        self._fs = fs
        self._path = directory / EPOCH

    def make(self) -> None:
        """Takes the sector."""
        write_atomically(self._fs, self._path, _epoch_sector(0))

    def read(self) -> int:
        """0 before the first. Raises DataLoss where it is damaged or missing."""
        try:
            epoch = json.loads(read_file(self._fs, self._path))["epoch"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            epoch = None
        if not isinstance(epoch, int):
            raise DataLoss(
                f"{self._path} is damaged or missing: write a number into it that is higher than every epoch that "
                'the service has shown in its status or its log, as {"epoch": 1000000}'
            )
        return epoch

    def write(self, epoch: int) -> None:
        """Returns when it is durable."""
        file = self._fs.open(self._path, writable=True)
        try:
            file.write(0, [_epoch_sector(epoch)])
            file.sync()
        finally:
            file.close()


def write_schema(fs: FileSystem, path: Path, text: str) -> None:
    """Remembers in a data directory the schema that is served with from now on. Raises OSError, DiskFull among them."""
    write_atomically(fs, path / SCHEMA, text.encode())


def shard_directory(path: Path, shard_id: int) -> Path:
    """Where a shard's files are below a data directory."""
    return path / f"{SHARD_PREFIX}{shard_id}"


def owners_document(fs: FileSystem, path: Path) -> Document:
    """Who owns what, as the coordinator keeps it; it holds `shards`, the shards that there are."""
    return Document(fs, path / OWNERS, "put back the one of a backup that is as old as the shards' directories")


def shard_ids(fs: FileSystem, path: Path, manifest: Manifest) -> list[int]:
    """The shards that there are, ascending. Raises DataLoss."""
    owners = owners_document(fs, path).read()
    return list(range(manifest.shards)) if owners is None else list(owners["shards"])


def read_manifest(fs: FileSystem, path: Path) -> Manifest:
    """What a directory was made with. Raises StartupError where it is none, DataLoss where the manifest is damaged or
    missing."""
    try:
        names = fs.names(path)
    except OSError as error:
        raise StartupError(f"{path} is no data directory ({error.strerror})") from None
    if MANIFEST not in names:
        if any(_is_shard(name) for name in names):
            raise _missing(path)
        raise StartupError(f"{path} is no data directory: it has no {MANIFEST}")
    return Manifest.decode(read_file(fs, path / MANIFEST), path / MANIFEST)


def _check_ours(fs: FileSystem, path: Path) -> None:
    names = fs.names(path)
    if MANIFEST in names:
        return
    shards = [name for name in names if _is_shard(name)]
    if any(fs.names(path / name) for name in shards):
        raise _missing(path)
    strange = [name for name in names if not _UNUSED.fullmatch(name) and name not in shards]
    if strange:
        raise StartupError(
            f"{path} is not empty and no data directory of this service (it holds {', '.join(strange[:3])}"
            f"{' and more' if len(strange) > 3 else ''}); give an empty or a new directory with --data-dir"
        )


def _has_holder(fs: FileSystem, path: Path) -> bool:
    """Whether the lock's file names somebody: who releases a lock takes the name away."""
    return LOCK in fs.names(path) and bool(read_file(fs, path / LOCK))


def _check_same(path: Path, manifest: Manifest, new: Manifest) -> None:
    if manifest.partition_bits != new.partition_bits:
        raise StartupError(
            f"{path} was made with {1 << manifest.partition_bits} partitions, not {1 << new.partition_bits}"
        )


def _check_whole(fs: FileSystem, path: Path, manifest: Manifest) -> None:
    names = set(fs.names(path))
    for shard_id in shard_ids(fs, path, manifest):
        directory = shard_directory(path, shard_id)
        if directory.name not in names:
            raise DataLoss(
                f"{directory} is missing; put back the one of a backup, or make an empty directory of this name "
                "to start without what it held"
            )


def _check_not_spread(fs: FileSystem, path: Path) -> None:
    if PLACES in fs.names(path):
        raise StartupError(
            f"{path} is of a service on several machines, which may have shards elsewhere; start it with deploy"
        )


def _make(fs: FileSystem, path: Path, manifest: Manifest, spread: bool) -> None:
    if spread:
        Document(fs, path / PLACES, "").write({"homes": {}})
    else:
        for shard_id in range(manifest.shards):
            fs.make_directory(shard_directory(path, shard_id))
    EpochFile(fs, path).make()
    write_atomically(fs, path / MANIFEST, manifest.encode())


def _missing(path: Path) -> DataLoss:
    return DataLoss(f"{path / MANIFEST} is missing; put back the one of a backup, it never changes")


def _is_shard(name: str) -> bool:
    return name.removeprefix(SHARD_PREFIX).isdigit() and name.startswith(SHARD_PREFIX)


def _epoch_sector(epoch: int) -> bytes:
    return json.dumps({"epoch": epoch}).encode().ljust(SECTOR_BYTES - 1) + b"\n"


def _utc_now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
