"""A service on a Ray cluster whose profiles are in Redis: a node is lost, and its shards go on elsewhere, from the
store; another deployment takes over; and the whole service ends and comes back with another schema."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest

from tests.e2e.known_load import KnownLoad, known_event, status, write_schema
from tests.e2e.raylets import RayCluster
from tests.e2e.reading import Reader
from tests.e2e.serving import run
from tests.redis_process import RedisProcess
from userprofile.v1 import (
    admin_service_pb2,
    event_service_pb2,
    event_service_pb2_grpc,
    profile_service_pb2,
    profile_service_pb2_grpc,
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

RAYLETS = ("a", "b")
LEASE_S = 3.0
PATIENCE_S = 90.0


@dataclass
class Deployed:
    """The service on its cluster, and its Redis."""

    cluster: RayCluster
    redis: RedisProcess
    schema: Path

    def deploy(self, *flags: str) -> None:
        """Deploys it with its schema, or updates it."""
        self.cluster.deploy("--schema", str(self.schema), "--shards", "2", "--lease-s", str(LEASE_S), *flags)

    @property
    def address(self) -> str:
        """Of the frontend beside the coordinator, on the node that is never lost."""
        return self.cluster.frontend("head")

    def status(self) -> admin_service_pb2.GetStatusResponse:
        """GetStatus."""
        return status(self.address, 10.0)

    def until(self, what: Callable[[admin_service_pb2.GetStatusResponse], bool]) -> None:
        """Returns when the status is so."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = self.status()
            if what(found):
                return
            assert time.monotonic() < deadline, found
            time.sleep(0.05)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    directory = tmp_path_factory.mktemp("raylets")
    with RedisProcess(directory / "redis") as redis, RayCluster(directory, RAYLETS) as cluster:
        deployed = Deployed(cluster, redis, write_schema(directory))
        deployed.deploy("--store", redis.url)
        yield deployed


def homes(found: admin_service_pb2.GetStatusResponse) -> dict[int, str]:
    """By shard: the directory of the node where it is."""
    return {shard_id: node.data_dir for node in found.nodes for shard_id in node.shard_ids}


def all_serve(found: admin_service_pb2.GetStatusResponse) -> bool:
    return all(shard.state == "serving" for shard in found.shards)


def test_the_shards_of_a_lost_node_go_on_elsewhere_and_count_every_event_once(deployed: Deployed, seed: int) -> None:
    cluster = deployed.cluster
    load = KnownLoad(deployed.address, seed)
    load.start()
    load.wait_for_progress()
    lost = next(name for name in RAYLETS if str(cluster.data_dir(name)) in homes(deployed.status()).values())
    gone = str(cluster.data_dir(lost))
    with Reader(deployed.address, load.sources[0].user_of) as reader:
        cluster.kill(lost)
        deployed.until(lambda found: gone not in homes(found).values() and len(homes(found)) == 2 and all_serve(found))
        load.wait_for_progress()
        load.check_alive()
    assert not reader.errors
    assert reader.count > 0
    # They stay where they are, and what the node had is no second one of them.
    before = homes(deployed.status())
    cluster.add(lost)
    deployed.until(lambda found: sum(node.state == "serving" for node in found.nodes) == len(RAYLETS) + 1)
    assert homes(deployed.status()) == before
    # As a rolling update, which needs no --store.
    deployed.deploy()
    assert homes(deployed.status()) == before
    load.wait_for_progress()
    load.finish()
    load.check()


def test_a_coordinator_that_is_killed_comes_back_and_no_caller_sees_an_error(deployed: Deployed, seed: int) -> None:
    def coordinators() -> set[int]:
        # The kernel keeps fifteen letters of a name.
        return {p.pid for p in deployed.cluster.processes() if p.name().startswith("ray::Coordinato")}

    load = KnownLoad(deployed.address, seed, "coordinator-")
    load.start()
    load.wait_for_progress()
    before = homes(deployed.status())
    (killed,) = coordinators()
    with Reader(deployed.address, load.sources[0].user_of) as reader:
        psutil.Process(killed).kill()
        deadline = time.monotonic() + PATIENCE_S
        while not coordinators() - {killed}:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # It has nothing of the one before but what is on disk: nodes, homes, leases, and the lease of the store.
        deployed.until(lambda found: all_serve(found) and homes(found) == before)
        load.wait_for_progress(200)
    assert not reader.errors
    load.finish()
    load.check()


def test_a_running_service_keeps_its_store_and_its_schema(deployed: Deployed) -> None:
    refused = deployed.cluster.try_to_deploy("--schema", str(deployed.schema), "--store", "local")
    assert refused.returncode != 0
    assert f"the running service has its profiles in {deployed.redis.url}" in refused.stderr
    refused = deployed.cluster.try_to_deploy("--schema", "retail")
    assert refused.returncode != 0
    assert "profile-service undeploy" in refused.stderr
    # Nothing was touched.
    assert all_serve(deployed.status())


def test_no_other_service_can_have_the_store(deployed: Deployed) -> None:
    refused = run("serve", "--store", deployed.redis.url, "--grpc-port", "0", "--http-port", "0")
    assert refused.returncode != 0
    assert "is in use by the service" in refused.stderr


def test_it_comes_back_with_another_schema(deployed: Deployed) -> None:
    events = [known_event("stays", number, "stays") for number in range(7)]
    with grpc.insecure_channel(deployed.address) as channel:
        stub = event_service_pb2_grpc.EventServiceStub(channel)
        request = event_service_pb2.IngestEventsRequest(events=events)
        assert stub.IngestEvents(request, timeout=PATIENCE_S).accepted_count == len(events)
    done = run("undeploy", "--address", deployed.cluster.address)
    assert done.returncode == 0, done.stderr
    deployed.schema.write_text(deployed.schema.read_text() + "  extra: {kind: counter}\n")
    refused = deployed.cluster.try_to_deploy("--schema", str(deployed.schema))
    assert refused.returncode != 0
    assert "give that with --store" in refused.stderr
    deployed.deploy("--store", deployed.redis.url)
    with grpc.insecure_channel(deployed.address) as channel:
        profiles = profile_service_pb2_grpc.ProfileServiceStub(channel)
        profile = profiles.GetProfile(profile_service_pb2.GetProfileRequest(user_id="stays"), timeout=PATIENCE_S)
    assert profile.event_count == len(events)
    assert "extra" in profile.features
