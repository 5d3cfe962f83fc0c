"""What is brought in before the code is loaded is used, and nothing depends on it."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path
from random import Random

import numpy as np

from profile_service.config import Capacity
from profile_service.domain.schema import load_schema
from profile_service.shard.files import LOG_DIRECTORY, SNAPSHOT_DIRECTORY
from profile_service.shard.preload import Preload, Zeros
from profile_service.shard.state import ShardState


def test_the_rows_lie_in_what_was_brought_in(tmp_path: Path) -> None:
    for name in (SNAPSHOT_DIRECTORY, LOG_DIRECTORY):
        (tmp_path / name).mkdir()
    (tmp_path / SNAPSHOT_DIRECTORY / "0000000001.snapshot").write_bytes(bytes(100_000))
    (tmp_path / LOG_DIRECTORY / "00000000000000000000.log").write_bytes(bytes(100))
    preload = Preload(tmp_path)
    space = preload.space()
    assert space is not None
    assert bytes(space.region[:100_000]) == bytes(100_000)
    state = ShardState(load_schema("marketplace"), partitions=4, capacity=Capacity(), space=space)
    state.table.claim_rows()
    state.table.rows[0, 0] = 7
    assert space.region[0] == 7
    assert preload.space() is None, "it is one state's alone"


def test_a_table_that_needs_more_takes_memory_of_its_own(tmp_path: Path) -> None:
    (tmp_path / SNAPSHOT_DIRECTORY).mkdir()
    (tmp_path / SNAPSHOT_DIRECTORY / "0000000001.snapshot").write_bytes(bytes(10))
    space = Preload(tmp_path).space()
    assert space is not None
    most_users = len(space.region) // 512
    state = ShardState(
        load_schema("marketplace"), partitions=4, capacity=Capacity(), most_users=most_users, space=space
    )
    assert state.table.rows.shape[0] == most_users
    state.table.rows[0] = np.uint8(7)
    assert space.region[0] == 0


def test_what_is_loaded_meanwhile_stays(tmp_path: Path, seed: int) -> None:
    (tmp_path / SNAPSHOT_DIRECTORY).mkdir()
    random = Random(seed)
    size = 64 << 20
    with (tmp_path / SNAPSHOT_DIRECTORY / "0000000001.snapshot").open("wb") as file:
        file.truncate(size)
    for _ in range(5):
        space = Preload(tmp_path).space()
        assert space is not None
        loaded = np.frombuffer(space.region, np.uint8, size)
        stop = 0
        while stop < size:
            start, stop = stop, min(stop + random.randrange(1, 4 << 20), size)
            space.claim(stop)
            loaded[start:stop] = 7
        for thread in threading.enumerate():
            if thread.name == "preload":
                thread.join()
        assert (loaded == 7).all()


def test_pages_are_brought_in_as_far_as_the_snapshot_reaches_and_nobody_claims_them(tmp_path: Path) -> None:
    (tmp_path / SNAPSHOT_DIRECTORY).mkdir()
    size = 32 << 20
    with (tmp_path / SNAPSHOT_DIRECTORY / "0000000001.snapshot").open("wb") as file:
        file.truncate(size)
    before = resident_bytes()
    space = Preload(tmp_path).space()
    assert space is not None
    for thread in threading.enumerate():
        if thread.name == "preload":
            thread.join()
    assert resident_bytes() - before >= size // 2
    claimed = Zeros(mmap.mmap(-1, size))
    claimed.claim(size)
    claimed.region[:] = b"7" * size
    claimed.take(next(tmp_path.rglob("*.snapshot")))
    assert claimed.region[:] == b"7" * size


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_without_a_snapshot_nothing_is_brought_in(tmp_path: Path) -> None:
    assert Preload(tmp_path).space() is None
    assert Preload(tmp_path / "not there").space() is None
