"""The simulation finds bugs: each of these is planted, and some run of it must fail.

They are mistakes that real services have made, and that no other test need notice: the shard works, until the wrong
moment comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from profile_service.shard.dedupe import EventIdWindow, ProducerSequences
from profile_service.shard.shard import Sender, Shard
from profile_service.shard.state import ShardState
from profile_service.shard.state_blocks import StateCopy
from profile_service.storage.snapshot import SnapshotStore
from profile_service.storage.wal import WriteAheadLog
from tests.simulation.campaign import run_some
from tests.simulation.disk import Disk

MOST_RUNS = 600
"""A bug that so many runs do not find is one that the simulation does not find."""

Plant = Callable[[], Sequence[AbstractContextManager[object]]]


def acknowledge_before_the_sync() -> Sequence[AbstractContextManager[object]]:
    """The commit loop does not wait for the disk."""
    sync = WriteAheadLog.sync

    async def hasty(log: WriteAheadLog) -> None:
        # Only looked at when it is done, so that a failure shows in the next group.
        asyncio.ensure_future(sync(log)).add_done_callback(lambda task: task.cancelled() or task.exception())

    return [mock.patch.object(WriteAheadLog, "sync", hasty)]


def write_without_sync() -> Sequence[AbstractContextManager[object]]:
    """Records are given to the kernel, and that is taken for durable."""
    commit = WriteAheadLog._commit

    def careless(log: WriteAheadLog, end: int, durable: bool) -> None:
        commit(log, end, durable=False)

    return [mock.patch.object(WriteAheadLog, "_commit", careless)]


def sync_no_directory() -> Sequence[AbstractContextManager[object]]:
    """Files are synced, their names are not."""
    return [mock.patch.object(Disk, "sync_directory", return_value=None)]


def rename_a_snapshot_before_its_sync() -> Sequence[AbstractContextManager[object]]:
    """The name of a snapshot reaches the disk before its bytes do."""
    do = Disk._do

    def careless(disk: Disk, operation: str, path: Path, *rest: Any) -> Any:
        return None if operation == "sync" and path.name.endswith(".snapshot.new") else do(disk, operation, path, *rest)

    return [mock.patch.object(Disk, "_do", careless)]


def serve_what_is_in_the_page_cache_only() -> Sequence[AbstractContextManager[object]]:
    """A log is opened after the death of its process, and what it holds is not synced."""
    recover_tail = WriteAheadLog._recover_tail

    def trusting(log: WriteAheadLog) -> None:
        with mock.patch("tests.simulation.disk._WatchedFile.sync", return_value=None):
            recover_tail(log)

    return [mock.patch.object(WriteAheadLog, "_recover_tail", trusting)]


def replay_without_stamps() -> Sequence[AbstractContextManager[object]]:
    """Every record after the snapshot's beginning is counted, also in rows that were copied later."""

    def forgetful(state: ShardState, rows: object, stamp: int) -> None:
        state.newest_stamp = max(state.newest_stamp, stamp)

    return [mock.patch.object(ShardState, "stamp_rows", forgetful)]


def forget_sequences_on_recovery() -> Sequence[AbstractContextManager[object]]:
    """What a replay brings back are profiles, not what makes batches count once."""
    return [mock.patch.object(ProducerSequences, "note", return_value=None)]


def leave_sequences_out_of_snapshots() -> Sequence[AbstractContextManager[object]]:
    """A snapshot holds profiles, not what makes batches count once."""
    return [mock.patch.object(StateCopy, "_copy_producers", return_value=())]


def leave_requests_out_of_snapshots() -> Sequence[AbstractContextManager[object]]:
    """A snapshot holds producers' sequences, not the ids of requests."""
    return [mock.patch.object(StateCopy, "_copy_requests", return_value=())]


def forget_event_ids_on_recovery() -> Sequence[AbstractContextManager[object]]:
    """Event ids that came after the snapshot are not known after a crash."""
    return [mock.patch.object(EventIdWindow, "note", return_value=None)]


def let_batches_overtake() -> Sequence[AbstractContextManager[object]]:
    """After a batch was refused for want of space, a smaller one behind it is taken."""
    return [mock.patch.object(Sender, "check", return_value=None)]


def log_duplicates() -> Sequence[AbstractContextManager[object]]:
    """A record holds its part as it came, so that a replay would have to decide again."""

    def whole(events: bytes, chosen: object) -> bytes:
        return events

    return [mock.patch("profile_service.shard.shard.gather_events", whole)]


def publish_a_snapshot_that_the_log_does_not_reach() -> Sequence[AbstractContextManager[object]]:
    """Without syncs of the log a snapshot says more than the log after a power failure."""

    async def lazy(log: WriteAheadLog) -> None:
        pass

    return [mock.patch.object(WriteAheadLog, "make_durable", lazy)]


def trim_to_the_newest_snapshot() -> Sequence[AbstractContextManager[object]]:
    """The log goes up to the newest snapshot: when that one is damaged, the one before it is of no use."""

    async def newest(store: SnapshotStore) -> int | None:
        found = [info for info in store.list() if not info.damage]
        return found[0].replay_position if found else None

    return [mock.patch.object(SnapshotStore, "trim_position", newest)]


def replay_no_forgetting() -> Sequence[AbstractContextManager[object]]:
    """Profiles that were forgotten are back after a recovery."""
    forget = ShardState.forget

    def mindful(state: ShardState, user_ids: Sequence[bytes], position: int | None = None) -> None:
        if position is None:
            forget(state, user_ids)

    return [mock.patch.object(ShardState, "forget", mindful)]


def refuse_after_noting() -> Sequence[AbstractContextManager[object]]:
    """What makes batches count once is asked before there is room in the log."""
    check = Shard._check

    def hasty(shard: Shard, submission: Any) -> Any:
        checked = check(shard, submission)
        for part in checked or ():
            shard._state.producers.note(
                part.part.producer_id or "nobody", part.part.sequence, 0, part.partitions, part.part.arrival_time_ns
            )
        return checked

    return [mock.patch.object(Shard, "_check", hasty)]


PLANTS: tuple[Plant, ...] = (
    acknowledge_before_the_sync,
    write_without_sync,
    sync_no_directory,
    rename_a_snapshot_before_its_sync,
    serve_what_is_in_the_page_cache_only,
    replay_without_stamps,
    forget_sequences_on_recovery,
    leave_sequences_out_of_snapshots,
    leave_requests_out_of_snapshots,
    forget_event_ids_on_recovery,
    let_batches_overtake,
    log_duplicates,
    publish_a_snapshot_that_the_log_does_not_reach,
    trim_to_the_newest_snapshot,
    replay_no_forgetting,
    refuse_after_noting,
)


@pytest.fixture(params=PLANTS, ids=lambda plant: plant.__name__)
def planted(request: pytest.FixtureRequest) -> Iterator[None]:
    plant: Plant = request.param
    with ExitStack() as stack:
        for patch in plant():
            stack.enter_context(patch)
        yield


@pytest.mark.usefixtures("planted")
def test_a_planted_bug_is_found(seed: int) -> None:
    summary = run_some(seed * MOST_RUNS, MOST_RUNS, until_fault=True)
    assert summary.faults, f"{summary.runs} runs have not found it"
    print(f"found by run {summary.runs}: {next(iter(summary.faults.values())).strip().splitlines()[-1][:200]}")
