"""`inspect` on data directories that are whole, damaged and in use. No service runs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from profile_service.storage.data_directory import EPOCH, MANIFEST, DataDirectory, Manifest
from profile_service.storage.fs import RealFileSystem
from tests.e2e.serving import run
from tests.shard import shards
from tests.shard.test_shard import SCHEMA, part

SHARDS = 2
EVENTS = 30


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Two shards that have counted events, snapshot and log; nobody uses it."""
    directory = DataDirectory.open(RealFileSystem(), tmp_path / "data", Manifest.new(8, SHARDS))

    async def fill(shard_id: int) -> None:
        async with shards.running(
            SCHEMA,
            RealFileSystem(),
            directory=directory.shard_directory(shard_id),
            identity=directory.manifest.identity(shard_id),
        ) as shard:
            for number in range(EVENTS):
                await shard.submit([part([f"u{number}"])], 100, 7)
                if number == EVENTS // 2:
                    await shard.create_snapshot()

    for shard_id in range(SHARDS):
        asyncio.run(fill(shard_id))
    directory.write_schema(SCHEMA.text)
    directory.release()
    return tmp_path / "data"


def facts(data_dir: Path, *flags: str, status: int = 0) -> dict[str, Any]:
    done = run("inspect", str(data_dir), "--json", *flags)
    assert done.returncode == status, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def the_file(directory: Path) -> Path:
    (found,) = directory.iterdir()
    return found


def test_a_whole_directory_is_shown_and_left_as_it_is(data_dir: Path) -> None:
    def bytes_of_all() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in data_dir.rglob("*") if path.is_file()}

    before = bytes_of_all()
    found = facts(data_dir)
    assert (found["shards"], found["partitions"], found["starts"], found["backup"]) == (SHARDS, 256, True, None)
    for shard in found["shardFindings"]:
        assert shard["damages"] == shard["refusals"] == shard["losses"] == []
        assert [segment["whole"] for segment in shard["segments"]] == [True]
        assert [snapshot["whole"] for snapshot in shard["snapshots"]] == [True]
        assert 0 < shard["snapshots"][0]["replayPosition"] < shard["segments"][0]["endPosition"]
    shown = run("inspect", str(data_dir), "--salvage")
    assert shown.returncode == 0
    assert "nothing is damaged" in shown.stdout
    assert found["id"] in shown.stdout
    assert bytes_of_all() == before


def test_damage_is_named_what_a_salvage_gives_up_is_said_before_and_after(data_dir: Path) -> None:
    segment = the_file(data_dir / "shard-1" / "log")
    end = facts(data_dir)["shardFindings"][1]["segments"][0]["endPosition"]
    flip(segment, end - 300)
    damaged = segment.read_bytes()

    shown = run("inspect", str(data_dir))
    assert shown.returncode == 1
    assert str(segment) in shown.stdout
    assert "the service does not start" in shown.stdout
    assert "with --salvage it does; lost is then" in shown.stdout
    assert "shard 1: events logged from position" in shown.stdout
    assert segment.read_bytes() == damaged

    found = facts(data_dir, "--salvage")
    assert found["shardFindings"][0]["losses"] == []
    assert len(found["shardFindings"][1]["losses"]) == 1
    assert (Path(found["backup"]) / "shard-1" / "log" / segment.name).read_bytes() == damaged

    after = facts(data_dir)
    assert after["starts"]
    assert after["shardFindings"][1]["segments"][0]["holeBytes"] > 0

    async def count() -> int:
        directory = DataDirectory.open_existing(RealFileSystem(), data_dir)
        found = await shards.recovered(
            RealFileSystem(),
            SCHEMA,
            directory=directory.shard_directory(1),
            identity=directory.manifest.identity(1),
        )
        await found.log.close()
        found.lock.release()
        directory.release()
        return found.state.event_count

    assert asyncio.run(count()) == EVENTS - 1


def test_a_damaged_epoch_is_replaced_by_a_higher_one(data_dir: Path) -> None:
    flip(data_dir / EPOCH, 0)
    found = facts(data_dir, status=1)
    assert not found["starts"]
    assert "epoch.json is damaged" in found["damages"][0]
    backup = Path(facts(data_dir, "--salvage")["backup"])
    assert (backup / EPOCH).is_file()
    assert json.loads((data_dir / EPOCH).read_bytes())["epoch"] > 10**9
    assert facts(data_dir)["starts"]


def test_what_is_no_data_directory_or_cannot_be_mended_is_said(data_dir: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        done = run("inspect", str(path))
        assert done.returncode == 1
        assert f"{path} is no data directory" in done.stderr
        assert "Traceback" not in done.stderr
    flip(data_dir / MANIFEST, 20)
    done = run("inspect", str(data_dir), "--salvage")
    assert done.returncode == 1
    assert "data.json is damaged; put back the one of a backup" in done.stderr


def test_a_directory_in_use_is_left_alone(data_dir: Path) -> None:
    directory = DataDirectory.open_existing(RealFileSystem(), data_dir)
    try:
        for flags in ([], ["--salvage"]):
            done = run("inspect", str(data_dir), *flags)
            assert done.returncode == 1
            assert "is in use by process" in done.stderr
    finally:
        directory.release()
