"""The data directory on a real file system that fills up, and has room again: writes are refused meanwhile, and nothing
else suffers."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.calls import Failure, GrpcCaller, HttpCaller
from tests.e2e.known_load import PATIENCE_S, KnownLoad, known_event, status, until_serving, write_schema
from tests.e2e.serving import ServeProcess
from userprofile.v1 import event_service_pb2

DISK_BYTES = 128 << 20
SEGMENT_BYTES = 1 << 20

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class SmallDisk:
    """A file system of DISK_BYTES, in memory.

    Attributes:
        path: where this process sees it.
        own_path: where those see it who are started with `prefix`.
    """

    path: Path
    own_path: Path
    prefix: tuple[str, ...] = ()

    def fill(self) -> Path:
        """Leaves no room; returns the file that took it."""
        ballast = self.path / "ballast"
        with ballast.open("ab", buffering=0) as file:
            block = bytes(1 << 20)
            while block:
                try:
                    file.write(block)
                except OSError:
                    block = block[: len(block) // 2]
        return ballast


@contextmanager
def small_disk(directory: Path) -> Iterator[SmallDisk]:
    """Mounted for all where we may, else in a namespace of its own, which any user may have."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory)]
    if os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0:
        try:
            yield SmallDisk(directory, directory)
        finally:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)
        return
    keeper = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f"{' '.join(mount)} && echo mounted && cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == "mounted\n", "neither mount nor unshare --user --mount works here"
        seen = Path(f"/proc/{keeper.pid}/root") / directory.relative_to("/")
        enter = ("nsenter", f"--target={keeper.pid}", "--user", "--preserve-credentials", "--mount")
        yield SmallDisk(seen, directory, enter)
    finally:
        keeper.terminate()
        keeper.wait()


def until_nothing_fits(load: KnownLoad, is_full: Callable[[], bool]) -> None:
    """Returns when not even the smallest batch finds room in what is left of the segments: the disk is full for large
    ones before."""
    give_up_at = time.monotonic() + PATIENCE_S
    acknowledged = [-1]
    while True:
        before, acknowledged = acknowledged, [source.acknowledged for source in load.sources]
        if acknowledged == before and is_full():
            return
        assert time.monotonic() < give_up_at, "the disk does not get full"
        time.sleep(1.5)


def test_a_full_disk_refuses_writes_serves_reads_and_resumes_by_itself(seed: int, tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk") as disk,
        ServeProcess(
            *("--shards", "2", "--data-dir", str(disk.own_path / "data"), "--schema", str(write_schema(tmp_path))),
            *("--segment-bytes", str(SEGMENT_BYTES), "--snapshot-log-bytes", str(8 << 20)),
            prefix=disk.prefix,
        ) as service,
        GrpcCaller(service.grpc_address) as rpc,
    ):
        load = KnownLoad(service.grpc_address, seed)
        load.start()
        load.wait_for_progress()

        def states() -> set[str]:
            return {shard.state for shard in status(service.grpc_address).shards}

        def probe() -> Failure | None:
            # To every shard, and large, so that what is left of their segments is soon used up.
            request = event_service_pb2.IngestEventsRequest()
            for number in range(500):
                event = known_event("probe", number, f"probe-{number % 50}")
                event.attributes["ballast"] = "x" * 1000
                request.events.append(event)
            answer = rpc.ingest(request.SerializeToString())
            return answer if isinstance(answer, Failure) else None

        for _ in range(2):
            ballast = disk.fill()
            refusal = None
            while refusal is None:
                refusal = probe()
            assert refusal.code == "RESOURCE_EXHAUSTED", refusal
            assert refusal.retry_after_s, refusal
            until_nothing_fits(load, lambda: probe() is not None and states() == {"full"})
            said = status(service.grpc_address)
            assert {shard.state for shard in said.shards} == {"full"}
            assert all("until its disk has room" in shard.message for shard in said.shards), said
            # Reads go on, over both ways, and so does the rest of the service.
            user = load.sources[0].user_of(0)
            for _ in range(20):
                assert rpc.profile(user).event_count > 0
            assert HttpCaller(service.http_address).get(f"/v1/profiles/{user}").code == 200
            ballast.unlink()
            resumed_s = until_serving(service.grpc_address)
            load.wait_for_progress()
            assert resumed_s < 20.0, f"took writes again after {resumed_s:.1f} s only"
        load.finish()
        counted = load.check()
        assert counted.events > 0
        assert service.stop() == 0, service.output
        assert "Traceback" not in service.output, service.output
