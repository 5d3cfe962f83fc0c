"""The benchmarks at tiny sizes: they run to their end, check their totals, and say what was promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import run


def bench(name: str, tmp_path: Path, *flags: str) -> dict[str, Any]:
    """The JSON of a benchmark, which has also drawn itself and has cleaned up behind itself."""
    disk, plot = tmp_path / "disk", tmp_path / "plot.svg"
    done = run("bench", name, "--data-dir", str(disk), "--plot", str(plot), "--seed", "7", "--json", *flags)
    assert done.returncode == 0, done.stderr
    assert list(disk.iterdir()) == []
    drawn = plot.read_text()
    assert drawn.startswith("<svg ")
    assert drawn.endswith("</svg>\n")
    assert "nan" not in drawn
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["benchmark"] == name
    assert result["verified"] is True
    assert {"processor", "memory", "kernel", "python", "ray", "grpcio"} <= set(result["machine"])
    assert " on " in result["disk"]
    return result


def test_ingest_compares_sync_modes_and_peers_in_turns(tmp_path: Path) -> None:
    flags = ("--events", "4000", "--users", "100", "--batch", "500", "--rounds", "2", "--steady-s", "0.5", "--peers")
    result = bench("ingest", tmp_path, *flags)
    assert result["counted_events"] == {"always": 12_000, "never": 12_000, "direct": 12_000}
    assert list(result["sync"]) == ["always", "never"]
    for figures in (result, result["direct"], *result["sync"].values()):
        assert figures["events_per_second"] > 0
        assert figures["server_cpu_us_per_event"] > 0
    assert result["events_per_second"] == result["sync"]["always"]["events_per_second"]
    assert all(len(found["rounds"]) == 2 for found in (result["direct"], *result["sync"].values()))
    assert result["durability"]["rate_ratio"] > 0
    assert result["floor_events_per_second"] > 0
    assert set(result["kernels_us_per_event"]) == {"scan", "gather", "decode", "apply"}
    steady = result["acknowledgement"]
    assert 0 < steady["p50_ms"] <= steady["p99_ms"] <= steady["p99.9_ms"] <= steady["max_ms"]
    assert result["users_compared"] == 100
    for peer in ("Python dicts", "Redis, packed rows"):
        assert result["peers"][peer]["events_per_second"] > 0
        assert result["peers"][peer]["server_cpu_us_per_event"] > 0
    bounds = ["1,000,000 events/s", "1 µs an event", "1,500,000 events/s", "0.75 µs an event", "0.25 µs an event"]
    assert [row["bound"] for row in result["costs"]] == bounds


@pytest.mark.long
def test_recovery_says_its_phases(tmp_path: Path) -> None:
    flags = ("--users", "500", "--history", "2", "--events", "1000", "--batch", "100", "--rounds", "2")
    result = bench("recovery", tmp_path, *flags)
    assert set(result["phases_s"]) == {"code", "kernels", "snapshot", "log", "serving"}
    assert len(result["rounds"]) == 2
    for one in (result, *result["rounds"]):
        assert sum(one["phases_s"].values()) == pytest.approx(one["process_to_serving_s"], abs=0.1)
        assert 0 < one["process_to_serving_s"] <= one["process_to_read_s"] <= one["kill_to_read_s"]
    assert result["snapshot_bytes"] > 500 * 100
    assert result["replayed_bytes"] > 1000 * 100
    assert result["page_cache"] == "warm"


@pytest.mark.long
def test_reads_are_measured_beside_an_echo_and_a_peer(tmp_path: Path) -> None:
    flags = ("--users", "300", "--history", "2", "--turn-s", "0.2", "--rounds", "2", "--steady-s", "0.5")
    result = bench("read", tmp_path, *flags)
    assert result["events"] == 600
    peer = "peer: FastAPI + Redis"
    assert list(result["targets"]) == ["bare echo", "owner", "frontend", "frontend, REST", peer]
    for figures in result["targets"].values():
        assert figures["reads_per_second"] > 0
        assert figures["latency_ms"] > 0
        assert len(figures["rounds"]) == 2
    for ratio in ("direct_latency", "direct_cpu", "direct_rate", "frontend_rate", "frontend_latency"):
        assert result[f"{ratio}_ratio_to_echo"] > 0
    assert result["rest_rate_ratio_to_fastapi_redis"] > 0
    assert set(result["steady"]) == {*result["targets"], "frontend, 100 profiles", "owner, 100 profiles"}
    for figures in result["steady"].values():
        assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["p99.9_ms"] <= figures["max_ms"]
    assert result["json_bytes"] > result["profile_bytes"] > 1000
    assert len(result["costs"]) == 5


@pytest.mark.long
def test_mixed_work_shows_how_soon_events_are_readable_and_what_each_side_leaves_the_other(tmp_path: Path) -> None:
    flags = ("--users", "500", "--batch", "100", "--share", "0.2", "--reads", "50", "--probes", "20", "--at-once", "8")
    result = bench("mixed", tmp_path, *flags, "--steady-s", "1")
    said = {
        "nothing else": {"freshness"},
        "half load": {"freshness", "read", "acknowledgement"},
        "events at full rate": {"read"},
        "reads at full rate": {"read", "acknowledgement"},
    }
    for name, quantiles in said.items():
        found = result["stretches"][name]
        assert {key for key, value in found.items() if isinstance(value, dict)} == quantiles
        for key in quantiles:
            assert 0 < found[key]["p50_ms"] <= found[key]["p99_ms"] <= found[key]["p99.9_ms"] <= found[key]["max_ms"]
    assert result["ingest_rate_ratio_beside_reads"] > 0
    assert result["read_rate_ratio_beside_ingest"] > 0
    assert [row["bound"] for row in result["costs"]] == ["10 ms", "–", "–"]


@pytest.mark.long
def test_snapshot_tells_acknowledgements_apart(tmp_path: Path) -> None:
    flags = ("--users", "500", "--rate", "5000", "--batch", "50", "--quiet-s", "1", "--rounds", "2")
    result = bench("snapshot", tmp_path, *flags)
    for stretch in ("without", "during", "after"):
        figures = result[stretch]
        assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["p99.9_ms"] <= figures["max_ms"]
    assert result["without"]["batches"] >= 100
    differences = []
    for one in result["snapshots"]:
        slowest = max(one["during_p99_ms"], one["after_p99_ms"])
        differences.append(slowest - one["without_p99_ms"])
    assert result["p99_difference_ms"] == pytest.approx(sum(differences) / 2)
    assert result["worst_p99_difference_ms"] == max(differences)
    assert len(differences) == 2
    assert all(one["seconds"] > 0 and one["bytes"] > 500 * 100 for one in result["snapshots"])


@pytest.mark.long
def test_scale_tells_the_waits_of_each_change_apart(tmp_path: Path) -> None:
    flags = ("--users", "500", "--rate", "2000", "--batch", "50", "--reads", "50", "--quiet-s", "1")
    result = bench("scale", tmp_path, *flags, "--shards", "1", "--shards", "2")
    (change,) = result["changes"]
    assert (change["from"], change["to"], change["partitions"]) == (1, 2, 128)
    # Every row of a partition that moves goes at least once.
    assert change["rows"] >= 200
    assert change["bytes"] > 500 * change["rows"]
    for found in (result["quiet"], change):
        for name in ("write", "read"):
            assert 0 < found[name]["p50_ms"] <= found[name]["p99_ms"] <= found[name]["max_ms"]
    assert result["worst_ms"] == {name: change[name]["max_ms"] for name in ("write", "read")}
    assert len(result["costs"]) == 2


@pytest.mark.long
def test_a_soak_keeps_exact_totals_and_tells_growth_and_drift(tmp_path: Path) -> None:
    flags = ("--minutes", "0.1", "--users", "500", "--batch", "100", "--share", "0.2", "--reads", "50")
    result = bench("soak", tmp_path, *flags, "--snapshot-interval-s", "1")
    assert result["events"] == pytest.approx(6 * result["events_per_second"], rel=0.1)
    assert result["read"]["requests"] == 300
    assert result["snapshots"] > 2
    for name in ("acknowledgement", "read"):
        figures = result[name]
        assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["p99.9_ms"] <= figures["max_ms"]
        assert len(figures["p99_ms_by_span"]) >= 9
    assert {name.split()[0] for name in result["memory"]["processes"]} >= {"serve", "FrontendActor", "ShardActor"}
    assert len(result["costs"]) == 3


@pytest.mark.long
def test_producers_without_restraint_are_slowed_and_not_served_with_growing_memory(tmp_path: Path) -> None:
    mib = 1 << 20
    windows = ("--stream-window-bytes", str(16 * mib), "--owner-window-bytes", str(4 * mib))
    load = ("--seconds", "2", "--producers", "4", "--users", "1000", "--batch", "1000")
    result = bench("flood", tmp_path, *load, *windows, "--shard-queue-bytes", str(4 * mib))
    message = 1000 * 200
    bound = 4 * (4 * mib + 16 * mib + 2 * message) + result["shards"] * (8 * mib + message)
    assert result["growth_bytes"] <= bound
    assert all(held <= 4 * mib + 16 * mib + 8 * mib for held in result["unacknowledged_bytes"])
    assert result["events"] > 0


@pytest.mark.long
def test_memory_is_the_growth_of_processes_beside_peers(tmp_path: Path) -> None:
    flags = ("--users", "20000", "--service-users", "5000", "--peer-users", "5000", "--history", "2", "--batch", "500")
    result = bench("memory", tmp_path, *flags)
    (table,) = result["marketplace"]
    assert table["row_bytes"] == 1160
    # Pages that were there before, or come with others, make a difference among so few users.
    assert table["bytes_per_user"] == pytest.approx(1197, rel=0.2)
    # The texts, which a million users share, are many for so few.
    assert 1160 + 8 + 16 + 10 < table["state_bytes_per_user"] < 1300
    assert 1160 + 8 + 16 + 10 < result["service"]["status_bytes_per_user"] < 1300
    assert result["service"]["resident_growth_bytes"] > 0
    (preferences,) = result["preferences"]
    assert set(preferences["peers"]) == {"Python dicts", "Redis, packed rows"}
    assert preferences["peers"]["Python dicts"]["bytes_per_user"] > preferences["bytes_per_user"]
    assert [row["bound"] for row in result["costs"]] == ["1,200 bytes", "–"]


@pytest.mark.long
def test_growth_measures_the_same_at_every_size(tmp_path: Path) -> None:
    flags = ("--users", "200", "--users", "2000", "--events", "3000", "--batch", "500", "--rounds", "2")
    result = bench("growth", tmp_path, *flags, "--turn-s", "0.3")
    assert [one["users"] for one in result["sizes"]] == [200, 2000]
    for one in result["sizes"]:
        table, service = one["table"], one["service"]
        assert 0 < table["decode_us_per_event"] < table["cpu_us_per_event"]
        assert 0 < table["apply_us_per_event"] < table["cpu_us_per_event"]
        assert table["read_cpu_us"] > 0
        assert table["touch_us_per_event"] > 0
        assert 616 < table["state_bytes_per_user"] < 1000
        assert service["events_per_second"] > 0
        assert service["server_cpu_us_per_event"] > 0
        assert service["server_cpu_us_per_read"] > 0
        assert len(service["rounds"]) == 2
    assert len(result["costs"]) == 2


@pytest.mark.long
def test_stores_measures_a_place_and_keeps_all_of_it_when_its_shards_become_more(tmp_path: Path) -> None:
    flags = (
        "--events",
        "20000",
        "--users",
        "100",
        "--batch",
        "500",
        "--rounds",
        "1",
        "--rate",
        "1000",
        "--reads",
        "20",
    )
    chosen = ("--store", "redis-always", "--steady-s", "0.5", "--shards", "1", "--scaled-shards", "2")
    result = bench("stores", tmp_path, *flags, *chosen)
    (found,) = result["stores"].values()
    assert found["events_per_second"] > 0
    assert found["redis_cpu_us_per_event"] > 0
    for waits in ("acknowledged_ms", "read_ms", "fresh_ms"):
        assert 0 < found[waits]["p50"] <= found[waits]["p99"]
    assert found["recovery"]["read_s"] > 0
    assert found["recovery"]["written_s"] > 0
    assert found["resident_bytes"]["service"] > found["resident_bytes"]["redis"] > 0
    assert found["scaled"]["scale_s"] > 0
    assert found["scaled"]["events_per_second"] > 0
