"""Whatever crashes, whenever: what was synced is there, in order and whole; of what was not, the first few or nothing.

Each seed is a story of several lives of one log on a disk that crashes, or whose process is killed, also while the log
is opened and cleans its tail. `RUNS=5000 pytest tests/storage/test_log_crashes.py` tells more of them; `SEED=17` one.
"""

from __future__ import annotations

import asyncio
import os
import random
from contextlib import suppress
from typing import get_args

import pytest

from profile_service.storage.crashing_fs import Crashed, CrashingFileSystem
from profile_service.storage.fs import DiskFull
from profile_service.storage.salvage import inspect_log
from profile_service.storage.wal import LogOptions, SyncMode, WriteAheadLog
from tests.storage.logs import DIRECTORY, Entry, open_log, read

RUNS = int(os.environ.get("RUNS", "400"))
SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else range(RUNS)
SHARES = 8


class Story:
    """A log's lives, and what it owes.

    Attributes:
        kept: entries that must be found from now on, from the log's start on.
        perhaps: entries behind them that may be found, the first few of them.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.fs = CrashingFileSystem(seed)
        self.kept: list[tuple[int, Entry]] = []
        self.perhaps: list[tuple[int, Entry]] = []
        self.start = 0

    async def tell(self) -> None:
        for _ in range(self.rng.randint(2, 6)):
            self.fs.capacity_bytes = self.rng.choice([None, None, 1 << 17, 1 << 15])
            if self.rng.random() < 0.85:
                self.fs.fail_after(self.rng.choice([self.rng.randint(1, 12), self.rng.randint(1, 80)]))
            if self.rng.random() < 0.15:
                self.fs.fail_once(self.rng.choice(["write", "sync", "create"]), self.rng.randint(0, 20))
            with suppress(Crashed, OSError):
                await self.live()
            # Work that still goes on in the background is the old process's.
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            self.fs = self.fs.crash() if self.rng.random() < 0.7 else self.fs.kill()
        self.fs.capacity_bytes = None
        self.open(SMALL_OPTIONS)
        self.fs = self.fs.crash()
        log = self.open(SMALL_OPTIONS)
        assert log.torn_bytes == 0, "what is decided once stays decided"
        assert all(finding.whole for finding in inspect_log(self.fs, DIRECTORY))

    def open(self, options: LogOptions) -> WriteAheadLog:
        log = open_log(self.fs, options)
        found = [(record.position, (record.type, bytes(record.payload))) for record in log.records(log.start)]
        assert log.durable_position == log.position
        owed = [entry for entry in self.kept if entry[0] >= log.start]
        assert log.start <= self.start, "trimmed more than was asked for"
        held = [entry for entry in self.kept + self.perhaps if entry[0] >= log.start]
        assert found == held[: len(found)], "not what was written"
        assert len(found) >= len(owed), "lost what was synced"
        self.kept, self.perhaps = found, []
        return log

    async def live(self) -> None:
        mode: SyncMode = self.rng.choice(get_args(SyncMode) if self.rng.random() < 0.4 else ["always"])
        log = self.open(LogOptions(self.rng.choice([4096, 4096, 8192, 65536]), mode, sync_interval_s=0.0001))
        for _ in range(self.rng.randint(0, 30)):
            group = [self.entry() for _ in range(self.rng.randint(1, 4))]
            try:
                await log.reserve(sum(len(payload) for _, payload in group), len(group))
            except DiskFull:
                self.start = log.position
                await log.trim(log.position)
                self.trimmed(log.start)
                continue
            for record_type, payload in group:
                cut = self.rng.randint(0, len(payload))
                position = log.append(record_type, [payload[:cut], payload[cut:]])
                self.perhaps.append((position, (record_type, payload)))
            if self.rng.random() < 0.8:
                await log.sync()
                self.settle(log.durable_position)
                if mode == "always":
                    assert not self.perhaps
            if self.rng.random() < 0.3:
                await asyncio.sleep(self.rng.choice([0, 0, 0.0003]))
            if self.rng.random() < 0.1:
                position = self.rng.choice([log.start, log.durable_position, log.position])
                self.start = max(self.start, position)
                await log.trim(position)
                self.trimmed(log.start)
        if self.rng.random() < 0.5:
            await log.close()
            self.settle(log.position)

    def entry(self) -> Entry:
        size = self.rng.choice([0, 1, 7, 8, 100, 600, 3000])
        payload = bytes(size) if self.rng.random() < 0.2 else self.rng.randbytes(size)
        return self.rng.randint(1, 252), payload

    def settle(self, durable: int) -> None:
        while self.perhaps and self.perhaps[0][0] < durable:
            self.kept.append(self.perhaps.pop(0))

    def trimmed(self, start: int) -> None:
        self.start = max(self.start, start)
        self.kept = [entry for entry in self.kept if entry[0] >= start]


SMALL_OPTIONS = LogOptions(segment_bytes=4096)


@pytest.mark.parametrize("share", range(SHARES))
def test_what_is_synced_survives_every_crash(share: int) -> None:
    for seed in SEEDS[share::SHARES]:
        try:
            asyncio.run(Story(seed).tell())
        except BaseException:
            print(f"the same again: SEED={seed} pytest {__file__}")
            raise


def test_a_crash_in_the_cleaning_of_a_tail_at_every_operation() -> None:
    """Opening is itself cut short at each of its operations, several times in a row."""
    for seed in range(60):
        rng = random.Random(seed)
        entries = [(1, rng.randbytes(rng.choice([20, 700, 3000]))) for _ in range(12)]

        async def write(fs: CrashingFileSystem, entries: list[Entry] = entries) -> None:
            log = open_log(fs, LogOptions(segment_bytes=65536, sync_mode="never"))
            await log.reserve(100_000, 20)
            for number, entry in enumerate(entries):
                log.append(entry[0], [entry[1]])
                if number % 3 == 0:
                    await log.sync()

        fs = CrashingFileSystem(seed)
        asyncio.run(write(fs))
        fs = fs.crash()
        found: list[Entry] | None = None
        for operation in (*range(1, 8), 1000):
            fs.fail_after(operation)
            try:
                found = read(open_log(fs))
            except Crashed:
                pass
            else:
                assert found == entries[: len(found)]
            fs = fs.crash()
        assert read(open_log(fs)) == found
