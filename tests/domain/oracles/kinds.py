"""One naive oracle a kind, by the contract's definitions alone."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from userprofile.v1 import profile_pb2

REL = 1e-4
SMALLEST = sys.float_info.min / REL
"""Below it float64 loses digits."""
NS = 10**9


@dataclass
class Seen:
    """An event as a feature sees it."""

    time_ns: int
    weight: float
    value: Any


def close(what: str, actual: float, expected: float, floor: float = 0.0) -> None:
    """Equal to one in ten thousand, or both below `floor`, or too small for a float64 to tell."""
    assert math.isclose(actual, expected, rel_tol=REL, abs_tol=max(floor, SMALLEST)), (
        f"{what}: {actual!r}, expected {expected!r}"
    )


@dataclass
class Oracle(ABC):
    """What every kind's oracle has."""

    options: Any
    half_life_s: float | None
    seen: list[Seen] = field(default_factory=list)

    def decayed(self, read_ns: int) -> list[tuple[float, Any]]:
        """Each event's weight at the read, and its value."""
        return [(s.weight * self.decay(s.time_ns, read_ns), s.value) for s in self.seen]

    def decay(self, time_ns: int, read_ns: int) -> float:
        if self.half_life_s is None:
            return 1.0
        return float(2.0 ** -((read_ns - time_ns) / (self.half_life_s * NS)))

    def newest_scale(self, read_ns: int) -> float:
        """The largest decay factor: what is far below it may be lost in 32 bits."""
        return max((self.decay(s.time_ns, read_ns) for s in self.seen), default=1.0)

    @abstractmethod
    def check(self, name: str, message: profile_pb2.Feature, read_ns: int, population: list[Oracle]) -> None:
        """Raises AssertionError for the first number of `message` that the events seen do not give."""


class CounterOracle(Oracle):
    def check(self, name: str, message: profile_pb2.Feature, read_ns: int, population: list[Oracle]) -> None:
        if self.half_life_s is None:
            assert message.counter.value == len(self.seen), name
        else:
            close(name, message.counter.value, math.fsum(w for w, _ in self.decayed(read_ns)))


class CategoricalOracle(Oracle):
    def weights(self, read_ns: int) -> dict[str, float]:
        answer = dict.fromkeys([*self.options.values, "other"], 0.0)
        for weight, value in self.decayed(read_ns):
            answer[value if value in self.options.values else "other"] += weight
        return answer

    def check(self, name: str, message: profile_pb2.Feature, read_ns: int, population: list[Oracle]) -> None:
        weights = self.weights(read_ns)
        total, strength = math.fsum(weights.values()), self.options.prior_strength
        prior = dict.fromkeys(weights, 1 / len(weights))
        if self.options.prior == "population":
            everyone = dict.fromkeys(weights, 0.0)
            for oracle in population:
                assert isinstance(oracle, CategoricalOracle)
                for value, weight in oracle.weights(read_ns).items():
                    everyone[value] += weight
            mass = math.fsum(everyone.values())
            prior = {value: (weight + 1) / (mass + len(everyone)) for value, weight in everyone.items()}
        answer = message.categorical
        tiny = self.newest_scale(read_ns) * 1e-30
        close(f"{name}.weight", answer.weight, total, tiny)
        close(f"{name}.confidence", answer.confidence, total / (total + strength), tiny)
        assert sorted(v.value for v in answer.values) == sorted(weights), name
        previous, order = math.inf, {value: place for place, value in enumerate(weights)}
        ranks = [(-entry.likelihood, order[entry.value]) for entry in answer.values]
        assert ranks == sorted(ranks), f"{name}: of equally likely values the schema's first comes first, other last"
        for entry in answer.values:
            likelihood = (weights[entry.value] + strength * prior[entry.value]) / (total + strength)
            close(f"{name}.{entry.value}.weight", entry.weight, weights[entry.value], tiny)
            # What a tiny weight may be off by, as a share of all.
            share = tiny / (total + strength)
            close(f"{name}.{entry.value}.likelihood", entry.likelihood, likelihood, share)
            close(f"{name}.{entry.value}.lift", entry.lift, likelihood / prior[entry.value], share / prior[entry.value])
            assert entry.likelihood <= previous, f"{name}: the likeliest come first"
            previous = entry.likelihood


class DistributionOracle(Oracle):
    def edges(self) -> list[float]:
        bins = self.options.bins
        if bins.scale == "explicit":
            return list(bins.edges)
        steps = [i / bins.count for i in range(1, bins.count)]
        if bins.scale == "log":
            inner = [bins.min * (bins.max / bins.min) ** step for step in steps]
        else:
            inner = [bins.min + (bins.max - bins.min) * step for step in steps]
        return [bins.min, *inner, bins.max]

    def check(self, name: str, message: profile_pb2.Feature, read_ns: int, population: list[Oracle]) -> None:
        answer, edges = message.distribution, list(message.distribution.histogram.edges)
        for actual, expected in zip(edges, self.edges(), strict=True):
            close(f"{name}.edges", actual, expected, 1e-12)
        if not self.seen:
            assert answer.weight == 0, name
            assert sum(answer.histogram.weights) == 0, name
            return
        # Relative to the newest event, so that nothing underflows however long ago all of it was.
        newest = max(s.time_ns for s in self.seen)
        relative = self.decayed(newest)
        total = math.fsum(w for w, _ in relative)
        scale = self.decay(newest, read_ns)
        low, high = min(s.value for s in self.seen), max(s.value for s in self.seen)
        mean = math.fsum(w * v for w, v in relative) / total
        variance = math.fsum(w * (v - mean) ** 2 for w, v in relative) / total
        spread = max(abs(low), abs(high), high - low)
        close(f"{name}.weight", answer.weight, total * scale)
        close(f"{name}.mean", answer.mean, mean, 1e-9 * spread)
        close(f"{name}.stddev", answer.stddev, math.sqrt(variance), 1e-6 * spread)
        assert (answer.min, answer.max) == (low, high), name
        histogram = [0.0] * (len(edges) + 1)
        for weight, value in relative:
            histogram[sum(edge <= value for edge in edges)] += weight
        for actual, expected in zip(answer.histogram.weights, histogram, strict=True):
            close(f"{name}.histogram", actual, expected * scale, 1e-30 * total * scale)
        assert [q.probability for q in answer.quantiles] == [0.05, 0.25, 0.5, 0.75, 0.95], name
        bounds = [min(low, edges[0]), *edges, max(high, edges[-1])]
        for quantile in answer.quantiles:
            # A probability on the border of two bins may fall to either, by rounding: both ends are right.
            nearby = [
                _quantile(histogram, bounds, quantile.probability * total * (1 + shift), low, high)
                for shift in (-1e-5, 0.0, 1e-5)
            ]
            slack = 1e-4 * max(abs(nearby[0]), abs(nearby[-1]), 1e-9 * spread)
            assert min(nearby) - slack <= quantile.value <= max(nearby) + slack, (
                f"{name}.quantile({quantile.probability}): {quantile.value}, expected {nearby}"
            )


