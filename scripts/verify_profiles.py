#!/usr/bin/env python3
"""Compares every profile of a running service with what the files that it was fed say.

    .venv/bin/python scripts/verify_profiles.py --schema retail --file events.parquet --address 127.0.0.1:50051

The files are Parquet, in the order in which they were ingested, with columns named user_id, event_type, event_time and,
where there is one, event_id; every other column counts under its own name, as an attribute. The numbers are recomputed
from the rows as docs/semantics.md defines them, for the moment that each profile says it was read at. Nothing of the
service computes them: of its code only the schema's parser is used.

What is an estimate is held against its promise: a `top_k` of more values than it keeps against its own error bounds, a
`distinct` against five standard errors. All else has to be equal, weights within a relative error of 1e-4.

Unless `--others` says that the service holds more than these files, its totals and its population are compared, too.
Exit status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from profile_service.domain.schema import FeatureSpec, Schema, load_schema
from userprofile.v1 import admin_service_pb2, admin_service_pb2_grpc, profile_pb2, profile_service_pb2
from userprofile.v1 import profile_service_pb2_grpc as profile_service_grpc

TOLERANCE = 1e-4
SHOWN = 20
NS = 1_000_000_000
USERS_A_READ = 200
POPULATION_WAIT_S = 10.0
TICKS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": NS}
PROBABILITIES = (0.05, 0.25, 0.5, 0.75, 0.95)
NEXT_TO = 1e-5
"""Probabilities so close are not told apart: at the end of a bin, rounding decides whether it is the next."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass
class Events:
    """The valid events of all files, by column, in the order of arrival."""

    users: list[str]
    user: Integers
    type: Integers
    time_ns: Integers
    texts: dict[str, Integers]
    """By attribute: position in its vocabulary, -1 where absent."""
    vocabulary: dict[str, list[str]]
    numbers: dict[str, Floats]
    """By attribute: NaN where absent."""
    row_count: int
    """Rows of the files, valid or not."""

    def __len__(self) -> int:
        return len(self.user)

    def by_user(self) -> Iterator[tuple[str, Integers]]:
        """Each user and their events, in the order of arrival."""
        order = np.argsort(self.user, kind="stable")
        bounds = np.searchsorted(self.user[order], np.arange(len(self.users) + 1))
        for i, user in enumerate(self.users):
            yield user, order[bounds[i] : bounds[i + 1]]


@dataclass
class Comparison:
    """What was compared, and what differed."""

    values: int = 0
    largest_error: float = 0.0
    largest_at: str = ""
    mismatches: int = 0
    shown: list[str] = field(default_factory=list)
    where: str = ""
    """The user and feature that are being compared."""

    def fail(self, what: str) -> None:
        """Something differs."""
        self.mismatches += 1
        if len(self.shown) < SHOWN:
            self.shown.append(f"{self.where}: {what}")

    def equal(self, name: str, got: object, want: object) -> None:
        """Must be the same."""
        self.values += 1
        if got != want:
            self.fail(f"{name} is {got!r}, must be {want!r}")

    def near(self, name: str, got: float, want: float, floor: float = 0.0) -> None:
        """Must be the same within the tolerance; what is smaller than `floor` is as good as 0."""
        self.between(name, got, want, want, floor)

    def between(self, name: str, got: float, low: float, high: float, floor: float = 0.0) -> None:
        """Must lie between the two within the tolerance, relative to the nearer one."""
        self.values += 1
        want = min(max(got, low), high)
        error = abs(got - want) / max(abs(want), floor) if got != want else 0.0
        if error > self.largest_error:
            self.largest_error, self.largest_at = error, f"{self.where} {name}"
        if not error <= TOLERANCE:
            self.fail(
                f"{name} is {got!r}, must be {want!r}"
                if low == high
                else f"{name} is {got!r}, not in {low!r} … {high!r}"
            )


