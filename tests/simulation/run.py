"""One run: a shard lives, fails and comes back, again and again, and is held against the model each time.

    seed ─▶ schema, users, senders, disk ─▶ start ─▶ live until the fault ─▶ start ─▶ … ─▶ send everything again ─▶ end
                                              │                                │
                                              └ may crash, too                 └ check: Ledger, History, reference table

Everything is drawn from the seed, time is made up, nothing runs in a thread: the same seed is the same run.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from profile_service.config import Capacity, Settings
from profile_service.domain.migrate import compare, migrate
from profile_service.domain.population import Population
from profile_service.domain.schema import Schema
from profile_service.domain.table import ProfileTable
from profile_service.errors import ProfileServiceError, SchemaChangeRefused
from profile_service.shard import recovery, replay, state_blocks
from profile_service.shard import shard as shard_module
from profile_service.shard import snapshotter as snapshotter_module
from profile_service.shard.files import SNAPSHOT_DIRECTORY
from profile_service.shard.health import SERVING, Health
from profile_service.shard.log_records import RECORD_EVENTS, RECORD_SCHEMA
from profile_service.shard.recovery import Recovered, recover
from profile_service.shard.shard import Shard
from profile_service.shard.snapshotter import Snapshotter
from profile_service.shard.state import ShardState
from profile_service.storage.crashing_fs import Crashed, CrashingFileSystem
from profile_service.storage.fs import DiskFull
from profile_service.storage.wal import LogOptions, WriteAheadLog
from profile_service.wire.apply_request import ApplyPart, decode_part
from profile_service.wire.decode import decode_events
from profile_service.wire.plan import WirePlan
from tests.shard.shards import endless_lease
from tests.simulation.disk import CrashPoint, Disk
from tests.simulation.events import TTL_S, Events, SchemaText, draw_schema, parsed, schema_of
from tests.simulation.loop import SimulatedLoop
from tests.simulation.model import NS, Expected, History, Ledger, Record, Violation, expect
from tests.simulation.network import CallLost, Network
from tests.simulation.senders import EPOCH, PARTITION_BITS, Caller, Frontend, Outside, SimulatedProducer
from userprofile.internal.v1 import shard_pb2
from userprofile.v1 import profile_pb2

BEGINNING_NS = 1_790_000_000 * NS
DIRECTORY = Path("/data/shard-0")
IDENTITY = bytes(range(16))
MOST_USERS = 4096
MOST_TEXTS = 1 << 16
PATIENCE_S = 600.0
"""Made-up seconds after which whoever waits waits in vain."""

_PROCESS: contextvars.ContextVar[int] = contextvars.ContextVar("process", default=0)
"""Which incarnation of the shard a task belongs to; 0 for everybody else."""

CRASH_PLACES = (
    "write segment",
    "sync segment",
    "create segment",
    "rename segment",
    "remove segment",
    "sync log directory",
    "create snapshot",
    "write snapshot",
    "sync snapshot",
    "rename snapshot",
    "remove snapshot",
    "sync snapshots directory",
)


_TEARING = ("write segment", "sync segment", "sync segment")
"""Where a record may be torn; oftener than elsewhere."""


@dataclass
class Report:
    """How a run went."""

    seed: int
    seen: Counter[str] = field(default_factory=Counter)
    """What was exercised, how often."""
    fault: str = ""
    """What went wrong; empty where nothing did."""
    trace: list[str] = field(default_factory=list)
    """What happened, if it was asked for."""


def run(seed: int, *, traced: bool = False) -> Report:
    """One run. Never raises what the shard does wrong: the report says it."""
    report = Report(seed)
    loop = SimulatedLoop()
    try:
        simulation = _Simulation(seed, loop, report, traced=traced)
        with simulation.small_parts():
            try:
                loop.run_until_complete(simulation.run())
            except Exception as error:  # noqa: BLE001  whatever it is, the run has found it
                report.fault = "".join(traceback.format_exception(error))
            loop.end_tasks()
    finally:
        loop.close()
    return report


class _Simulation:
    def __init__(self, seed: int, loop: SimulatedLoop, report: Report, *, traced: bool) -> None:
        self._random = random = Random(seed)
        self._loop = loop
        self._report = report
        self._traced = traced
        self.seen = report.seen
        self._offset_ns = 0
        self._disk = Disk(CrashingFileSystem(random.getrandbits(32)), self.seen, self.trace)
        self._ledger = Ledger()
        self._history = History(self._ledger, self.clock, loop.time)
        self._schema = draw_schema(random)
        self._modes = random.choice((["always"], ["always"], ["always"], ["interval"], ["never", "always"]))
        self._segment_bytes = random.choice((4096, 8192, 16384))
        self._event_ids = random.choice((8, 64, 1024))
        self._capacity = Capacity(
            event_ids_per_shard=self._event_ids, shard_queue_bytes=random.choice((3000, 20_000, 1 << 20))
        )
        self._network = Network(random)
        self._outside = Outside(random, self._network, self._ledger, Events(random), self.clock, self.seen, self.trace)
        self._reference = _Reference(self._history)
        self._producers: list[SimulatedProducer] = []
        self._process: _Process | None = None
        self._incarnation = 0
        self._killed = False
        """Whether the process before was killed, and its machine went on."""
        self._damaged: set[str] = set()
        """Names of snapshots with a flipped byte."""

    # --- what everything shares ---

    def clock(self) -> int:
        """The time, made up."""
        return BEGINNING_NS + self._offset_ns + int(self._loop.time() * NS)

    def trace(self, line: str) -> None:
        """Notes what happens."""
        if self._traced:
            self._report.trace.append(f"{self._loop.time():9.4f} {line}")

    @contextlib.contextmanager
    def small_parts(self) -> Iterator[None]:
        """Everything that goes in slices goes in small ones."""
        random = self._random
        append = WriteAheadLog.append

        def watched(log: WriteAheadLog, kind: int, payload: Any) -> int:
            position = append(log, kind, payload)
            record = self._history.append(position, kind, b"".join(payload))
            self.trace(f"log: {position}: {_describe(record)}")
            self.seen["users forgotten"] += len(record.forgotten)
            return position

        open_log = WriteAheadLog.open

        def watched_open(*arguments: Any) -> WriteAheadLog:
            log = open_log(*arguments)
            self.trace(f"log: opened, ends at {log.position}")
            self._history.opened(log.position)
            # What is there when a log is opened is synced then.
            self._unsynced = None
            return log

        submit = Shard.submit

        async def watched_submit(shard: Shard, parts: Sequence[ApplyPart], *rest: Any) -> None:
            names = ", ".join(f"{part.producer_id}/{part.sequence}" for part in parts)
            self.trace(f"shard: {names} come")
            try:
                await submit(shard, parts, *rest)
            except BaseException as error:
                self.trace(f"shard: {names} are refused: {error!r}")
                raise
            self.trace(f"shard: {names} are applied")

        patches: list[contextlib.AbstractContextManager[object]] = [
            mock.patch.object(Shard, "submit", watched_submit),
            mock.patch.object(WriteAheadLog, "open", watched_open),
            mock.patch.object(WriteAheadLog, "append", watched),
            mock.patch.object(shard_module, "SLICE_EVENTS", random.choice((2, 7, 2048))),
            mock.patch.object(shard_module, "LOOK_INTERVAL_S", random.choice((0.02, 0.1))),
            mock.patch.object(shard_module, "EXPIRY_ROWS", random.choice((3, 1 << 16))),
            mock.patch.object(state_blocks, "SPACE_BYTES", 1 << 17),
            mock.patch.object(state_blocks, "ROWS_A_STEP", random.choice((1, 2, 5, 1024))),
            mock.patch.object(state_blocks, "PRODUCERS_A_STEP", random.choice((1, 2, 256))),
            mock.patch.object(state_blocks, "REQUESTS_A_STEP", random.choice((1, 3, 512))),
            mock.patch.object(state_blocks, "EVENT_IDS_A_STEP", random.choice((1, 5, 1 << 14))),
            mock.patch.object(state_blocks, "TEXTS_A_STEP", random.choice((7, 50, 1 << 14))),
            mock.patch.object(replay, "LARGE_RUN", random.choice((5, 1 << 14, 1 << 14))),
            mock.patch.object(snapshotter_module, "RETRY_S", 0.1),
            mock.patch.object(recovery, "parse_schema", parsed),
            mock.patch.object(state_blocks, "parse_schema", parsed),
            mock.patch.object(snapshotter_module, "LEAST_SYNC_BYTES", random.choice((1000, 1 << 20))),
            mock.patch.object(snapshotter_module, "BUFFERS", random.choice((1, 2, 4))),
        ]
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            level = logging.root.manager.disable
            logging.disable(logging.CRITICAL)
            stack.callback(logging.disable, level)
            yield

    # --- the run ---

    async def run(self) -> None:
        """The whole run."""
        random, outside = self._random, self._outside
        outside.frontends = [Frontend(outside) for _ in range(2)]
        self._producers += [
            SimulatedProducer(outside, f"p{n}", random.randint(2, 14)) for n in range(random.randint(1, 3))
        ]
        senders: list[SimulatedProducer | Caller] = [
            *self._producers,
            *(Caller(outside, f"c{n}", random.randint(1, 8)) for n in range(random.randint(1, 2))),
        ]
        sending = [asyncio.create_task(sender.run(), name=f"sender {n}") for n, sender in enumerate(senders)]
        others = [asyncio.create_task(self._ask_for_snapshots()), asyncio.create_task(self._read())]
        for _ in range(random.randint(1, 5)):
            await self._start()
            await self._live(sending)
        self._disk.inner.capacity_bytes = None
        await self._start()
        for other in others:
            other.cancel()
        outside.hurry = True
        await self._all_of(sending)
        await self._all_of([asyncio.create_task(sender.send_all_again()) for sender in senders])
        await self._quiet()
        self._check(self._running())
        assert self._running().health.state == SERVING
        await self._stop()
        self._disk.inner = self._disk.inner.crash()
        await self._start(calm=True)
        await self._stop()
        for frontend in outside.frontends:
            await frontend.close()

    async def _all_of(self, tasks: list[asyncio.Task[None]]) -> None:
        """Everything that is sent is answered in the end, and the shard goes on."""
        waiting = asyncio.ensure_future(asyncio.gather(*tasks))
        task = self._running().task
        either: list[asyncio.Future[Any]] = [waiting, task]
        await asyncio.wait(either, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            raise Violation("the shard ends, and nothing has failed") from task.exception()
        if not waiting.done():
            pending = "\n".join(repr(held) for held, _ in self._loop.live_tasks())
            raise Violation(f"nobody answers any more:\n{pending}")
        await waiting

    async def _quiet(self) -> None:
        """Until nothing is on its way any more, and the shard holds what its log says."""
        await asyncio.sleep(0.5)
        shard = self._running().shard
        assert shard is not None
        for _ in range(1000):
            if not shard.is_forgetting:
                return
            await asyncio.sleep(0.001)
        raise Violation("the shard never comes to an end with forgetting users")

    def _running(self) -> _Process:
        assert self._process is not None
        return self._process

    # --- starting ---

    async def _start(self, *, calm: bool = False) -> None:
        """Starts the shard, however often that takes."""
        before, refusal_expected = self._schema, False
        reset: tuple[str, ...] = ()
        if self._incarnation and not calm:
            self._maybe_damage_snapshot()
            if self._random.random() < 0.25:
                self._schema, reset, refusal_expected = self._change_schema(before)
        for attempt in range(100):
            faults = not calm and attempt < 3
            self._incarnation += 1
            process = _Process(self, self._incarnation, self._schema, reset)
            if faults:
                self._arm_recovery()
            try:
                await process.recover()
                # In the background, when the rest was done.
                if self._disk.crashed_in:
                    raise Crashed
                if process.failure is not None:
                    raise process.failure
            except Crashed:
                self.seen[f"crash in recovery: {self._disk.crashed_in}"] += 1
                await self._bury(process, power=self._random.random() < 0.7)
                continue
            except SchemaChangeRefused as error:
                held = self._schemas()[-1]
                if held == before and not refusal_expected:
                    raise Violation("the change of the schema is refused") from error
                # Another one than before: a change that was not synced is lost.
                self.seen["change of the schema refused"] += 1
                self._schema, reset = held, ()
                await self._bury(process, power=False)
                continue
            except (OSError, ProfileServiceError) as error:
                self._refused_to_start(error, changed=self._schema != before)
                await self._bury(process, power=False)
                continue
            finally:
                self._disk.disarm()
            if refusal_expected and self._schemas()[-2:] == [before, self._schema]:
                raise Violation("the schema has changed, and that should have been refused")
            self._process = process
            self._recovered(process)
            self._check(process)
            process.serve()
            # What is served is readable, and what is readable is durable.
            for record in self._history.records:
                self._ledger.promise(record.events)
            self._unsynced = process if process.mode != "always" else None
            return
        raise Violation("the shard does not start any more")

    def _arm_recovery(self) -> None:
        random = self._random
        if random.random() < 0.25:
            self._disk.crash_at(CrashPoint(random.randint(1, 12)), lambda: None)
        elif random.random() < 0.08:
            self._disk.inner.fail_once(random.choice(("write", "sync", "create")), random.randint(0, 4))

    def _refused_to_start(self, error: Exception, *, changed: bool) -> None:
        """What a start may fail with."""
        self.trace(f"recovery: {error!r}")
        if isinstance(error, DiskFull):
            if self._history.records and not changed:
                raise Violation("a full disk keeps a shard from starting") from error
            self.seen["start on a full disk is refused"] += 1
            self._disk.inner.capacity_bytes = None
        elif isinstance(error, OSError):
            self.seen["start fails with an I/O error"] += 1
        else:
            raise Violation("the shard refuses to start") from error

    def _change_schema(self, before: SchemaText) -> tuple[SchemaText, tuple[str, ...], bool]:
        """Another schema, the features that start anew with it, and whether the change is to be refused."""
        after = draw_schema(self._random)
        changes = compare(parsed(before.yaml), parsed(after.yaml))
        needed = tuple(name for name, _ in after.features if any(f"feature {name}:" in f for f in changes.faults))
        self.seen["start with another schema"] += 1
        self.seen["features converted"] += len(changes.converted)
        if needed and self._random.random() < 0.3:
            return after, (), True
        more = tuple(name for name, _ in after.features if name not in needed and self._random.random() < 0.2)
        self.seen["features reset"] += len(needed)
        return after, needed + more, False

    def _schemas(self) -> list[SchemaText]:
        """Those that the log holds, in order."""
        return [schema_of(record.schema.yaml) for record in self._history.records if record.schema is not None]

    def _maybe_damage_snapshot(self) -> None:
        """Flips a byte of the newest of two whole snapshots."""
        directory = DIRECTORY / SNAPSHOT_DIRECTORY
        try:
            names = [name for name in self._disk.inner.names(directory) if name.endswith(".snapshot")]
        except FileNotFoundError:
            return
        if len(names) < 2 or self._damaged.intersection(names[-2:]) or self._random.random() < 0.7:
            return
        file = self._disk.inner.open(directory / names[-1], writable=True)
        if not file.size:
            raise Violation(f"{names[-1]} is empty")
        at = self._random.randrange(file.size)
        file.write(at, [bytes([file.read(at, 1)[0] ^ 1 << self._random.randrange(8)])])
        file.sync()
        file.close()
        self._damaged.add(names[-1])
        self.trace(f"byte {at} of {names[-1]} is flipped")
        self.seen["newest snapshot is damaged"] += 1

    def _recovered(self, process: _Process) -> None:
        recovered = process.recovered
        assert recovered is not None
        log = recovered.log
        lost, self._history.lost = self._history.lost, []
        self.seen["recoveries"] += 1
        self.seen["records lost in a crash"] += len(lost)
        self.seen["torn tail cut"] += bool(log.torn_bytes)
        self.seen["snapshot loaded"] += recovered.snapshot is not None
        self.seen["log replayed from its beginning"] += recovered.snapshot is None
        self.seen["records replayed"] += recovered.replayed_records
        self.seen["log of several segments"] += len(log._segments) > 1
        self.seen["log trimmed"] += log.start > 0
        listed = recovered.snapshots.list()
        if recovered.snapshot is not None and listed and listed[0].generation != recovered.snapshot.generation:
            self.seen["older snapshot loaded"] += 1
        self.trace(
            f"recovered to {log.position}: snapshot {recovered.snapshot}, {recovered.replayed_records} records "
            f"replayed, {log.torn_bytes} bytes torn, records lost: {[_describe(record) for record in lost]}"
        )
        self._forgive(lost)

    def _forgive(self, lost: list[Record]) -> None:
        """Without `always`, a crash of the machine may take what was acknowledged."""
        if self._lossy_since is None:
            return
        for record in lost:
            promised = any(event.key in self._ledger.promised for event in record.events)
            if promised and record.appended_s < self._lossy_since:
                raise Violation(f"what was appended at {record.appended_s} was to be durable: {_describe(record)}")
            self.seen["acknowledged events lost without sync"] += promised
            # Also of those whose acknowledgement is still on its way.
            self._ledger.forgive(record.events)
        self._lossy_since = None

    _unsynced: _Process | None = None
    """The process that acknowledged what may not be on the disk."""
    _lossy_since: float | None = None
    """What was appended later may be lost: the machine has crashed and does not sync before each acknowledgement."""

    # --- living and dying ---

    async def _live(self, sending: list[asyncio.Task[None]]) -> None:
        """The shard serves until what is drawn befalls it."""
        random, process = self._random, self._running()
        fault = random.choices(
            (
                *("power at an operation", "power at a place", "power"),
                *("kill at an operation", "kill at a place", "kill"),
                *("error", "clean"),
            ),
            (28, 24, 6, 5, 10, 5, 12, 10),
        )[0]
        longest_s = random.choice((0.05, 0.3, 0.8))
        if self._killed and random.random() < 0.5:
            # What the process before has written is perhaps in the page cache only.
            fault, longest_s = "power", 0.02
        if random.random() < 0.25:
            self._disk.inner.capacity_bytes = self._disk.inner._used_bytes
        self.trace(f"lives until: {fault}")
        if fault.endswith("at an operation"):
            self._disk.crash_at(CrashPoint(random.randint(1, random.choice((10, 50, 120)))), process.crashed)
        elif fault.endswith("at a place"):
            place = random.choice((*CRASH_PLACES, *_TEARING) if fault.startswith("power") else _TEARING)
            self._disk.crash_at(CrashPoint(random.randint(1, 3), place), process.crashed)
        elif fault == "error":
            self._disk.inner.fail_once(random.choice(("write", "write", "sync", "create")), random.randint(0, 30))
        disturbing = asyncio.create_task(self._disturb())
        if all(task.done() for task in sending):
            # There is not much to disturb any more.
            longest_s = min(longest_s, 0.05)
        ending = asyncio.ensure_future(process.ended.wait())
        either: list[asyncio.Future[Any]] = [ending, process.task]
        if fault in ("power", "kill", "clean"):
            longest_s *= random.random()
        await asyncio.wait(either, timeout=longest_s, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        disturbing.cancel()
        self._disk.disarm()
        for task in sending:
            if task.done() and not task.cancelled():
                task.result()
        if self._disk.crashed_in:
            self.seen[f"crash: {self._disk.crashed_in}"] += 1
            await self._bury(process, power=fault.startswith("power"))
        elif process.task.done():
            self._check_end(process)
            await self._bury(process, power=random.random() < 0.3)
        elif fault == "clean":
            await self._stop()
            if random.random() < 0.5:
                self._disk.inner = self._disk.inner.crash()
        else:
            await self._bury(process, power=not fault.startswith("kill"))

    def _check_end(self, process: _Process) -> None:
        """The commit loop has ended by itself: only a failed disk may do that."""
        error = process.task.exception()
        cause = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__
        if cause is None or isinstance(cause, DiskFull):
            raise Violation("the shard ends, and its disk has not failed") from error
        self.trace(f"the shard ends: {error!r}")
        self.seen["shard ended by an I/O error"] += 1

    async def _disturb(self) -> None:
        """Time leaps, the disk fills up and empties again, the network slows down."""
        random = self._random
        while True:
            await asyncio.sleep(random.random() * 0.05)
            match random.randrange(8):
                case 0:
                    self._offset_ns += random.randrange(TTL_S) * NS
                    self.trace("time leaps")
                case 1 | 2:
                    self._disk.inner.capacity_bytes = self._disk.inner._used_bytes + random.choice((0, 0, 5000, 20_000))
                    self._disk.full = False
                    self._disk.taken_bytes = random.choice((0, 1 << 20))
                    self.trace("the disk is nearly full")
                case 3 | 4:
                    self.seen["disk was full"] += self._disk.full
                    self._disk.full = False
                    self._disk.inner.capacity_bytes = None
                    self.trace("the disk has room")
                case 5:
                    self._network.slowest_s = random.choice((0.0, 0.002, 0.02))

    async def _bury(self, process: _Process, *, power: bool) -> None:
        """The process is gone, and with `power` what its machine had not written."""
        self._network.cut()
        self._killed = not power
        fallen = self._disk.inner
        if power:
            self._disk.inner = fallen.crash()
            if self._unsynced is not None:
                slack_s = 0.1
                interval_s = self._unsynced.sync_interval_s + slack_s
                since = self._loop.time() - interval_s if self._unsynced.mode == "interval" else 0.0
                since = max(since, self._unsynced.served_s)
                self._lossy_since = min(since, self._lossy_since) if self._lossy_since is not None else since
        else:
            self._disk.inner = fallen.kill()
        self.seen["power failures" if power else "processes killed"] += 1
        self.trace("power failure" if power else "killed")
        self._disk.crashed_in = ""
        self._process = None
        await process.end()
        await asyncio.sleep(self._random.random() * 0.01)

    async def _stop(self) -> None:
        """As an operator does: everything accepted is answered, and all of it is on the disk."""
        process = self._running()
        self.trace("stops")
        assert process.shard is not None
        await process.shard.close()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait([process.task])
        if process.task.exception() is not None:
            self._check_end(process)
        self._network.cut()
        self._process = None
        self._disk.inner = self._disk.inner.kill()
        self.seen["clean stops"] += 1
        await process.end()

    # --- those who ask ---

    async def _ask_for_snapshots(self) -> None:
        while True:
            await asyncio.sleep(self._random.random() * 0.2)
            try:
                await self._network.unary("CreateSnapshot", shard_pb2.CreateSnapshotRequest())
            except CallLost:
                continue
            self.seen["snapshot published on request"] += 1

    async def _read(self) -> None:
        """What is readable is durable: who has read something finds it again."""
        while True:
            await asyncio.sleep(self._random.random() * 0.03)
            process = self._process
            if process is None or process.shard is None or not self._network.connected or process.mode != "always":
                continue
            user_id = self._random.choice(self._outside.events.user_ids)
            encoded = process.shard.read([user_id], ["items"], EPOCH)[0]
            if encoded:
                entries = profile_pb2.Profile.FromString(encoded).features["items"].recent.entries
                shown = {entry.value for entry in entries}
                self._ledger.promise([event for event in self._ledger.known.values() if event.item in shown])
                self.seen["reads"] += 1

    # --- checking ---

    def _check(self, process: _Process) -> None:
        """The shard shows what the records of its log say, and those are what was promised."""
        shard = process.shard
        assert shard is not None
        expected = expect(self._ledger, self._history, most_event_ids=self._event_ids, ttl_ns=TTL_S * NS)
        self._check_users(shard, expected)
        counters = shard.status()
        if (counters.user_count, counters.event_count) != (len(expected.users), expected.event_count):
            raise Violation(
                f"the shard has {counters.user_count} users and {counters.event_count} events, "
                f"not {len(expected.users)} and {expected.event_count}"
            )
        for producer in self._producers:
            known = shard.acknowledged(producer.producer_id)
            if known < expected.acknowledged[producer.producer_id]:
                raise Violation(
                    f"{producer.producer_id} is known to be acknowledged up to {known}, its records say more"
                )
            for event in producer.events_up_to(known):
                if not expected.counted[event.key] and event.key not in self._ledger.forgiven:
                    raise Violation(f"{producer.producer_id} is said to be acknowledged up to {known}, without {event}")
        if self._random.random() < 0.2:
            process.state.check_invariants()

    def _check_users(self, shard: Shard, expected: Expected) -> None:
        """Profiles and population are, byte by byte, those of a table that was given the same records in their order;
        and they name the events that the model says."""
        table = self._reference.table(shard.schema)
        now_ns = self.clock()
        for user_id in self._outside.events.user_ids:
            encoded = shard._state.table.profile(user_id, now_ns)
            if encoded != table.profile(user_id, now_ns):
                raise Violation(f"the profile of {user_id} is not that of the surviving events")
            user = expected.users.get(user_id)
            if user is None or now_ns - user.last_received_ns > TTL_S * NS:
                if encoded:
                    raise Violation(f"{user_id} has a profile, and should have none")
                continue
            profile = profile_pb2.Profile.FromString(encoded)
            shown = [entry.value for entry in profile.features["items"].recent.entries]
            if sorted(set(shown)) != sorted({event.item for event in user.events}) or len(set(shown)) != len(shown):
                raise Violation(f"{user_id} shows {shown}, should show {[event.item for event in user.events]}")
            if profile.event_count != len(user.events):
                raise Violation(f"{user_id} has {profile.event_count} events, should have {len(user.events)}")
        population = Population.merge(shard.schema, [shard.population_state()])
        reference = Population.merge(shard.schema, [table.population.to_state(table.texts)])
        if population.profile(now_ns) != reference.profile(now_ns):
            raise Violation("the population is not that of the surviving events")


class _WatchedShard(Shard):
    """Says when its log is ahead of what it holds though nobody has sent anything."""

    is_forgetting = False

    async def _forget_idle(self) -> None:
        self.is_forgetting = True
        try:
            await super()._forget_idle()
        finally:
            self.is_forgetting = False


class _Process:
    """One process of the shard: its tasks end with it."""

    def __init__(self, simulation: _Simulation, number: int, schema: SchemaText, reset: tuple[str, ...]) -> None:
        self._simulation = simulation
        self._number = number
        self._schema = schema
        self._reset = reset
        self._loop = simulation._loop
        self._random = simulation._random
        self._context = contextvars.copy_context()
        self._context.run(_PROCESS.set, number)
        self.ended = asyncio.Event()
        self.health = Health()
        self.recovered: Recovered | None = None
        self.shard: _WatchedShard | None = None
        self.task: asyncio.Task[None]
        self.mode = self._random.choice(simulation._modes)
        self.sync_interval_s = 0.05
        self.served_s = 0.0
        """When it began to serve; what it held then is durable."""

    @property
    def state(self) -> ShardState:
        """What it holds."""
        assert self.recovered is not None
        return self.recovered.state

    @property
    def failure(self) -> BaseException | None:
        """What its log has failed with, though nobody has asked it yet."""
        return None if self.recovered is None else self.recovered.log._failure

    def crashed(self) -> None:
        """Its machine goes down this moment: nothing that it says is heard any more."""
        self._simulation._network.cut()
        self.ended.set()

    async def recover(self) -> None:
        """Raises what recovery raises."""
        task = self._loop.create_task(self._recover(), context=self._context)
        await asyncio.wait([task])
        await task

    async def _recover(self) -> None:
        simulation = self._simulation
        capacity = simulation._capacity
        options = LogOptions(
            segment_bytes=simulation._segment_bytes,
            sync_mode=self.mode,  # type: ignore[arg-type]
            sync_interval_s=self.sync_interval_s,
        )

        def new_state(schema: Any) -> ShardState:
            return ShardState(
                schema,
                partitions=1 << PARTITION_BITS,
                capacity=capacity,
                most_users=MOST_USERS,
                most_texts=MOST_TEXTS,
            )

        self.recovered = recovered = await recover(
            simulation._disk,
            DIRECTORY,
            parsed(self._schema.yaml),
            identity=IDENTITY,
            holder="the simulation",
            reset_features=self._reset,
            partition_bits=PARTITION_BITS,
            capacity=capacity,
            options=options,
            run=_Worker(self._random).run,
            run_snapshots=_Worker(self._random).run,
            new_state=new_state,
        )
        self._check_log(recovered)
        snapshotter = Snapshotter(
            recovered.snapshots,
            recovered.state,
            recovered.log,
            clock=simulation.clock,
            last=recovered.snapshot,
            log_bytes=self._random.choice((2000, 10_000, 1 << 30)),
            interval_s=self._random.choice((5.0, 1e9)),
        )
        self.shard = _WatchedShard(
            0,
            partition_bits=PARTITION_BITS,
            owned=range(1 << PARTITION_BITS),
            epoch=EPOCH,
            state=recovered.state,
            log=recovered.log,
            snapshotter=snapshotter,
            capacity=capacity,
            clock=simulation.clock,
            health=self.health,
            # Who may acknowledge is the subject of tests/simulation/coordination.py.
            lease=endless_lease(),
        )

    def _check_log(self, recovered: Recovered) -> None:
        """The log holds what was appended, from its beginning on."""
        log = recovered.log
        if log._appended:
            return
        held = [(record.position, record.type, bytes(record.payload)) for record in log.records(log.start)]
        known = self._simulation._history.records
        appended = [(r.position, r.kind, r.payload) for r in known if log.start <= r.position < log.position]
        if held != appended:
            raise Violation("the log does not hold what was appended to it")

    def serve(self) -> None:
        """From now on it can be reached."""
        simulation = self._simulation
        self.served_s = self._loop.time()
        assert self.shard is not None
        self.health.serving()
        self.task = self._loop.create_task(self.shard.run(), name="commit loop", context=self._context)
        settings = replace(Settings(), capacity=simulation._capacity)
        simulation._network.serve(self.shard, settings, self.health, context=self._context)

    async def end(self) -> None:
        """Ends what is left of it: it runs no more."""
        for _ in range(50):
            left = [task for task, context in self._loop.live_tasks() if context.get(_PROCESS) == self._number]
            if not left:
                return
            for task in left:
                task.cancel()
            await asyncio.sleep(0)
        raise Violation(f"tasks of a dead shard go on: {left}")


class _Worker:
    """A thread that runs what blocks, one piece after the other; made up, like all time here."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._one_at_a_time = asyncio.Lock()
        self._slowest_s = random.choice((0.0, 0.001, 0.005))

    async def run(self, work: Callable[[], Any]) -> Any:
        """As run_in_executor: who no longer waits for it does not stop it."""
        return await asyncio.shield(asyncio.create_task(self._do(work)))

    async def _do(self, work: Callable[[], Any]) -> Any:
        async with self._one_at_a_time:
            await asyncio.sleep(self._random.random() * self._slowest_s)
            result = work()
        if self._random.random() < 0.3:
            await asyncio.sleep(self._random.random() * self._slowest_s)
        return result


