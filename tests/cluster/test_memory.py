"""What outlasts a coordinator is whole or refused, and one coordinator at a time has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from profile_service.cluster.leases import Holder
from profile_service.cluster.memory import CoordinatorMemory
from profile_service.errors import DataLoss
from profile_service.storage.data_directory import LEASES, DataDirectory, Manifest
from profile_service.storage.fs import LockHeld, RealFileSystem
from profile_service.storage.redis_client import StoreFull


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    DataDirectory.open(RealFileSystem(), tmp_path / "data", Manifest.new(8, 2)).release()
    return tmp_path / "data"


async def test_the_next_coordinator_knows_epoch_and_holders_and_waits_for_the_one_before(data_dir: Path) -> None:
    memory = CoordinatorMemory(RealFileSystem(), data_dir)
    assert memory.last_epoch() == 0
    assert memory.last_holders() == {}
    await memory.epoch(7)
    holders = {0: Holder("one", "boot:1:2"), 11: Holder("other", "")}
    await memory.holders(holders)
    with pytest.raises(LockHeld):
        CoordinatorMemory(RealFileSystem(), data_dir)
    memory.release()
    again = CoordinatorMemory(RealFileSystem(), data_dir)
    assert (again.last_epoch(), again.last_holders()) == (7, holders)
    again.release()
    # The directory is still taken for one of ours.
    DataDirectory.open(RealFileSystem(), data_dir, Manifest.new(8, 2)).release()


async def test_damaged_holders_are_said_and_not_guessed(data_dir: Path) -> None:
    memory = CoordinatorMemory(RealFileSystem(), data_dir)
    await memory.holders({0: Holder("one", "boot:1:2")})
    path = data_dir / LEASES
    whole = json.loads(path.read_text())
    whole["holders"]["0"][0] = "another"
    for content in (json.dumps(whole), "", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(DataLoss, match=r"leases\.json is damaged"):
            memory.last_holders()
    memory.release()


class FullStore:
    """A store that has no room."""

    async def raise_epoch(self, epoch: int) -> None:
        raise StoreFull("no memory left")


async def test_an_epoch_that_the_store_has_no_room_for_is_an_error_of_the_memory(data_dir: Path) -> None:
    memory = CoordinatorMemory(RealFileSystem(), data_dir, FullStore())  # type: ignore[arg-type]
    with pytest.raises(OSError, match="no memory left"):
        await memory.epoch(3)
    # Whoever goes on by it goes on from there.
    assert memory.last_epoch() == 3
    memory.release()
