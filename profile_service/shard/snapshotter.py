"""One snapshot after the other, each taken while its shard goes on.

    idle ──due, or asked for──▶ copying ──last block──▶ publishing ──▶ trim the log ──▶ discard the old ──▶ idle
                                   │                        │
                                   └──────── disk full ─────┴──▶ abandoned; again after a while

The commit loop calls `step` between two groups: the state is then that of the log's end, which is the stamp of the one
block that a step copies. A few buffers lie between the steps and the writer, who works elsewhere: a step waits for
nothing, and copies nothing while the buffers are full.

The writer shares a disk with the log, whose syncs everybody waits for. So it syncs as often as makes each sync short,
whatever the disk: what is not synced is never more than a few milliseconds of writing. And it rests longer than it
works, so that most of the disk's time is left; but less so when the log grows faster than the snapshot. The old
snapshot goes in small pieces: the space of a whole one, given back at once, keeps a file system from syncing anything
for tenths of a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from profile_service.clock import Clock
from profile_service.domain.decay import NS
from profile_service.errors import StorageFull, Unavailable
from profile_service.shard.state import ShardState
from profile_service.shard.state_blocks import StateCopy
from profile_service.storage.fs import DiskFull
from profile_service.storage.snapshot import SnapshotInfo, SnapshotStore, SnapshotWriter

BUFFERS = 4
"""Blocks that are copied and not yet written."""

SYNC_S = 0.002
"""How long writing and syncing a stretch of a snapshot should take: what a sync of the log may have to wait for."""
LEAST_SYNC_BYTES, MOST_SYNC_BYTES = 256 << 10, 8 << 20
"""Bounds of such a stretch."""

REST_SHARE, HURRIED_REST_SHARE = 3.0, 1.0
"""How long the writer rests after a stretch, in shares of the time that it took: usually, and once so much was logged
since the snapshot's beginning that the next one is due."""

DISCARD_BYTES = 8 << 20
"""How much of an old snapshot is given back at once."""
DISCARD_REST_S = 0.02
"""How long the next piece waits."""

RETRY_S = 30.0
"""After how long a snapshot that found the disk full is tried again."""

logger = logging.getLogger(__name__)


class Log(Protocol):
    """What a snapshot needs of the log."""

    @property
    def position(self) -> int:
        """Of the next record."""

    async def make_durable(self) -> None:
        """Returns when everything appended is on the disk, whenever else the log would sync it."""

    async def trim(self, position: int) -> None:
        """Gives up what stands before `position`."""


