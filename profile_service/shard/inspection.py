"""What a shard's directory holds, what of it is damaged, and how to make it startable again when it is.

    inspect_shard   reads everything and changes nothing: says whether the shard would start, and what a salvage would
                    give up
    salvage_shard   puts the originals of what it changes aside, then

| found                                                 | done                                                        |
|-------------------------------------------------------|-------------------------------------------------------------|
| a damaged stretch of the log                          | given up: its positions stay, as a hole                     |
| the log ends, or begins, where a whole snapshot needs | a hole up to there: what the snapshot holds is kept         |
| more of it                                            |                                                             |
| a damaged snapshot, beside a whole one                | taken away                                                  |
| only damaged ones, and the log goes back to 0         | taken away: the log holds everything                        |
| only damaged ones, and the log does not               | the newest whose blocks can be loaded keeps those           |
| no snapshot, and the log does not go back to 0        | an empty snapshot where the log begins                      |
| a snapshot of another directory                       | taken away                                                  |
| the directory is missing                              | an empty one                                                |

What a hole held is not lost where the snapshot that is loaded was begun behind it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from profile_service.config import Capacity
from profile_service.domain.schema import Schema
from profile_service.errors import DataLoss, SchemaError, StartupError
from profile_service.shard.files import LOG_DIRECTORY, SNAPSHOT_DIRECTORY
from profile_service.shard.state import ShardState
from profile_service.storage.fs import FileSystem
from profile_service.storage.salvage import Damage, SegmentFinding, inspect_log, salvage_log
from profile_service.storage.segment import encode_segment_header, segment_name
from profile_service.storage.snapshot import SnapshotInfo, SnapshotStore

_EMPTY_SEGMENT_BYTES = 4096
_ALIGNMENT = 8
_SOME_BLOCKS = "the damaged blocks of"


@dataclass(frozen=True)
class SnapshotFinding:
    """What a snapshot holds."""

    info: SnapshotInfo
    block_count: int
    """Whole ones."""
    newest_stamp: int
    """The log position up to which it needs the log; that of its beginning where it is damaged."""
    faults: tuple[str, ...]
    """Everything that is wrong with it; empty for a whole one."""


@dataclass(frozen=True)
class ShardFinding:
    """What a shard's directory holds."""

    shard_id: int
    directory: Path
    segments: tuple[SegmentFinding, ...]
    """In the order of their positions."""
    snapshots: tuple[SnapshotFinding, ...]
    """The newest first."""
    damages: tuple[str, ...]
    """Everything that is not as it was written."""
    refusals: tuple[str, ...]
    """Why the shard would not start; empty when it would."""
    losses: tuple[str, ...]
    """What a salvage gives up; empty when nothing is lost."""

    @property
    def log_start(self) -> int:
        """Position where the log begins."""
        return min((segment.first for segment in self.segments if not segment.foreign), default=0)

    @property
    def log_end(self) -> int:
        """Position where the log ends."""
        return max((segment.end for segment in self.segments if not segment.foreign), default=0)

    @property
    def whole_snapshots(self) -> list[SnapshotFinding]:
        """Those with nothing wrong about them, the newest first."""
        return [snapshot for snapshot in self.snapshots if not snapshot.faults]


def inspect_shard(fs: FileSystem, shard_id: int, directory: Path, identity: bytes) -> ShardFinding:
    """What the directory of a shard holds. Nobody may be using it.

    Raises:
        StartupError: a newer version wrote its log.
    """
    try:
        names = fs.names(directory)
    except FileNotFoundError:
        missing = (f"{directory} is missing",)
        return ShardFinding(shard_id, directory, (), (), missing, missing, ("everything that the shard held",))
    segments = inspect_log(fs, directory / LOG_DIRECTORY, identity) if LOG_DIRECTORY in names else []
    store = _store(fs, directory, identity)
    snapshots = [_look_at(store, info) for info in store.list()]
    found = ShardFinding(shard_id, directory, tuple(segments), tuple(snapshots), (), (), ())
    damages = [
        f"{segment.path}, offset {damage.offset} (position {damage.position}), {damage.size_bytes} bytes: "
        f"{damage.reason}"
        for segment in segments
        for damage in segment.damages
    ]
    damages += [fault for snapshot in snapshots for fault in snapshot.faults]
    refusals = _refusals(found)
    return ShardFinding(
        shard_id, directory, found.segments, found.snapshots, tuple(damages), tuple(refusals), tuple(_losses(found))
    )