def load_events(paths: list[Path], schema: Schema) -> Events:
    """The valid events of the files; which rows are valid is decided here, by the documented limits."""
    names = ["user_id", "event_type", "event_time", "event_id", *schema.text_attributes, *schema.number_attributes]
    tables = [pq.read_table(path) for path in paths]
    present = [name for name in names if any(name in table.column_names for table in tables)]
    table = pa.concat_tables([table.select([n for n in present if n in table.column_names]) for table in tables],
                             promote_options="default").combine_chunks()  # fmt: skip
    user_ids = _text_column(table, "user_id")
    time_ns, valid = _times(table["event_time"])
    type_names = _text_column(table, "event_type")
    types = _numpy(pc.index_in(type_names, pa.array(schema.event_type_names, pa.large_string())).fill_null(-1))
    id_bytes = _numpy(pc.binary_length(user_ids).fill_null(0))
    valid &= (types >= 0) & (id_bytes > 0) & (id_bytes <= 256)
    numbers = {
        name: _numpy(table[name].cast(pa.float64()).fill_null(np.nan))
        for name in schema.number_attributes
        if name in present
    }
    for name, values in numbers.items():
        valid &= np.isfinite(values) | ~_numpy(table[name].is_valid())
    columns = {name: _text_column(table, name) for name in schema.text_attributes if name in present}
    for column in columns.values():
        valid &= _numpy(pc.binary_length(column).fill_null(0)) <= 1024
    if "event_id" in present:
        ids, owners = _codes(_text_column(table, "event_id"))[0], _codes(user_ids)[0]
        rows = np.flatnonzero(valid & (ids >= 0))
        _, first = np.unique(np.stack([owners, ids])[:, rows], axis=1, return_index=True)
        repeated = np.ones(len(rows), dtype=np.bool_)
        repeated[first] = False
        valid[rows[repeated]] = False
    keep = pa.array(valid)
    user, users = _codes(user_ids.filter(keep))
    coded = {name: _codes(column.filter(keep)) for name, column in columns.items()}
    return Events(
        users=users,
        user=user,
        type=types[valid].astype(np.int64),
        time_ns=time_ns[valid],
        texts={name: codes for name, (codes, _) in coded.items()},
        vocabulary={name: values for name, (_, values) in coded.items()},
        numbers={name: values[valid] for name, values in numbers.items()},
        row_count=table.num_rows,
    )


