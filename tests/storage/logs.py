"""Logs for tests: made in memory, taken apart into the bytes of their segments, and read back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from profile_service.storage.crashing_fs import CrashingFileSystem
from profile_service.storage.fs import FileSystem
from profile_service.storage.wal import LogOptions, WriteAheadLog

T = TypeVar("T")

DIRECTORY = Path("/data/log")
BACKUP = Path("/data/backup")
IDENTITY = bytes(range(16))
SMALL = LogOptions(segment_bytes=4096)

Entry = tuple[int, bytes]
"""A record's type and payload."""


async def inline(work: Callable[[], T]) -> T:
    """A Runner that runs work where it is asked to."""
    return work()


def run(work: Awaitable[T]) -> T:
    """Runs what a test does in a loop of its own."""

    async def main() -> T:
        return await work

    return asyncio.run(main())


def open_log(fs: FileSystem, options: LogOptions = SMALL) -> WriteAheadLog:
    return WriteAheadLog.open(fs, DIRECTORY, IDENTITY, options, inline)


async def write(log: WriteAheadLog, entries: Sequence[Entry]) -> list[int]:
    """Appends a group and syncs it; returns the positions."""
    await log.reserve(sum(len(payload) for _, payload in entries), len(entries))
    positions = [log.append(record_type, [payload]) for record_type, payload in entries]
    await log.sync()
    return positions


def read(log: WriteAheadLog, position: int | None = None) -> list[Entry]:
    return [(record.type, bytes(record.payload)) for record in log.records(log.start if position is None else position)]


def some_entries(rng: random.Random, count: int, max_bytes: int = 300) -> list[Entry]:
    return [(rng.randint(1, 252), rng.randbytes(rng.randint(0, max_bytes))) for _ in range(count)]


def make_log(
    groups: Sequence[Sequence[Entry]], *, close: bool = False, options: LogOptions = SMALL
) -> dict[str, bytes]:
    """The segments of a log of these groups, by name; without `close`, as the death of the process leaves it."""

    async def main(fs: CrashingFileSystem) -> None:
        log = open_log(fs, options)
        for group in groups:
            await write(log, group)
        if close:
            await log.close()

    fs = CrashingFileSystem()
    asyncio.run(main(fs))
    return {name: data for name, data in contents(fs).items() if name.endswith(".log")}


def contents(fs: FileSystem, directory: Path = DIRECTORY) -> dict[str, bytes]:
    return {name: bytes(fs.map(directory / name)) for name in fs.names(directory)}


def disk_of(segments: dict[str, bytes]) -> CrashingFileSystem:
    """A file system with a log of these files."""
    fs = CrashingFileSystem()
    fs.make_directory(DIRECTORY)
    for name, data in segments.items():
        file = fs.create(DIRECTORY / name)
        file.write(0, [data])
        file.sync()
    fs.sync_directory(DIRECTORY)
    return fs
