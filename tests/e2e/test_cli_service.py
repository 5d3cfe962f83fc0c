"""The commands against the running service: files in, profiles out, and what was refused told by its row."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tests.e2e.serving import ServeProcess, run
from tests.e2e.stores import IN_BOTH_STORES
from userprofile.v1 import profile_pb2, profile_service_pb2, profile_service_pb2_grpc

NOW_S = 1_780_000_000


def profiles(service: ServeProcess, *user_ids: str) -> dict[str, profile_pb2.Profile]:
    with grpc.insecure_channel(service.grpc_address) as channel:
        stub = profile_service_pb2_grpc.ProfileServiceStub(channel)
        answer = stub.BatchGetProfiles(profile_service_pb2.BatchGetProfilesRequest(user_ids=user_ids), timeout=30)
    return {profile.user_id: profile for profile in answer.profiles}


def counted(service: ServeProcess, *user_ids: str) -> int:
    return sum(profile.event_count for profile in profiles(service, *user_ids).values())


def ingest(service: ServeProcess, *arguments: str | Path) -> dict[str, Any]:
    done = run("ingest", *map(str, arguments), "--address", service.grpc_address, "--json")
    assert done.returncode == 0, done.stderr
    tally: dict[str, Any] = json.loads(done.stdout)
    return tally


def cars(users: Sequence[str | None], **columns: Any) -> pa.Table:
    count = len(users)
    usual = {"user_id": users, "event_type": ["view"] * count, "event_time": [NOW_S] * count}
    return pa.table({**usual, "color": ["red"] * count, "price": [12_900.0] * count, **columns})


@IN_BOTH_STORES
@pytest.mark.parametrize("kind", ["parquet", "csv", "ndjson"])
def test_a_file_of_any_kind_becomes_profiles(service: ServeProcess, tmp_path: Path, kind: str) -> None:
    users = [f"{kind}-{i % 7}" for i in range(1_000)]
    table = cars(users, item_id=list(range(1_000)))
    path = tmp_path / f"events.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "csv":
        pa.csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    tally = ingest(service, path, "--batch", "64")
    assert (tally["read"], tally["accepted"], tally["rejected"], tally["reasons"]) == (1_000, 1_000, 0, [])
    assert counted(service, *sorted(set(users))) == 1_000
    profile = profiles(service, f"{kind}-0")[f"{kind}-0"]
    assert profile.features["recent_items"].recent.entries[0].value == "994", "a number in a column of texts is a text"
    assert profile.last_seen_time.seconds == NOW_S


def test_what_is_refused_is_told_by_reason_with_its_rows(service: ServeProcess, tmp_path: Path) -> None:
    prices = [12_900.0, float("nan"), 1.0, None, float("inf"), 5.0]
    table = cars(
        ["tally-1", "tally-1", None, "tally-1", "tally-1", "u" * 300], price=pa.array(prices, from_pandas=False)
    )
    types = pa.array(["view", "view", "view", "view", "view", "view"])
    good, odd = tmp_path / "a.parquet", tmp_path / "b.csv"
    pq.write_table(table.set_column(1, "event_type", types), good)
    odd.write_text(
        f"user_id,event_type,event_time,price\ntally-1,view,{NOW_S},cheap\ntally-1,buy,{NOW_S},1\n"
        f"tally-1,view,{NOW_S + 2**34},1\ntally-1\ntally-1,view,,1\ntally-1,view,{NOW_S},7\n"
    )
    tally = ingest(service, good, odd)
    assert tally["read"] == 12
    assert tally["accepted"] == counted(service, "tally-1") == 3
    assert tally["rejected"] == sum(reason["count"] for reason in tally["reasons"]) == 9
    told = {
        (Path(row["file"]).name, row["row"]): reason["field"] for reason in tally["reasons"] for row in reason["rows"]
    }
    assert told == {
        ("a.parquet", 2): "attributes.price", ("a.parquet", 5): "attributes.price",
        ("a.parquet", 3): "user_id", ("a.parquet", 6): "user_id",
        ("b.csv", 1): "attributes.price", ("b.csv", 2): "type",
        ("b.csv", 3): "time", ("b.csv", 4): "", ("b.csv", 5): "time",
    }  # fmt: skip
    assert all(reason["reason"] for reason in tally["reasons"])

    shown = run("ingest", str(odd), "--address", service.grpc_address, "--producer-id", "shown", "--strict")
    assert shown.returncode == 1, "strict"
    assert "1 event accepted, 5 refused" in shown.stdout
    assert "attributes.price" in shown.stdout


@IN_BOTH_STORES
def test_the_same_file_again_is_not_counted_again(service: ServeProcess, tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    pq.write_table(cars(["again"] * 500), path)
    assert ingest(service, path)["accepted"] == 500
    again = ingest(service, path)
    assert (again["sent"], again["accepted"], again["skipped"], again["unanswered"]) == (0, 0, 500, 0)
    assert counted(service, "again") == 500
    assert ingest(service, path, "--producer-id", "somebody-else")["accepted"] == 500
    assert counted(service, "again") == 1_000


@IN_BOTH_STORES
def test_a_file_that_is_held_tells_what_of_it_was_refused_all_the_same(service: ServeProcess, tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    pq.write_table(cars(["refused-before"] * 90 + ["u" * 300] * 10), path)
    for accepted, skipped in ((90, 0), (0, 90)):
        tally = ingest(service, path, "--batch", "7")
        assert (tally["accepted"], tally["skipped"], tally["rejected"]) == (accepted, skipped, 10)
        (reason,) = tally["reasons"]
        assert reason["field"] == "user_id"
        assert [row["row"] for row in reason["rows"]] == [91, 92, 93, 94, 95]
    assert counted(service, "refused-before") == 90


def test_another_name_another_batch_or_one_changed_byte_counts_anew_and_nothing_else_does(
    service: ServeProcess, tmp_path: Path
) -> None:
    path, other = tmp_path / "events.csv", tmp_path / "renamed.csv"
    path.write_text("user_id,type,time,color\n" + f"anew,view,{NOW_S},red\n" * 100)
    other.write_bytes(path.read_bytes())
    assert ingest(service, path)["accepted"] == 100
    assert ingest(service, other)["accepted"] == 0
    assert ingest(service, path, "--batch", "10")["accepted"] == 100
    assert ingest(service, path, "--producer-id", "x")["accepted"] == 100
    assert ingest(service, path, "--attribute", "color=")["accepted"] == 100
    other.write_text(path.read_text() + f"anew,view,{NOW_S},blue\n")
    assert ingest(service, other)["accepted"] == 101
    # Even under the name of a producer that has sent something else.
    assert ingest(service, other, "--producer-id", "x")["accepted"] == 101
    assert counted(service, "anew") == 400 + 202


def test_rows_too_large_for_one_message_go_in_several(service: ServeProcess, tmp_path: Path) -> None:
    path = tmp_path / "large.ndjson"
    extra = {f"a{n}": "x" * 1000 for n in range(60)}
    rows = [
        {"userId": "large", "type": "view" if n % 50 else "sold", "time": "2026-01-01T00:00:00Z", "attributes": extra}
        for n in range(400)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for accepted, skipped in ((392, 0), (0, 392)):
        tally = ingest(service, path)
        assert (tally["accepted"], tally["skipped"], tally["rejected"]) == (accepted, skipped, 8)
        assert [row["row"] for row in tally["reasons"][0]["rows"]] == [1, 51, 101, 151, 201]
    assert counted(service, "large") == 392


@IN_BOTH_STORES
def test_an_interrupted_run_goes_on_without_counting_an_event_twice(service: ServeProcess, tmp_path: Path) -> None:
    users = [f"interrupted-{i}" for i in range(20)]
    rows = 300_000
    path = tmp_path / "events.parquet"
    pq.write_table(cars([users[i % len(users)] for i in range(rows)]), path)
    command = [sys.executable, "-m", "profile_service", "ingest", str(path), "--address", service.grpc_address]
    with subprocess.Popen([*command, "--batch", "200"], stderr=subprocess.PIPE, text=True) as process:
        # Far enough for the service to know what it has acknowledged, and far from the end.
        while counted(service, users[0]) < rows // len(users) // 8 and process.poll() is None:
            pass
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    before = counted(service, *users)
    assert 0 < before < rows
    tally = ingest(service, path, "--batch", "200")
    assert counted(service, *users) == rows
    assert tally["sent"] == tally["accepted"] == rows - tally["skipped"]
    assert 0 < tally["skipped"] <= before
    assert tally["unanswered"] == 0


def test_a_damaged_file_is_named_and_what_was_before_the_damage_is_counted(
    service: ServeProcess, tmp_path: Path
) -> None:
    path, next_path = tmp_path / "damaged.parquet", tmp_path / "next.parquet"
    pq.write_table(cars(["damaged"] * 100_000), path, row_group_size=40_000, use_dictionary=False)
    pq.write_table(cars(["damaged"] * 10), next_path)
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[start : start + 64] = b"\xff" * 64
    path.write_bytes(content)
    done = run("ingest", str(path), str(next_path), "--address", service.grpc_address, "--json")
    assert done.returncode == 1
    tally = json.loads(done.stdout)
    assert "damaged.parquet" in done.stderr
    assert tally["errors"]
    assert tally["accepted"] == counted(service, "damaged") > 32_000
    # The batch that the damage cuts through waits until the file can be read.
    assert 0 < tally["unanswered"] < 4_000


def test_a_file_without_the_columns_is_refused_before_anything_is_sent(service: ServeProcess, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    pq.write_table(cars(["not-sent"]), good)
    pq.write_table(pa.table({"customer": ["u"], "cost": [1.0]}), bad)
    done = run("ingest", str(good), str(bad), "--address", service.grpc_address)
    assert done.returncode == 1
    for part in ("error: ", "bad.parquet", "--user-column", "--type-column", "--time-column", "customer, cost"):
        assert part in done.stderr
    assert counted(service, "not-sent") == 0
    flags = ("--user-column", "customer", "--type-value", "view", "--untimed", "--attribute", "price=cost")
    assert ingest(service, bad, *flags)["accepted"] == 1


@IN_BOTH_STORES
def test_get_shows_a_profile_as_tables_and_as_json(service: ServeProcess, tmp_path: Path) -> None:
    user = "a/b:c \u00e9\x1b[31m"
    path = tmp_path / "events.parquet"
    kinds = ["view", "favorite", "contact"]
    pq.write_table(
        cars(
            [user] * 3, event_type=kinds, make=["opel", "opel", "fiat"], query=["opel red"] * 3, item_id=["x", "y", "z"]
        ),
        path,
    )
    assert ingest(service, path)["accepted"] == 3
    shown = run("get", user, "--address", service.grpc_address)
    assert shown.returncode == 0, shown.stderr
    for part in (
        "3 events",
        "red",
        "lift",
        "opel",
        "median",
        "12,900",
        "EUR",
        "opel red",
        "contacts",
        "distinct_items",
    ):
        assert part in shown.stdout, part
    assert "\x1b[31m" not in shown.stdout, "a user id must not speak to the terminal"
    some = run("get", user, "--features", "color,price", "--json", "--address", service.grpc_address)
    profile = json.loads(some.stdout)
    assert profile["userId"] == user
    assert profile["eventCount"] == "3"
    assert profile["features"].keys() == {"color", "price"}
    # Likelier for him than for others; what is likeliest depends on who else is in the service.
    assert max(profile["features"]["color"]["categorical"]["values"], key=lambda each: each["lift"])["value"] == "red"


def test_an_unknown_user_and_an_unknown_feature_are_named(service: ServeProcess) -> None:
    for arguments, part in ((["nobody-knows"], "nobody-knows"), (["u1", "--features", "shoe_size"], "shoe_size")):
        done = run("get", *arguments, "--address", service.grpc_address)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert part in done.stderr


def test_a_machine_alone_has_no_standbys_and_says_so(service: ServeProcess) -> None:
    facts = json.loads(run("status", "--json", "--address", service.grpc_address).stdout)
    assert facts["replicas"] == 1
    assert [shard["standbyState"] for shard in facts["shards"]] == ["missing", "missing"]
    shown = run("status", "--address", service.grpc_address).stdout
    assert "shard 0 has no standby that is in sync: no other node can take one" in shown


@IN_BOTH_STORES
def test_status_shows_the_shards_and_the_totals(service: ServeProcess) -> None:
    facts = json.loads(run("status", "--json", "--address", service.grpc_address).stdout)
    assert facts["schemaName"] == "marketplace"
    assert len(facts["shards"]) == 2
    assert facts["syncMode"] == "always"
    shown = run("status", "--address", service.grpc_address)
    assert shown.returncode == 0
    for part in ("marketplace", "serving", *(shard["address"] for shard in facts["shards"])):
        assert part in shown.stdout


def test_a_column_mapping_may_come_from_a_file(service: ServeProcess, tmp_path: Path) -> None:
    mapping, path = tmp_path / "mapping.yaml", tmp_path / "visits.csv"
    mapping.write_text("user: visitor\ntype: {value: view}\ntime: at\nattributes: {color: paint, price: cost}\n")
    path.write_text("visitor,at,paint,cost\nmapped,2026-01-02 03:04:05,blue,1000\n")
    assert ingest(service, path, "--mapping", mapping)["accepted"] == 1
    profile = profiles(service, "mapped")["mapped"]
    assert {value.value: value.weight > 0 for value in profile.features["color"].categorical.values}["blue"]
    assert profile.features["price"].distribution.max == 1000


def test_memory_does_not_grow_with_the_file(service: ServeProcess, tmp_path: Path) -> None:
    part = cars([f"memory-{i % 50}" for i in range(50_000)])

    def peak_bytes(parts: int) -> int:
        path = tmp_path / f"{parts}.parquet"
        with pq.ParquetWriter(path, part.schema) as writer:
            for _ in range(parts):
                writer.write_table(part)
        # The high-water mark of this program alone; what getrusage tells would begin with that of its parent.
        code = (
            "import re, sys; from pathlib import Path; from profile_service.cli import app\n"
            f"app(['ingest', {str(path)!r}, '--address', {service.grpc_address!r}, '--json'], standalone_mode=False)\n"
            "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1], file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["accepted"] == parts * len(part)
        return int(done.stderr.split()[-1]) * 1024

    assert peak_bytes(24) < peak_bytes(4) + 50_000_000
