"""A Ray cluster of several raylets on this machine, each with a data directory of its own, and a service on it.

The raylets are Ray's own `ray.cluster_utils.Cluster`, in a process of theirs: a test's own process must not load Ray.
This module is that process, too: it does what comes as JSON lines, and answers each with one.

    {"do": "add", "name": "a", "cpus": 1}     a raylet; the answer comes when it is part of the cluster
    {"do": "kill", "name": "a"}               SIGKILL of it and of everything below it
    end of the input                          the end
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.e2e.serving import START_TIMEOUT_S, environment

STORE_BYTES = 80 << 20
STOP_TIMEOUT_S = 30.0

DATA_VARIABLE = "RAYLET_DATA"
"""In each raylet's environment: its directory."""

HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}
"""Ray's own way of noticing that a node has gone takes 15 s and more by default. The service does not wait for it."""

NODE_LINE = re.compile(r"^node \S+: gRPC (\S+), REST http://(\S+), shards .*$", re.MULTILINE)


class RayCluster:
    """A head that takes no shards, and raylets that do; with `deploy`, the service on them."""

    def __init__(self, directory: Path, names: tuple[str, ...]) -> None:
        self.directory = directory
        self.names = names
        with (directory / "raylets.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.raylets", str(directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
                cwd=Path(__file__).parents[2],
            )
        self._frontends: list[tuple[str, str]] = []
        self._tree: dict[int, psutil.Process] = {}
        try:
            self.address = self._ask({})["address"]
            for name in names:
                self.add(name)
        except BaseException:
            self.close()
            raise

    def add(self, name: str) -> None:
        """Starts the raylet of this name, for the first time or again; returns when it is part of the cluster."""
        self._ask({"do": "add", "name": name})
        self.processes()

    def kill(self, name: str) -> None:
        """Ends the raylet and everything that it has started, at once."""
        self.processes()
        self._ask({"do": "kill", "name": name})

    def data_dir(self, name: str) -> Path:
        """Where a raylet has its data."""
        return self.directory / name

    def deploy(self, *flags: str) -> None:
        """Deploys the service, or updates it; returns when all of it serves."""
        done = self.try_to_deploy(*flags)
        assert done.returncode == 0, done.stderr + done.stdout
        self._frontends = NODE_LINE.findall(done.stdout)
        self.processes()

    def try_to_deploy(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """What comes of a deployment, when it has ended."""
        return subprocess.run(
            [
                *(sys.executable, "-m", "profile_service", "deploy", "--address", self.address),
                *("--data-dir", f"${DATA_VARIABLE}", "--grpc-port", "0", "--http-port", "0"),
                *("--nodes", str(len(self.names) + 1), *flags),
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            env=environment(),
        )

    def frontend(self, name: str) -> str:
        """host:port of gRPC of the frontend on a raylet: as its directory says."""
        found: dict[str, Any] = json.loads((self.data_dir(name) / "node.json").read_text())
        (address,) = [grpc for grpc, _ in self._frontends if grpc.endswith(f":{found['grpc_port']}")]
        return address

    def processes(self) -> list[psutil.Process]:
        """The living processes below the cluster; from now on they are known to belong to it."""
        found = psutil.Process(self._process.pid).children(recursive=True)
        for process in found:
            self._tree.setdefault(process.pid, process)
        return found

    def close(self) -> list[str]:
        """Ends everything; returns what could only be killed."""
        if self._process.poll() is None:
            self.processes()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        _, alive = psutil.wait_procs(list(self._tree.values()), timeout=5.0)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=5.0)
        return [str(process) for process in alive]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if request:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        guard = threading.Timer(START_TIMEOUT_S, self._process.kill)
        guard.start()
        try:
            line = self._process.stdout.readline()
        finally:
            guard.cancel()
        assert line, f"the cluster has ended:\n{(self.directory / 'raylets.log').read_text()}"
        answer: dict[str, Any] = json.loads(line)
        assert "fault" not in answer, answer
        return answer

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _tree_of(node: Any) -> list[psutil.Process]:
    roots = [psutil.Process(info.process.pid) for infos in node.all_processes.values() for info in infos]
    return [process for root in roots for process in (root, *root.children(recursive=True))]


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)


def _main(directory: Path) -> None:
    # Whatever Ray prints is not an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    from ray.cluster_utils import Cluster

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    def arguments(name: str, cpus: int) -> dict[str, Any]:
        return {
            "num_cpus": cpus,
            "object_store_memory": STORE_BYTES,
            "env_vars": {DATA_VARIABLE: str(directory / name)},
            "include_dashboard": False,
        }

    cluster = Cluster(initialize_head=True, head_node_args={**arguments("head", 0), "_system_config": HEALTH})
    nodes: dict[str, Any] = {}
    answer(address=cluster.address)
    for line in sys.stdin:
        request = json.loads(line)
        name = request["name"]
        if request["do"] == "add":
            nodes[name] = cluster.add_node(wait=False, **arguments(name, 1))
        else:
            node = nodes.pop(name)
            _kill(_tree_of(node))
            cluster.worker_nodes.discard(node)
        answer(done=True)
    left = [process for node in (*nodes.values(), cluster.head_node) for process in _tree_of(node)]
    _kill(left)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
