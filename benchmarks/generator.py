"""The load generator: processes of their own, which hold the load and send it, so that what sending costs is told apart
from what the service costs, and from what watches both.

A `Generator` runs functions of this module in its process. Loads stay there; figures come back.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import multiprocessing
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import uvloop
from numpy.typing import NDArray

from benchmarks import producing, reading
from benchmarks.crowd import Crowd
from benchmarks.kernels import measure_kernels
from benchmarks.load import Load, build_load
from benchmarks.split import split_load

_FILLED_AT_ONCE = 100
"""Batches of a crowd."""

_QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


@dataclass(frozen=True)
class Sent:
    """What sending a load took."""

    events: int
    seconds: float
    cpu_s: float
    """Of the load generator."""


@dataclass(frozen=True)
class Flood:
    """What one producer of a flood got rid of."""

    events: int
    seconds: float
    """Until the last was acknowledged."""
    unacknowledged_bytes: int
    """The most that the transport had taken and nobody had acknowledged."""


@dataclass(frozen=True)
class Latencies:
    """Of requests at a steady rate, each from when it was due."""

    due_s: NDArray[np.float64]
    """Of `time.monotonic`."""
    latency_s: NDArray[np.float64]
    events: int
    """That they held."""
    cpu_s: float

    def quantiles_ms(self) -> dict[str, float]:
        """The middle and the tail, in milliseconds."""
        return {name: float(np.quantile(self.latency_s, q) * 1e3) for name, q in _QUANTILES.items()}


class Generator:
    """A process that sends. It ends with the `with` that it is made for."""

    def __init__(self) -> None:
        # One that is forked would have this process's threads and gRPC's in the middle of what they do.
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What it does after an error, or Ctrl-C, nobody waits for.
        if error is not None:
            for process in list(self._pool._processes.values()):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def build(
        self,
        schema: str,
        events: int,
        users: int,
        batch: int,
        seed: int,
        *,
        every_user: bool = False,
        first_user: int = 0,
    ) -> float:
        """Makes a load, and returns how many bytes an event has."""
        return self._pool.submit(
            _build, schema, events, users, batch, seed, every_user=every_user, first_user=first_user
        ).result()

    def fill(self, address: str, schema: str, start: int, stop: int, batch: int, seed: int) -> None:
        """Sends an event of each of a crowd's users, over two streams, as fast as they are acknowledged."""
        self._pool.submit(_fill, address, schema, start, stop, batch, seed).result()

    def measure_kernels(self) -> dict[str, float]:
        """What the kernels alone cost for the load, as `kernels.measure_kernels` says."""
        return self._pool.submit(_measure_kernels).result()

    def renew(self, round_number: int) -> None:
        """Gives the events the ids of a round: what was counted once would not be counted again."""
        self._pool.submit(_renew, round_number).result()

    def send(self, address: str, method: str, producers: int, window: int) -> Sent:
        """Sends the load as fast as it is acknowledged."""
        return self._pool.submit(_send, address, method, producers, window).result()

    def split(self, address: str) -> None:
        """Splits the load by the shards of the service at `address`, for `send_directly`."""
        self._pool.submit(_split, address).result()

    def send_directly(self, producers: int, window: int) -> Sent:
        """Sends the load as fast as it is acknowledged, each shard's part straight to it, over so many streams."""
        return self._pool.submit(_send_directly, producers, window).result()

    def send_steadily(
        self, address: str, events_per_second: float, seconds: float, producers: int, first_round: int
    ) -> Future[Latencies]:
        """Sends the load's whole batches at a rate that nothing slows down, again and again, every time with the ids of
        another round."""
        return self._pool.submit(_send_steadily, address, events_per_second, seconds, producers, first_round)

    def flood(self, address: str, seconds: float) -> Future[Flood]:
        """One producer sends whatever the transport takes, without waiting for an acknowledgement, and then waits for
        all of them."""
        return self._pool.submit(_flood, address, seconds)

    def read_steadily(
        self, address: str, users: int, requests_per_second: float, seconds: float, seed: int
    ) -> Future[Latencies]:
        """Reads profiles of any of the users at a rate that nothing slows down."""
        return self._pool.submit(_read_steadily, address, users, requests_per_second, seconds, seed)

    def read_fast(
        self, address: str, users: int, at_once: int, seconds: float, seed: int
    ) -> Future[tuple[float, Latencies]]:
        """Reads profiles of any of the users, so many at once; how many a second, and how long each took."""
        return self._pool.submit(_read_fast, address, users, at_once, seconds, seed)

    def probe(self, address: str, event_type: str, probes_per_second: float, seconds: float) -> Future[Latencies]:
        """Sends events of users of their own, and reads each until it shows."""
        return self._pool.submit(_probe, address, event_type, probes_per_second, seconds)