def salvage_shard(
    fs: FileSystem,
    shard_id: int,
    directory: Path,
    identity: bytes,
    *,
    backup: Path,
    schema: Schema | None,
    partitions: int,
) -> ShardFinding:
    """Makes the directory of a shard startable again. May be interrupted, and run again.

    Args:
        fs: where the directories are.
        shard_id: which shard it is.
        directory: the shard's, which nobody else may use.
        identity: of the directory.
        backup: a directory for the originals of what is changed; made when it is needed.
        schema: the schema last served with, where it is known.
        partitions: of the whole service.

    Returns:
        What was found before; `losses` says what is lost now.

    Raises:
        DiskFull: no room for the originals, or for what is written.
        DataLoss: nothing can be made of it.
        StartupError: a newer version wrote it.
    """
    found = inspect_shard(fs, shard_id, directory, identity)
    newer = [snapshot.info.damage for snapshot in found.snapshots if snapshot.info.state == "newer"]
    if newer:
        raise StartupError(newer[0])
    if not found.damages and not found.refusals:
        return found
    fs.make_directory(directory)
    store = _store(fs, directory, identity)
    damaged = [snapshot.info for snapshot in found.snapshots if snapshot.faults]
    for info in damaged:
        _copy(fs, info.path, backup / SNAPSHOT_DIRECTORY)
    base = found.whole_snapshots[0] if found.whole_snapshots else None
    if base is None and found.log_start > 0:
        kept = _keep_blocks(fs, store, damaged, backup, partitions)
        if kept is None:
            kept = _write_empty(store, found.log_start, schema, partitions)
            others = (loss for loss in found.losses if not loss.startswith(_SOME_BLOCKS))
            found = replace(found, losses=(_everything_before(found.log_start), *others))
        base = _look_at(store, kept)
    if base is not None:
        _stretch_log(fs, directory / LOG_DIRECTORY, identity, found, base)
    if LOG_DIRECTORY in fs.names(directory):
        salvage_log(fs, directory / LOG_DIRECTORY, backup / LOG_DIRECTORY, identity)
    left = {info.path for info in store.list()}
    for info in damaged:
        if info.path in left:
            fs.remove(info.path)
    if left:
        fs.sync_directory(directory / SNAPSHOT_DIRECTORY)
    return found


def _look_at(store: SnapshotStore, info: SnapshotInfo) -> SnapshotFinding:
    if info.state in ("foreign", "newer"):
        return SnapshotFinding(info, 0, info.replay_position, (info.damage,))
    stamp, count = info.replay_position, 0
    try:
        for block in store.blocks(info):
            stamp, count = max(stamp, block.stamp), count + 1
    except DataLoss:
        check = store.check(info)
        return SnapshotFinding(info, check.blocks, info.replay_position, check.faults)
    return SnapshotFinding(info, count, stamp, ())


def _refusals(found: ShardFinding) -> list[str]:
    """What a recovery would not start from, as `shard.recovery` and the opening of a log decide."""
    refusals = []
    replayed_from = 0
    for snapshot in found.snapshots:
        if snapshot.info.state in ("foreign", "newer"):
            refusals.append(snapshot.info.damage)
        elif not snapshot.faults and snapshot.info.replay_position >= found.log_start:
            replayed_from = snapshot.info.replay_position
            if snapshot.newest_stamp > found.log_end:
                refusals.append(
                    f"{snapshot.info.path} needs the log up to position {snapshot.newest_stamp}, and the log ends at "
                    f"{found.log_end}"
                )
            break
    else:
        if found.log_start > 0:
            refusals.append(f"the log begins at position {found.log_start}, and no whole snapshot reaches it")
    for number, segment in enumerate(found.segments):
        # Between ours and another log's nothing follows anything, but neither opens then.
        following = found.segments[number + 1] if number + 1 < len(found.segments) else None
        if not segment.opens or any(_is_read(damage, segment, following, replayed_from) for damage in segment.damages):
            refusals.append(f"{segment.path} is damaged")
    return refusals


def _is_read(damage: Damage, segment: SegmentFinding, following: SegmentFinding | None, replayed_from: int) -> bool:
    """Whether a start comes across it: it reads the last segment, and what is to be replayed."""
    if following is None:
        return True
    if damage.size_bytes and damage.position < min(segment.end, following.first):
        return damage.position + damage.size_bytes > replayed_from
    # Nothing is readable from here to the next segment.
    return following.first > replayed_from


