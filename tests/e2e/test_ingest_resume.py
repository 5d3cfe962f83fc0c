"""`ingest FILE` through everything that can end it, or end the service under it: every row counts once, and the last
summary is that of the whole file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import grpc
import psutil
import pytest

from tests.e2e.serving import ServeProcess, run
from tests.e2e.stores import STORES, stored_in
from userprofile.v1 import profile_service_pb2, profile_service_pb2_grpc

USERS = 50
BAD_EVERY = 97
NOW_S = 1_780_000_000
FINISH_S = 150.0
OWN_SHARE = 0.13
"""Of the file: more than is ever unanswered."""


@dataclass
class Restartable:
    """A service at one address, over one store, that can be killed as a whole and started again."""

    flags: tuple[str, ...]
    address: str
    process: ServeProcess

    def kill(self) -> None:
        self.process.kill()

    def start(self) -> None:
        self.process = ServeProcess(*self.flags)

    def kill_one(self, name: str, random: Random) -> None:
        """SIGKILL for one process of that name."""
        found = [each for each in self.process.tree() if name in " ".join(_command_line(each))]
        assert found, f"no {name}"
        random.choice(found).kill()


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def restartable(request: pytest.FixtureRequest) -> Restartable:
    """Local, but for tests of what it has to know again of a sender."""
    shared: Restartable = request.getfixturevalue(f"{getattr(request, 'param', 'local')}_restartable")
    return shared


@pytest.fixture(scope="module")
def local_restartable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restartable]:
    yield from _restartable("local", tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def redis_restartable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restartable]:
    yield from _restartable("redis", tmp_path_factory.mktemp("resume"))


def _restartable(store: str, directory: Path) -> Iterator[Restartable]:
    with stored_in(store, directory) as where:
        flags = ("--shards", "2", *where)
        process = ServeProcess(*flags)
        address = process.grpc_address
        # Again at the port that it drew.
        service = Restartable((*flags, "--grpc-port", address.rpartition(":")[2]), address, process)
        try:
            yield service
        finally:
            service.kill()


@dataclass
class Shop:
    """A file of events, and who did how many."""

    path: Path
    rows: int
    counted: Counter[str]

    def check(self, service: Restartable, tally: dict[str, Any]) -> None:
        """Every event was counted once, and the summary says so."""
        with grpc.insecure_channel(service.address) as channel:
            stub = profile_service_pb2_grpc.ProfileServiceStub(channel)
            request = profile_service_pb2.BatchGetProfilesRequest(user_ids=sorted(self.counted))
            answer = stub.BatchGetProfiles(request, timeout=60, wait_for_ready=True)
        assert {profile.user_id: profile.event_count for profile in answer.profiles} == self.counted
        refused = self.rows - self.counted.total()
        assert (tally["read"], tally["rejected"], tally["unanswered"]) == (self.rows, refused, 0)
        assert tally["accepted"] + tally["skipped"] == self.counted.total()
        (reason,) = tally["reasons"]
        assert reason["count"] == refused
        assert [row["row"] for row in reason["rows"]] == [BAD_EVERY * n for n in range(1, 6)]


@pytest.fixture
def shop(tmp_path: Path, request: pytest.FixtureRequest) -> Shop:
    rows, counted = 100_000, Counter[str]()
    path = tmp_path / "events.csv"
    with path.open("w") as file:
        file.write("user_id,type,time,color\n")
        for row in range(1, rows + 1):
            user = f"{request.node.name}-{row % USERS}"
            good = row % BAD_EVERY != 0
            counted[user] += good
            file.write(f"{user},{'view' if good else 'sold'},{NOW_S + row},red\n")
    return Shop(path, rows, counted)


def begin(service: Restartable, shop: Shop) -> subprocess.Popen[str]:
    command = ["ingest", str(shop.path), "--address", service.address, "--json", "--batch", "200"]
    return subprocess.Popen(
        [sys.executable, "-m", "profile_service", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=FINISH_S)
    assert process.returncode == 0, errors
    tally: dict[str, Any] = json.loads(output)
    return tally


def counted_share(service: Restartable, shop: Shop) -> float:
    """How much of the file is counted by now."""
    user = f"{min(shop.counted).rpartition('-')[0]}-0"
    with grpc.insecure_channel(service.address) as channel:
        stub = profile_service_pb2_grpc.ProfileServiceStub(channel)
        request = profile_service_pb2.GetProfileRequest(user_id=user)
        try:
            profile = stub.GetProfile(request, timeout=10, wait_for_ready=True)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.NOT_FOUND:
                return 0.0
            raise
    return float(profile.event_count / shop.counted[user])


def wait_for_progress(service: Restartable, shop: Shop, share: float) -> None:
    """Returns when that share of the file is counted."""
    deadline = time.monotonic() + FINISH_S
    while time.monotonic() < deadline:
        try:
            if counted_share(service, shop) >= share:
                return
        except grpc.RpcError:
            time.sleep(0.02)
    raise AssertionError("the file makes no progress")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_it_goes_on_after_it_was_ended_again_and_again(
    restartable: Restartable, shop: Shop, seed: int, number: signal.Signals
) -> None:
    random = Random(seed)
    for share in sorted(random.uniform(0.02, 0.8) for _ in range(3)):
        before = counted_share(restartable, shop)
        process = begin(restartable, shop)
        # More than the run before can have left on its way: this one sends, too.
        wait_for_progress(restartable, shop, min(1.0, max(share, before + OWN_SHARE)))
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
        if number == signal.SIGINT:
            tally = json.loads(output)
            told = tally["accepted"] + tally["skipped"] + tally["rejected"] + tally["unanswered"]
            assert told == tally["read"]
    tally = finish(begin(restartable, shop))
    assert tally["skipped"] > 0
    shop.check(restartable, tally)


@pytest.mark.parametrize(
    ("restartable", "name"),
    [("local", "ray::FrontendActor"), ("local", "ray::ShardActor"), ("redis", "ray::ShardActor")],
    indirect=["restartable"],
    scope="module",
)
def test_it_does_not_notice_that_a_process_of_the_service_is_killed(
    restartable: Restartable, shop: Shop, seed: int, name: str
) -> None:
    random = Random(seed)
    process = begin(restartable, shop)
    for share in (0.05, 0.4):
        wait_for_progress(restartable, shop, share)
        restartable.kill_one(name, random)
    tally = finish(process)
    assert tally["skipped"] == 0
    shop.check(restartable, tally)


def test_it_waits_for_a_service_that_was_killed_as_a_whole(restartable: Restartable, shop: Shop) -> None:
    process = begin(restartable, shop)
    wait_for_progress(restartable, shop, 0.1)
    restartable.kill()
    time.sleep(1.0)
    assert process.poll() is None
    restartable.start()
    shop.check(restartable, finish(process))


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("first", ["the command", "the service"])
def test_it_goes_on_after_everything_was_killed(restartable: Restartable, shop: Shop, first: str) -> None:
    process = begin(restartable, shop)
    wait_for_progress(restartable, shop, 0.2)
    kills: list[Callable[[], None]] = [lambda: _end(process), restartable.kill]
    for kill in kills if first == "the command" else reversed(kills):
        kill()
    restartable.start()
    tally = finish(begin(restartable, shop))
    assert tally["skipped"] > 0
    shop.check(restartable, tally)


@pytest.mark.parametrize("restartable", STORES, indirect=True, scope="module")
def test_of_two_that_send_the_same_file_the_later_goes_on(restartable: Restartable, shop: Shop) -> None:
    earlier = begin(restartable, shop)
    wait_for_progress(restartable, shop, 0.1)
    # Else it might be done before the later one begins.
    earlier.send_signal(signal.SIGSTOP)
    left = counted_share(restartable, shop)
    later = begin(restartable, shop)
    wait_for_progress(restartable, shop, min(1.0, left + 2 * OWN_SHARE))
    earlier.send_signal(signal.SIGCONT)
    _, errors = earlier.communicate(timeout=FINISH_S)
    assert earlier.returncode == 1
    assert "another command that sends the same has taken over" in errors
    shop.check(restartable, finish(later))
    again = run("ingest", str(shop.path), "--address", restartable.address, "--json", "--batch", "200")
    shop.check(restartable, json.loads(again.stdout))
    assert json.loads(again.stdout)["accepted"] == 0
