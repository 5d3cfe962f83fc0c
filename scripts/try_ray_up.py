"""`ray up` with deploy/local.yaml, really run: a head and two workers made of namespaces of this machine (`hosts.py`),
to which Ray speaks by SSH as to any others. Then events go in and profiles come out, a worker is lost and comes back
with its disk, and `ray down` leaves nothing running. Prints what it does and how long that took; ends with 1 where
something fails.

Differs from what deploy/local.yaml gives in the addresses and the key; in that nothing is installed (the hosts have no
network but the lab's, and find this checkout's .venv); and in how soon a lost node is noticed, which is seconds here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from scripts.hosts import Host, enter_lab, private_key

REPOSITORY = Path(__file__).parents[1]
USERS = 16
SHOWN_LINES = 60
"""Of a program that failed."""

DEADLINE_S = 120.0
GRPC_PORT, HTTP_PORT = 50051, 8080

LAUNCHER_ENVIRONMENT = {"RAY_UP_enable_autoscaler_v2": "0"}
"""As deploy/local.yaml asks for."""

WORKER_ENVIRONMENT = "RAY_gcs_rpc_server_reconnect_timeout_s=10"
HEAD_ENVIRONMENT = (
    "RAY_health_check_initial_delay_ms=1000 RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=2000 "
    "RAY_health_check_failure_threshold=3 AUTOSCALER_UPDATE_INTERVAL_S=1 AUTOSCALER_HEARTBEAT_TIMEOUT_S=10"
)


def cluster_config(head: Host, workers: list[Host]) -> dict[str, Any]:
    """deploy/local.yaml for the hosts."""
    config: dict[str, Any] = yaml.safe_load((REPOSITORY / "deploy" / "local.yaml").read_text())
    config["provider"]["head_ip"] = head.address
    config["provider"]["worker_ips"] = [worker.address for worker in workers]
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(private_key())}
    config["file_mounts"] = {
        "~/profile-service/schema.yaml": str(REPOSITORY / "profile_service" / "schemas" / "marketplace.yaml")
    }
    config["setup_commands"] = []
    small = "--object-store-memory=80000000"
    config["head_start_ray_commands"] = [
        command.replace("ray start", f"{HEAD_ENVIRONMENT} ray start {small} --include-dashboard=false").replace(
            "--nodes 4", f"--nodes {1 + len(workers)} --shards {len(workers)} --segment-bytes 4194304"
        )
        for command in config["head_start_ray_commands"]
    ]
    config["worker_start_ray_commands"] = [
        command.replace("ray start", f"{WORKER_ENVIRONMENT} ray start {small} --num-cpus=1")
        for command in config["worker_start_ray_commands"]
    ]
    return config


def main() -> None:
    """Runs it all."""
    enter_lab()
    path = REPOSITORY / ".venv" / "bin"
    head, *workers = hosts = [Host(number, path) for number in (1, 2, 3)]
    config = Path("/tmp/cluster.yaml")  # noqa: S108
    content = cluster_config(head, workers)
    config.write_text(yaml.safe_dump(content))
    deployment: str = content["head_start_ray_commands"][-1]
    with step("ray up"):
        run("ray", "up", "--yes", "--no-config-cache", "--disable-usage-stats", str(config))
    with step("what runs where"):
        status = settled_now(head, len(hosts))
        for node in status["nodes"]:
            print("   ", node["address"], node["state"], "shards", node["shardIds"], node["grpcAddress"])
    assert [node["shardIds"] for node in status["nodes"]] in ([[], [0], [1]], [[], [1], [0]])
    with step("events go in at the head, profiles come out at every node"):
        ingest(head)
        for host in hosts:
            expect(host, 1)
    lost = workers[1]
    with step("a worker is switched off"):
        lost.switch_off()
        status = until(lambda: lacking(head))
        readable = sum(count == 1 for count in counts(head, patience_s=1.0))
        print(f"    {readable} of {USERS} users can be read meanwhile")
        assert 0 < readable < USERS
    with step("it is switched on again, and Ray's autoscaler starts it"):
        lost.switch_on()
        settled_now(head, len(hosts))
        expect(lost, 1)
    with step("events go in again, at the node that was lost"):
        ingest(lost)
        expect(head, 2)
    with step("deployed again, a rolling update"):
        before = {shard["pid"] for shard in settled_now(head, len(hosts))["shards"]}
        run("ray", "exec", str(config), deployment)
        after = {shard["pid"] for shard in settled_now(head, len(hosts))["shards"]}
        assert not before & after, "every shard was started anew"
        expect(lost, 2)
    with step("undeployed"):
        run("ray", "exec", str(config), "profile-service undeploy")
        assert not running(hosts, "ray::ShardActor", "ray::FrontendActor", "ray::CoordinatorActor")
    with step("ray down"):
        run("ray", "down", "--yes", str(config))
        # Of workers of this provider Ray ends by itself, when the head is gone.
        until(lambda: None if running(hosts, "ray") else {})
    print("done: nothing is left of it")


def running(hosts: list[Host], *names: str) -> list[str]:
    """Programs on the hosts whose names have one of these in them."""
    programs = [line.split(" ")[0].rpartition("/")[2] for host in hosts for line in host.processes()]
    return [program for program in programs if any(name in program for name in names)]


@contextmanager
def step(what: str) -> Iterator[None]:
    """Says what is done, and how long it took."""
    print(f"{what} …", flush=True)
    began = time.monotonic()
    yield
    print(f"    {time.monotonic() - began:.1f} s", flush=True)


def settled(host: Host, nodes: int) -> dict[str, Any] | None:
    """The status where all serves, as this host's frontend tells it."""
    status = get_status(host)
    if status is None or len(status["nodes"]) != nodes:
        return None
    serving = [part["state"] == "serving" for part in (*status["nodes"], *status["shards"])]
    return status if all(serving) else None


