"""Makes the synchronous client from the asyncio one: the same calls without their awaits.

`python scripts/generate_sync_client.py` writes it; with `--check` it only says whether what is there is up to date.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "clients" / "python" / "profile_client"
SOURCE, TARGET = PACKAGE / "aio_client.py", PACKAGE / "client.py"

REPLACEMENTS = [
    (r"The asyncio client\. `client\.py` is made from this file by `(.*?)`: change\s+this one\.",
     r"The synchronous client. Made from `aio_client.py` by `\1`: change that one."),
    (r"^import asyncio\n", ""),
    (r"^ +# grpc\.aio binds a channel [^\n]*\n +asyncio\.get_running_loop\(\)\n", ""),
    (r" To be made where an event loop runs\.", " Safe for threads."),
    (r"^import grpc\.aio\n", ""),
    (r"await asyncio\.sleep", "time.sleep"),
    (r"grpc\.aio\.", "grpc."),
    (r"profile_client\.aio_producer", "profile_client.producer"),
    (r"\bAsync(?=ProfileClient|Producer|Iterator)", ""),
    (r"\basync (?=def|for|with)", ""),
    (r"\bawait ", ""),
    (r"__a(enter|exit)__", r"__\1__"),
]  # fmt: skip


def generate() -> str:
    """The synchronous client's text, formatted."""
    text = SOURCE.read_text(encoding="utf-8")
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE | re.DOTALL)
    for command in (["check", "--fix", "--quiet", "--select", "I"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(TARGET), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


def main() -> int:
    """Writes the file, or checks it."""
    text = generate()
    if "--check" not in sys.argv:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"{TARGET.name} is not what {SOURCE.name} makes: run python scripts/generate_sync_client.py")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