class Oracle:
    """What a profile of some events must be, and whether it is."""

    def __init__(self, schema: Schema, events: Events, comparison: Comparison) -> None:
        self._schema = schema
        self._events = events
        self._is = comparison
        weights = {event.name: event.weight for event in schema.event_types}
        self._weights = {
            spec.name: np.array([weights[n] if n in spec.events else 0.0 for n in schema.event_type_names])
            for spec in schema.features
        }

    def compare(self, name: str, profile: profile_pb2.Profile, rows: Integers, *, population: bool = False) -> None:
        """Compares the profile with the events `rows`, in their order of arrival."""
        compare, times = self._is, self._events.time_ns[rows]
        compare.where = name
        compare.equal("event_count", profile.event_count, len(rows))
        compare.equal("first_seen_time", profile.first_seen_time.ToNanoseconds(), int(times.min()))
        compare.equal("last_seen_time", profile.last_seen_time.ToNanoseconds(), int(times.max()))
        compare.equal("features", sorted(profile.features), sorted(spec.name for spec in self._schema.features))
        read_ns = profile.read_time.ToNanoseconds()
        for spec in self._schema.features:
            if spec.name not in profile.features:
                continue
            compare.where = f"{name} {spec.name}"
            answer = profile.features[spec.name]
            compare.equal("kind", answer.WhichOneof("kind"), spec.kind)
            taken = rows[self._weights[spec.name][self._events.type[rows]] > 0]
            getattr(self, f"_{spec.kind}")(spec, getattr(answer, spec.kind), taken, read_ns, population)

    def _decayed(self, spec: FeatureSpec, rows: Integers, read_ns: int) -> tuple[Floats, float]:
        """Weights of the events as of the newest of them, and what they are multiplied by to be as of `read_ns`."""
        weights = self._weights[spec.name][self._events.type[rows]]
        if spec.half_life_s is None or not len(rows):
            return weights, 1.0
        times = self._events.time_ns[rows]
        newest = int(times.max())
        half_life_ns = spec.half_life_s * NS
        return weights * np.exp2((times - newest) / half_life_ns), 2.0 ** ((newest - read_ns) / half_life_ns)

    def _with_text(self, spec: FeatureSpec, rows: Integers) -> tuple[Integers, Integers, list[str]]:
        """The rows that have the feature's attribute, its codes, and what they stand for."""
        attribute = _option(spec, "attribute")
        if attribute not in self._events.texts:
            return rows[:0], rows[:0], []
        codes = self._events.texts[attribute][rows]
        return rows[codes >= 0], codes[codes >= 0], self._events.vocabulary[attribute]

    def _counter(self, spec: FeatureSpec, got: profile_pb2.Counter, rows: Integers, read_ns: int, _: bool) -> None:
        weights, scale = self._decayed(spec, rows, read_ns)
        self._is.near("value", got.value, len(rows) if spec.half_life_s is None else float(weights.sum()) * scale)

    def _categorical(
        self, spec: FeatureSpec, got: profile_pb2.Categorical, rows: Integers, read_ns: int, _: bool
    ) -> None:
        labels = [*_option(spec, "values"), "other"]
        strength = _option(spec, "prior_strength")
        own = self._by_label(spec, labels, rows, read_ns)
        prior = np.full(len(labels), 1 / len(labels))
        if _option(spec, "prior") == "population":
            every = np.arange(len(self._events))
            every = every[self._weights[spec.name][self._events.type] > 0]
            population = self._by_label(spec, labels, every, read_ns)
            prior = (population + 1) / (population.sum() + len(labels))
        total = float(own.sum())
        likelihood = (own + strength * prior) / (total + strength)
        self._is.near("weight", got.weight, total)
        self._is.near("confidence", got.confidence, total / (total + strength))
        self._is.equal("values", sorted(v.value for v in got.values), sorted(labels))
        for before, after in zip(got.values, got.values[1:], strict=False):
            self._is.between("order", after.likelihood, 0.0, before.likelihood)
        for value in got.values:
            at = labels.index(value.value)
            self._is.near(f"{value.value} weight", value.weight, float(own[at]), floor=total * 2.0**-100)
            self._is.near(f"{value.value} likelihood", value.likelihood, float(likelihood[at]))
            self._is.near(f"{value.value} lift", value.lift, float(likelihood[at] / prior[at]))

    def _by_label(self, spec: FeatureSpec, labels: list[str], rows: Integers, read_ns: int) -> Floats:
        rows, codes, vocabulary = self._with_text(spec, rows)
        weights, scale = self._decayed(spec, rows, read_ns)
        place = {label: i for i, label in enumerate(labels[:-1])}
        labelled = np.array([place.get(text, len(labels) - 1) for text in vocabulary], dtype=np.int64)
        return np.asarray(
            np.bincount(labelled[codes] if len(codes) else codes, weights, len(labels)) * scale, np.float64
        )

    def _distribution(
        self, spec: FeatureSpec, got: profile_pb2.Distribution, rows: Integers, read_ns: int, _: bool
    ) -> None:
        compare = self._is
        values = self._events.numbers.get(_option(spec, "attribute"), np.full(len(self._events), np.nan))[rows]
        rows, values = rows[~np.isnan(values)], values[~np.isnan(values)]
        weights, scale = self._decayed(spec, rows, read_ns)
        edges = _edges(_option(spec, "bins"))
        places = np.searchsorted(edges, values, side="right")
        bins = np.asarray(np.bincount(places, weights, len(edges) + 1), np.float64)
        total = float(bins.sum())
        compare.near("weight", got.weight, total * scale)
        compare.equal("number of bins", len(got.histogram.weights), len(bins))
        for i, (edge, want) in enumerate(zip(got.histogram.edges, edges.tolist(), strict=True)):
            compare.near(f"edge {i}", edge, want)
        for i, (weight, want) in enumerate(zip(got.histogram.weights, bins.tolist(), strict=False)):
            compare.near(f"bin {i}", weight, want * scale, floor=total * scale * 2.0**-100)
        if not len(values):
            compare.equal("quantiles", len(got.quantiles), 0)
            return
        low, high = float(values.min()), float(values.max())
        floor = 1e-6 * max(abs(low), abs(high))
        mean = float((weights * values).sum()) / total
        compare.near("mean", got.mean, mean, floor)
        compare.near("stddev", got.stddev, math.sqrt(float((weights * (values - mean) ** 2).sum()) / total), floor)
        compare.equal("min", got.min, low)
        compare.equal("max", got.max, high)
        compare.equal("probabilities", [q.probability for q in got.quantiles], list(PROBABILITIES))
        for quantile in got.quantiles:
            least, most = (_quantile(bins, edges, low, high, quantile.probability + d) for d in (-NEXT_TO, NEXT_TO))
            compare.between(f"quantile {quantile.probability}", quantile.value, least, most, floor)

    def _top_k(self, spec: FeatureSpec, got: profile_pb2.TopK, rows: Integers, read_ns: int, population: bool) -> None:
        compare, k = self._is, _option(spec, "k")
        rows, codes, vocabulary = self._with_text(spec, rows)
        weights, scale = self._decayed(spec, rows, read_ns)
        found, inverse = np.unique(codes, return_inverse=True)
        sums = (np.bincount(inverse, weights, len(found)) * scale).tolist()
        true = {vocabulary[code]: weight for code, weight in zip(found.tolist(), sums, strict=True)}
        total = float(weights.sum()) * scale
        floor = total * 2.0**-100
        compare.near("weight", got.weight, total)
        compare.equal("number of entries", len(got.entries), min(k, len(true)))
        compare.equal("entries that never came", [e.value for e in got.entries if e.value not in true], [])
        compare.equal("values listed once", len({entry.value for entry in got.entries}), len(got.entries))
        for before, after in zip(got.entries, got.entries[1:], strict=False):
            compare.between("order", after.weight, 0.0, before.weight)
        for entry in got.entries:
            weight = true.get(entry.value, 0.0)
            if len(true) <= k:
                compare.near(f"{entry.value!r} weight", entry.weight, weight, floor)
                compare.equal(f"{entry.value!r} error", entry.error, 0.0)
            else:
                compare.between(f"{entry.value!r} weight", entry.weight, weight, weight + entry.error, floor)
                compare.between(f"{entry.value!r} error", entry.error, 0.0, total / k, floor)
            compare.near(f"{entry.value!r} share", entry.share, entry.weight / total if total else entry.share)
        if len(true) > k:
            unlisted = max(weight for value, weight in true.items() if value not in {e.value for e in got.entries})
            compare.between("heaviest of the unlisted", unlisted, 0.0, got.entries[-1].weight, floor)
            if not population:
                compare.near("sum of all counters", sum(entry.weight for entry in got.entries), total)

    def _window_count(
        self, spec: FeatureSpec, got: profile_pb2.WindowCount, rows: Integers, read_ns: int, _: bool
    ) -> None:
        bucket_ns = round(_option(spec, "bucket") * NS)
        buckets = -(-round(_option(spec, "window") * NS) // bucket_ns)
        ago = read_ns // bucket_ns - self._events.time_ns[rows] // bucket_ns
        self._is.equal("value", got.value, int(((ago >= 0) & (ago < buckets)).sum()))

    def _latest(self, spec: FeatureSpec, got: profile_pb2.Latest, rows: Integers, _: int, population: bool) -> None:
        newest = self._newest(spec, rows)[:1]
        self._is.equal(
            "time", got.time.ToNanoseconds() if got.HasField("time") else None, newest[0][0] if newest else None
        )
        # Which of two users' events of one moment arrived later is nobody's to know.
        if not population:
            self._is.equal("value", got.value, newest[0][1] if newest else "")

    def _recent(self, spec: FeatureSpec, got: profile_pb2.Recent, rows: Integers, _: int, population: bool) -> None:
        newest = self._newest(spec, rows)
        size = _option(spec, "size")
        entries = [(entry.time.ToNanoseconds(), entry.value) for entry in got.entries]
        if population:
            self._is.equal("times", [when for when, _ in entries], [when for when, _ in newest[:size]])
            self._is.equal("entries that are not so", sorted(set(entries) - set(newest)), [])
        else:
            self._is.equal("entries", entries, newest[:size])

    def _newest(self, spec: FeatureSpec, rows: Integers) -> list[tuple[int, str]]:
        """(time, value) of each value's newest event, the newest first; of one moment, what arrived later first."""
        rows, codes, vocabulary = self._with_text(spec, rows)
        times = self._events.time_ns[rows]
        order = np.argsort(times, kind="stable")[::-1]
        _, first = np.unique(codes[order], return_index=True)
        return [(int(times[i]), vocabulary[codes[i]]) for i in order[np.sort(first)].tolist()]

    def _distinct(self, spec: FeatureSpec, got: profile_pb2.Distinct, rows: Integers, _: int, __: bool) -> None:
        true = len(np.unique(self._with_text(spec, rows)[1]))
        error = 5 * 1.04 / math.sqrt(2 ** _option(spec, "precision")) * true
        # Of a few values, two may share a register.
        slack = error + (3 if true > 1 else 0.1 * true)
        self._is.equal("estimate is near", (got.estimate, True), (got.estimate, abs(got.estimate - true) <= slack))


def _quantile(bins: Floats, edges: Floats, low: float, high: float, probability: float) -> float:
    bounds = np.concatenate(([min(low, edges[0])], edges, [max(high, edges[-1])]))
    reached = np.cumsum(bins)
    target = probability * reached[-1]
    at = min(int(np.searchsorted(reached, target)), len(bins) - 1)
    inside = (target - (reached[at] - bins[at])) / bins[at] if bins[at] > 0 else 0.0
    return float(min(max(bounds[at] + (bounds[at + 1] - bounds[at]) * inside, low), high))


def _edges(bins: Any) -> Floats:
    if bins.scale == "explicit":
        return np.array(bins.edges)
    spaced = np.geomspace if bins.scale == "log" else np.linspace
    return np.asarray(spaced(bins.min, bins.max, bins.count + 1))


def _option(spec: FeatureSpec, name: str) -> Any:
    return getattr(spec.options, name)


def _numpy(column: Any) -> NDArray[Any]:
    array: NDArray[Any] = column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()
    return array


def _text_column(table: pa.Table, name: str) -> pa.Array:
    column = table[name].combine_chunks()
    if pa.types.is_floating(column.type):
        texts = [None if v is None else str(int(v)) if v.is_integer() else repr(v) for v in column.to_pylist()]
        return pa.array(texts, pa.large_string())
    return column.cast(pa.large_string())


def _codes(column: pa.Array) -> tuple[Integers, list[str]]:
    encoded = column.dictionary_encode()
    return _numpy(encoded.indices.fill_null(-1)).astype(np.int64), encoded.dictionary.to_pylist()


def _times(column: pa.ChunkedArray) -> tuple[Integers, NDArray[np.bool_]]:
    """Nanoseconds since 1970, and whether the service takes such a time."""
    if not pa.types.is_timestamp(column.type):
        raise SystemExit(f"event_time: must be a timestamp column, is {column.type}")
    per_second = TICKS[column.type.unit]
    ticks = _numpy(column.cast(pa.int64()).fill_null(0))
    seconds = ticks // per_second
    valid = _numpy(column.is_valid()).astype(np.bool_)
    valid &= (seconds >= -9_223_372_036) & (seconds <= int(time.time()) + 300)
    seconds = np.where(valid, seconds, 0)
    return seconds * NS + ticks % per_second * (NS // per_second), valid


def compare_all(address: str, schema: Schema, events: Events, console: Console, *, others: bool) -> Comparison:
    """Reads every user of `events` from the service and compares."""
    comparison = Comparison()
    oracle = Oracle(schema, events, comparison)
    unlimited = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, unlimited) as channel, Progress(console=console, transient=True) as progress:
        profiles = profile_service_grpc.ProfileServiceStub(channel)
        if not others:
            status = admin_service_pb2_grpc.AdminServiceStub(channel).GetStatus(
                admin_service_pb2.GetStatusRequest(), timeout=30
            )
            comparison.where = "status"
            comparison.equal("event_count", status.event_count, len(events))
            comparison.equal("user_count", status.user_count, len(events.users))
            oracle.compare("population", _population(profiles, len(events)), np.arange(len(events)), population=True)
        bar = progress.add_task("comparing users", total=len(events.users))
        users = list(events.by_user())
        for start in range(0, len(users), USERS_A_READ):
            page = users[start : start + USERS_A_READ]
            request = profile_service_pb2.BatchGetProfilesRequest(user_ids=[user for user, _ in page])
            answer = profiles.BatchGetProfiles(request, timeout=60)
            found = {profile.user_id: profile for profile in answer.profiles}
            for user, rows in page:
                comparison.where = f"user {user}"
                if user in found:
                    oracle.compare(f"user {user}", found[user], rows)
                else:
                    comparison.fail("has no profile")
            progress.advance(bar, len(page))
    return comparison


def _population(profiles: Any, event_count: int) -> profile_pb2.Profile:
    """The population, once it holds the events; it may be some seconds old."""
    deadline = time.monotonic() + POPULATION_WAIT_S
    while True:
        population: profile_pb2.Profile = profiles.GetPopulation(profile_service_pb2.GetPopulationRequest(), timeout=30)
        if population.event_count == event_count or time.monotonic() > deadline:
            return population
        time.sleep(0.1)


def main() -> int:
    """Compares, prints what came of it, and returns the exit status."""
    parser = argparse.ArgumentParser(description="Compares every profile of a running service with its input files.")
    parser.add_argument(
        "--file", type=Path, action="append", required=True, help="Parquet; repeat in the order of ingestion"
    )
    parser.add_argument(
        "--schema", default="retail", help="the schema that the service runs: a shipped one's name, or a file"
    )
    parser.add_argument("--address", default="127.0.0.1:50051", help="where the service's gRPC listens")
    parser.add_argument(
        "--others", action="store_true", help="the service holds other events, too: leave totals and population out"
    )
    given = parser.parse_args()
    console = Console(stderr=True)
    schema = load_schema(given.schema)
    events = load_events(given.file, schema)
    if not len(events):
        print("none of the rows is a valid event")
        return 1
    started = time.monotonic()
    comparison = compare_all(given.address, schema, events, console, others=given.others)
    print(f"events           {len(events):,} valid of {events.row_count:,} rows")
    print(f"users compared   {len(events.users):,} in {time.monotonic() - started:.1f} s")
    print(f"values compared  {comparison.values:,}")
    print(f"largest error    {comparison.largest_error:.3g} ({comparison.largest_at or 'none'})")
    print(f"mismatches       {comparison.mismatches:,}")
    for mismatch in comparison.shown:
        print(f"  {mismatch}")
    return 1 if comparison.mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
