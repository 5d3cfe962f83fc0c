"""A cluster of several raylets, each shard with a standby on another one: whichever is lost with everything on it, what
was acknowledged is there, counted once, and writes and reads are back; and no two owners acknowledge for the same user.

pytest tests/e2e/test_standby.py                two kills, of two raylets beside the head
pytest tests/e2e/test_standby.py --kills 20     so many, of three; with progress and how long writes and reads were away
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
import xxhash

from profile_service.rpc.frames import MESSAGE, OPEN
from tests.e2e.known_load import KnownLoad, known_event, median_and_worst, status, write_schema
from tests.e2e.raylets import RayCluster
from tests.e2e.reading import Reader, owned
from tests.e2e.serving import run
from userprofile.internal.v1 import shard_pb2, shard_pb2_grpc
from userprofile.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    event_service_pb2,
    event_service_pb2_grpc,
    profile_service_pb2,
    profile_service_pb2_grpc,
)

pytestmark = pytest.mark.timeout(3600)

RAYLETS = ("a", "b", "c")
A_FEW_RAYLETS = ("a", "b")
"""They start sooner."""
KILLS = 2
LEASE_S = 3.0
PATIENCE_S = 120.0
RESTART_S = 4.0
"""After how long a raylet that was killed is started again."""
CALL_S = 1.0
FRAME = struct.Struct("<IB")
"""Deadline of a probe's call: an owner that is away is waited for so long."""

APPLIED = shard_pb2.ApplyResponse.STATUS_APPLIED


@dataclass
class Deployed:
    """The service on its cluster, and the frontend beside the coordinator, on the raylet that is never killed."""

    cluster: RayCluster
    address: str

    def status(self) -> admin_service_pb2.GetStatusResponse:
        """GetStatus."""
        return status(self.address, 10.0)

    def until_in_sync(self) -> None:
        """Returns when every shard serves and has a standby that has everything."""
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(grpc.RpcError):
                found = self.status()
                if all(shard.state == "serving" and shard.standby_state == "in sync" for shard in found.shards):
                    return
            assert time.monotonic() < give_up_at, f"not every shard has its standby again:\n{found}"
            time.sleep(0.05)

    def topology(self) -> admin_service_pb2.GetTopologyResponse:
        """GetTopology."""
        with grpc.insecure_channel(self.address) as channel:
            stub = admin_service_pb2_grpc.AdminServiceStub(channel)
            return stub.GetTopology(admin_service_pb2.GetTopologyRequest(), timeout=10.0)

    def users(self, prefix: str) -> list[str]:
        """A user of each shard, in the order of their numbers, as partitions are spread now."""
        topology = self.topology()
        found: dict[int, str] = {}
        for number in itertools.count():
            user_id = f"{prefix}{number}"
            found.setdefault(owner_of(topology, partition_of(topology, user_id)), user_id)
            if len(found) == len(topology.shards):
                return [found[shard.shard_id] for shard in topology.shards]
        raise AssertionError


def partition_of(topology: admin_service_pb2.GetTopologyResponse, user_id: str) -> int:
    return xxhash.xxh64_intdigest(user_id.encode()) * topology.partition_count >> 64


def owner_of(topology: admin_service_pb2.GetTopologyResponse, partition: int) -> int:
    return next(r.shard_id for r in topology.ranges if r.first_partition <= partition <= r.last_partition)


@pytest.fixture(scope="module")
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    directory = tmp_path_factory.mktemp("raylets")
    raylets = A_FEW_RAYLETS if request.config.option.kills is None else RAYLETS
    with RayCluster(directory, raylets) as cluster:
        small = ("--snapshot-log-bytes", str(2 << 20), "--segment-bytes", str(1 << 20))
        cluster.deploy(
            *("--schema", str(write_schema(directory)), "--shards", str(len(raylets)), "--replicas", "1"),
            *("--lease-s", str(LEASE_S), *small),
        )
        yield Deployed(cluster, cluster.frontend("head"))


