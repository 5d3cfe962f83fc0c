"""Whether all kernels of a schema are compiled: a stamp beside what numba keeps says so, for these sources, this numba
and this processor. Without it a start would have to load them all to find out, and all that compiling needs.

    __pycache__/DIGEST.nbs      how many files numba kept, in decimal

What is told wrongly by it costs time and nothing else: whoever needs a kernel that is not there compiles it.
"""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parent
SUFFIX = ".nbs"


def is_complete(schema: str, *, is_local: bool) -> bool:
    """Whether `note_complete` was called for this and nothing has changed since.

    Args:
        schema: the schema's fingerprint: its kinds of features have kernels of their own.
        is_local: whether profiles live in the shards; with a store there are some more.
    """
    try:
        kept = int(_stamp(schema, is_local=is_local).read_text())
    except (OSError, ValueError, metadata.PackageNotFoundError):
        return False
    return 0 < kept <= _kept_files()


def note_complete(schema: str, *, is_local: bool) -> None:
    """All kernels have run, so numba has kept them; where nothing can be written nothing is noted."""
    try:
        stamp = _stamp(schema, is_local=is_local)
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text(f"{_kept_files()}\n")
    except (OSError, metadata.PackageNotFoundError):
        return


def _kept_files() -> int:
    return sum(1 for _ in PACKAGE.rglob("*.nbc"))


def _stamp(schema: str, *, is_local: bool) -> Path:
    said = [schema, str(is_local), platform.python_version(), metadata.version("numba"), _processor()]
    for path in sorted(PACKAGE.rglob("*.py")):
        found = path.stat()
        said.append(f"{path} {found.st_mtime_ns} {found.st_size}")
    digest = hashlib.blake2b("\n".join(said).encode(), digest_size=12).hexdigest()
    return PACKAGE / "__pycache__" / f"{digest}{SUFFIX}"


def _processor() -> str:
    """What numba compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