def lacking(host: Host) -> dict[str, Any] | None:
    """The status where a node is away."""
    status = get_status(host)
    return status if status is not None and any(node["state"] == "away" for node in status["nodes"]) else None


def get_status(host: Host) -> dict[str, Any] | None:
    """None where there is no answer."""
    asked = run("profile-service", "status", "--json", "--address", f"{host.address}:{GRPC_PORT}", check=False)
    return json.loads(asked.stdout) if asked.returncode == 0 else None


def settled_now(host: Host, nodes: int) -> dict[str, Any]:
    """The status once all serves."""
    return until(lambda: settled(host, nodes))


def expect(host: Host, contacts: int) -> None:
    """Every user has so many."""
    found = counts(host)
    if found != [contacts] * USERS:
        sys.exit(f"{host.address}: expected {contacts} of each user, found {found}")


def ingest(host: Host) -> None:
    """One contact of each user."""
    events = Path("/tmp/events.ndjson")  # noqa: S108
    lines = [{"userId": f"u{number}", "type": "contact", "eventId": f"{time.time_ns()}"} for number in range(USERS)]
    events.write_text("\n".join(map(json.dumps, lines)) + "\n")
    run("profile-service", "ingest", "--address", f"{host.address}:{GRPC_PORT}", str(events))


def counts(host: Host, patience_s: float = 20.0) -> list[float | None]:
    """How many contacts each user has; None where it cannot be read within `patience_s`."""
    import grpc

    from profile_client import ProfileClient, ProfileClientError

    found: list[float | None] = []
    with ProfileClient(f"{host.address}:{GRPC_PORT}") as client:
        for number in range(USERS):
            try:
                found.append(client.get_profile(f"u{number}", timeout_s=patience_s)["contacts"].value)
            except (ProfileClientError, grpc.RpcError):
                found.append(None)
    return found


def until(ask: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """The first answer that is one."""
    give_up_at = time.monotonic() + DEADLINE_S
    while (answer := ask()) is None:
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"waited for {DEADLINE_S:g} s")
        time.sleep(0.5)
    return answer


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs one of the .venv's programs."""
    done = subprocess.run(
        [str(REPOSITORY / ".venv" / "bin" / command[0]), *command[1:]],
        check=False,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **LAUNCHER_ENVIRONMENT},
        capture_output=True,
    )
    if check and done.returncode:
        print(
            *(f"    | {line}" for line in (done.stdout + done.stderr).splitlines()[-SHOWN_LINES:]), sep="\n", flush=True
        )
        sys.exit(f"{' '.join(command[:2])} ended with {done.returncode}")
    return done


if __name__ == "__main__":
    main()
