"""Reads while something happens to the service: no caller may see an error. And who owns how much."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import grpc

from profile_client import ProfileClient
from userprofile.v1 import admin_service_pb2, admin_service_pb2_grpc


class Reader:
    """Reads a profile after the other, and keeps every error."""

    def __init__(self, address: str, user_of: Callable[[int], str]) -> None:
        self._address = address
        self._user_of = user_of
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reader")
        self.errors: list[BaseException] = []
        self.count = 0
        self.longest_s = 0.0

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with ProfileClient(self._address) as client:
                while not self._stop.is_set():
                    began = time.monotonic()
                    client.batch_get_profiles([self._user_of(self.count + n) for n in range(4)])
                    self.longest_s = max(self.longest_s, time.monotonic() - began)
                    self.count += 4
        except BaseException as error:  # noqa: BLE001  It is shown by the test.
            self.errors.append(error)


def topology(address: str) -> admin_service_pb2.GetTopologyResponse:
    with grpc.insecure_channel(address) as channel:
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        return stub.GetTopology(admin_service_pb2.GetTopologyRequest(), timeout=10.0)


def owned(address: str) -> dict[int, int]:
    """By shard: how many partitions it owns."""
    found = topology(address)
    counts = {shard.shard_id: 0 for shard in found.shards}
    for held in found.ranges:
        counts[held.shard_id] += held.last_partition - held.first_partition + 1
    return counts