# --- in the process ---

_load: Load
_round: Load
_round_number = 0
_parts: list[tuple[str, Load]]
"""By shard: its address, and what its users do."""


def _build(schema: str, events: int, users: int, batch: int, seed: int, *, every_user: bool, first_user: int) -> float:
    global _load, _round  # noqa: PLW0603  the process is for this
    _load = _round = build_load(schema, events, users, batch, seed, every_user=every_user, first_user=first_user)
    # A collection of this process's garbage is no wait of the service's.
    gc.collect()
    gc.freeze()
    return sum(map(len, _load.batches)) / _load.events


def _fill(address: str, schema: str, start: int, stop: int, batch: int, seed: int) -> None:
    bodies = Crowd(schema, batch, seed).batches(start, stop)
    while chunk := list(itertools.islice(bodies, _FILLED_AT_ONCE)):
        uvloop.run(producing.send(address, producing.STREAM, Load(schema, chunk, len(chunk) * batch, batch), 2, 8))


def _measure_kernels() -> dict[str, float]:
    return measure_kernels(_load.schema, _load.batches)


def _renew(round_number: int) -> None:
    global _round, _round_number
    _round, _round_number = _load.renewed(round_number), round_number


def _send(address: str, method: str, producers: int, window: int) -> Sent:
    cpu = time.process_time()
    seconds = uvloop.run(producing.send(address, method, _round, producers, window))
    return Sent(_round.events, seconds, time.process_time() - cpu)


def _split(address: str) -> None:
    """The shards' addresses, and the load of each."""
    global _parts  # noqa: PLW0603
    _parts = split_load(_load, asyncio.run(producing.topology(address)))
    gc.collect()
    gc.freeze()


def _send_directly(producers: int, window: int) -> Sent:
    parts = [(address, load.renewed(_round_number)) for address, load in _parts]
    cpu = time.process_time()
    seconds = uvloop.run(producing.send_directly(parts, producers, window))
    return Sent(sum(load.events for _, load in parts), seconds, time.process_time() - cpu)


def _send_steadily(
    address: str, events_per_second: float, seconds: float, producers: int, first_round: int
) -> Latencies:
    cpu = time.process_time()
    due, latency = uvloop.run(
        producing.send_steadily(address, _load, events_per_second, seconds, producers, first_round)
    )
    return Latencies(due, latency, len(due) * _load.batch_events, time.process_time() - cpu)


def _flood(address: str, seconds: float) -> Flood:
    began = time.perf_counter()
    events, unacknowledged_bytes = uvloop.run(producing.flood(address, _load, seconds))
    return Flood(events, time.perf_counter() - began, unacknowledged_bytes)


def _read_steadily(address: str, users: int, requests_per_second: float, seconds: float, seed: int) -> Latencies:
    cpu = time.process_time()
    due, latency = uvloop.run(reading.read_steadily(address, users, requests_per_second, seconds, seed))
    return Latencies(due, latency, 0, time.process_time() - cpu)


def _read_fast(address: str, users: int, at_once: int, seconds: float, seed: int) -> tuple[float, Latencies]:
    cpu = time.process_time()
    rate, asked, taken = uvloop.run(reading.read_fast(address, users, at_once, seconds, seed))
    return rate, Latencies(asked, taken, 0, time.process_time() - cpu)


def _probe(address: str, event_type: str, probes_per_second: float, seconds: float) -> Latencies:
    cpu = time.process_time()
    due, latency = uvloop.run(reading.probe(address, event_type, probes_per_second, seconds))
    return Latencies(due, latency, len(due), time.process_time() - cpu)
