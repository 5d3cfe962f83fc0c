"""From a shard's directory to its state: the newest whole snapshot, then the log from where the snapshot begins.

    lock ─▶ open the log (its tail is decided about) ─▶ load a snapshot ─▶ replay ─▶ the schema of now ─▶ serve
                                                          │ damaged: the one before

| snapshots            | log                                    | what happens                                        |
|----------------------|----------------------------------------|-----------------------------------------------------|
| none                 | from 0                                 | replayed whole; an empty one is a new shard         |
| none, or all damaged | begins later                           | DataLoss: what the log no longer holds is gone      |
| newest whole         | reaches from its position              | loaded, replayed from there                         |
| newest damaged       | reaches from the older one's position  | the older is loaded: nothing is lost but time       |
| a whole one          | ends before the snapshot's last block  | DataLoss: the log has lost its end                  |

The log is trimmed to the older of two snapshots only, so the fourth row is what a single damaged snapshot comes to.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from profile_service.config import Capacity
from profile_service.domain.schema import Schema, parse_schema
from profile_service.errors import DataLoss, ProfileServiceError, StartupError
from profile_service.shard.files import LOCK_FILE, LOG_DIRECTORY, SNAPSHOT_DIRECTORY
from profile_service.shard.log_records import (
    RECORD_ADOPTION,
    RECORD_BEGINNING,
    RECORD_EVENTS,
    RECORD_FORGET,
    RECORD_SCHEMA,
    RECORD_TRANSFER,
    decode_forget,
    decode_schema,
    encode_schema,
)
from profile_service.shard.startup import Phase
from profile_service.shard.state import ShardState
from profile_service.shard.transfer import Transfer, check, check_room, receive
from profile_service.storage.fs import FileSystem, Lock
from profile_service.storage.snapshot import SnapshotInfo, SnapshotStore
from profile_service.storage.wal import LogOptions, Record, Runner, WriteAheadLog
from profile_service.wire.apply_request import decode_part
from profile_service.wire.decode import decode_batches
from profile_service.wire.plan import WirePlan
from userprofile.internal.v1 import shard_log_pb2

RUN_BYTES = 2 << 20
"""Records of events are decoded and applied together up to this size, as one may hold a single event: some milliseconds
of work."""

logger = logging.getLogger(__name__)

Progress = Callable[[float, str], None]
"""Hears how much of a recovery is done, 0 to 1, and what is being done."""


@dataclass
class Recovered:
    """A shard's state as of the end of its log, and where it goes on."""

    state: ShardState
    log: WriteAheadLog
    snapshots: SnapshotStore
    lock: Lock
    snapshot: SnapshotInfo | None
    """The snapshot that was loaded."""
    replayed_records: int
    replayed_events: int


async def recover(
    fs: FileSystem,
    directory: Path,
    schema: Schema,
    *,
    identity: bytes,
    holder: str,
    reset_features: Sequence[str],
    partition_bits: int,
    capacity: Capacity,
    options: LogOptions,
    run: Runner,
    run_snapshots: Runner,
    progress: Progress = lambda fraction, message: None,
    done: Callable[[Phase], None] = lambda phase: None,
    new_state: Callable[[Schema], ShardState] | None = None,
    locked: Callable[[Path], None] = lambda path: None,
) -> Recovered:
    """The shard that the directory holds; a new one where it holds none.

    Args:
        fs: where the directory is.
        directory: the shard's own; made where there is none.
        schema: what rows are to be of from now on.
        identity: of the directory, in every file's header: files of another one are refused.
        holder: who takes the directory's lock, for whoever else wants it.
        reset_features: features that start anew where the schema's change would refuse them.
        partition_bits: of the whole service.
        capacity: bounds of what makes events count once.
        options: how the log is written.
        run: runs what blocks, off the loop, one piece after the other.
        run_snapshots: the same for a snapshot's writes, which take longer.
        progress: hears how far it is.
        done: hears when the snapshot is loaded, and when the log is replayed.
        new_state: makes an empty state of a schema.
        locked: hears which file is locked, once it is.

    Raises:
        LockHeld: another process has the directory.
        DataLoss: what is stored is damaged, and nothing that is whole makes up for it.
        SchemaChangeRefused: rows of the schema before cannot become rows of `schema`.
        DiskFull: there is no room to begin.
    """
    recovery = _Recovery(fs, directory, identity, capacity, partition_bits, progress, done, run_snapshots, new_state)
    lock = await run(lambda: recovery.lock(holder))
    locked(directory / LOCK_FILE)
    log = None
    try:
        log = await run(lambda: WriteAheadLog.open(fs, directory / LOG_DIRECTORY, identity, options, run))
        opened = log
        state, snapshot = await run(lambda: recovery.load_and_replay(opened, schema))
        if log.position == 0:
            await _log_schema(log, schema, ())
        elif state.schema.fingerprint != schema.fingerprint:
            await run(lambda: state.check_schema(schema, reset_features))
            await _log_schema(log, schema, reset_features)
            await run(lambda: state.change_schema(schema, reset_features))
        else:
            state.change_schema(schema, ())
    except BaseException:
        if log is not None:
            with contextlib.suppress(OSError):
                await log.close()
        lock.release()
        raise
    return Recovered(state, log, recovery.snapshots, lock, snapshot, recovery.records, recovery.events)