class Probe:
    """Calls of one kind, for a user of each shard, one after the other, each in a thread of its own."""

    def __init__(self, call: Callable[[str, int], None], users: Sequence[str]) -> None:
        self._call = call
        self._stop = threading.Event()
        self._done: list[list[tuple[float, float]]] = [[] for _ in users]
        self.count = 0
        self.fault: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(user, done), daemon=True)
            for user, done in zip(users, self._done, strict=True)
        ]

    def __enter__(self) -> Probe:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE_S)

    def _run(self, user: str, done: list[tuple[float, float]]) -> None:
        for number in itertools.count():
            if self._stop.wait(0.01):
                return
            began = time.monotonic()
            try:
                self._call(user, number)
            except grpc.RpcError:
                continue
            except BaseException as error:  # noqa: BLE001  It is shown by the test.
                self.fault = error
                return
            done.append((began, time.monotonic()))
            self.count += 1

    def back_after(self, moment: float) -> float:
        """Seconds from then until a call that began later was answered, for the shard that took longest. Returns when
        there was one for each."""
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            if self.fault is not None:
                raise self.fault
            later = [[ended for began, ended in list(done) if began >= moment] for done in self._done]
            if all(later):
                return max(min(ends) for ends in later) - moment
            assert time.monotonic() < give_up_at, "nothing comes back"
            time.sleep(0.01)


@contextlib.contextmanager
def probes(deployed: Deployed) -> Iterator[tuple[Probe, Probe]]:
    """Of writes and of reads."""
    # Owners of partitions do not change here, so each user stays with a shard.
    users = deployed.users("probe")
    options = [("grpc.max_reconnect_backoff_ms", 500)]
    with grpc.insecure_channel(deployed.address, options) as channel:
        events = event_service_pb2_grpc.EventServiceStub(channel)
        profiles = profile_service_pb2_grpc.ProfileServiceStub(channel)
        counted = dict.fromkeys(users, 0)

        def write(user: str, number: int) -> None:
            request = event_service_pb2.IngestEventsRequest(
                request_id=f"{user}-{number}", events=[known_event(user, number, user)]
            )
            assert events.IngestEvents(request, timeout=CALL_S).accepted_count == 1
            counted[user] += 1

        def read(user: str, _: int) -> None:
            before = counted[user]
            answer = profiles.BatchGetProfiles(
                profile_service_pb2.BatchGetProfilesRequest(user_ids=[user]), timeout=CALL_S
            )
            found = sum(profile.event_count for profile in answer.profiles)
            assert found >= before, f"{user} has {found} events, {before} are acknowledged"

        with Probe(write, users) as writes, Probe(read, users) as reads:
            yield writes, reads


def test_whichever_node_is_lost_nothing_acknowledged_is_lost_or_counted_twice(
    request: pytest.FixtureRequest, deployed: Deployed, seed: int, tell: Callable[[str], None]
) -> None:
    asked = request.config.option.kills
    say = print if asked is None else tell
    drawn = random.Random(seed)
    deployed.until_in_sync()
    load = KnownLoad(deployed.address, seed)
    load.start()
    load.wait_for_progress()
    # Users move between shards with standbys, too, and what comes with them is shipped.
    moved = run("move", "0-15", "--to", "1", "--address", deployed.address)
    assert moved.returncode == 0, moved.stderr
    kills = KILLS if asked is None else asked
    writes_s: list[float] = []
    reads_s: list[float] = []
    with probes(deployed) as (writes, reads):
        for number in range(kills):
            deployed.until_in_sync()
            time.sleep(drawn.uniform(0.0, 1.0))
            name = drawn.choice(deployed.cluster.names)
            before = {shard.shard_id: shard.address for shard in deployed.topology().shards}
            moment = time.monotonic()
            deployed.cluster.kill(name)
            again = threading.Timer(RESTART_S, deployed.cluster.add, [name])
            again.start()
            reads_s.append(reads.back_after(moment))
            writes_s.append(writes.back_after(moment))
            again.join()
            load.wait_for_progress()
            load.check_alive()
            after = {shard.shard_id: shard.address for shard in deployed.topology().shards}
            promoted = sum(after[shard_id] != address for shard_id, address in before.items())
            back = f"reads back after {reads_s[-1]:.2f} s, writes after {writes_s[-1]:.2f} s"
            say(f"{number + 1} of {kills}: raylet {name}, {promoted} shards promoted; {back}")
        deployed.until_in_sync()
    if asked is not None:
        take_a_shard_away(deployed)
    load.finish()
    counted = load.check()
    events = sum(shard.event_count for shard in deployed.status().shards)
    assert events >= counted.events > 0
    say(
        f"{kills} kills, {counted}, {writes.count} writes and {reads.count} reads of the probes; "
        f"writes back: {median_and_worst(writes_s)}; reads back: {median_and_worst(reads_s)}"
    )


