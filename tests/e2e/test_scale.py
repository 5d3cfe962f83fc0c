"""Users move between shards while events and reads go on: callers see no error, and every event is counted once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from profile_client import ProfileClient
from tests.e2e.known_load import PATIENCE_S, KnownLoad, processes_named, status, until_serving, write_schema
from tests.e2e.reading import Reader, owned
from tests.e2e.serving import ServeProcess, run
from tests.e2e.stores import STORES, stored_in

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(params=STORES)
def scaled(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServeProcess]:
    small = ("--snapshot-log-bytes", str(2 << 20), "--segment-bytes", str(1 << 20))
    with (
        stored_in(request.param, tmp_path) as where,
        ServeProcess("--shards", "2", "--schema", str(write_schema(tmp_path)), *where, *small) as process,
    ):
        yield process
        assert process.stop() == 0, process.output
        assert process.left_over() == []
        assert "Traceback" not in process.output, process.output


def command(service: ServeProcess, *arguments: str) -> None:
    done = run(*arguments, "--address", service.grpc_address)
    assert done.returncode == 0, done.stderr


def test_scaling_under_load_loses_nothing_whoever_dies_and_no_caller_sees_an_error(
    scaled: ServeProcess, seed: int
) -> None:
    load = KnownLoad(scaled.grpc_address, seed)
    load.start()
    load.wait_for_progress()
    with Reader(scaled.grpc_address, load.sources[0].user_of) as reader:
        for shards, expected in ((4, [64] * 4), (3, [85, 85, 86])):
            command(scaled, "scale", "--shards", str(shards))
            assert sorted(owned(scaled.grpc_address).values()) == expected
            load.wait_for_progress()
            load.check_alive()
        command(scaled, "move", "0-9", "77", "--to", "2")
        load.wait_for_progress()
    assert not reader.errors
    assert reader.count > 100
    # Whoever takes part in a move may die.
    for victim, shards in (("ShardActor", 2), ("Coordinato", 3)):
        scaling = threading.Thread(
            target=run, args=("scale", "--shards", str(shards), "--address", scaled.grpc_address)
        )
        scaling.start()
        time.sleep(0.7)
        os.kill(processes_named(scaled, victim)[0], signal.SIGKILL)
        scaling.join()
        until_serving(scaled.grpc_address)
        # Asked again, it goes on from where it is; a coordinator may still be on its way back.
        again = ("scale", "--shards", str(shards), "--address", scaled.grpc_address)
        deadline = time.monotonic() + PATIENCE_S
        while (done := run(*again)).returncode != 0:
            assert "ask again" in done.stderr, done.stderr
            assert time.monotonic() < deadline, done.stderr
        assert len(owned(scaled.grpc_address)) == shards
        load.wait_for_progress()
    load.finish()
    counted = load.check()
    found = status(scaled.grpc_address)
    assert found.event_count == counted.events
    with ProfileClient(scaled.grpc_address) as client:
        deadline = time.monotonic() + 10.0
        while client.get_population().event_count != counted.events:
            assert time.monotonic() < deadline, "the population never has every event"
            time.sleep(0.1)


def test_a_directory_opens_with_another_number_of_shards(tmp_path: Path, seed: int) -> None:
    flags = ("--data-dir", str(tmp_path / "data"), "--schema", str(write_schema(tmp_path)))
    load: KnownLoad | None = None
    for shards in (2, 3):
        with ServeProcess(*flags, "--shards", str(shards)) as service:
            if load is None:
                load = KnownLoad(service.grpc_address, seed)
                load.start()
                load.wait_for_progress()
                load.finish()
            deadline = time.monotonic() + 60.0
            while len(owned(service.grpc_address)) != shards:
                assert time.monotonic() < deadline, service.output
                time.sleep(0.1)
            assert status(service.grpc_address).event_count > 0
            load.address = service.grpc_address
            load.check()
            assert service.stop() == 0, service.output
            assert "Traceback" not in service.output, service.output
    assert len([path for path in (tmp_path / "data").iterdir() if path.name.startswith("shard-")]) == 3