def _losses(found: ShardFinding) -> list[str]:
    losses = []
    base = found.whole_snapshots[0] if found.whole_snapshots else None
    held_up_to = base.info.replay_position if base is not None else 0
    if base is not None and held_up_to < found.log_start:
        losses.append(f"what was logged from position {held_up_to} to {found.log_start}, where the log begins")
    elif base is None and found.log_start > 0:
        held_up_to = found.log_start
        usable = [snapshot for snapshot in found.snapshots if snapshot.block_count]
        losses.append(
            f"{_SOME_BLOCKS} {usable[0].info.path.name}: users, texts, or what makes events count once"
            if usable
            else _everything_before(found.log_start)
        )
    ours = [segment for segment in found.segments if not segment.foreign]
    following = [*(segment.first for segment in ours[1:]), 0]
    for segment, next_first in zip(ours, following[: len(ours)], strict=True):
        for damage in segment.damages:
            end = damage.position + damage.size_bytes
            if damage.position >= segment.end:
                # Nothing is readable from here to the next segment.
                end = max(end, next_first)
            start = max(damage.position, held_up_to)
            if start < end:
                losses.append(f"events logged from position {start} to {end} at most, {end - start} bytes")
    if base is not None and base.newest_stamp > found.log_end:
        losses.append(
            f"what was logged from position {found.log_end} on, but for what {base.info.path.name} holds of it"
        )
    return losses


def _everything_before(position: int) -> str:
    return f"everything that was counted before position {position}, where the log begins"


def _store(fs: FileSystem, directory: Path, identity: bytes) -> SnapshotStore:
    async def at_once(work: Callable[[], Any]) -> Any:
        return work()

    return SnapshotStore(fs, directory / SNAPSHOT_DIRECTORY, identity, at_once)


def _keep_blocks(
    fs: FileSystem, store: SnapshotStore, damaged: list[SnapshotInfo], backup: Path, partitions: int
) -> SnapshotInfo | None:
    """A new snapshot of the whole blocks of the newest damaged one that can be loaded then. Those that are tried are
    taken from `damaged`, and are no longer there."""
    for info in [info for info in damaged if info.state != "foreign"]:
        if info.path.name not in fs.names(info.path.parent):
            # The publishing of one that could not be loaded has removed it.
            _copy(fs, backup / SNAPSHOT_DIRECTORY / info.path.name, info.path.parent)
        try:
            store.salvage(info, backup / SNAPSHOT_DIRECTORY)
        except DataLoss:
            continue
        # Its name may be given again.
        damaged.remove(info)
        kept = store.list()[0]
        try:
            ShardState.load(store.blocks(kept), _new_state(partitions))
        except (DataLoss, SchemaError):
            fs.remove(kept.path)
            continue
        return kept
    return None


def _write_empty(store: SnapshotStore, position: int, schema: Schema | None, partitions: int) -> SnapshotInfo:
    """A snapshot without users."""
    if schema is None:
        raise DataLoss(
            "no snapshot of the shard is readable, and the schema last served with is not known: put it into the data "
            "directory as schema.yaml"
        )
    state = _new_state(partitions)(schema)
    copy = state.copy_blocks()
    space = np.empty(copy.space_bytes, np.uint8)
    writer = asyncio.run(store.begin(position, time.time_ns()))
    while (taken := copy.step(space)) is not None:
        kind, payload = taken
        writer.write_now(kind, position, [payload])
    return writer.publish_now()


def _stretch_log(fs: FileSystem, directory: Path, identity: bytes, found: ShardFinding, base: SnapshotFinding) -> None:
    """Puts empty segments where a snapshot needs the log and it has none; `salvage_log` sees to what is in between."""
    fs.make_directory(directory)
    begin = base.info.replay_position
    none = all(segment.foreign for segment in found.segments)
    if none or begin < found.log_start:
        _write_empty_segment(fs, directory, identity, begin)
    end = begin if none else found.log_end
    if base.newest_stamp > end:
        # Far enough for a record that says what is missing.
        _write_empty_segment(fs, directory, identity, max(base.newest_stamp, end + _EMPTY_SEGMENT_BYTES))


def _write_empty_segment(fs: FileSystem, directory: Path, identity: bytes, position: int) -> None:
    first = -(-position // _ALIGNMENT) * _ALIGNMENT
    file = fs.create(directory / segment_name(first), _EMPTY_SEGMENT_BYTES)
    try:
        file.write(0, [encode_segment_header(identity, first, _EMPTY_SEGMENT_BYTES)])
        file.sync()
    finally:
        file.close()
    fs.sync_directory(directory)


def _copy(fs: FileSystem, path: Path, backup: Path) -> None:
    """Copies a file to a directory."""
    fs.make_directory(backup)
    copy = backup / path.name
    if copy.name in fs.names(backup):
        fs.remove(copy)
    file = fs.create(copy)
    try:
        file.write(0, [fs.map(path)])
        file.sync()
    finally:
        file.close()
    fs.sync_directory(backup)


def _new_state(partitions: int) -> Callable[[Schema], ShardState]:
    return lambda schema: ShardState(schema, partitions=partitions, capacity=Capacity())