def take_a_shard_away(deployed: Deployed) -> None:
    """A shard goes with its standby."""
    found = deployed.status()
    goes = found.shards[-1].shard_id
    nodes = [node for node in found.nodes if goes in (*node.shard_ids, *node.standby_shard_ids)]
    directories = [Path(node.data_dir) / f"shard-{goes}" for node in nodes]
    assert [directory.is_dir() for directory in directories] == [True, True]
    done = run("scale", "--shards", str(len(found.shards) - 1), "--address", deployed.address)
    assert done.returncode == 0, done.stderr
    deployed.until_in_sync()
    assert [directory.exists() for directory in directories] == [False, False]


@pytest.mark.long
def test_a_node_is_drained_under_load_and_lost_and_nobody_waits_for_it(deployed: Deployed, seed: int) -> None:
    deployed.until_in_sync()
    cluster, shards = deployed.cluster, len(deployed.status().shards)
    if sum(bool(node.shard_ids) for node in deployed.status().nodes) == 1:
        # Standbys that took over are all on one node: its users need a shard elsewhere to go to.
        done = run("scale", "--shards", str(shards + 1), "--address", deployed.address)
        assert done.returncode == 0, done.stderr
        deployed.until_in_sync()
    load = KnownLoad(deployed.address, seed, "drain-")
    load.start()
    load.wait_for_progress()
    with Reader(deployed.address, load.sources[0].user_of) as reader:
        drained = next(node for node in deployed.status().nodes if node.shard_ids)
        (name,) = [name for name in cluster.names if cluster.data_dir(name) == Path(drained.data_dir)]
        done = run("drain", drained.name, "--address", deployed.address)
        assert done.returncode == 0, done.stderr
        found = next(node for node in deployed.status().nodes if node.name == drained.name)
        assert not found.shard_ids
        assert not set(owned(deployed.address)) & set(drained.shard_ids)
        assert sum(owned(deployed.address).values()) == deployed.topology().partition_count
        load.wait_for_progress()
        load.check_alive()
        # The standbys of others may be there still: their writes go on without them.
        cluster.kill(name)
        load.wait_for_progress()
        load.check_alive()
        cluster.add(name)
        done = run("scale", "--shards", str(shards), "--address", deployed.address)
        assert done.returncode == 0, done.stderr
        deployed.until_in_sync()
        load.wait_for_progress()
    assert not reader.errors
    assert reader.count > 100
    load.finish()
    load.check()


@dataclass(frozen=True)
class Acknowledged:
    """What an owner has acknowledged."""

    at: float
    epoch: int
    owner: str
    partition: int
    sequence: int


