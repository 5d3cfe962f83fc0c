"""Logs written by earlier versions: they must load for ever.

`golden/log-v1` was written by `python -m tests.storage.test_golden_log DIRECTORY`. A change of the format gets a
directory of its own beside it; this one stays.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from crc32c import crc32c

from profile_service.errors import StartupError
from profile_service.storage.crashing_fs import CrashingFileSystem
from profile_service.storage.fs import RealFileSystem
from profile_service.storage.salvage import inspect_log, salvage_log
from profile_service.storage.segment import segment_name
from tests.storage.logs import BACKUP, DIRECTORY, IDENTITY, Entry, contents, disk_of, make_log, open_log, read

GOLDEN = Path(__file__).parent / "golden" / "log-v1"


def groups() -> list[list[Entry]]:
    """What the golden log holds: small and empty records, one larger than a segment, and payloads of zeros."""
    rng = random.Random(20)
    return [
        [(3, b"name: marketplace")],
        [(1, rng.randbytes(100)), (1, b""), (2, b"12345678")],
        [(1, bytes(1500)), (252, b"\xff" * 7)],
        [(1, rng.randbytes(5000))],
        [(1, bytes([number]) * 900) for number in range(6)],
    ]


def golden() -> dict[str, bytes]:
    return contents(RealFileSystem(), GOLDEN)


def test_the_golden_log_loads() -> None:
    segments = golden()
    assert len(segments) == 3
    fs = disk_of(segments)
    assert all(finding.whole for finding in inspect_log(fs, DIRECTORY, IDENTITY))
    log = open_log(fs)
    assert read(log) == [entry for group in groups() for entry in group]
    assert log.torn_bytes == 0


def test_the_format_is_still_the_same() -> None:
    """Fails where bytes are written otherwise than before: then the version must rise, and both be read."""
    assert make_log(groups(), close=True) == golden()


@pytest.mark.parametrize("version", [0, 2, 1 << 31])
def test_another_version_is_refused_and_named(version: int) -> None:
    segments = golden()
    name = segment_name(0)
    header = bytearray(segments[name][:64])
    header[8:12] = version.to_bytes(4, "little")
    header[60:64] = crc32c(bytes(header[:60])).to_bytes(4, "little")
    segments[name] = bytes(header) + segments[name][64:]
    fs = disk_of(segments)
    actions: list[Callable[[CrashingFileSystem], object]] = [
        open_log,
        lambda fs: inspect_log(fs, DIRECTORY),
        lambda fs: salvage_log(fs, DIRECTORY, BACKUP, IDENTITY),
    ]
    for action in actions:
        with pytest.raises(StartupError, match=f"format version {version}, this version .* up to 1"):
            action(fs)
    assert contents(fs) == segments


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for name, data in make_log(groups(), close=True).items():
        (target / name).write_bytes(data)
