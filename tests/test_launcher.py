"""What keeps a service from starting is said before any process starts, and what it took is given back."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from profile_service.cluster.coordinator import Standing
from profile_service.cluster.embedded_ray import EmbeddedRay
from profile_service.config import Settings, Storage
from profile_service.errors import DataLoss, SchemaChangeRefused, StartupError
from profile_service.launcher import MOST_DEATHS, Service, _check_standings, describe_start
from profile_service.storage.data_directory import LOCK, MANIFEST, DataDirectory, Manifest
from profile_service.storage.fs import RealFileSystem

SCHEMA = """\
name: test
events: {view: {weight: 1}}
half_life: none
features:
  views: {kind: counter}
  items: {kind: recent, attribute: item, size: 3}
"""


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets as far as starting Ray was refused too late."""

    def start(self: EmbeddedRay, workers: int) -> None:
        raise StartupError("Ray would start now")

    monkeypatch.setattr(EmbeddedRay, "__init__", start)
    monkeypatch.setattr("profile_service.launcher._warm", lambda schema: None)


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.yaml"
    path.write_text(SCHEMA)
    return path


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A directory of two shards that was served with SCHEMA."""
    path = tmp_path / "data"
    directory = DataDirectory.open(RealFileSystem(), path, Manifest.new(8, 2))
    directory.write_schema(SCHEMA)
    directory.release()
    return path


def settings(
    data_dir: Path | None, schema: Path, *, shards: int | None = None, reset: tuple[str, ...] = ()
) -> Settings:
    return Settings(
        schema_path=schema,
        storage=Storage(data_dir=data_dir, reset_features=reset),
        shards=shards,
        grpc_port=0,
        http_port=0,
    )


def assert_free(data_dir: Path) -> None:
    DataDirectory.open_existing(RealFileSystem(), data_dir).release()


def test_a_directory_in_use_is_refused_and_its_user_named(data_dir: Path, schema: Path) -> None:
    other = DataDirectory.open_existing(RealFileSystem(), data_dir)
    with pytest.raises(StartupError, match=r"is in use by process \d+ on .* since .*--data-dir"):
        Service.start(settings(data_dir, schema))
    other.release()
    with pytest.raises(StartupError, match="Ray would start now"):
        Service.start(settings(data_dir, schema))
    assert_free(data_dir)


def test_a_directory_opens_whatever_the_number_of_shards(data_dir: Path, schema: Path) -> None:
    for shards in (None, 1, 2, 3):
        with pytest.raises(StartupError, match="Ray would start now"):
            Service.start(settings(data_dir, schema, shards=shards))
    assert_free(data_dir)


def test_a_schema_that_the_profiles_cannot_follow_is_refused_unless_told_to_reset(data_dir: Path, schema: Path) -> None:
    schema.write_text(SCHEMA.replace("{kind: counter}", "{kind: distinct, attribute: item}"))
    with pytest.raises(SchemaChangeRefused, match="--reset-feature views"):
        Service.start(settings(data_dir, schema))
    with pytest.raises(StartupError, match="Ray would start now"):
        Service.start(settings(data_dir, schema, reset=("views",)))
    with pytest.raises(StartupError, match="--reset-feature vews"):
        Service.start(settings(data_dir, schema, reset=("vews",)))
    # One that another version wrote is for the shards to judge.
    (data_dir / "schema.yaml").write_text("name: [")
    with pytest.raises(StartupError, match="Ray would start now"):
        Service.start(settings(data_dir, schema))
    assert_free(data_dir)


def test_a_damaged_manifest_or_epoch_is_refused(data_dir: Path, schema: Path) -> None:
    whole = (data_dir / MANIFEST).read_bytes()
    (data_dir / MANIFEST).write_bytes(whole.replace(b'"shards": 2', b'"shards": 3'))
    with pytest.raises(DataLoss, match=r"data\.json is damaged"):
        Service.start(settings(data_dir, schema))
    (data_dir / MANIFEST).write_bytes(whole)
    (data_dir / "epoch.json").write_bytes(b"")
    with pytest.raises(DataLoss, match=r"epoch\.json is damaged"):
        Service.start(settings(data_dir, schema))
    assert_free(data_dir)


def test_every_fault_of_the_settings_is_said_together(schema: Path) -> None:
    storage = Storage(segment_bytes=1, snapshot_log_bytes=1, snapshot_interval_s=0)
    with pytest.raises(StartupError, match=r"--segment-bytes.*; --snapshot-log-bytes.*; --snapshot-interval-s"):
        Service.start(Settings(schema_path=schema, storage=storage))


def test_without_a_directory_one_is_made_and_taken_away_again(
    schema: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr("profile_service.cluster.scratch.LONGEST_PARENT", 1000)
    seen: list[Path] = []
    monkeypatch.setattr(
        "profile_service.launcher._wait_for_leftovers", lambda directory, *_: seen.append(directory.path)
    )
    with pytest.raises(StartupError, match="Ray would start now"):
        Service.start(settings(None, schema))
    assert len(seen) == 1
    assert seen[0].is_relative_to(scratch)
    assert list(scratch.iterdir()) == []


def test_processes_of_a_killed_service_are_waited_for_and_so_are_its_ports(data_dir: Path, schema: Path) -> None:
    (data_dir / LOCK).write_text('{"pid": 1, "host": "here", "started": "before"}')
    lock = RealFileSystem().lock(data_dir / "shard-1" / LOCK, "")
    taken = socket.create_server(("127.0.0.1", 0))
    told: list[str] = []
    waiting = threading.Event()

    def hear(text: str) -> None:
        told.append(text)
        waiting.set()

    def end() -> None:
        waiting.wait()
        lock.release()
        taken.close()

    ending = threading.Thread(target=end)
    ending.start()
    before = Settings(
        schema_path=schema, storage=Storage(data_dir=data_dir), grpc_port=taken.getsockname()[1], http_port=0
    )
    with pytest.raises(StartupError, match="Ray would start now"):
        Service.start(before, hear)
    ending.join()
    assert "which had shard 1, to end" in told[0]


def test_a_shard_that_cannot_recover_or_dies_again_and_again_ends_the_start() -> None:
    well = {0: Standing("serving"), 1: Standing("recovering", 0.5)}
    _check_standings(well, {1: MOST_DEATHS - 1})
    with pytest.raises(StartupError, match="shard 1 cannot start: its log is damaged"):
        _check_standings({**well, 1: Standing("failed", message="its log is damaged")}, {})
    with pytest.raises(StartupError, match="shard 1 has died 3 times while it recovered, the last time with: killed"):
        _check_standings({**well, 1: Standing("away", message="killed")}, {1: MOST_DEATHS})


def test_the_terminal_shows_how_far_the_shards_are() -> None:
    starting = Standing("starting")
    assert describe_start({0: starting, 1: starting}) == "2 of 2 shards are starting"
    assert describe_start({0: Standing("serving"), 1: Standing("recovering", 0.432)}) == "shard 1 recovers: 43%"
    both = {0: Standing("recovering", 0.5, "replaying the log"), 1: Standing("away")}
    assert describe_start(both) == "shard 0 recovers: 50% (replaying the log), 1 of 2 shards is starting"
    assert describe_start({0: Standing("serving")}) == "waiting for the frontend"