class Direct:
    """Speaks to one owner as a frontend does: a stream of events of one user, by one epoch."""

    def __init__(self, address: str) -> None:
        self.address = address
        with grpc.insecure_channel(address) as channel:
            where = shard_pb2_grpc.ShardServiceStub(channel).GetStreamAddress(
                shard_pb2.GetStreamAddressRequest(), timeout=CALL_S
            )
        host = address.rpartition(":")[0].strip("[]")
        self._connection = socket.create_connection((host, where.port), CALL_S)
        self._connection.settimeout(None)
        self._received = self._connection.makefile("rb")
        self._put(OPEN, b"Apply")
        self._read()

    def answers(self) -> Iterator[shard_pb2.ApplyResponse]:
        """What it answers, until the connection ends."""
        while (message := self._read()) is not None:
            yield shard_pb2.ApplyResponse.FromString(message)

    def _put(self, kind: int, payload: bytes) -> None:
        self._connection.sendall(FRAME.pack(len(payload), kind) + payload)

    def _read(self) -> bytes | None:
        header = self._received.read(FRAME.size)
        if len(header) < FRAME.size:
            return None
        size_bytes, _ = FRAME.unpack(header)
        return self._received.read(size_bytes)

    def send(self, producer: str, user_id: str, sequence: int, epoch: int) -> None:
        """Sends one event; it is answered by its sequence."""
        events = event_service_pb2.IngestEventsRequest(events=[known_event(producer, sequence, user_id)])
        part = shard_pb2.ApplyRequest.Part(
            producer_id=producer,
            sequence=sequence,
            acknowledged_sequence=sequence - 1,
            arrival_time_ns=time.time_ns(),
            events=events.SerializeToString(),
            event_count=1,
        )
        request = shard_pb2.ApplyRequest(request_id=sequence, epoch=epoch, parts=[part])
        self._put(MESSAGE, request.SerializeToString())

    def close(self) -> None:
        """Ends the stream."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._received.close()
        self._connection.close()


class Recorder:
    """Sends one producer's events to whoever owns its user, each until it is acknowledged, and records who did."""

    def __init__(self, deployed: Deployed, user_id: str, record: list[Acknowledged]) -> None:
        self._deployed = deployed
        self.user_id = user_id
        self._record = record
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.fault: BaseException | None = None
        self.acknowledged = 0

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                with contextlib.suppress(grpc.RpcError, OSError):
                    self._send_by(self._deployed.topology())
                self._stop.wait(0.02)
        except BaseException as error:  # noqa: BLE001  It is shown by the test.
            self.fault = error

    def _send_by(self, topology: admin_service_pb2.GetTopologyResponse) -> None:
        """Sends until something is refused, or not answered in time."""
        partition = partition_of(topology, self.user_id)
        owner = owner_of(topology, partition)
        address = next(shard.address for shard in topology.shards if shard.shard_id == owner)
        if not address:
            return
        direct = Direct(address)
        answers: queue.SimpleQueue[int] = queue.SimpleQueue()

        def receive() -> None:
            with contextlib.suppress(OSError):
                for answer in direct.answers():
                    for result in answer.results:
                        if result.status == APPLIED:
                            # Whenever it comes: an owner that wakes late is recorded, too.
                            self._record.append(
                                Acknowledged(time.monotonic(), topology.epoch, address, partition, result.request_id)
                            )
                        answers.put(result.request_id if result.status == APPLIED else 0)
            direct.close()
            answers.put(0)

        threading.Thread(target=receive, daemon=True).start()
        while not self._stop.is_set():
            sequence = self.acknowledged + 1
            direct.send(self.user_id, self.user_id, sequence, topology.epoch)
            try:
                answered = answers.get(timeout=CALL_S)
            except queue.Empty:
                # The stream stays: what it may still answer is what this is about.
                return
            if answered != sequence:
                direct.close()
                return
            self.acknowledged = sequence


def check_acknowledged(record: Sequence[Acknowledged]) -> None:
    """No two owners have acknowledged for one partition by the same epoch, and none went on after a later one's."""
    by_partition: dict[int, list[Acknowledged]] = {}
    for one in sorted(record, key=lambda one: one.at):
        by_partition.setdefault(one.partition, []).append(one)
    for partition, acknowledged in by_partition.items():
        owners: dict[int, str] = {}
        latest = 0
        for one in acknowledged:
            assert owners.setdefault(one.epoch, one.owner) == one.owner, f"partition {partition}: {one}, {owners}"
            assert one.epoch >= latest or owners[latest] == one.owner, (
                f"partition {partition}: {one} after epoch {latest} of {owners[latest]}"
            )
            latest = max(latest, one.epoch)


