"""SIGKILL and SIGSTOP of every kind of process under a known load; afterwards every event is where it should be.

pytest tests/e2e/test_kills.py                a few of each kind
pytest tests/e2e/test_kills.py --kills 200    so many, with progress, pauses and recovery times
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from profile_service.storage.redis_client import TIMEOUT_S
from tests.e2e.known_load import (
    PATIENCE_S,
    KnownLoad,
    median_and_worst,
    processes_named,
    status,
    until_serving,
    write_schema,
)
from tests.e2e.serving import ServeProcess
from tests.e2e.stores import STORES
from tests.redis_process import RedisProcess

A_FEW = (
    *("shard",) * 3,
    *("frontend",) * 2,
    "coordinator",
    *("stop",) * 2,
    "all shards",
    "service",
    "command",
)
LIKELIHOOD = {
    "shard": 30,
    "all shards": 5,
    "frontend": 20,
    "coordinator": 15,
    "stop": 15,
    "service": 8,
    "command": 7,
}
A_FEW_WITH_REDIS = ("shard", "all shards", "frontend", *("redis",) * 2, "redis pauses", "service")
LIKELIHOOD_WITH_REDIS = {**LIKELIHOOD, "redis": 20, "redis pauses": 10}
"""`appendfsync always`: what it has answered, it has again."""
SHARDS = 2
CHECK_EVERY = 25
"""In a long run all totals are also compared in between."""


class Victims:
    """A service whose processes are killed, and started again where that takes somebody from outside.

    Each kill returns what was done, for people.
    """

    def __init__(self, directory: Path, drawn: random.Random, redis: RedisProcess | None) -> None:
        self._random = drawn
        self._redis = redis
        where = (
            ("--store", redis.url)
            if redis is not None
            # Small, so that rolls and snapshots happen all the time.
            else (
                *("--data-dir", str(directory / "data")),
                *("--segment-bytes", str(1 << 20)),
                *("--snapshot-log-bytes", str(2 << 20)),
            )
        )
        self._flags = ("--schema", str(write_schema(directory)), *where)
        self.service = ServeProcess(*self._flags, "--shards", str(SHARDS))
        self.address = self.service.grpc_address

    def kill(self, kind: str) -> str:
        """Does it."""
        match kind:
            case "shard":
                return self._kill([self._random.choice(self._named("ShardActor"))])
            case "all shards":
                return self._kill(self._named("ShardActor"))
            case "frontend":
                return self._kill(self._named("Frontend"))
            case "coordinator":
                return self._kill(self._named("Coordinato"))
            case "stop":
                return self._stop()
            case "service":
                self.service.kill()
                return self._start("everything at once")
            case "command":
                # The rest has to see by itself that it is to end, and the next one has to wait for that.
                self.service.signal(signal.SIGKILL)
                self.service.wait()
                return self._start("the command alone")
            case "redis":
                assert self._redis is not None
                self._redis.kill()
                time.sleep(self._random.uniform(0.0, 2.0))
                self._redis.start()
                return "SIGKILL of Redis, started again"
            case "redis pauses":
                return self._pause_redis()
        raise AssertionError(kind)

    def _pause_redis(self) -> str:
        assert self._redis is not None
        # Longer than anyone waits for it, too.
        seconds = self._random.choice((1.0, TIMEOUT_S + 2.0))
        self._redis.pause()
        time.sleep(seconds)
        self._redis.resume()
        return f"SIGSTOP of Redis for {seconds:.1f} s"

    def _named(self, name: str) -> list[int]:
        """Processes of that name; waits for one that is on its way back."""
        give_up_at = time.monotonic() + PATIENCE_S
        while not (pids := processes_named(self.service, name)):
            assert time.monotonic() < give_up_at, f"no {name} for {PATIENCE_S:g} s"
            time.sleep(0.02)
        return pids

    def _kill(self, pids: list[int]) -> str:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return f"SIGKILL of {pids}"

    def _stop(self) -> str:
        pid = self._random.choice(self._named(self._random.choice(("ShardActor", "Frontend", "Coordinato"))))
        seconds = self._random.uniform(1.0, 4.0)
        process = psutil.Process(pid)
        process.suspend()
        time.sleep(seconds)
        process.resume()
        return f"SIGSTOP of {pid} for {seconds:.1f} s"

    def _start(self, what: str) -> str:
        port = self.address.rpartition(":")[2]
        # In a store no shard has anything of its own: any number of them can go on.
        shards = SHARDS if self._redis is None else self._random.randint(1, SHARDS + 1)
        self.service = ServeProcess(*self._flags, "--grpc-port", port, "--shards", str(shards))
        return f"SIGKILL of {what}, started again with {shards} shards"


@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("store", STORES)
def test_every_event_is_counted_as_acknowledged_whoever_was_killed(
    request: pytest.FixtureRequest, seed: int, tmp_path: Path, tell: Callable[[str], None], store: str
) -> None:
    with contextlib.ExitStack() as held:
        redis = held.enter_context(RedisProcess(tmp_path / "redis")) if store == "redis" else None
        asked = request.config.option.kills
        say = print if asked is None else tell
        drawn = random.Random(seed)
        if asked is None:
            kinds = list(A_FEW if redis is None else A_FEW_WITH_REDIS)
            drawn.shuffle(kinds)
        else:
            likelihood = LIKELIHOOD if redis is None else LIKELIHOOD_WITH_REDIS
            kinds = drawn.choices(list(likelihood), list(likelihood.values()), k=asked)
        _kill_under_load(Victims(tmp_path, drawn, redis), drawn, seed, kinds, say, is_long=asked is not None)


def _kill_under_load(
    victims: Victims,
    drawn: random.Random,
    seed: int,
    kinds: Sequence[str],
    say: Callable[[str], None],
    *,
    is_long: bool,
) -> None:
    try:
        load = KnownLoad(victims.address, seed)
        load.start()
        load.wait_for_progress()
        times = _Times()
        for number, kind in enumerate(kinds, 1):
            time.sleep(drawn.uniform(0.0, 1.0))
            began = time.monotonic()
            done = victims.kill(kind)
            if drawn.random() < 0.2 and kind in ("shard", "frontend", "coordinator"):
                # Again, while it is on its way back.
                time.sleep(drawn.uniform(0.0, 1.5))
                done += ", then " + victims.kill(drawn.choice(("shard", "frontend")))
            load.wait_for_progress()
            until_serving(victims.address)
            load.check_alive()
            ended = time.monotonic()
            pause_s = max(source.longest_pause_s(began, ended) for source in load.sources)
            times.add(kind, pause_s, ended - began)
            back = f"longest pause {pause_s:.2f} s, back in {ended - began:.2f} s"
            line = f"{number} of {len(kinds)}: {kind}: {done}; {back}"
            say(line)
            if is_long and number % CHECK_EVERY == 0:
                say(f"  so far: {load.pause_and_check()}")
        load.finish()
        counted = load.check()
        events = sum(shard.event_count for shard in status(victims.address).shards)
        assert events == counted.events, f"the shards have counted {events} events, profiles show {counted.events}"
        text = f"{len(kinds)} kills, {counted}\n{times}"
        say(text)
        assert counted.events > 0
        assert victims.service.stop() == 0, victims.service.output
        assert "Traceback" not in victims.service.output, victims.service.output
    except BaseException as error:
        error.add_note(f"output of the last serve:\n{victims.service.output}")
        raise
    finally:
        victims.service.kill()


class _Times:
    """How long things took, by kind of kill."""

    def __init__(self) -> None:
        self._pauses: dict[str, list[float]] = {}
        self._recoveries: dict[str, list[float]] = {}

    def add(self, kind: str, pause_s: float, recovery_s: float) -> None:
        """One kill."""
        self._pauses.setdefault(kind, []).append(pause_s)
        self._recoveries.setdefault(kind, []).append(recovery_s)

    def __str__(self) -> str:
        return "\n".join(
            f"  {kind:12} {len(pauses):4}  longest pause of a producer: {median_and_worst(pauses)}; "
            f"all serving and acknowledging again: {median_and_worst(self._recoveries[kind])}"
            for kind, pauses in sorted(self._pauses.items())
        )