class Snapshotter:
    """Takes the snapshots of one shard.

    Args:
        state: as of the end of `log` whenever `step` is called.
        last: the newest snapshot that there is.
        log_bytes: bytes of log after which the next one is due.
        interval_s: seconds after which the next one is due, if anything was logged.
    """

    def __init__(
        self,
        store: SnapshotStore,
        state: ShardState,
        log: Log,
        *,
        clock: Clock,
        last: SnapshotInfo | None,
        log_bytes: int,
        interval_s: float,
    ) -> None:
        self._store = store
        self._state = state
        self._log = log
        self._clock = clock
        self._log_bytes = log_bytes
        self._interval_ns = int(interval_s * NS)
        self._ready: Callable[[], None] = lambda: None
        self._spaces: deque[NDArray[np.uint8]] = deque()
        self._running: _Running | None = None
        self._requests: list[asyncio.Future[int]] = []
        self._failure: BaseException | None = None
        self._closed = False
        self._begun_ns = last.created_ns if last is not None else clock()
        self._retry_ns = 0
        self.last_position = last.replay_position if last is not None else 0
        """Log position from which a recovery with the newest snapshot replays; 0 before the first one."""
        self.last_time_ns = last.created_ns if last is not None else 0
        """When the newest snapshot was begun; 0 before the first one."""
        self.problem = ""
        """Why there is no newer snapshot, for people; empty while nothing is wrong."""

    def on_ready(self, ready: Callable[[], None]) -> None:
        """`ready` is called when `step` has something to do again."""
        self._ready = ready

    @property
    def is_running(self) -> bool:
        """Whether a snapshot is being taken."""
        return self._running is not None

    def request(self) -> Awaitable[int]:
        """A snapshot that begins at the next step, or behind the one under way: the log position at its beginning, once
        it is published.

        Raises:
            StorageFull: the disk has no room for it.
            Unavailable: the shard is closing.
        """
        if self._closed or self._failure is not None:
            raise Unavailable("the shard is shutting down", retry_after_s=1.0)
        published: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._requests.append(published)
        return published

    async def step(self) -> bool:
        """Copies one block, if a snapshot is under way, and begins one that is due. Returns whether there is more to do
        at once.

        Called when everything that was appended to the log is applied, and nothing else is. Raises what ended the
        writer, other than a full disk: the shard is to end, too.
        """
        if self._failure is not None:
            raise self._failure
        if self._running is None:
            if self._closed or not self._is_due():
                return False
            self._begin()
        assert self._running is not None
        return self._running.copy_block(self._log.position)

    async def abandon(self) -> None:
        """Abandons the snapshot under way, if there is one; one that is complete is still published."""
        if self._running is not None:
            self._running.stop()
            await asyncio.wait([self._running.task])

    async def close(self) -> None:
        """Abandons the snapshot under way, and takes no more."""
        self._closed = True
        await self.abandon()
        self._refuse(self._requests, Unavailable("the shard is shutting down", retry_after_s=1.0))

    def _is_due(self) -> bool:
        if self._requests:
            return True
        now_ns = self._clock()
        logged = self._log.position - self.last_position
        if not logged or now_ns < self._retry_ns:
            return False
        return logged >= self._log_bytes or now_ns >= self._begun_ns + self._interval_ns

    def _begin(self) -> None:
        copy = self._state.copy_blocks()
        while len(self._spaces) < BUFFERS or len(self._spaces[0]) < copy.space_bytes:
            self._spaces.append(np.empty(copy.space_bytes, np.uint8))
            if len(self._spaces) > BUFFERS:
                self._spaces.popleft()
        self._begun_ns = self._clock()
        waiting, self._requests = self._requests, []
        running = _Running(copy, self._log.position, self._begun_ns, self._spaces, waiting)
        running.task = asyncio.create_task(self._take(running))
        self._running = running

    async def _take(self, running: _Running) -> None:
        try:
            await self._discard()
            self._answer(running, await self._write(running))
            await self._discard()
        except DiskFull as error:
            self._retry_ns = self._clock() + int(RETRY_S * NS)
            self.problem = f"no room for a snapshot: {error}"
            logger.error("%s; it is tried again in %g s", self.problem, RETRY_S)
            self._refuse(running.waiting, StorageFull(self.problem, retry_after_s=RETRY_S))
        except BaseException as error:  # noqa: BLE001 -- raised again by `step`, in the commit loop
            self._failure = error
            self._refuse(running.waiting, Unavailable(f"the snapshot failed: {error}", retry_after_s=1.0))
        finally:
            self._running = None
            self._ready()

    def _answer(self, running: _Running, published: SnapshotInfo | None) -> None:
        if published is None:
            self._refuse(running.waiting, Unavailable("the snapshot was abandoned", retry_after_s=1.0))
            return
        self.last_position, self.last_time_ns, self.problem = published.replay_position, published.created_ns, ""
        for waiting in running.waiting:
            if not waiting.done():
                waiting.set_result(published.replay_position)

    async def _discard(self) -> None:
        is_more = True
        while is_more and not self._closed:
            if is_more := await self._store.discard(DISCARD_BYTES):
                await asyncio.sleep(DISCARD_REST_S)

    async def _write(self, running: _Running) -> SnapshotInfo | None:
        """Writes blocks as they come and publishes the snapshot; None when it was stopped before its end."""
        try:
            await self._discard()
            writer = await self._store.begin(running.position, running.begun_ns)
            try:
                info = await self._write_blocks(running, writer)
            except DiskFull:
                await writer.abandon()
                raise
        finally:
            self._state.finish_copy()
        if info is None:
            return None
        position = await self._store.trim_position()
        if position is not None:
            await self._log.trim(position)
        return info

    async def _write_blocks(self, running: _Running, writer: SnapshotWriter) -> SnapshotInfo | None:
        pace = _Pace(asyncio.get_running_loop())
        while (filled := await running.filled.get()) is not None:
            pace.begin()
            await writer.write(filled.kind, filled.stamp, [filled.payload])
            running.give_back(filled.space)
            self._ready()
            is_stretch = pace.wrote(len(filled.payload))
            if is_stretch:
                await writer.sync()
            hurries = self._log.position - running.position >= self._log_bytes
            rest_s = pace.end(HURRIED_REST_SHARE if hurries else REST_SHARE, synced=is_stretch)
            if rest_s > 0 and not self._closed:
                await asyncio.sleep(rest_s)
        if not running.is_complete:
            await writer.abandon()
            return None
        # What a snapshot says was copied at a position must not be lost from the log.
        await self._log.make_durable()
        return await writer.publish()

    def _refuse(self, waiting: list[asyncio.Future[int]], error: Exception) -> None:
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                # Whoever waited may have gone away; the error is then nobody's.
                future.exception()


