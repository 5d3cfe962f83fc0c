"""What a frontend counts, in Prometheus' text format at `/metrics`.

    profile_service_calls_total{method,protocol,code}                 calls answered, by gRPC status code
    profile_service_call_duration_seconds{method,protocol}            how long they took, a histogram
    profile_service_events_accepted_total                             events that became durable and readable
    profile_service_events_rejected_total{field}                      events refused, by the field at fault
    profile_service_events_duplicate_total                            events of batches that were counted before
    profile_service_attributes_ignored_total                          attributes that the schema does not declare
    profile_service_shard_users{shard}                                users that a shard holds
    profile_service_shard_events_total{shard}                         events that a shard has counted
    profile_service_shard_duplicates_total{shard}                     events that a shard has refused as duplicates
    profile_service_shard_state_bytes{shard}                          bytes of rows, index and strings in use
    profile_service_shard_queued_bytes{shard}                         event bytes that wait in a shard's bounded queue
    profile_service_shard_resident_bytes{shard}                       resident memory of a shard's process
    profile_service_shard_cpu_seconds_total{shard}                    CPU time of a shard's process
    profile_service_shard_state{shard,state}                          1 for the state that a shard is in, 0 for the rest
    profile_service_shard_standby_in_sync{shard}                      1 where a standby has everything, 0 elsewhere
    profile_service_shard_recovery_progress{shard}                    how much of a recovery is done, 0 to 1
    profile_service_shard_log_bytes{shard}                            bytes of log on disk
    profile_service_shard_replay_bytes{shard}                         bytes of log that a recovery would replay now
    profile_service_shard_snapshot_timestamp_seconds{shard}           when its last snapshot was published, 0 before
    profile_service_users                                             users over all shards
    profile_service_bytes_per_user                                    bytes of state in use over all shards, by users

What is counted here is the frontend's own; what is known of shards is read when a scrape asks (`watch_shards`). Labels
take only values from closed lists, so that no caller can make the number of series grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of what `Metrics.render` gives."""

