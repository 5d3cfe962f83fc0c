"""What a service has acknowledged is there when it is started again, whatever ended it; a directory has one service at
a time, and is not started from when it is damaged."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import serving
from tests.e2e.calls import Failure, GrpcCaller, delimited
from tests.e2e.serving import ServeProcess, run

# Each starts a service several times, which on a fresh machine compiles its kernels first.
pytestmark = pytest.mark.timeout(600)

USERS = [f"user-{number}" for number in range(50)]


def count(service: ServeProcess, times: int) -> None:
    request = b"".join(delimited(1, delimited(1, user.encode()) + delimited(2, b"view")) for user in USERS)
    with GrpcCaller(service.grpc_address) as rpc:
        for _ in range(times):
            answer = rpc.ingest(request)
            assert not isinstance(answer, Failure), answer
            assert answer.accepted_count == len(USERS)


def counted(service: ServeProcess) -> set[int]:
    with GrpcCaller(service.grpc_address) as rpc:
        return {rpc.profile(user).event_count for user in USERS}


def as_json(*arguments: str) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_was_acknowledged_is_there_after_a_stop_and_after_a_kill(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with ServeProcess("--data-dir", str(data_dir), "--shards", "2") as service:
        count(service, 3)
        other = serving.run("serve", "--data-dir", str(data_dir), "--grpc-port", "0", "--http-port", "0")
        assert other.returncode == 1
        assert "is in use by process" in other.stderr
        assert run("inspect", str(data_dir)).returncode == 1
        assert service.stop(signal.SIGTERM) == 0, service.output
    assert "nothing is damaged" in run("inspect", str(data_dir)).stdout

    # Without --shards it is what the directory has, on a machine of any size.
    with ServeProcess("--data-dir", str(data_dir)) as service:
        assert counted(service) == {3}
        status = as_json("status", "--address", service.grpc_address)
        assert status["dataDir"] == str(data_dir)
        assert status["syncMode"] == "always"
        assert [shard["state"] for shard in status["shards"]] == ["serving"] * 2
        positions = as_json("snapshot", "--address", service.grpc_address)["logPositions"]
        count(service, 2)
        shards = as_json("status", "--address", service.grpc_address)["shards"]
        assert {str(shard["shardId"]): shard["snapshotPosition"] for shard in shards} == positions
        assert all(int(shard["logPosition"]) > int(shard["snapshotPosition"]) > 0 for shard in shards)
        assert all(int(shard["logBytes"]) > 0 and shard["snapshotTime"] for shard in shards)
        epoch = int(status["epoch"])
        service.signal(signal.SIGKILL)
        service.wait()
        # At once: what is left of the one before is waited for.
        with ServeProcess("--data-dir", str(data_dir)) as again:
            assert counted(again) == {5}
            assert int(as_json("status", "--address", again.grpc_address)["epoch"]) > epoch


def test_a_damaged_log_is_refused_shown_and_salvaged(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with ServeProcess("--data-dir", str(data_dir), "--shards", "1") as service:
        count(service, 2)
        assert service.stop(signal.SIGTERM) == 0, service.output
    (segment,) = (data_dir / "shard-0" / "log").iterdir()
    data = bytearray(segment.read_bytes())
    # In the first record of events, some way behind that of the schema.
    end = len(data.rstrip(b"\0"))
    data[end // 2] ^= 1
    segment.write_bytes(data)

    refused = serving.run("serve", "--data-dir", str(data_dir), "--grpc-port", "0", "--http-port", "0")
    assert refused.returncode == 1
    assert "shard 0 cannot start" in refused.stderr
    assert str(segment) in refused.stderr
    assert "profile-service inspect" in refused.stderr
    assert "Traceback" not in refused.stderr.split("error: ")[-1]

    assert run("inspect", str(data_dir)).returncode == 1
    salvaged = as_json("inspect", str(data_dir), "--salvage")
    assert salvaged["starts"]
    assert len(salvaged["shardFindings"][0]["losses"]) == 1
    with ServeProcess("--data-dir", str(data_dir)) as service:
        # One of the records is lost, and no more.
        assert counted(service) < {0, 1, 2}


def test_without_a_directory_nothing_is_kept_or_left() -> None:
    with ServeProcess() as service:
        assert "note: no --data-dir" in service.output
        count(service, 1)
        data_dir = Path(as_json("status", "--address", service.grpc_address)["dataDir"])
        assert (data_dir / "data.json").is_file()
        assert service.stop(signal.SIGTERM) == 0, service.output
    assert not data_dir.exists()
    assert not data_dir.parent.exists()