def _quantile(histogram: list[float], bounds: list[float], target: float, low: float, high: float) -> float:
    before = 0.0
    for index, weight in enumerate(histogram):
        if weight > 0 and before + weight >= target:
            share = max(0.0, (target - before) / weight)
            value = bounds[index] + (bounds[index + 1] - bounds[index]) * min(1.0, share)
            return min(max(value, low), high)
        before += weight
    return high


class TopKOracle(Oracle):
    def check(self, name: str, message: profile_pb2.Feature, read_ns: int, population: list[Oracle]) -> None:
        # Relative to the newest event, as shares stay when all the weights have decayed to nothing.
        newest = max((s.time_ns for s in self.seen), default=read_ns)
        true: dict[str, float] = {}
        for weight, value in self.decayed(newest):
            true[value] = true.get(value, 0.0) + weight
        total, scale = math.fsum(true.values()), self.decay(newest, read_ns)
        answer = message.top_k
        close(f"{name}.weight", answer.weight, total * scale)
        listed = {entry.value for entry in answer.entries}
        assert len(listed) == len(answer.entries) <= self.options.k, name
        weights = [entry.weight for entry in answer.entries]
        assert weights == sorted(weights, reverse=True), name
        slack = REL * total
        for entry in answer.entries:
            most, least = entry.share * total, entry.share * total - entry.error / scale if scale > SMALLEST else 0.0
            assert most + slack >= true[entry.value] >= least - slack, (name, entry, true)
            close(f"{name}.{entry.value}", entry.weight, entry.share * total * scale, total * scale * 1e-30)
        if len(true) <= self.options.k:
            assert listed == set(true), name
            for entry in answer.entries:
                close(f"{name}.{entry.value}.share", entry.share, true[entry.value] / total, 1e-30)
                assert entry.error == 0, name
        for value, weight in true.items():
            assert value in listed or weight <= total / self.options.k + slack, f"{name}: {value} is missing"


class WindowCountOracle(Oracle):
    def check(self, name: str, message: profile_pb2.Feature, read_ns: int, population: list[Oracle]) -> None:
        bucket_ns = round(self.options.bucket * NS)
        last = read_ns // bucket_ns
        first = last - math.ceil(self.options.window / self.options.bucket)
        expected = sum(first < s.time_ns // bucket_ns <= last for s in self.seen)
        assert message.window_count.value == expected, f"{name}: {message.window_count.value}, expected {expected}"


def _newest_first(seen: list[Seen]) -> list[tuple[int, str]]:
    order = sorted(enumerate(seen), key=lambda item: (item[1].time_ns, item[0]), reverse=True)
    answer: dict[str, int] = {}
    for _, event in order:
        answer.setdefault(event.value, event.time_ns)
    return [(time_ns, value) for value, time_ns in answer.items()]


class LatestOracle(Oracle):
    def check(self, name: str, message: profile_pb2.Feature, read_ns: int, population: list[Oracle]) -> None:
        newest = _newest_first(self.seen)
        if newest:
            actual = message.latest.time.ToNanoseconds(), message.latest.value
            assert actual == newest[0], f"{name}: {actual}, expected {newest[0]}"
        else:
            assert not message.latest.value, name


class RecentOracle(Oracle):
    def check(self, name: str, message: profile_pb2.Feature, read_ns: int, population: list[Oracle]) -> None:
        actual = [(entry.time.ToNanoseconds(), entry.value) for entry in message.recent.entries]
        expected = _newest_first(self.seen)[: self.options.size]
        assert actual == expected, f"{name}: {actual}, expected {expected}"


class DistinctOracle(Oracle):
    def check(self, name: str, message: profile_pb2.Feature, read_ns: int, population: list[Oracle]) -> None:
        true = len({s.value for s in self.seen})
        error = 1.04 / math.sqrt(2**self.options.precision)
        estimate = message.distinct.estimate
        # Five standard errors, and two values that may share a register among very few.
        assert abs(estimate - true) <= 5 * error * true + 2 * (true > 1), f"{name}: {estimate}, of {true}"


KIND_ORACLES: dict[str, Callable[[Any, float | None], Oracle]] = {
    "counter": CounterOracle,
    "categorical": CategoricalOracle,
    "distribution": DistributionOracle,
    "top_k": TopKOracle,
    "window_count": WindowCountOracle,
    "latest": LatestOracle,
    "recent": RecentOracle,
    "distinct": DistinctOracle,
}