def test_the_checker_finds_two_owners() -> None:
    def one(at: float, epoch: int, owner: str) -> Acknowledged:
        return Acknowledged(at, epoch, owner, 3, 1)

    check_acknowledged([one(1, 5, "a"), one(2, 5, "a"), one(3, 6, "b")])
    with pytest.raises(AssertionError, match="partition 3"):
        check_acknowledged([one(1, 5, "a"), one(2, 5, "b")])
    with pytest.raises(AssertionError, match="after epoch 6"):
        check_acknowledged([one(1, 5, "a"), one(2, 6, "b"), one(3, 5, "a")])


def test_an_owner_that_wakes_after_its_standby_was_promoted_acknowledges_nothing(
    deployed: Deployed, tell: Callable[[str], None]
) -> None:
    deployed.until_in_sync()
    record: list[Acknowledged] = []
    with contextlib.ExitStack() as held:
        recorders = [held.enter_context(Recorder(deployed, user, record)) for user in deployed.users("woken")]
        until(lambda: all(recorder.acknowledged >= 20 for recorder in recorders), recorders)
        stopped = deployed.status().shards[0]
        # On a stream of its own it is sent more and more, by the epoch of when it was stopped.
        stubborn = Direct(stopped.address)
        held.callback(stubborn.close)
        epoch = deployed.topology().epoch
        process = psutil.Process(stopped.pid)
        process.suspend()
        try:
            stopped_at = time.monotonic()
            for sequence in range(1, 50):
                stubborn.send("stubborn", recorders[0].user_id, sequence, epoch)
            until(lambda: address_of(deployed, 0) not in ("", stopped.address), recorders)
            before = recorders[0].acknowledged
            until(lambda: recorders[0].acknowledged >= before + 20, recorders)
            back_s = time.monotonic() - stopped_at
            time.sleep(max(0.0, stopped_at + 1.2 * LEASE_S - time.monotonic()))
        finally:
            woken_at = time.monotonic()
            process.resume()
        late = answers_of(stubborn)
        before = recorders[0].acknowledged
        until(lambda: recorders[0].acknowledged >= before + 20, recorders)
    assert APPLIED not in late, "the one that woke has acknowledged what came while it was stopped"
    check_acknowledged(record)
    assert not [one for one in record if one.owner == stopped.address and one.at >= woken_at]
    assert {one.owner for one in record if one.partition == record[-1].partition}
    deployed.until_in_sync()
    counts = {recorder.user_id: event_count(deployed, recorder.user_id) for recorder in recorders}
    for recorder in recorders:
        # The last one may be durable and not acknowledged.
        assert recorder.acknowledged <= counts[recorder.user_id] <= recorder.acknowledged + 1
    print(f"its successor had acknowledged 20 events {back_s:.2f} s after the SIGSTOP; {len(record)} acknowledgements")


def answers_of(direct: Direct) -> list[int]:
    """What became of the requests, once the stream has ended or everything is answered."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for answer in direct.answers():
            found += [result.status for result in answer.results]
            if len(found) >= 49:
                break
    return found


def address_of(deployed: Deployed, shard_id: int) -> str:
    return next(shard.address for shard in deployed.topology().shards if shard.shard_id == shard_id)


def event_count(deployed: Deployed, user_id: str) -> int:
    with grpc.insecure_channel(deployed.address) as channel:
        stub = profile_service_pb2_grpc.ProfileServiceStub(channel)
        return stub.GetProfile(profile_service_pb2.GetProfileRequest(user_id=user_id), timeout=30.0).event_count


def until(condition: Callable[[], bool], recorders: Sequence[Recorder]) -> None:
    """Returns when the condition holds."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        for recorder in recorders:
            if recorder.fault is not None:
                raise recorder.fault
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.02)
