"""The directories of embedded Rays: private, short, and removed once nobody lives in them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from profile_service.cluster import embedded_ray


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(embedded_ray, "LONGEST_DIRECTORY", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def age(directory: Path) -> None:
    os.utime(directory, (0, 0))


def test_what_a_killed_process_left_is_removed_and_what_lives_stays(parent: Path) -> None:
    living, lock = embedded_ray._make_directory()
    abandoned, other_lock = embedded_ray._make_directory()
    (abandoned / "session").mkdir()
    os.close(other_lock)
    young, young_lock = embedded_ray._make_directory()
    os.close(young_lock)
    foreign = parent / "something-else"
    foreign.mkdir()
    for directory in (living, abandoned, foreign):
        age(directory)
    last, last_lock = embedded_ray._make_directory()
    assert sorted(parent.iterdir()) == sorted([living, young, foreign, last])
    assert stat.S_IMODE(last.stat().st_mode) == 0o700
    for handle in (lock, last_lock):
        os.close(handle)


def test_a_long_path_is_not_for_sockets(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_ray, "LONGEST_DIRECTORY", 3)
    directory, lock = embedded_ray._make_directory()
    assert directory.parent == Path("/tmp")  # noqa: S108
    directory.joinpath("lock").unlink()
    directory.rmdir()
    os.close(lock)
