"""Makes the synchronous client and producer from the asyncio ones: the same calls without their awaits.

`python scripts/generate_sync_client.py` writes them; with `--check` it only says whether what is there is up to date.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "clients" / "python" / "profile_client"
MADE = {"client.py": "aio_client.py", "producer.py": "aio_producer.py"}
"""Target -> source."""

REPLACEMENTS = [
    (r"The asyncio (client|producer)\. `(\w+\.py)` is made from this file by `(.*?)`: change\s+this one\.",
     r"The synchronous \1. Made from `aio_\2` by `\3`: change that one."),
    (r"^import asyncio\n", ""),
    (r"^ +# grpc\.aio binds a channel [^\n]*\n +asyncio\.get_running_loop\(\)\n", ""),
    (r" To be made where an\s+event loop runs\.", " Safe for threads."),
    (r"^import grpc\.aio\n", ""),
    # Threads take turns by themselves.
    (r"^ +sealed = window\.sealed_batches\n", ""),
    (r"^ +if window\.sealed_batches > sealed:\n +# [^\n]*\n +await asyncio\.sleep\(0\)\n", ""),
    (r"^ +# A caller with events at hand [^\n]*\n +await asyncio\.sleep\(0\)\n", ""),
    # A synchronous call that is cancelled raises an RpcError.
    (r"^ +except asyncio\.CancelledError:\n +# [^\n]*\n [^\n]*\n", ""),
    (r"await asyncio\.sleep", "time.sleep"),
    (r"grpc\.aio\.", "grpc."),
    (r"profile_client\.aio_(producer|concurrency)", r"profile_client.\1"),
    (r"\bAsync(?=ProfileClient|Producer|Iterator)", ""),
    (r"\basync (?=def|for|with)", ""),
    (r"\bawait ", ""),
    (r"__a(enter|exit)__", r"__\1__"),
]  # fmt: skip


def generate(source: Path, target: Path) -> str:
    """The synchronous text, formatted."""
    text = source.read_text(encoding="utf-8")
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE | re.DOTALL)
    for command in (["check", "--fix", "--quiet", "--select", "I"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(target), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


def main() -> int:
    """Writes the files, or checks them."""
    stale = []
    for target, source in MADE.items():
        text = generate(PACKAGE / source, PACKAGE / target)
        path = PACKAGE / target
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(f"{target} is not what {source} makes")
    if stale:
        print(f"{'; '.join(stale)}: run python scripts/generate_sync_client.py")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
