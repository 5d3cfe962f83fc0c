"""A start that finds all kernels compiled does not load them to find out; and one that cannot be sure does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from profile_service import kernel_cache


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a kernel that numba has kept."""
    (tmp_path / "domain" / "__pycache__").mkdir(parents=True)
    (tmp_path / "domain" / "kernels.py").write_text("one = 1\n")
    (tmp_path / "domain" / "__pycache__" / "kernels.find-1.py311.1.nbc").write_bytes(b"code")
    monkeypatch.setattr(kernel_cache, "PACKAGE", tmp_path)
    return tmp_path


def test_what_was_compiled_is_known_for_its_schema_and_store_only(package: Path) -> None:
    assert not kernel_cache.is_complete("a", is_local=True)
    kernel_cache.note_complete("a", is_local=True)
    assert kernel_cache.is_complete("a", is_local=True)
    assert not kernel_cache.is_complete("b", is_local=True)
    assert not kernel_cache.is_complete("a", is_local=False)


def test_a_changed_source_or_another_numba_or_processor_is_compiled_for(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_cache.note_complete("a", is_local=True)
    with monkeypatch.context() as patched:
        patched.setattr("importlib.metadata.version", lambda name: "99")
        assert not kernel_cache.is_complete("a", is_local=True)
    with monkeypatch.context() as patched:
        patched.setattr(kernel_cache, "_processor", lambda: "another")
        assert not kernel_cache.is_complete("a", is_local=True)
    assert kernel_cache.is_complete("a", is_local=True)
    source = package / "domain" / "kernels.py"
    os.utime(source, ns=(1, 1))
    assert not kernel_cache.is_complete("a", is_local=True)


def test_what_numba_kept_and_is_gone_is_missed(package: Path) -> None:
    kernel_cache.note_complete("a", is_local=True)
    shutil.rmtree(package / "domain" / "__pycache__")
    assert not kernel_cache.is_complete("a", is_local=True)


def test_a_damaged_stamp_and_a_directory_that_takes_none_say_nothing(package: Path) -> None:
    kernel_cache.note_complete("a", is_local=True)
    (stamp,) = (package / "__pycache__").glob("*.nbs")
    stamp.write_text("many")
    assert not kernel_cache.is_complete("a", is_local=True)
    shutil.rmtree(package / "__pycache__")
    (package / "__pycache__").write_text("not a directory")
    kernel_cache.note_complete("a", is_local=True)
    assert not kernel_cache.is_complete("a", is_local=True)
