"""The write-ahead log of one shard: records in order, durable in groups.

    reserve ──▶ append, append, … ──▶ sync ──▶ (what is synced may be acknowledged)
       │           │                    │
       │           │                    └ one piece of blocking work: write all that was appended, then fdatasync
       │           └ encodes; decides which segment the record goes to; touches no file
       └ sees to it that there is room: nothing after it can fail for want of space

A directory holds segments (`storage.segment`), one behind the other without a gap in positions. A position is the
number of bytes of records since the log began; segments' headers do not count. The next segment is made ready in the
background before the current one is full, as zeros, synced, under a temporary name; it is renamed when its first
records are synced. Before that the segment before it is synced, in every mode: so only the last segment can have a torn
tail.

    sync mode   when `sync` returns, everything appended is      what a crash of the machine may take
    ---------   -------------------------------------------      ------------------------------------
    always      on the disk                                      nothing that was synced
    interval    with the kernel, on the disk sync_interval_s     the last sync_interval_s, and the time a sync takes
                later at most
    never       with the kernel, which writes when it likes      what the kernel had not written yet (with Linux's
                                                                 defaults about half a minute)

    The death of the process takes nothing in any mode. In each of them what is left is a prefix of what was appended.

Opening reads the last segment and decides about its tail by the table in `storage.segment`: a torn tail is zeroed;
damage is a DataLoss. Then what no later record knows to be synced is written once more and synced, before anything of
it is served: after the death of a process alone it may be in the page cache only, and after a failed sync the cache may
call clean what the disk never got. So are the zeros behind it, unless the log was closed: the opening before this one
may have cut a tail and failed to sync that, and what it cut would stand behind later records after a crash.
"""

from __future__ import annotations

import asyncio
import errno
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from profile_service.storage.fs import Buffer, DiskFull, File, FileSystem, Runner
from profile_service.storage.record import (
    FIRST_RESERVED_TYPE,
    MAX_OVERHEAD_BYTES,
    MAX_PAYLOAD_BYTES,
    RECORD_GAP,
    RECORD_HOLE,
    RECORD_MARK,
    encode,
    identity_seed,
    payload_of,
    record_bytes,
)
from profile_service.storage.segment import (
    IDENTITY_BYTES,
    SEGMENT_HEADER_BYTES,
    Found,
    data_loss,
    decode_segment_header,
    encode_segment_header,
    first_of_name,
    is_temporary,
    is_zero,
    judge,
    last_nonzero,
    segment_name,
    temporary_name,
)

__all__ = ["LogOptions", "Record", "Runner", "SyncMode", "WriteAheadLog"]

SyncMode = Literal["always", "interval", "never"]

_MIN_SEGMENT_BYTES = 4096
# Sizes of segments are multiples of this: whole pages, whole sectors.
_GRAIN_BYTES = 4096
# How much of the next segment is made ready in one piece of work, and so what a group's sync may have to wait for.
_STEP_BYTES = 1 << 20
_ZEROS = bytes(_STEP_BYTES)


@dataclass(frozen=True)
class LogOptions:
    """How a log is written. Everything may change at a restart."""

    segment_bytes: int = 64 << 20
    """Of a segment's file; one that a larger group needs is larger."""
    sync_mode: SyncMode = "always"
    sync_interval_s: float = 1.0
    """For sync mode "interval"."""

    def validate(self) -> None:
        """Raises ValueError that names every fault."""
        faults = []
        if self.segment_bytes < _MIN_SEGMENT_BYTES or self.segment_bytes % _GRAIN_BYTES:
            faults.append(f"segment_bytes: must be a multiple of {_GRAIN_BYTES}, is {self.segment_bytes}")
        if self.sync_mode not in get_args(SyncMode):
            faults.append(f"sync_mode: must be one of {', '.join(get_args(SyncMode))}, is {self.sync_mode}")
        if not self.sync_interval_s > 0:
            faults.append(f"sync_interval_s: must be more than 0, is {self.sync_interval_s}")
        if faults:
            raise ValueError("; ".join(faults))


class Record(NamedTuple):
    """A record as it is replayed."""

    position: int
    type: int
    payload: memoryview