class _Reference:
    """A table that is given the surviving records in their order, and knows neither snapshots nor crashes."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._fed: list[Record] = []
        self._table: ProfileTable | None = None
        self._plan: WirePlan | None = None

    def table(self, schema: Schema) -> ProfileTable:
        """As of the history's end, and to be read by `schema`."""
        records = self._history.records
        if self._fed and (len(self._fed) > len(records) or records[len(self._fed) - 1] is not self._fed[-1]):
            self._fed, self._table = [], None
        for record in records[len(self._fed) :]:
            self._feed(record)
            self._fed.append(record)
        assert self._table is not None
        if self._table.schema.text != schema.text:
            assert self._table.schema.fingerprint == schema.fingerprint
            self._table = migrate(self._table, schema)
        return self._table

    def _feed(self, record: Record) -> None:
        if record.schema is not None:
            schema = parsed(record.schema.yaml)
            if self._table is None:
                self._table = ProfileTable(schema, most_users=MOST_USERS, most_texts=MOST_TEXTS)
            else:
                self._table = migrate(self._table, schema, record.schema.reset_features)
            self._plan = WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)
            return
        table, plan = self._table, self._plan
        assert table is not None
        assert plan is not None
        if record.kind == RECORD_EVENTS:
            part = decode_part(record.payload)
            columns = decode_events(part.events, plan, part.arrival_time_ns)
            assert table.has_room(columns.count, len(part.events))
            table.apply(columns, 0, columns.count, part.arrival_time_ns)
        for user_id in record.forgotten:
            table.remove(user_id)


def _describe(record: Record) -> str:
    if record.kind == RECORD_SCHEMA:
        return "schema"
    if record.forgotten:
        return f"forget {record.forgotten}"
    return f"{record.producer_id}/{record.sequence} {[event.number for event in record.events]}"