LATENCY_BUCKETS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""A read from memory takes about a millisecond, a durable write a few; the ends catch what goes wrong."""

SHARD_STATES = ("serving", "recovering", "full", "stalled", "failed", "unreachable")
"""What a shard can be in."""

EVENT_FIELDS = ("user_id", "type", "time", "event_id", "attributes")
"""The fields that a refused event can be counted under; anything else is "event"."""


# A second series beside each counter, of when it began, is of use in OpenMetrics' format only.
disable_created_metrics()  # type: ignore[no-untyped-call]


class ShardReading(Protocol):
    """What is known of one shard; `GetStatusResponse.ShardStatus` has these fields."""

    @property
    def shard_id(self) -> int: ...
    @property
    def user_count(self) -> int: ...
    @property
    def event_count(self) -> int: ...
    @property
    def duplicate_count(self) -> int: ...
    @property
    def state_bytes(self) -> int: ...
    @property
    def queued_bytes(self) -> int: ...
    @property
    def resident_bytes(self) -> int: ...
    @property
    def cpu_seconds(self) -> float: ...
    @property
    def state(self) -> str: ...
    @property
    def standby_state(self) -> str: ...
    @property
    def recovery_progress(self) -> float: ...
    @property
    def log_bytes(self) -> int: ...
    @property
    def log_position(self) -> int: ...
    @property
    def snapshot_position(self) -> int: ...
    @property
    def snapshot_time(self) -> Timestamp: ...


class Metrics:
    """A frontend's metrics, in a registry of their own. The counting methods are for the event loop's thread.

    >>> metrics = Metrics()
    >>> metrics.call("userprofile.v1.ProfileService/GetProfile", "grpc", grpc.StatusCode.OK, 0.0012)
    >>> b'code="OK"' in metrics.render()
    True
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._calls = Counter(
            "profile_service_calls",
            "Calls answered, by gRPC status code.",
            ("method", "protocol", "code"),
            registry=self.registry,
        )
        self._duration = Histogram(
            "profile_service_call_duration_seconds",
            "Seconds from a call's arrival to its answer.",
            ("method", "protocol"),
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._accepted = self._counter("events_accepted", "Events that became durable and readable.")
        self._rejected = Counter(
            "profile_service_events_rejected",
            "Events refused, by the field at fault.",
            ("field",),
            registry=self.registry,
        )
        self._duplicate = self._counter("events_duplicate", "Events of batches that had been counted before.")
        self._ignored = self._counter("attributes_ignored", "Attributes of events that the schema does not declare.")
        self._shards = _Readings()
        self.registry.register(self._shards)
        # `labels()` builds a key and takes a lock; what a call needs is looked up here instead.
        self._bound_calls: dict[tuple[str, str, grpc.StatusCode], Counter] = {}
        self._bound_durations: dict[tuple[str, str], Histogram] = {}
        self._bound_rejected = {field: self._rejected.labels(field) for field in (*EVENT_FIELDS, "event")}

    def call(self, method: str, protocol: str, code: grpc.StatusCode, seconds: float) -> None:
        """Counts an answered call: method "userprofile.v1.ProfileService/GetProfile", protocol "grpc" or "rest"."""
        key = (method, protocol, code)
        calls = self._bound_calls.get(key)
        if calls is None:
            calls = self._bound_calls[key] = self._calls.labels(method, protocol, code.name)
        calls.inc()
        duration = self._bound_durations.get(key[:2])
        if duration is None:
            duration = self._bound_durations[key[:2]] = self._duration.labels(method, protocol)
        duration.observe(seconds)

    def events_accepted(self, count: int) -> None:
        """Counts events that are durable and readable."""
        self._accepted.inc(count)

    def events_rejected(self, field: str, count: int = 1) -> None:
        """Counts refused events by the field at fault; a path such as "attributes.price" counts as "attributes"."""
        bound = self._bound_rejected.get(field)
        if bound is None:
            bound = self._bound_rejected.get(field.partition(".")[0]) or self._bound_rejected["event"]
        bound.inc(count)

    def events_duplicate(self, count: int) -> None:
        """Counts events that were not counted again."""
        self._duplicate.inc(count)

    def attributes_ignored(self, count: int) -> None:
        """Counts attributes that the schema does not declare."""
        self._ignored.inc(count)

    def watch_shards(self, read: Callable[[], Iterable[ShardReading]]) -> None:
        """From now on each scrape asks `read` what is known of the shards; it answers at once, from what is at hand."""
        self._shards.read_shards = read

    def render(self) -> bytes:
        """Everything, in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(f"profile_service_{name}", documentation, registry=self.registry)


class _Readings(Collector):
    """Series of what others count, made anew from their latest readings at each scrape."""

    def __init__(self) -> None:
        self.read_shards: Callable[[], Iterable[ShardReading]] = tuple

    def collect(self) -> Iterator[Metric]:
        shards = tuple(self.read_shards())
        for name, documentation, value in _SHARD_GAUGES:
            gauge = GaugeMetricFamily(f"profile_service_shard_{name}", documentation, labels=("shard",))
            for shard in shards:
                gauge.add_metric((str(shard.shard_id),), value(shard))
            yield gauge
        for name, documentation, value in _SHARD_COUNTERS:
            counter = CounterMetricFamily(f"profile_service_shard_{name}", documentation, labels=("shard",))
            for shard in shards:
                counter.add_metric((str(shard.shard_id),), value(shard))
            yield counter
        state = GaugeMetricFamily(
            "profile_service_shard_state",
            "1 for the state that the shard is in, 0 for the others.",
            labels=("shard", "state"),
        )
        for shard in shards:
            for name in SHARD_STATES:
                state.add_metric((str(shard.shard_id), name), shard.state == name)
        yield state
        total = sum(shard.user_count for shard in shards)
        yield GaugeMetricFamily("profile_service_users", "Users over all shards.", value=total)
        state_bytes = sum(shard.state_bytes for shard in shards)
        yield GaugeMetricFamily(
            "profile_service_bytes_per_user",
            "Bytes of rows, index and strings in use over all shards, divided by the users; 0 without users.",
            value=state_bytes / total if total else 0.0,
        )


_SHARD_GAUGES: tuple[tuple[str, str, Callable[[ShardReading], float]], ...] = (
    ("users", "Users that the shard holds.", lambda shard: shard.user_count),
    ("state_bytes", "Bytes of rows, index and strings in use.", lambda shard: shard.state_bytes),
    ("queued_bytes", "Event bytes that wait in the shard's bounded queue.", lambda shard: shard.queued_bytes),
    ("resident_bytes", "Resident memory of the shard's process.", lambda shard: shard.resident_bytes),
    (
        "standby_in_sync",
        "1 where the shard's standby has everything that is acknowledged, 0 elsewhere.",
        lambda shard: shard.standby_state == "in sync",
    ),
    ("recovery_progress", "How much of a recovery is done, 0 to 1.", lambda shard: shard.recovery_progress),
    ("log_bytes", "Bytes of the shard's log on disk.", lambda shard: shard.log_bytes),
    (
        "replay_bytes",
        "Bytes of log that a recovery would replay now.",
        lambda shard: shard.log_position - shard.snapshot_position,
    ),
    (
        "snapshot_timestamp_seconds",
        "When the shard's last snapshot was published, in seconds since 1970; 0 before the first.",
        lambda shard: shard.snapshot_time.ToNanoseconds() / 1e9,
    ),
)
_SHARD_COUNTERS: tuple[tuple[str, str, Callable[[ShardReading], float]], ...] = (
    ("events", "Events that the shard has counted.", lambda shard: shard.event_count),
    ("duplicates", "Events that the shard has refused as duplicates.", lambda shard: shard.duplicate_count),
    ("cpu_seconds", "CPU time of the shard's process.", lambda shard: shard.cpu_seconds),
)
