"""Whether what is sent is soon read, and whether reads and events leave each other room.

    nothing else                    probes                           the floor
    half load                       probes, reads, events            both at rates that nothing slows down
    events as fast as they go       reads at their rate              are reads starved?
    reads as fast as they go        events at half their rate        are events starved?

A probe is one event of a user of its own, due at a moment; then that user is read, again and again, until the profile
is there. What counts is the time from when the event was due to the answer that shows it, however late it was sent.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.chart import Bar, bars
from benchmarks.generator import Generator, Latencies
from benchmarks.load import SCHEMAS
from benchmarks.processes import Disk, data_directory, describe_machine, serve, started
from benchmarks.producing import STREAM, check_totals
from benchmarks.report import cost
from profile_service.domain.schema import load_schema

BOUND_FRESH_MS = 10.0
"""Event sent to readable, at half load: p99."""

QUIET, MIXED, INGEST_FIRST, READS_FIRST = "nothing else", "half load", "events at full rate", "reads at full rate"

_EVENTS = 1_000_000
"""Of the load that is sent again and again, each time with new ids."""
_ROUNDS = 3
"""Of the search for the highest rate."""
_WINDOW = 8
_KEPT_BYTES_PER_EVENT = 400
_RUSH = 4
"""Events that shall go as fast as they can are due so many times as fast."""


@dataclass(frozen=True)
class Options:
    """What is measured."""

    schema: str
    """A key of `SCHEMAS`."""
    users: int
    share: float
    """Of the highest rate of events."""
    reads: float
    """A second."""
    probes: float
    """A second."""
    at_once: int
    """Reads under way where they go as fast as they can."""
    steady_s: float
    """Seconds of each stretch."""
    batch: int
    """Events a batch."""
    producers: int
    shards: int | None
    data_dir: Path | None
    seed: int | None


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measures, and returns everything as one JSON object. `console` hears how far it is."""
    seed = options.seed if options.seed is not None else int(np.random.SeedSequence().generate_state(1)[0]) % 10**6
    with ExitStack() as stack:
        room = int(4 * options.steady_s * 1e6 * _KEPT_BYTES_PER_EVENT)
        directory = stack.enter_context(data_directory(options.data_dir, room))
        producers, readers, prober = (stack.enter_context(Generator()) for _ in range(3))
        flags = ["--data-dir", str(directory)]
        flags += ["--shards", str(options.shards)] if options.shards else []
        with console.status("starting") as progress:
            child = stack.enter_context(started(serve(SCHEMAS[options.schema], *flags)))
            progress.update(f"an event of each of {options.users:,} users")
            producers.build(options.schema, options.users, options.users, options.batch, seed, every_user=True)
            producers.send(child.address, STREAM, options.producers, _WINDOW)
            progress.update("serialising the load")
            events = max(min(_EVENTS, 10 * options.users) // options.batch, 1) * options.batch
            producers.build(options.schema, events, options.users, options.batch, seed + 1)
            rates = []
            for number in range(_ROUNDS):
                progress.update(f"the highest rate, {number + 1} of {_ROUNDS}")
                producers.renew(number)
                sent = producers.send(child.address, STREAM, options.producers, _WINDOW)
                rates.append(sent.events / sent.seconds)
            work = _Work(options, child.address, producers, readers, prober, float(np.median(rates)), seed)
            stretches = {}
            for name in (QUIET, MIXED, INGEST_FIRST, READS_FIRST):
                progress.update(f"{options.steady_s:g} s: {name}")
                stretches[name] = work.stretch(name)
        check_totals(
            child.address, options.users + events * _ROUNDS + work.events + work.probed, options.users + work.probed
        )
    result: dict[str, Any] = {
        "benchmark": "mixed",
        "machine": describe_machine(),
        "disk": str(Disk.below(directory)),
        "schema": options.schema,
        "users": options.users,
        "batch": options.batch,
        "producers": options.producers,
        "at_once": options.at_once,
        "seed": seed,
        "highest_events_per_second": work.highest,
        "highest_reads_per_second": work.reads_alone,
        "stretches": stretches,
        "ingest_rate_ratio_beside_reads": stretches[INGEST_FIRST]["events_per_second"] / work.highest,
        "read_rate_ratio_beside_ingest": stretches[READS_FIRST]["reads_per_second"] / work.reads_alone,
        "verified": True,
    }
    result["costs"] = _costs(result, options)
    return result


class _Work:
    def __init__(
        self,
        options: Options,
        address: str,
        producers: Generator,
        readers: Generator,
        prober: Generator,
        highest: float,
        seed: int,
    ) -> None:
        self._options = options
        self._address = address
        self._producers, self._readers, self._prober = producers, readers, prober
        self._seed = seed
        self._round = _ROUNDS
        schema = load_schema(SCHEMAS[options.schema])
        self._event_type = schema.event_types[0].name
        self.highest = highest
        self.reads_alone, _ = readers.read_fast(
            address, options.users, options.at_once, options.steady_s, seed
        ).result()
        self.events = 0
        """Sent in the stretches, without probes."""
        self.probed = 0

    def stretch(self, name: str) -> dict[str, Any]:
        """What was measured in one of them."""
        options, found = self._options, dict[str, Any]()
        steady = options.share * self.highest
        events = acks = reads = fast = probes = None
        if name == INGEST_FIRST:
            events = self._send(_RUSH * self.highest, options.steady_s / _RUSH)
        elif name != QUIET:
            events = acks = self._send(steady, options.steady_s)
        if name in (MIXED, INGEST_FIRST):
            reads = self._readers.read_steadily(
                self._address, options.users, options.reads, options.steady_s, self._seed
            )
        if name == READS_FIRST:
            fast = self._readers.read_fast(self._address, options.users, options.at_once, options.steady_s, self._seed)
        if name in (QUIET, MIXED):
            probes = self._prober.probe(self._address, self._event_type, options.probes, options.steady_s)
        if events is not None:
            sent = events.result()
            self.events += sent.events
            seconds = float((sent.due_s + sent.latency_s).max() - sent.due_s.min())
            found["events_per_second"] = sent.events / seconds
        if acks is not None:
            found["acknowledgement"] = _quantiles(acks.result())
        if reads is not None:
            found["read"] = _quantiles(reads.result())
            found["reads_per_second"] = options.reads
        if fast is not None:
            found["reads_per_second"], latencies = fast.result()
            found["read"] = _quantiles(latencies)
        if probes is not None:
            seen = probes.result()
            self.probed += seen.events
            found["freshness"] = _quantiles(seen)
        return found

    def _send(self, rate: float, seconds: float) -> Any:
        first, batches = self._round, rate * seconds / self._options.batch
        # Batches of one round do not come again in another stretch.
        self._round += int(batches * self._options.batch / min(_EVENTS, 10 * self._options.users)) + 2
        return self._producers.send_steadily(self._address, rate, seconds, self._options.producers, first)


def _quantiles(seen: Latencies) -> dict[str, float]:
    return {f"{name}_ms": value for name, value in seen.quantiles_ms().items()}


def _costs(result: dict[str, Any], options: Options) -> list[dict[str, Any]]:
    """Rows of docs/performance.md."""
    stretches = result["stretches"]
    fresh, alone = stretches[MIXED]["freshness"], stretches[QUIET]["freshness"]
    rate = stretches[MIXED]["events_per_second"]
    reads, mixed_reads = stretches[INGEST_FIRST]["read"], stretches[MIXED]["read"]
    acks, mixed_acks = stretches[READS_FIRST]["acknowledgement"], stretches[MIXED]["acknowledgement"]
    return [
        cost(
            f"event sent → readable at {rate:,.0f} events/s, {options.reads:g} reads/s: p99",
            bound=f"{BOUND_FRESH_MS:g} ms",
            figure=f"{fresh['p99_ms']:.1f} ms",
            floor=f"nothing else going on {alone['p99_ms']:.1f} ms",
            ratio=fresh["p99_ms"] / alone["p99_ms"],
            held=fresh["p99_ms"] <= BOUND_FRESH_MS,
        ),
        cost(
            f"{options.reads:g} reads/s beside events as fast as they go: p99",
            bound="–",
            figure=f"{reads['p99_ms']:.1f} ms",
            floor=f"at half load {mixed_reads['p99_ms']:.1f} ms",
            ratio=reads["p99_ms"] / mixed_reads["p99_ms"],
            held=True,
        ),
        cost(
            f"acknowledgements at half load beside {options.at_once} reads at once: p99",
            bound="–",
            figure=f"{acks['p99_ms']:.1f} ms",
            floor=f"beside {options.reads:g} reads/s {mixed_acks['p99_ms']:.1f} ms",
            ratio=acks["p99_ms"] / mixed_acks["p99_ms"],
            held=True,
        ),
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """The figures as tables."""
    console.print(
        f"alone: {result['highest_events_per_second']:,.0f} events/s, "
        f"{result['highest_reads_per_second']:,.0f} reads/s; "
        f"beside each other {result['ingest_rate_ratio_beside_reads']:.2f} and "
        f"{result['read_rate_ratio_beside_ingest']:.2f} of that; totals exact"
    )
    table = Table(title="ms")
    columns = ("", "", "events/s", "reads/s", "p50", "p99", "p99.9", "max")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right")
    titles = {"freshness": "sent → readable", "read": "read", "acknowledgement": "acknowledged"}
    for name, found in result["stretches"].items():
        rates = tuple(f"{found.get(key, 0):,.0f}" for key in ("events_per_second", "reads_per_second"))
        for key, title in titles.items():
            if key in found:
                figures = (f"{found[key][f'{each}_ms']:.1f}" for each in ("p50", "p99", "p99.9", "max"))
                table.add_row(name, title, *rates, *figures)
    console.print(table)


def draw(result: dict[str, Any]) -> str:
    """How soon events are readable: a bar for the p99, dots for p50 and p99.9."""
    rows = [
        Bar(name, found["freshness"]["p99_ms"], [found["freshness"]["p50_ms"], found["freshness"]["p99.9_ms"]])
        for name, found in result["stretches"].items()
        if "freshness" in found
    ]
    return bars("Event sent to readable: p99, dots p50 and p99.9", rows, unit="ms")
