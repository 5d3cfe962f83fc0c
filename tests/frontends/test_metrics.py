"""What is counted comes out in Prometheus' text format, under documented names."""

from __future__ import annotations

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from profile_service.frontends import metrics as subject
from profile_service.frontends.metrics import LATENCY_BUCKETS_S, Metrics
from userprofile.v1.admin_service_pb2 import GetStatusResponse

GET = "userprofile.v1.ProfileService/GetProfile"


def test_a_call_is_counted_by_method_protocol_and_code_and_timed() -> None:
    metrics = Metrics()
    metrics.call(GET, "grpc", grpc.StatusCode.OK, 0.0012)
    metrics.call(GET, "grpc", grpc.StatusCode.OK, 0.3)
    metrics.call(GET, "rest", grpc.StatusCode.NOT_FOUND, 0.00005)
    found = samples(metrics)
    assert found["profile_service_calls_total", ("OK", GET, "grpc")] == 2
    assert found["profile_service_calls_total", ("NOT_FOUND", GET, "rest")] == 1
    assert found["profile_service_call_duration_seconds_count", (GET, "grpc")] == 2
    assert found["profile_service_call_duration_seconds_sum", (GET, "grpc")] == pytest.approx(0.3012)
    assert found["profile_service_call_duration_seconds_bucket", ("0.0025", GET, "grpc")] == 1
    assert found["profile_service_call_duration_seconds_bucket", ("0.0001", GET, "rest")] == 1


def test_the_buckets_reach_from_a_tenth_of_a_millisecond_to_ten_seconds() -> None:
    assert (LATENCY_BUCKETS_S[0], LATENCY_BUCKETS_S[-1]) == (0.0001, 10.0)
    assert list(LATENCY_BUCKETS_S) == sorted(LATENCY_BUCKETS_S)


def test_events_are_counted_by_what_became_of_them() -> None:
    metrics = Metrics()
    metrics.events_accepted(7)
    metrics.events_accepted(3)
    metrics.events_duplicate(2)
    metrics.attributes_ignored(5)
    found = samples(metrics)
    assert found["profile_service_events_accepted_total", ()] == 10
    assert found["profile_service_events_duplicate_total", ()] == 2
    assert found["profile_service_attributes_ignored_total", ()] == 5


def test_what_callers_send_cannot_make_new_series() -> None:
    metrics = Metrics()
    before = metrics.render().count(b"\n")
    metrics.events_rejected("user_id", 2)
    metrics.events_rejected("attributes.price")
    metrics.events_rejected("attributes.x" * 100)
    metrics.events_rejected("surprise")
    metrics.events_rejected("")
    found = samples(metrics)
    assert found["profile_service_events_rejected_total", ("user_id",)] == 2
    assert found["profile_service_events_rejected_total", ("attributes",)] == 2
    assert found["profile_service_events_rejected_total", ("event",)] == 2
    assert metrics.render().count(b"\n") == before


def test_shards_are_read_when_a_scrape_asks() -> None:
    metrics = Metrics()
    shards = [
        GetStatusResponse.ShardStatus(shard_id=0, user_count=10, state_bytes=1_000, queued_bytes=5, event_count=99),
        GetStatusResponse.ShardStatus(shard_id=1, user_count=32, duplicate_count=4, cpu_seconds=1.5),
    ]
    metrics.watch_shards(lambda: shards)
    found = samples(metrics)
    assert found["profile_service_users", ()] == 42
    assert found["profile_service_bytes_per_user", ()] == 1_000 / 42
    assert found["profile_service_shard_users", ("1",)] == 32
    assert found["profile_service_shard_state_bytes", ("0",)] == 1_000
    assert found["profile_service_shard_queued_bytes", ("0",)] == 5
    assert found["profile_service_shard_events_total", ("0",)] == 99
    assert found["profile_service_shard_duplicates_total", ("1",)] == 4
    assert found["profile_service_shard_cpu_seconds_total", ("1",)] == 1.5
    shards.pop()
    assert ("profile_service_shard_users", ("1",)) not in samples(metrics)


def test_what_a_recovery_would_cost_and_how_a_shard_does_are_there_to_be_watched() -> None:
    metrics = Metrics()
    serving = GetStatusResponse.ShardStatus(
        shard_id=0, state="serving", log_position=900, snapshot_position=600, log_bytes=1 << 20
    )
    serving.snapshot_time.FromMilliseconds(1_500)
    recovering = GetStatusResponse.ShardStatus(
        shard_id=1, state="recovering", recovery_progress=0.43, standby_state="in sync"
    )
    metrics.watch_shards(lambda: [serving, recovering])
    found = samples(metrics)
    assert found["profile_service_shard_replay_bytes", ("0",)] == 300
    assert found["profile_service_shard_log_bytes", ("0",)] == 1 << 20
    assert found["profile_service_shard_snapshot_timestamp_seconds", ("0",)] == 1.5
    assert found["profile_service_shard_snapshot_timestamp_seconds", ("1",)] == 0
    assert found["profile_service_shard_recovery_progress", ("1",)] == 0.43
    assert [found["profile_service_shard_standby_in_sync", (shard,)] for shard in ("0", "1")] == [0, 1]
    states = {labels: value for (name, labels), value in found.items() if name == "profile_service_shard_state"}
    assert [labels for labels, value in states.items() if value] == [("0", "serving"), ("1", "recovering")]
    assert len(states) == 2 * len(subject.SHARD_STATES)


def test_before_anything_is_known_there_are_no_users() -> None:
    found = samples(Metrics())
    assert found["profile_service_users", ()] == 0
    assert found["profile_service_bytes_per_user", ()] == 0


def test_two_frontends_in_one_process_count_apart() -> None:
    one, two = Metrics(), Metrics()
    one.events_accepted(1)
    assert samples(two)["profile_service_events_accepted_total", ()] == 0


def test_every_series_is_documented_at_the_top_of_the_module() -> None:
    metrics = Metrics()
    metrics.watch_shards(lambda: [GetStatusResponse.ShardStatus()])
    metrics.call(GET, "grpc", grpc.StatusCode.OK, 1.0)
    assert subject.__doc__ is not None
    for family in text_string_to_metric_families(metrics.render().decode()):
        name = family.name + ("_total" if family.type == "counter" else "")
        assert name in subject.__doc__
        assert family.documentation


def samples(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    """(name, label values by label name) -> value, as Prometheus' own parser reads the text."""
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }
