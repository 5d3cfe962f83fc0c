"""Runs the benchmarks one after the other, draws into docs/, keeps what they said in build/benchmarks/, and prints the
table of docs/performance.md from it.

    python scripts/bench_all.py [--only NAME]... [--print]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "build" / "benchmarks"

sys.path.insert(0, str(ROOT))
from benchmarks.report import markdown  # noqa: E402

RUNS: dict[str, list[str]] = {
    "ingest": ["ingest", "--peers"],
    "ingest-1m": ["ingest", "--users", "1000000", "--sync", "always", "--peers"],
    "read": ["read"],
    "mixed": ["mixed"],
    "memory": ["memory"],
    "growth": ["growth"],
    "recovery": ["recovery"],
    "snapshot": ["snapshot"],
    "startup": ["startup"],
    "flood": ["flood"],
    "stores": ["stores"],
    "scale": ["scale", "--rate", "10000", "--reads", "100"],
    "soak": ["soak", "--minutes", "30"],
}
"""By the name of the files, what `profile-service bench` is told."""


def main() -> None:
    """Runs what is asked for, and prints what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=sorted(RUNS), help="Not all, but this one, and others so.")
    parser.add_argument("--print", action="store_true", dest="no_run", help="Prints the table of what was kept.")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in [] if arguments.no_run else arguments.only or RUNS:
        print(f"--- {name}: profile-service bench {' '.join(RUNS[name])}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "profile_service", "bench", *RUNS[name], "--json"]
        command += ["--plot", str(ROOT / "docs" / f"bench-{name}.svg")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        (RESULTS / f"{name}.json").write_text(done.stdout, encoding="utf-8")
    kept = [path for name in RUNS if (path := RESULTS / f"{name}.json").exists()]
    print(markdown(row for path in kept for row in json.loads(path.read_text(encoding="utf-8")).get("costs", [])))


if __name__ == "__main__":
    main()
