"""The whole service, with Ray: it starts, listens where it should, outlives the death of its parts, and leaves nothing
behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from profile_service.config import Settings, Storage
from profile_service.errors import SchemaError, StartupError
from profile_service.launcher import Service
from userprofile.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    event_service_pb2,
    event_service_pb2_grpc,
    profile_service_pb2,
    profile_service_pb2_grpc,
)

pytestmark = pytest.mark.timeout(300)

DEADLINE_S = 60.0
LEASE_S = 3.0


def until(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds."""
    give_up_at = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < give_up_at, "waited in vain"
        pause.wait(0.05)


class Caller:
    """A client of the service."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self.events = event_service_pb2_grpc.EventServiceStub(self.channel)
        self.profiles = profile_service_pb2_grpc.ProfileServiceStub(self.channel)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(self.channel)

    def ingest(self, *user_ids: str) -> None:
        request = event_service_pb2.IngestEventsRequest()
        for user_id in user_ids:
            request.events.add(user_id=user_id, type="contact")
        assert self.events.IngestEvents(request, timeout=DEADLINE_S).accepted_count == len(user_ids)

    def contacts(self, user_id: str) -> float:
        profile = self.profiles.GetProfile(
            profile_service_pb2.GetProfileRequest(user_id=user_id, features=["contacts"]), timeout=DEADLINE_S
        )
        return profile.features["contacts"].counter.value

    def status(self) -> admin_service_pb2.GetStatusResponse:
        return self.admin.GetStatus(admin_service_pb2.GetStatusRequest(), timeout=DEADLINE_S, wait_for_ready=True)

    def serving(self) -> bool:
        try:
            return all(shard.state == "serving" for shard in self.status().shards)
        except grpc.RpcError:
            return False


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.start(Settings(shards=2, grpc_port=0, http_port=0, lease_s=LEASE_S)) as running:
        yield running
        processes = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []


@pytest.fixture
def caller(service: Service) -> Iterator[Caller]:
    caller = Caller(service.grpc_address)
    until(caller.serving)
    yield caller
    caller.channel.close()


def actor(name: str) -> psutil.Process:
    """The one process of an actor's class that is below this one."""
    found = [p for p in psutil.Process().children(recursive=True) if p.name().startswith(f"ray::{name}")]
    assert len(found) == 1, found
    return found[0]


def test_events_go_in_and_profiles_come_out(caller: Caller) -> None:
    caller.ingest("a", "a", "b")
    assert (caller.contacts("a"), caller.contacts("b")) == (2, 1)

    def population() -> float:
        asked = profile_service_pb2.GetPopulationRequest(features=["contacts"])
        return caller.profiles.GetPopulation(asked, timeout=DEADLINE_S).features["contacts"].counter.value

    until(lambda: population() >= 3)


def test_everything_listens_on_the_loopback_interface_only(service: Service, caller: Caller) -> None:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = {
        (process.name(), *connection.laddr)
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert service.grpc_address.rpartition(":")[2] in {str(port) for _, _, port in listening}
    assert {host.removeprefix("::ffff:") for _, host, _ in listening} == {"127.0.0.1"}, listening


def test_a_stream_goes_on_through_the_death_of_a_shard(caller: Caller) -> None:
    victim = caller.status().shards[0].pid
    epoch = caller.status().epoch
    sent, killed = threading.Event(), threading.Event()

    def requests() -> Iterator[event_service_pb2.StreamEventsRequest]:
        yield event_service_pb2.StreamEventsRequest(producer_id="through a death")
        for sequence in range(1, 101):
            if sequence == 51:
                sent.set()
                killed.wait(DEADLINE_S)
            request = event_service_pb2.StreamEventsRequest(sequence=sequence)
            for number in range(20):
                request.events.add(user_id=f"s{number}", type="contact")
            yield request

    def kill() -> None:
        sent.wait(DEADLINE_S)
        os.kill(victim, signal.SIGKILL)
        killed.set()

    killer = threading.Thread(target=kill)
    killer.start()
    told = [response.sequence for response in caller.events.StreamEvents(requests(), timeout=DEADLINE_S)]
    killer.join()
    assert told[-1] == 100
    until(caller.serving)
    status = caller.status()
    assert status.shards[0].pid != victim
    assert status.epoch > epoch
    assert [caller.contacts(f"s{number}") for number in range(20)] == [100] * 20


def test_the_death_of_the_coordinator_changes_nothing_for_callers(caller: Caller) -> None:
    epoch = caller.status().epoch
    actor("Coordinato").kill()
    caller.ingest("c")
    assert caller.contacts("c") >= 1
    # The next coordinator goes on after the epochs of this one.
    until(lambda: caller.status().epoch > epoch)
    caller.ingest("c")


def test_shards_that_hear_nothing_from_the_coordinator_acknowledge_nothing_until_they_do(caller: Caller) -> None:
    caller.ingest("f")
    coordinator = actor("Coordinato")
    coordinator.suspend()
    try:
        refused = False

        def is_refused() -> bool:
            nonlocal refused
            request = event_service_pb2.IngestEventsRequest()
            request.events.add(user_id="g", type="contact")
            try:
                caller.events.IngestEvents(request, timeout=0.2)
            except grpc.RpcError:
                refused = True
            return refused

        stopped_s = time.monotonic()
        until(is_refused)
        assert time.monotonic() - stopped_s > LEASE_S / 2
        assert caller.contacts("f") == 1
    finally:
        coordinator.resume()
    caller.ingest("f")
    assert caller.contacts("f") == 2


def test_a_frontend_that_died_is_back_where_it_was(service: Service, caller: Caller) -> None:
    before = actor("Frontend").pid
    os.kill(before, signal.SIGKILL)
    until(caller.serving)
    caller.ingest("d")
    assert actor("Frontend").pid != before


def test_a_port_in_use_is_said_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=rf"127\.0\.0\.1:{port}.*--grpc-port"):
            Service.start(Settings(grpc_port=port, http_port=0))
        with pytest.raises(StartupError, match=rf"127\.0\.0\.1:{port}.*--http-port"):
            Service.start(Settings(grpc_port=0, http_port=port))
    with pytest.raises(StartupError, match="--host"):
        Service.start(Settings(host="192.0.2.77", grpc_port=0, http_port=0))


def test_a_data_directory_or_a_schema_that_cannot_be_used_is_said_at_once(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("name: x\nfeatures: 3\n")
    with pytest.raises(StartupError, match="--data-dir"):
        Service.start(Settings(storage=Storage(data_dir=occupied / "data"), grpc_port=0, http_port=0))
    with pytest.raises(SchemaError):
        Service.start(Settings(schema_path=occupied, grpc_port=0, http_port=0))


SERVE = """
import sys, threading
from profile_service.config import Settings
from profile_service.launcher import Service
service = Service.start(Settings(shards=1, grpc_port=0, http_port=0))
print(service.grpc_address, flush=True)
threading.Event().wait()
"""


def test_two_services_run_side_by_side_and_a_killed_one_leaves_nothing(caller: Caller) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        address = other.stdout.readline().strip()
        # Ray's own two agents take a minute longer to see that the rest is gone.
        below = psutil.Process(other.pid).children(recursive=True)
        processes = [process for process in below if "Agent" not in process.name()]
        assert {"gcs_server", "raylet"} < {process.name() for process in processes}
        second = Caller(address)
        second.ingest("a")
        assert second.contacts("a") == 1
        second.channel.close()
        other.kill()
        _, alive = psutil.wait_procs(processes, timeout=DEADLINE_S)
        assert alive == []
    caller.ingest("e")
