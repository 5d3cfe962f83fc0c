"""Directories of the moment: private, short, and removed once nobody lives in them, and nothing else is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from profile_service.cluster import scratch
from profile_service.cluster.scratch import LOCK, PREFIX, ScratchDirectory


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(scratch, "LONGEST_PARENT", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def age(directory: Path) -> None:
    os.utime(directory, (0, 0))


def abandon(directory: ScratchDirectory) -> Path:
    """As a kill of its process does."""
    os.close(directory._lock)
    directory._lock = -1
    return directory.path


def test_what_a_killed_process_left_is_removed_and_what_lives_stays(parent: Path) -> None:
    living, old, young = ScratchDirectory(), ScratchDirectory(), ScratchDirectory()
    abandoned = abandon(old)
    (abandoned / "session").mkdir()
    abandon(young)
    foreign = parent / "something-else"
    foreign.mkdir()
    for directory in (living.path, abandoned, foreign):
        age(directory)
    last = ScratchDirectory()
    assert sorted(parent.iterdir()) == sorted([living.path, young.path, foreign, last.path])
    assert stat.S_IMODE(last.path.stat().st_mode) == 0o700
    for each in (living, last, last):
        each.remove()
    assert sorted(parent.iterdir()) == sorted([young.path, foreign])


def test_a_directory_that_only_has_such_a_name_is_never_removed(parent: Path) -> None:
    kept = parent / f"{PREFIX}data"
    kept.mkdir()
    (kept / "LOCK").touch()
    age(kept)
    ScratchDirectory().remove()
    assert list(parent.iterdir()) == [kept]
    assert not (kept / LOCK).exists()


def test_a_long_path_is_not_for_sockets(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "LONGEST_PARENT", 3)
    directory = ScratchDirectory()
    assert directory.path.parent == Path("/tmp")  # noqa: S108
    directory.remove()
    assert not directory.path.exists()