class _Segment:
    """A file of the log.

    Attributes:
        path: its final name, also before it has it.
        first: position of its first record.
        file: open while it may be written.
        temporary: the name it has before it is part of the log.
        dirty: something was written since the last sync.
    """

    def __init__(self, path: Path, first: int, size_bytes: int) -> None:
        self.path = path
        self.first = first
        self.size_bytes = size_bytes
        self.file: File | None = None
        self.temporary: Path | None = None
        self.dirty = False

    @property
    def capacity(self) -> int:
        """Bytes of records that it has room for."""
        return self.size_bytes - SEGMENT_HEADER_BYTES

    def offset(self, position: int) -> int:
        return position - self.first + SEGMENT_HEADER_BYTES


class _Write(NamedTuple):
    """A record that is appended and not written yet."""

    segment: _Segment
    position: int
    buffers: list[Buffer]
    end: int


class _Preparation:
    """The next segment while it is made ready: zeros, on the disk, under a temporary name.

    Attributes:
        done_bytes: of it are ready.
    """

    def __init__(self, fs: FileSystem, path: Path, size_bytes: int, *, direct: bool) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._direct = direct
        self.file: File | None = None
        self._fs = fs
        self.done_bytes = 0

    @property
    def ready(self) -> bool:
        return self.done_bytes == self.size_bytes

    def step(self) -> None:
        """Blocking: makes a bounded part of it ready; does nothing when all of it is.

        Raises:
            DiskFull: nothing is left of it.
        """
        if self.ready:
            return
        try:
            if self.file is None:
                # Asked first, so that a nearly full disk is not filled to the brim each time that somebody tries.
                if self._fs.free_bytes(self.path.parent) < self.size_bytes:
                    raise DiskFull(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path.parent))
                self.file = self._fs.create(self.path)
            size = min(_STEP_BYTES, self.size_bytes - self.done_bytes)
            zeros = [_ZEROS if size == _STEP_BYTES else _ZEROS[:size]]
            if self._direct:
                self.file.append(self.done_bytes, zeros)
            else:
                self.file.write(self.done_bytes, zeros)
            self.file.sync()
            self.done_bytes += size
        except DiskFull:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Blocking: gives the room back."""
        if self.file is not None:
            self.file.close()
            self.file = None
            self._fs.remove(self.path)
        self.done_bytes = 0


class WriteAheadLog:
    """See the module's text. Made by `open`; used from one event loop; all that blocks goes through the Runner.

    After a failed write or sync the log is dead: everything but `close` raises OSError, and only opening it anew tells
    what is on the disk.
    """

    def __init__(self, fs: FileSystem, directory: Path, identity: bytes, options: LogOptions, run: Runner) -> None:
        self._fs = fs
        self._directory = directory
        self._identity = identity
        self._seed = identity_seed(identity)
        self._options = options
        self._run = run
        self._is_direct = options.sync_mode == "always"
        """What is synced at once goes past the page cache; what the kernel is to hold for a while goes into it."""
        self._segments: list[_Segment] = []
        self._position = 0
        self._written_position = 0
        self._durable_position = 0
        self._torn_bytes = 0
        self._appended = False
        self._marked_position = 0  # everything before it is known to be synced by a record in the log, or is a mark
        self._queue: deque[_Write] = deque()
        self._writing: _Segment  # what the Runner's work wrote last
        self._next: _Preparation | None = None
        self._preparing = False  # in the background
        self._prepare_below = 0  # bytes left in the segment at which the next one is made ready
        self._temporary_number = 0
        self._tasks: set[asyncio.Future[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._failure: BaseException | None = None
        self._told = False  # somebody was told of the failure
        self._on_failure: Callable[[], None] = lambda: None
        self._closed = False

    # --- opening ---

    @classmethod
    def open(cls, fs: FileSystem, directory: Path, identity: bytes, options: LogOptions, run: Runner) -> WriteAheadLog:
        """Opens the log in `directory`, or begins one where there is none. Blocking.

        Args:
            fs: where the directory is; nobody else may use the directory.
            directory: made when it is missing.
            identity: 16 bytes, of this log alone; see `storage.record`.
            options: valid ones.
            run: for the blocking work of everything but `open` and `records`; one piece after the other.

        Raises:
            DataLoss: what is there is not what was written; says where, and what to do.
            StartupError: a newer version wrote it.
            DiskFull: no room for the first segment.
        """
        assert len(identity) == IDENTITY_BYTES
        options.validate()
        log = cls(fs, directory, identity, options, run)
        fs.make_directory(directory)
        names = fs.names(directory)
        for name in filter(is_temporary, names):
            fs.remove(directory / name)
        log._segments = [
            log._check_segment(directory / name, first)
            for name, first in ((name, first_of_name(name)) for name in names)
            if first is not None
        ]
        if not log._segments:
            log._begin()
        log._recover_tail()
        fs.sync_directory(directory)
        log._prepare_below = log._segments[-1].size_bytes // 2
        return log

    def _begin(self) -> None:
        """Makes the first segment."""
        preparation = self._new_preparation(self._options.segment_bytes)
        while not preparation.ready:
            preparation.step()
        segment = self._adopt(preparation, 0)
        self._segments = [segment]
        self._publish(segment, [])
        assert segment.file is not None
        segment.file.close()

    def _check_segment(self, path: Path, first: int) -> _Segment:
        file = self._fs.open(path)
        try:
            header = decode_segment_header(file.read(0, SEGMENT_HEADER_BYTES))
            size_bytes = file.size
        finally:
            file.close()
        reason = header if isinstance(header, str) else ""
        if not isinstance(header, str):
            if header.identity != self._identity:
                reason = "the segment belongs to another log"
            elif header.first != first:
                reason = f"by its name its first record is at position {first}, by its header at {header.first}"
            elif header.size_bytes != size_bytes:
                reason = f"the file has {size_bytes} bytes, by its header {header.size_bytes}"
        if reason:
            raise data_loss(path, min(size_bytes, SEGMENT_HEADER_BYTES), first, reason)
        return _Segment(path, first, size_bytes)

    def _recover_tail(self) -> None:
        """Decides where the log ends, and makes sure that what is before is on the disk, and nothing is behind."""
        segment = self._segments[-1]
        view = self._fs.map(segment.path)
        offset = SEGMENT_HEADER_BYTES
        durable = segment.first  # segments before the last one are synced
        self._marked_position = segment.first
        closed = False  # the last record is a mark: all is on the disk
        while (found := judge(view, segment.first, offset, self._seed, last=True)).found is Found.RECORD:
            header = found.header
            assert header is not None
            durable = max(durable, header.durable)
            offset += header.size_bytes
            if header.type == RECORD_GAP:
                position = segment.first + offset - SEGMENT_HEADER_BYTES
                raise data_loss(segment.path, offset, position, "the segment that should follow a gap is missing")
            self._marked_position = max(self._marked_position, header.durable)
            closed = header.type == RECORD_MARK and self._marked_position == header.position
            if closed:
                self._marked_position = header.position + header.size_bytes
        self._position = segment.first + offset - SEGMENT_HEADER_BYTES
        if found.found is Found.DAMAGED:
            raise data_loss(segment.path, offset, self._position, found.reason)
        segment.file = self._fs.open(segment.path, writable=True)
        if found.found is Found.TORN:
            self._torn_bytes = last_nonzero(view, offset, len(view)) + 1 - offset
        for start in range(segment.offset(durable), offset, _STEP_BYTES):
            segment.file.write(start, [bytes(view[start : min(start + _STEP_BYTES, offset)])])
        if found.found is Found.TORN or not closed:
            for start in range(offset, len(view), _STEP_BYTES):
                segment.file.write(start, [_ZEROS[: min(_STEP_BYTES, len(view) - start)]])
        segment.file.sync()
        self._writing = segment
        self._written_position = self._durable_position = self._position

    # --- what there is ---

    @property
    def start(self) -> int:
        """Position of the first record held."""
        return self._segments[0].first

    @property
    def position(self) -> int:
        """Position of the next record."""
        return self._position

    @property
    def durable_position(self) -> int:
        """Everything before is on the disk."""
        return self._durable_position

    @property
    def size_bytes(self) -> int:
        """On the disk, with what is made ready."""
        return sum(segment.size_bytes for segment in self._segments) + (self._next.done_bytes if self._next else 0)

    @property
    def sync_mode(self) -> SyncMode:
        """See the module's text."""
        return self._options.sync_mode

    @property
    def torn_bytes(self) -> int:
        """Cut from the tail when the log was opened; nobody was told that they were durable."""
        return self._torn_bytes

    def records(self, position: int) -> Iterator[Record]:
        """Every record from `position` on, which is one's position or the log's end. Blocking; before the first append.

        A position may also lie in what a salvage gave up: then they are those behind it. A payload is a slice of a
        mapped file; what keeps it keeps the mapping.

        Raises:
            DataLoss: something is not what was written; what came before it is right.
        """
        assert not self._appended, "the log is read before it is written"
        if not self.start <= position <= self._position:
            path = self._segments[0 if position < self.start else -1].path
            held = f"the log holds positions {self.start} to {self._position}"
            raise data_loss(path, SEGMENT_HEADER_BYTES, position, f"it should be read from here, but {held}")
        index = bisect_right(self._segments, position, key=lambda segment: segment.first) - 1
        while position < self._position:
            segment = self._segments[index]
            index += 1
            last = index == len(self._segments)
            end = self._position if last else self._segments[index].first
            position = self._behind_loss(segment, position)
            position = yield from self._records_of(segment, position, end, last=last)

    def _behind_loss(self, segment: _Segment, position: int) -> int:
        """The end of the hole or gap that `position` lies in; `position` itself where it lies in none."""
        start = segment.first
        if start == position:
            return position
        view = self._fs.map(segment.path)
        if judge(view, start, segment.offset(position), self._seed, last=False).found is Found.RECORD:
            return position
        while start < position:
            offset = segment.offset(start)
            found = judge(view, segment.first, offset, self._seed, last=False)
            if found.found is not Found.RECORD:
                break  # the reader says what is wrong
            header = found.header
            assert header is not None
            end = start + header.size_bytes
            if header.type == RECORD_GAP:
                end = int.from_bytes(payload_of(view, offset, header), "little")
            if end > position:
                return end if header.type in (RECORD_HOLE, RECORD_GAP) else position
            start = end
        return position

    def _records_of(self, segment: _Segment, position: int, end: int, *, last: bool) -> Generator[Record, None, int]:
        """Those of one segment up to the position `end`; returns where the next one has to begin."""
        view = self._fs.map(segment.path)
        while position < end:
            offset = segment.offset(position)
            found = judge(view, segment.first, offset, self._seed, last=False)
            if found.found is Found.END:
                reason = f"the log ends here, but goes on at position {end} in the next segment"
                raise data_loss(segment.path, offset, position, reason)
            if found.found is not Found.RECORD:
                raise data_loss(segment.path, offset, position, found.reason)
            header = found.header
            assert header is not None
            if header.type < FIRST_RESERVED_TYPE:
                yield Record(position, header.type, payload_of(view, offset, header))
            position += header.size_bytes
            if header.type == RECORD_GAP:
                offset = segment.offset(position)
                position = int.from_bytes(payload_of(view, segment.offset(header.position), header), "little")
                if position != end:
                    raise data_loss(segment.path, offset, position, f"after a gap the log goes on at position {end}")
                return position
        if position != end:
            raise data_loss(segment.path, segment.offset(end), end, "the next segment begins within a record")
        if not last and not is_zero(view, segment.offset(end)):
            raise data_loss(segment.path, segment.offset(end), end, "behind the last record there are not only zeros")
        return position

    # --- writing ---

    async def reserve(self, payload_bytes: int, records: int) -> None:
        """Makes room for the next `records` records, of `payload_bytes` together.

        After it neither `append` nor `sync` can fail for want of space, on file systems that overwrite in place.

        Raises:
            DiskFull: there is no room. Nothing has changed; trying again is all that is needed once there is.
            OSError: the log is dead.
        """
        self.check()
        need = payload_bytes + records * MAX_OVERHEAD_BYTES
        # A record that does not fit here goes to the next segment, with all that follow: that one needs room for all.
        size_bytes = -(-(SEGMENT_HEADER_BYTES + need) // _GRAIN_BYTES) * _GRAIN_BYTES
        while self._room() < need:
            if self._next is not None and self._next.size_bytes < size_bytes:
                too_small, self._next = self._next, None
                await self._do(too_small.abandon)
            elif self._next is None:
                self._next = self._new_preparation(max(self._options.segment_bytes, size_bytes))
            elif self._next.ready:
                break
            else:
                await self._do(partial(self._prepare_step, self._next))
            self.check()

    def append(self, record_type: int, payload: Sequence[Buffer]) -> int:
        """Adds a record to what the next `sync` writes; returns its position. There must be room (`reserve`).

        Args:
            record_type: 1 to 252.
            payload: its bytes, in pieces; not copied, so they must stay as they are until they are synced.
        """
        assert 0 < record_type < FIRST_RESERVED_TYPE
        return self._append(record_type, payload)

    def _append(self, record_type: int, payload: Sequence[Buffer]) -> int:
        self.check()
        length = sum(map(len, payload))
        if length > MAX_PAYLOAD_BYTES:
            raise ValueError(f"a record holds at most {MAX_PAYLOAD_BYTES} bytes, this one has {length}")
        size = record_bytes(length)
        if self._room() < size:
            self._go_on_in_next(size)
        segment = self._segments[-1]
        position = self._position
        buffers = encode(
            record_type,
            payload,
            position=position,
            durable=self._durable_position,
            offset=segment.offset(position),
            seed=self._seed,
        )
        self._appended = True
        self._position = position + size
        self._queue.append(_Write(segment, position, buffers, self._position))
        return position

    async def sync(self) -> None:
        """Returns when everything appended before the call is as durable as the sync mode says.

        Raises:
            OSError: a write or a sync failed; the log is dead, and what was appended since the last sync may or may not
                be found when it is opened anew.
        """
        self.check()
        end = self._position
        always = self._options.sync_mode == "always"
        if (self._durable_position if always else self._written_position) < end:
            await self._do(partial(self._commit, end, durable=always))
            self.check()
        if self._room() < self._prepare_below and not self._preparing and (self._next is None or not self._next.ready):
            self._preparing = True
            self._in_background(self._prepare())
        if self._options.sync_mode == "interval" and self._timer is None and self._durable_position < end:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._options.sync_interval_s, self._sync_in_background)

    async def make_durable(self) -> None:
        """Returns when everything appended before the call is on the disk, whatever the sync mode.

        Raises:
            OSError: a write or a sync failed; the log is dead.
        """
        self.check()
        if self._durable_position < self._position:
            await self._do(partial(self._commit, self._position, durable=True))
            self.check()

    def on_failure(self, failed: Callable[[], None]) -> None:
        """`failed` is called when the log has died in the background, where no caller hears of it; `check` says why."""
        self._on_failure = failed

    def check(self) -> None:
        """Raises OSError where the log is dead."""
        assert not self._closed, "the log is closed"
        if self._failure is not None:
            self._told = True
            raise OSError(
                errno.EIO, f"the log in {self._directory} failed before ({self._failure!r})"
            ) from self._failure

    async def trim(self, position: int) -> None:
        """Removes the segments that hold nothing from `position` on; never the one in use.

        Raises:
            OSError: the log is dead.
        """
        self.check()
        while len(self._segments) > 1 and self._segments[1].first <= position:
            # A segment that still waits to be written is not part of the log yet, and neither can the one before it go.
            if self._segments[1].temporary is not None:
                break
            await self._do(self._remove_first)
            self.check()

    async def close(self) -> None:
        """Writes and syncs everything appended, whatever the mode, and releases the files. Closing twice does nothing.

        Raises:
            OSError: not everything could be written, and no call before has said so.
        """
        if self._closed:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            if not self._told:
                self.check()
                await self._do(partial(self._commit, self._position, durable=True))
                # With a mark at its end every record of a log that was closed is known to be on the disk.
                if self._marked_position < self._position and self._room() >= record_bytes(0):
                    self._append(RECORD_MARK, [])
                    await self._do(partial(self._commit, self._position, durable=True))
        finally:
            self._closed = True
            await self._run(self._release)

    async def _do(self, work: Callable[[], None]) -> None:
        try:
            await self._run(work)
        except BaseException:
            self._told = self._failure is not None
            raise

    def _room(self) -> int:
        """Bytes of records that the segment in use still has room for."""
        segment = self._segments[-1]
        return segment.first + segment.capacity - self._position

    def _go_on_in_next(self, size: int) -> None:
        preparation, self._next = self._next, None
        assert preparation is not None, "append without reserve"
        assert preparation.ready, "append without reserve"
        segment = self._adopt(preparation, self._position)
        assert segment.capacity >= size, "append without reserve"
        self._segments.append(segment)
        self._prepare_below = segment.size_bytes // 2

    def _new_preparation(self, size_bytes: int) -> _Preparation:
        self._temporary_number += 1
        return _Preparation(
            self._fs, self._directory / temporary_name(self._temporary_number), size_bytes, direct=self._is_direct
        )

    def _adopt(self, preparation: _Preparation, first: int) -> _Segment:
        """The segment made of what is ready; it becomes part of the log by `_publish`."""
        segment = _Segment(self._directory / segment_name(first), first, preparation.size_bytes)
        segment.file = preparation.file
        segment.temporary = preparation.path
        return segment

    # --- in the background ---

    def _in_background(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whatever it is, the log has noted it and the next call says it
        if self._failure is not None:
            self._on_failure()

    async def _prepare(self) -> None:
        """Makes the next segment ready, step by step, so that groups are written in between."""
        if self._next is None:
            self._next = self._new_preparation(self._options.segment_bytes)
        preparation = self._next
        try:
            while self._next is preparation and not preparation.ready and not self._closed:
                await self._run(partial(self._prepare_step, preparation))
        except DiskFull:
            # Whoever needs the room will try, and be told. Until then: not again for each group.
            self._prepare_below = self._room() // 2
        finally:
            self._preparing = False

    def _sync_in_background(self) -> None:
        self._timer = None
        if self._failure is None and not self._closed:
            self._in_background(self._run(partial(self._commit, self._written_position, durable=True)))

    # --- blocking work, one piece after the other ---

    def _prepare_step(self, preparation: _Preparation) -> None:
        try:
            preparation.step()
        except DiskFull:
            raise  # not a failure: nobody was promised anything yet
        except BaseException as error:
            self._failure = error
            raise

    def _commit(self, end: int, durable: bool) -> None:
        """Writes what was appended up to `end`; with `durable`, syncs it too."""
        try:
            while self._queue and self._queue[0].position < end:
                first = self._queue[0]
                buffers: list[Buffer] = []
                while self._queue and self._queue[0].segment is first.segment and self._queue[0].position < end:
                    write = self._queue.popleft()
                    buffers += write.buffers
                if first.segment.temporary is None:
                    assert first.segment.file is not None
                    self._write(first.segment.file, first.segment.offset(first.position), buffers)
                    first.segment.dirty = True
                else:
                    self._sync_segment(self._writing)
                    if self._writing.file is not None:
                        self._writing.file.close()
                        self._writing.file = None
                    self._publish(first.segment, buffers)
                    self._writing = first.segment
                self._written_position = write.end
                if not self._writing.dirty:
                    self._durable_position = self._written_position
            if durable:
                self._sync_segment(self._writing)
                self._durable_position = self._written_position
        except BaseException as error:
            self._failure = error
            raise

    def _write(self, file: File, offset: int, buffers: list[Buffer]) -> None:
        if self._is_direct:
            file.append(offset, buffers)
        else:
            file.write(offset, buffers)

    def _sync_segment(self, segment: _Segment) -> None:
        if segment.dirty:
            assert segment.file is not None
            segment.file.sync()
            segment.dirty = False

    def _publish(self, segment: _Segment, buffers: list[Buffer]) -> None:
        """Makes a segment part of the log, with its first records."""
        assert segment.file is not None
        assert segment.temporary is not None
        header = encode_segment_header(self._identity, segment.first, segment.size_bytes)
        self._write(segment.file, 0, [header, *buffers])
        segment.file.sync()
        self._fs.rename(segment.temporary, segment.path)
        self._fs.sync_directory(self._directory)
        segment.temporary = None

    def _remove_first(self) -> None:
        try:
            self._fs.remove(self._segments[0].path)
            # At once, so that no crash can bring back a segment without the ones behind it.
            self._fs.sync_directory(self._directory)
            del self._segments[0]
        except BaseException as error:
            self._failure = error
            raise

    def _release(self) -> None:
        if self._next is not None:
            with suppress(OSError):
                self._next.abandon()
            self._next = None
        for segment in self._segments:
            if segment.file is not None:
                segment.file.close()
                segment.file = None
