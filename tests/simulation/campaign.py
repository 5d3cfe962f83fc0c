"""Many runs: in this process, or spread over several; what they exercised, and which of them failed."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

from tests.simulation.run import Report, run

Run = Callable[..., Report]
"""Of a seed; `traced` has it noted what happens."""

RUNS_AT_ONCE = 50
"""What one process is given at a time."""

TRACE_LINES = 150


@dataclass
class Summary:
    """How the runs went."""

    runs: int = 0
    seconds: float = 0.0
    seen: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)
    """By seed."""

    def add(self, other: Summary) -> None:
        """Both together."""
        self.runs += other.runs
        self.seen += other.seen
        self.faults.update(other.faults)

    def table(self) -> str:
        """What was exercised, for people."""
        width = max((len(f"{count:,}") for count in self.seen.values()), default=0)
        return "\n".join(f"  {count:>{width},}  {what}" for what, count in sorted(self.seen.items()))


def run_some(first_seed: int, runs: int, *, until_fault: bool = False, run: Run = run) -> Summary:
    """Runs of consecutive seeds, in this process."""
    summary = Summary()
    for seed in range(first_seed, first_seed + runs):
        report = run(seed)
        summary.runs += 1
        summary.seen += report.seen
        if report.fault:
            summary.faults[seed] = report.fault
            if until_fault:
                break
    return summary


def run_many(first_seed: int, runs: int, *, processes: int, progress: Callable[[str], None], run: Run = run) -> Summary:
    """Runs of consecutive seeds, spread over processes; `progress` hears how it goes every few seconds."""
    summary, began, told = Summary(), time.monotonic(), time.monotonic()
    for part in _parts(first_seed, runs, processes, run):
        summary.add(part)
        now = time.monotonic()
        if now - told > 5.0 or summary.runs == runs:
            told = now
            rate = summary.runs / (now - began)
            progress(
                f"{summary.runs:,} of {runs:,} runs, {rate:.0f} a second, {(runs - summary.runs) / rate:.0f} s to go, "
                f"{summary.seen['recoveries']:,} recoveries, {len(summary.faults)} failed: {sorted(summary.faults)}"
            )
    summary.seconds = time.monotonic() - began
    return summary


def _parts(first_seed: int, runs: int, processes: int, run: Run) -> Iterator[Summary]:
    starts = range(first_seed, first_seed + runs, RUNS_AT_ONCE)
    if processes == 1:
        for start in starts:
            yield run_some(start, min(RUNS_AT_ONCE, first_seed + runs - start), run=run)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = [
            pool.submit(run_some, start, min(RUNS_AT_ONCE, first_seed + runs - start), run=run) for start in starts
        ]
        for done in as_completed(pending):
            yield done.result()


def explain(seed: int, fault: str, run: Run = run) -> str:
    """What happened in a run that failed, and how to have it again."""
    again = run(seed, traced=True)
    lines = again.trace[-TRACE_LINES:]
    if again.fault.splitlines()[-1:] != fault.splitlines()[-1:]:
        lines.append(f"!! the same seed has ended otherwise now: {again.fault or 'well'}")
    return "\n".join(
        [
            f"--- seed {seed}: the last {len(lines)} lines of its trace ---",
            *lines,
            fault,
            f"This run alone: pytest {_test_of(run)} --runs 1 --first-seed {seed}",
        ]
    )


def _test_of(run: Run) -> str:
    return f"tests/simulation/test_{'simulation' if run.__module__.endswith('.run') else 'coordination'}.py"