async def _log_schema(log: WriteAheadLog, schema: Schema, reset_features: Sequence[str]) -> None:
    record = encode_schema(schema.text, reset_features)
    await log.reserve(sum(map(len, record)), 1)
    log.append(RECORD_SCHEMA, record)
    await log.sync()


class _Recovery:
    """The blocking part."""

    def __init__(
        self,
        fs: FileSystem,
        directory: Path,
        identity: bytes,
        capacity: Capacity,
        partition_bits: int,
        progress: Progress,
        done: Callable[[Phase], None],
        run_snapshots: Runner,
        new_state: Callable[[Schema], ShardState] | None,
    ) -> None:
        self._fs = fs
        self._directory = directory
        self._progress = progress
        self._done = done
        self.snapshots = SnapshotStore(fs, directory / SNAPSHOT_DIRECTORY, identity, run_snapshots)
        self._new_state = new_state or (
            lambda schema: ShardState(schema, partitions=1 << partition_bits, capacity=capacity)
        )
        self.records = 0
        self.events = 0

    def lock(self, holder: str) -> Lock:
        self._fs.make_directory(self._directory)
        return self._fs.lock(self._directory / LOCK_FILE, holder)

    def load_and_replay(self, log: WriteAheadLog, schema: Schema) -> tuple[ShardState, SnapshotInfo | None]:
        started = time.monotonic()
        loaded = self._load(log)
        state, snapshot = loaded if loaded is not None else (self._new_state(self._first_schema(log) or schema), None)
        state.table.claim_rows()
        loaded_at = time.monotonic()
        self._done("snapshot")
        position = snapshot.replay_position if snapshot is not None else 0
        self._replay(state, log, position)
        state.finish_replay()
        self._done("log")
        logger.info(
            "%s: %d users; snapshot from position %d loaded in %.2f s, %d records with %d events replayed in %.2f s%s",
            self._directory,
            len(state.table),
            position,
            loaded_at - started,
            self.records,
            self.events,
            time.monotonic() - loaded_at,
            f"; {log.torn_bytes} bytes of a torn tail cut" if log.torn_bytes else "",
        )
        return state, snapshot

    def _first_schema(self, log: WriteAheadLog) -> Schema | None:
        """The schema with which the log begins; None for an empty one."""
        for record in log.records(0):
            if record.type == RECORD_SCHEMA:
                return parse_schema(decode_schema(record.payload).yaml)
            raise _unreadable(self._directory, [record], "a log begins with its schema")
        return None

    def _load(self, log: WriteAheadLog) -> tuple[ShardState, SnapshotInfo] | None:
        """The newest snapshot that is whole."""
        faults = []
        for snapshot in self.snapshots.list():
            if snapshot.state in ("newer", "foreign"):
                # Not damage: somebody put it there, or a newer version went on from here.
                raise StartupError(snapshot.damage)
            if snapshot.damage:
                faults.append(snapshot.damage)
            elif snapshot.replay_position < log.start:
                faults.append(f"{snapshot.path}: the log no longer reaches back to it")
            else:
                self._progress(0.0, f"loading {snapshot.path.name}")
                try:
                    state = ShardState.load(self.snapshots.blocks(snapshot), self._new_state)
                except DataLoss as error:
                    faults.append(error.message)
                    continue
                if max(snapshot.replay_position, state.newest_stamp) > log.position:
                    raise DataLoss(
                        f"{self._directory}: the log ends at position {log.position}, and {snapshot.path.name} was "
                        f"written when it went on to {state.newest_stamp} at least: {_ADVICE}"
                    )
                for fault in faults:
                    logger.error("%s; the snapshot before it is loaded, nothing is lost", fault)
                return state, snapshot
        if log.start > 0:
            found = "; ".join(faults) or "there is no snapshot"
            raise DataLoss(
                f"{self._directory}: the log begins at position {log.start}, and no whole snapshot reaches it "
                f"({found}): {_ADVICE}"
            )
        for fault in faults:
            logger.error("%s; the whole log is replayed, nothing is lost", fault)
        return None

    def _replay(self, state: ShardState, log: WriteAheadLog, start: int) -> None:
        todo = max(1, log.position - start)
        plan = _plan(state.schema)
        for run in _runs(log.records(start)):
            record = run[0]
            self.records += len(run)
            self._progress((record.position - start) / todo, "replaying the log")
            try:
                if record.type == RECORD_EVENTS:
                    self._replay_events(state, plan, run)
                elif record.type == RECORD_FORGET:
                    state.forget(decode_forget(record.payload), record.position)
                elif record.type == RECORD_SCHEMA:
                    change = decode_schema(record.payload)
                    state.change_schema(parse_schema(change.yaml), change.reset_features)
                    plan = _plan(state.schema)
                elif record.type == RECORD_TRANSFER:
                    piece = Transfer.FromString(bytes(record.payload))
                    rows = check(state, piece)
                    check_room(state, rows)
                    receive(state, piece, rows, record.position)
                elif record.type == RECORD_ADOPTION:
                    state.adopt(shard_log_pb2.Adoption.FromString(bytes(record.payload)))
                elif record.type == RECORD_BEGINNING:
                    beginning = shard_log_pb2.Beginning.FromString(bytes(record.payload))
                    state.check_beginning(beginning)
                    state.begin_anew(beginning)
                else:
                    raise DataLoss(
                        f"{self._directory}: the record at position {record.position} is of type {record.type}, "
                        "which this version does not know: start the version that wrote it, or a later one"
                    )
            except (DecodeError, ValueError) as error:
                raise _unreadable(self._directory, run, str(error)) from error
            except DataLoss:
                raise
            except ProfileServiceError as error:
                raise _unreadable(self._directory, run, error.message) from error

    def _replay_events(self, state: ShardState, plan: WirePlan, run: list[Record]) -> None:
        parts = [decode_part(record.payload) for record in run]
        counts = [part.event_count for part in parts]
        arrivals_ns = [part.arrival_time_ns for part in parts]
        columns = decode_batches([part.events for part in parts], counts, plan, arrivals_ns)
        start = 0
        for part, count in zip(parts, counts, strict=True):
            these = slice(start, start + count)
            state.note(
                part.producer_id,
                part.sequence,
                part.acknowledged_sequence,
                columns.user_hash[these],
                columns.event_id_hash[these],
                part.arrival_time_ns,
            )
            start += count
        state.replay(
            columns, np.repeat([record.position for record in run], counts), np.repeat(np.array(arrivals_ns), counts)
        )
        self.events += columns.count


def _runs(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Neighbouring records of events together, up to some size; every other record by itself."""
    run: list[Record] = []
    size_bytes = 0
    for record in records:
        if run and (record.type != RECORD_EVENTS or size_bytes >= RUN_BYTES):
            yield run
            run, size_bytes = [], 0
        if record.type == RECORD_EVENTS:
            run.append(record)
            size_bytes += len(record.payload)
        else:
            yield [record]
    if run:
        yield run


_ADVICE = "`profile-service inspect DATA_DIR` shows what is there, and with --salvage keeps what is readable"


def _unreadable(directory: Path, run: Sequence[Record], reason: str) -> DataLoss:
    which = f"the record at position {run[0].position}"
    if len(run) > 1:
        which = f"one of the records from position {run[0].position} to {run[-1].position}"
    return DataLoss(
        f"{directory}: {which} is whole and cannot be read ({reason}): it was written by another version, or damaged "
        f"before its checksum was made; {_ADVICE}"
    )


def _plan(schema: Schema) -> WirePlan:
    return WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)
