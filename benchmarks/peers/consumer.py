"""The process that runs a peer: it holds the same load as ours and counts it from memory."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Self

import psutil

from benchmarks.crowd import Crowd
from benchmarks.load import PREFERENCES, Load, build_load
from benchmarks.peers.dicts import Dicts
from benchmarks.peers.work import Peer, PeerProfile

PEERS = ("dicts", "redis")


class Consumer:
    """A peer in a process of its own, which ends with the `with` that this is made for."""

    def __init__(self, name: str) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._name = name

    def __enter__(self) -> Self:
        self.name, self.durability = self._pool.submit(_start, self._name).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.submit(_close).result()
        self._pool.shutdown()

    def build(self, events: int, users: int, batch: int, seed: int) -> None:
        """Makes the load that `Generator.build` makes of the same arguments."""
        self._pool.submit(_build, events, users, batch, seed).result()

    def consume(self) -> tuple[float, float]:
        """Counts the load once; the seconds it took, and the CPU time of the consumer and its server."""
        return self._pool.submit(_consume).result()

    def grow(self, users: int, warm: int, history: int, batch: int, seed: int) -> tuple[int, int, int]:
        """Gives every user of a crowd so many events; resident memory of consumer and server when the first `warm` of
        them have theirs, and at the end, and by how many users it has grown."""
        return self._pool.submit(_grow, users, warm, history, batch, seed).result()

    def profiles(self, user_ids: Sequence[str]) -> list[PeerProfile]:
        """What it knows of users."""
        return self._pool.submit(_profiles, user_ids).result()


# --- in the process ---

_peer: Peer
_load: Load


def _start(name: str) -> tuple[str, str]:
    global _peer  # noqa: PLW0603  the process is for this
    if name == "redis":
        # Its client comes with the development environment alone.
        from benchmarks.peers.redis_rows import RedisRows

        _peer = RedisRows()
    else:
        _peer = Dicts()
    return _peer.name, _peer.durability


def _build(events: int, users: int, batch: int, seed: int) -> None:
    global _load  # noqa: PLW0603
    _load = build_load(PREFERENCES, events, users, batch, seed)


def _consume() -> tuple[float, float]:
    cpu, began = _cpu_s(), time.perf_counter()
    for batch in _load.batches:
        _peer.consume(batch)
    seconds = time.perf_counter() - began
    return seconds, _cpu_s() - cpu


def _grow(users: int, warm: int, history: int, batch: int, seed: int) -> tuple[int, int, int]:
    crowds = [Crowd(PREFERENCES, batch, seed + number) for number in range(history)]
    before = 0
    for start, stop in ((0, warm), (warm, users)):
        before = _resident_bytes()
        for crowd in crowds:
            for body in crowd.batches(start, stop):
                _peer.consume(body)
    return before, _resident_bytes(), users - warm


def _resident_bytes() -> int:
    gc.collect()
    processes = [psutil.Process(), *([] if _peer.server is None else [_peer.server])]
    return int(sum(process.memory_info().rss for process in processes))


def _cpu_s() -> float:
    spent = time.process_time()
    if _peer.server is not None:
        times = _peer.server.cpu_times()
        spent += times.user + times.system
    return spent


def _profiles(user_ids: Sequence[str]) -> list[PeerProfile]:
    return [_peer.profile(user_id) for user_id in user_ids]


def _close() -> None:
    _peer.close()
