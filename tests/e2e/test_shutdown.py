"""Starting, sharing a machine and stopping: as processes, signals and sockets see it."""

from __future__ import annotations

import ipaddress
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from tests.e2e import serving
from tests.e2e.calls import Failure, GrpcCaller, HttpCaller, delimited, failure_of, new_user
from tests.e2e.serving import ServeProcess
from tests.e2e.stores import STORES, stored_in
from userprofile.v1 import event_pb2
from userprofile.v1.event_service_pb2 import StreamEventsRequest

# Each starts services of its own, which on a fresh machine compile their kernels first.
pytestmark = pytest.mark.timeout(400)

EVENTS_A_BATCH = 500
BATCHES_BEFORE_THE_SIGNAL = 20
MOST_IN_FLIGHT = 50


class KeenProducer(threading.Thread):
    """Sends batches for ever, some ahead of their acknowledgements, until the stream ends."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self._caller = GrpcCaller(address)
        self._stream = self._caller.stream()
        self.user_id = new_user("keen")
        self.sent = 0
        self.acknowledged = 0
        self.failure: Failure | None = None
        self.at_work = threading.Event()

    def run(self) -> None:
        event = event_pb2.Event(user_id=self.user_id, type="view")
        try:
            self._stream.begin(new_user("producer"))
            while True:
                while self.sent < self.acknowledged + MOST_IN_FLIGHT:
                    self.sent += 1
                    self._stream.send(StreamEventsRequest(sequence=self.sent, events=[event] * EVENTS_A_BATCH))
                sequence = self._stream.receive().sequence
                assert self.acknowledged <= sequence <= self.sent, (self.acknowledged, sequence, self.sent)
                self.acknowledged = sequence
                if sequence >= BATCHES_BEFORE_THE_SIGNAL:
                    self.at_work.set()
        except grpc.RpcError as error:
            self.failure = failure_of(error)
        finally:
            self.at_work.set()
            self._stream.cancel()
            self._caller.channel.close()


@pytest.mark.parametrize("store", STORES)
def test_sigterm_under_load_answers_what_was_accepted_and_leaves_nothing_behind(store: str, tmp_path: Path) -> None:
    with (
        stored_in(store, tmp_path) as where,
        ServeProcess(*where) as service,
        GrpcCaller(service.grpc_address) as rpc,
    ):
        producers = [KeenProducer(service.grpc_address) for _ in range(2)]
        for producer in producers:
            producer.start()
        for producer in producers:
            assert producer.at_work.wait(60.0)
            assert producer.failure is None
        # Calls on their way when the signal comes are answered, or told to come again; none is left hanging or cut off.
        ingest = rpc.method("EventService/IngestEvents")
        request = delimited(1, delimited(1, new_user().encode()) + delimited(2, b"view"))
        calls = [ingest.future(request, timeout=60.0) for _ in range(200)]
        next(iter(calls)).result()
        service.signal(signal.SIGTERM)
        codes = {call.code() for call in calls}
        assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, codes
        for producer in producers:
            producer.join(60.0)
            assert not producer.is_alive()
            assert producer.failure is not None
            assert producer.failure.code == "UNAVAILABLE", producer.failure
            assert producer.acknowledged >= BATCHES_BEFORE_THE_SIGNAL
        assert service.wait() == 0, service.output
        assert service.left_over() == []
        assert "Traceback" not in service.output, service.output
        assert not accepts_connections(service.grpc_address)
        assert not accepts_connections(service.http_address)


def test_two_services_share_a_machine_each_on_loopback_and_each_stops_alone() -> None:
    with ServeProcess() as one, ServeProcess("--shards", "2") as other:
        addresses = {one.grpc_address, one.http_address, other.grpc_address, other.http_address}
        assert len(addresses) == 4
        for service in (one, other):
            listening = [
                (process.pid, connection.laddr.ip, connection.laddr.port)
                for process in service.tree()
                for connection in process.net_connections(kind="inet")
                if connection.status == psutil.CONN_LISTEN
            ]
            assert len(listening) > 3, listening
            assert [entry for entry in listening if not is_loopback(entry[1])] == []

        user = new_user("split")
        assert count_view(one, user) == 1
        assert count_view(one, user) == 2
        assert count_view(other, user) == 1

        assert one.stop(signal.SIGTERM) == 0, one.output
        assert one.left_over() == []
        assert HttpCaller(other.http_address).get("/readyz").code == 200
        assert count_view(other, user) == 2
        assert other.stop(signal.SIGINT) == 0, other.output
        assert other.left_over() == []


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("flag", ["--grpc-port", "--http-port"])
def test_a_port_in_use_is_named_with_what_to_do(taken_port: int, flag: str) -> None:
    ports = {"--grpc-port": "0", "--http-port": "0", flag: str(taken_port)}
    ended = serving.run("serve", *(word for pair in ports.items() for word in pair))
    assert ended.returncode == 1
    assert f"127.0.0.1:{taken_port}" in ended.stderr
    assert flag in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_data_directory_that_cannot_be_written_is_named_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    # Below a file, and where not even root may write.
    for directory in (file / "data", Path("/proc/self/data")):
        ended = serving.run("serve", "--grpc-port", "0", "--http-port", "0", "--data-dir", str(directory))
        assert ended.returncode == 1
        assert str(directory) in ended.stderr
        assert "--data-dir" in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_schema_that_is_no_file_or_has_faults_is_said_before_anything_starts(tmp_path: Path) -> None:
    missing = serving.run("serve", "--schema", str(tmp_path / "none.yaml"))
    assert (missing.returncode, "none.yaml" in missing.stderr) == (1, True)
    faulty = tmp_path / "faulty.yaml"
    faulty.write_text("name: x\nevents: {view: {weight: heavy}}\nfeatures:\n  color: {kind: categorial}\n")
    ended = serving.run("serve", "--schema", str(faulty))
    assert ended.returncode == 1
    assert "line 2" in ended.stderr
    assert "line 4" in ended.stderr


def is_loopback(address: str) -> bool:
    """Also of an IPv4 address that a socket of IPv6 listens on."""
    ip = ipaddress.ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def accepts_connections(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5.0):
            return True
    except ConnectionRefusedError:
        return False


def count_view(service: ServeProcess, user_id: str) -> int:
    """Counts one view and returns how many there are."""
    with GrpcCaller(service.grpc_address) as rpc:
        rpc.ingest(delimited(1, delimited(1, user_id.encode()) + delimited(2, b"view")))
        return rpc.profile(user_id).event_count