class _Pace:
    """How much is written before a sync, and how long the writer rests behind it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._stretch_bytes = LEAST_SYNC_BYTES
        self._bytes = 0
        self._taken_s = 0.0
        self._begun_s = 0.0

    def begin(self) -> None:
        """The writer begins to write a block."""
        self._begun_s = self._loop.time()

    def wrote(self, size_bytes: int) -> bool:
        """The block is written; returns whether the stretch ends with it, and is to be synced."""
        self._bytes += size_bytes
        return self._bytes >= self._stretch_bytes

    def end(self, rest_share: float, *, synced: bool) -> float:
        """The block is done with; returns for how many seconds to rest."""
        self._taken_s += self._loop.time() - self._begun_s
        if not synced:
            return 0.0
        # No faster than twofold at a time: one sync that was lucky must not make the next one long.
        fitting = self._bytes * SYNC_S / max(self._taken_s, SYNC_S / 2)
        self._stretch_bytes = int(min(max(fitting, LEAST_SYNC_BYTES), MOST_SYNC_BYTES))
        rest_s = self._taken_s * rest_share
        self._bytes, self._taken_s = 0, 0.0
        return rest_s


@dataclass(frozen=True)
class _Filled:
    """A block that waits to be written, in its space."""

    kind: int
    stamp: int
    payload: memoryview
    space: NDArray[np.uint8]


class _Running:
    """A snapshot under way, between those who copy and the one who writes."""

    task: asyncio.Task[None]

    def __init__(
        self,
        copy: StateCopy,
        position: int,
        begun_ns: int,
        spaces: deque[NDArray[np.uint8]],
        waiting: list[asyncio.Future[int]],
    ) -> None:
        self.position = position
        self.begun_ns = begun_ns
        self.waiting = waiting
        self.filled: asyncio.Queue[_Filled | None] = asyncio.Queue()
        self.is_complete = False
        """Whether every block was copied."""
        self._copy = copy
        self._spaces = spaces
        self._stopped = False

    def copy_block(self, position: int) -> bool:
        """Copies a block, as of `position`, if there is a free space; returns whether the next one can follow."""
        if self.is_complete or self._stopped or not self._spaces:
            return False
        space = self._spaces.popleft()
        block = self._copy.step(space)
        if block is None:
            self.is_complete = True
            self._spaces.append(space)
            self.filled.put_nowait(None)
            return False
        self.filled.put_nowait(_Filled(block[0], position, block[1], space))
        return bool(self._spaces)

    def give_back(self, space: NDArray[np.uint8]) -> None:
        """The block in the space is written."""
        self._spaces.append(space)

    def stop(self) -> None:
        """Nothing more is copied; what is complete is still written."""
        if not self.is_complete and not self._stopped:
            self._stopped = True
            self.filled.put_nowait(None)
