"""What a node says of itself: a name that goes with its data, ports that stay, and plainly why it cannot take part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from profile_service.cluster.survey import (
    Survey,
    expand,
    make_shard_directory,
    prepare_head,
    remove_shard_directory,
    survey,
)
from profile_service.config import LOCAL, Settings, Storage
from profile_service.errors import StartupError
from profile_service.storage.data_directory import LOCK, NODE, PLACES, SCHEMA, STORE, DataDirectory, Manifest
from profile_service.storage.fs import RealFileSystem

MANIFEST = Manifest.new(8, 2)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(storage=Storage(data_dir=tmp_path / "data"), grpc_port=0, http_port=0)


def look(settings: Settings, manifest: Manifest = MANIFEST) -> Survey:
    return survey(settings, manifest, "127.0.0.1")


def test_a_node_keeps_its_name_and_its_ports_and_shows_its_shards(settings: Settings, tmp_path: Path) -> None:
    first = look(settings)
    assert not first.fault
    assert first.grpc_port
    assert first.grpc_port != first.http_port
    assert first.shards == frozenset()
    make_shard_directory(first.data_dir, 7)
    make_shard_directory(first.data_dir, 7)
    assert look(settings) == replace(first, shards=frozenset({7}))
    # The data on another disk is the same node.
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    moved = look(replace(settings, storage=Storage(data_dir=tmp_path / "elsewhere")))
    assert (moved.name, moved.shards) == (first.name, frozenset({7}))
    assert look(settings).name != first.name
    remove_shard_directory(moved.data_dir, 7)
    remove_shard_directory(moved.data_dir, 7)
    assert not look(replace(settings, storage=Storage(data_dir=tmp_path / "elsewhere"))).shards


def test_given_ports_are_taken(settings: Settings) -> None:
    look(settings)
    found = look(replace(settings, grpc_port=4711, http_port=4712))
    assert (found.grpc_port, found.http_port) == (4711, 4712)


def test_data_of_another_service_or_of_none_is_left_alone(settings: Settings, tmp_path: Path) -> None:
    look(settings)
    assert "another service" in look(settings, Manifest.new(8, 2)).fault
    (tmp_path / "data" / NODE).unlink()
    make_shard_directory(tmp_path / "data", 0)
    assert "does not say of which service" in look(settings).fault
    assert not (tmp_path / "data" / NODE).exists()


def test_a_directory_that_cannot_be_used_is_said(settings: Settings, tmp_path: Path) -> None:
    look(settings)
    whole = (tmp_path / "data" / NODE).read_text()
    (tmp_path / "data" / NODE).write_text(whole.replace('"grpc_port": ', '"grpc_port": 1'))
    assert "node.json is damaged" in look(settings).fault
    (tmp_path / "file").write_text("")
    assert "cannot be used" in look(replace(settings, storage=Storage(data_dir=tmp_path / "file"))).fault


def test_a_directory_may_be_named_by_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("NODE_NUMBER", "3")
    assert expand(Path("~/data-$NODE_NUMBER")) == Path("/home/someone/data-3")
    monkeypatch.delenv("NODE_NUMBER")
    with pytest.raises(StartupError, match="not set on this node"):
        expand(Path("~/data-$NODE_NUMBER"))


def test_the_head_gets_a_directory_whose_shards_are_elsewhere(settings: Settings, tmp_path: Path) -> None:
    manifest, served = prepare_head(settings, 3, LOCAL)
    assert (manifest.shards, served) == (3, None)
    path = tmp_path / "data"
    assert not list(path.glob("shard-*"))
    assert (path / PLACES).exists()
    (path / SCHEMA).write_text("name: last\n")
    # It is found again, however many shards are wanted now.
    assert prepare_head(settings, 5, LOCAL) == (manifest, "name: last\n")
    assert not look(settings, manifest).fault
    with pytest.raises(StartupError, match="start it with deploy"):
        DataDirectory.open(RealFileSystem(), path, Manifest.new(8, 3))


def test_the_head_takes_over_what_was_served_on_one_machine(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "data"
    served = DataDirectory.open(RealFileSystem(), path, Manifest.new(8, 2))
    with pytest.raises(StartupError, match="is held by another process"):
        prepare_head(settings, 2, LOCAL)
    served.release()
    manifest, _ = prepare_head(settings, 4, LOCAL)
    assert manifest == served.manifest
    assert look(settings, manifest).shards == frozenset({0, 1})
    assert not (path / LOCK).read_bytes()


def test_a_service_whose_profiles_are_in_a_store_does_not_start_without_it(settings: Settings, tmp_path: Path) -> None:
    manifest, _ = prepare_head(settings, 3, "redis://cache:6379/0")
    assert prepare_head(settings, 3, "redis://cache:6379/0")[0] == manifest
    for other in (LOCAL, "redis://cache:6379/1"):
        with pytest.raises(StartupError, match="are in redis://cache:6379/0: give that with --store"):
            prepare_head(settings, 3, other)
    (tmp_path / "data" / STORE).unlink()
    # And not the other way round: it would start empty beside what is in its directories.
    with pytest.raises(StartupError, match="in its data directories"):
        prepare_head(settings, 3, "redis://cache:6379/0")
    assert prepare_head(settings, 3, LOCAL)[0] == manifest
