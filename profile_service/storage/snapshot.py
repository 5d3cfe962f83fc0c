"""Snapshots: numbered blocks of opaque bytes in one file, whole or recognised as not.

A snapshot is written under a temporary name, synced, renamed, and its directory synced: a file named
`0000000007.snapshot` was complete once, and whatever is wrong with it now is damage. The last two are kept, so that a
damaged one costs the time of a longer replay, and nothing else.

    file     header | block | block | … | footer

    header   64 bytes
       0     u8[8]   magic
       8     u32     CRC32C of the other bytes       12   u32   format version
      16     u8[16]  identity of the shard's directory
      32     u64     generation, as in the file's name
      40     u64     log position from which a recovery replays
      48     i64     when it was begun, ns since 1970
      56     u64     0

    block    32 bytes, then the payload, then zeros up to a multiple of 8
       0     u32     CRC32C of bytes 4 to 32, begun with that of identity and generation
       4     u32     CRC32C of the payload and the zeros
       8     u64     stamp: the log position as of which the payload was copied
      16     u64     length of the payload
      24     u32     number of the block, from 0
      28     u8      kind: 1 to 254 the writer's, 255 what a salvage left behind, 0 the footer
      29     u8[3]   0

    footer   a block of kind 0, with which the file ends
       0     u64     bytes of the file               8    u64   as in the header
      16     i64     as in the header

All numbers are little-endian. A block's checksum depends on the file that it belongs to: one of an older snapshot,
which a failing disk left in its place, is none of this one's. Every byte is under a checksum.

| what is found                                   | what it is                                                        |
|-------------------------------------------------|-------------------------------------------------------------------|
| `*.snapshot.new`                                | one that was never finished: `discard` removes it                 |
| `*.snapshot.old`                                | one that is no longer kept: `discard` removes it, bit by bit      |
| header and footer whole                         | whole, as far as `list` can see; `blocks` checks each block       |
| a format version above this one's               | refused: this version must not guess                              |
| another identity or generation, checksum right  | another directory's, or renamed: refused                          |
| no footer at the end, or any checksum wrong     | damaged: the snapshot before it is loaded; `salvage` keeps blocks |
"""

from __future__ import annotations

import contextlib
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import crc32c
import numpy as np

from profile_service.errors import DataLoss, StartupError
from profile_service.storage.fs import Buffer, DiskFull, File, FileSystem, Runner

FORMAT_VERSION = 1
KEPT = 2
"""How many published snapshots are kept."""

FOOTER = 0
SALVAGED = 255
"""Kind of the block that says, as text, what a salvage could not keep; the first block of such a snapshot."""

_MAGIC = b"PROFSNAP"
_HEADER = struct.Struct("<8sII16sQQqQ")
_BLOCK = struct.Struct("<IIQQIB3x")
_FOOTER = struct.Struct("<QQq")
_FOOTER_BYTES = _BLOCK.size + _FOOTER.size
_ALIGNMENT = 8
_SUFFIX = ".snapshot"
_UNFINISHED = ".snapshot.new"
_OLD = ".snapshot.old"
_NAME = re.compile(r"(\d{10})\.snapshot")

_COPY_BYTES = 1 << 22


SnapshotState = Literal["whole", "damaged", "foreign", "newer"]


@dataclass(frozen=True)
class SnapshotInfo:
    """A published snapshot, as far as its header and footer tell."""

    path: Path
    generation: int
    size_bytes: int
    replay_position: int
    """Log position from which a recovery replays."""
    created_ns: int
    damage: str = ""
    """What is wrong with it, where; empty when header and footer are whole. The other fields may then be 0."""
    state: SnapshotState = "whole"
    """`foreign` is another directory's, `newer` of a format version that this one does not know."""


@dataclass(frozen=True)
class Block:
    """One block of a snapshot."""

    kind: int
    stamp: int
    payload: memoryview
    """Read-only, begins at a multiple of 8 bytes of memory."""


@dataclass(frozen=True)
class SnapshotCheck:
    """What a whole reading of a snapshot found."""

    info: SnapshotInfo
    blocks: int
    """Blocks that are whole."""
    faults: tuple[str, ...]
    """Everything that is wrong, each with its place; empty for a whole snapshot."""


class SnapshotStore:
    """The snapshots of one shard.

    Args:
        directory: theirs alone; made when the first one begins.
        identity: 16 bytes, in every header: snapshots of another directory are refused.
        run: runs what blocks; `list`, `blocks`, `check` and `salvage` block themselves.
    """

    def __init__(self, fs: FileSystem, directory: Path, identity: bytes, run: Runner) -> None:
        assert len(identity) == 16
        self._fs = fs
        self._directory = directory
        self._identity = identity
        self._run = run

    def list(self) -> list[SnapshotInfo]:
        """Every published snapshot, the newest first; a damaged one says so in `damage`."""
        found = [(int(match[1]), name) for name in self._names() if (match := _NAME.fullmatch(name))]
        return [self._inspect(self._directory / name, generation) for generation, name in sorted(found, reverse=True)]

    def blocks(self, info: SnapshotInfo) -> Iterator[Block]:
        """The blocks in the order of their writing.

        Raises:
            DataLoss: names file and offset. What came before it was whole.
            StartupError: a newer version's snapshot.
        """
        if info.state == "newer":
            raise StartupError(info.damage)
        if info.damage:
            raise DataLoss(info.damage)
        data = self._fs.map(info.path)
        seed = self._seed(info.generation)
        offset, number = _HEADER.size, 0
        while True:
            found = _parse_block(data, offset, seed)
            if isinstance(found, str):
                raise _damaged(info.path, offset, found)
            if found.number != number:
                raise _damaged(info.path, offset, f"block {found.number} stands where block {number} belongs")
            if not found.is_payload_whole(data):
                raise _damaged(info.path, offset, f"the checksum of block {number} does not fit its bytes")
            if found.kind == FOOTER:
                if found.end != len(data):
                    raise _damaged(info.path, found.end, f"{len(data) - found.end} bytes behind the footer")
                return
            yield found.block(data)
            offset, number = found.end, number + 1

    def check(self, info: SnapshotInfo) -> SnapshotCheck:
        """Reads the whole snapshot and says everything that is wrong with it."""
        found = _Survey(self._fs.map(info.path), info, self._seed(info.generation))
        return SnapshotCheck(info, len(found.whole), tuple(found.faults))

    def salvage(self, info: SnapshotInfo, backup: Path) -> SnapshotCheck:
        """Writes the blocks of a damaged snapshot that are whole as a new one, and moves the damaged one to `backup`.

        Returns what was wrong with the old one; the new one tells it, too, in a block of kind `SALVAGED`.

        Raises:
            DataLoss: neither header nor footer says from where to replay.
            StartupError: it is another directory's, or a newer version's.
            DiskFull: nothing was changed.
        """
        if info.state in ("foreign", "newer"):
            raise StartupError(info.damage)
        data = self._fs.map(info.path)
        survey = _Survey(data, info, self._seed(info.generation))
        if survey.replay_position is None:
            raise DataLoss(f"{info.path}: neither header nor footer is whole: where a replay would begin is not known")
        self._fs.make_directory(backup)
        self._copy(data, backup / info.path.name)
        writer = self._begin(survey.replay_position, survey.created_ns)
        try:
            writer.write_now(SALVAGED, survey.replay_position, ["\n".join(survey.faults).encode()])
            for block in survey.whole:
                if block.kind != SALVAGED:
                    writer.write_now(block.kind, block.stamp, [block.payload])
            writer.publish_now()
            self._discard_all()
        except DiskFull:
            writer.abandon_now()
            raise
        if info.path in (kept.path for kept in self.list()):
            self._fs.remove(info.path)
            self._fs.sync_directory(self._directory)
        return SnapshotCheck(info, len(survey.whole), tuple(survey.faults))

    async def begin(self, replay_position: int, created_ns: int) -> SnapshotWriter:
        """A new snapshot, which nobody sees before it is published.

        Raises:
            DiskFull: there is no room even to begin.
        """
        writer: SnapshotWriter = await self._run(lambda: self._begin(replay_position, created_ns))
        return writer

    async def trim_position(self) -> int | None:
        """Up to where no kept snapshot needs the log; None while there is only one, which may be damaged one day."""
        found: list[SnapshotInfo] = await self._run(self.list)
        whole = [info for info in found if not info.damage]
        return whole[KEPT - 1].replay_position if len(whole) >= KEPT else None

    async def discard(self, most_bytes: int) -> bool:
        """Gives back at most so many bytes of one that is no longer kept, or was never finished; returns whether there
        is more. Not while one is written.

        A file system that gives back a gigabyte at once makes everybody wait who syncs anything meanwhile.
        """
        more: bool = await self._run(lambda: self._discard(most_bytes))
        return more

    def _begin(self, replay_position: int, created_ns: int) -> SnapshotWriter:
        self._fs.make_directory(self._directory)
        self._discard_all()
        newest = 0
        for name in self._fs.names(self._directory):
            if match := _NAME.fullmatch(name):
                newest = max(newest, int(match[1]))
        return SnapshotWriter(self, self._fs, self._directory, newest + 1, replay_position, created_ns, self._run)

    def _names(self) -> Sequence[str]:
        try:
            return self._fs.names(self._directory)
        except FileNotFoundError:  # before the first snapshot
            return []

    def _discard_all(self) -> None:
        while self._discard(sys.maxsize):
            pass

    def _discard(self, most_bytes: int) -> bool:
        paths = [self._directory / name for name in self._names() if name.endswith((_UNFINISHED, _OLD))]
        if not paths:
            return False
        file = self._fs.open(paths[0], writable=True)
        try:
            rest = file.size - most_bytes
            if rest > 0:
                file.truncate(rest)
                # Else a journal would gather many pieces, and give them back at once.
                file.sync()
        finally:
            file.close()
        if rest <= 0:
            self._fs.remove(paths[0])
        return rest > 0 or len(paths) > 1

    def _set_old_aside(self) -> None:
        """Gives what stands behind the last two whole ones a name for `discard`; what is not this shard's stays."""
        found = self.list()
        whole = [info for info in found if not info.damage]
        if len(whole) < KEPT:
            return
        limit = whole[KEPT - 1].generation
        old = [info.path for info in found if info.generation < limit and info.state in ("whole", "damaged")]
        for path in old:
            self._fs.rename(path, path.with_suffix(_OLD))
        if old:
            # They are cut up under these names, and must not be found so under their own.
            self._fs.sync_directory(self._directory)

    def _copy(self, data: memoryview, path: Path) -> None:
        """Writes a file, in place of one that a salvage before began to write."""
        unfinished = path.with_name(path.name + ".new")
        with contextlib.suppress(FileNotFoundError):
            self._fs.remove(unfinished)
        file = self._fs.create(unfinished)
        try:
            for offset in range(0, len(data), _COPY_BYTES):
                file.write(offset, [data[offset : offset + _COPY_BYTES]])
            file.sync()
        except DiskFull:
            self._fs.remove(unfinished)
            raise
        finally:
            file.close()
        self._fs.rename(unfinished, path)
        self._fs.sync_directory(path.parent)

    def _seed(self, generation: int) -> int:
        return crc32c.crc32c(self._identity + generation.to_bytes(8, "little"))

    def _inspect(self, path: Path, generation: int) -> SnapshotInfo:
        file = self._fs.open(path)
        try:
            size = file.size
            header = file.read(0, _HEADER.size)
            footer = file.read(size - _FOOTER_BYTES, _FOOTER_BYTES) if size >= _HEADER.size + _FOOTER_BYTES else b""
        finally:
            file.close()
        state, reason = self._judge_header(generation, header)
        if state == "whole":
            _, _, _, _, _, replay_position, created_ns, _ = _HEADER.unpack(header)
            if _read_footer(footer, self._seed(generation)) == (size, replay_position, created_ns):
                return SnapshotInfo(path, generation, size, replay_position, created_ns)
            state, reason = "damaged", f"offset {max(0, size - _FOOTER_BYTES)}: it does not end with its footer"
        return SnapshotInfo(path, generation, size, 0, 0, f"{path}, {reason}", state)

    def _judge_header(self, generation: int, header: bytes) -> tuple[SnapshotState, str]:
        """What the header shows, and what is wrong with it."""
        if len(header) < _HEADER.size:
            return "damaged", f"offset 0: it has {len(header)} bytes, less than a header"
        magic, checksum, version, identity, named, _, _, _ = _HEADER.unpack(header)
        if magic != _MAGIC:
            return "damaged", "offset 0: it does not begin as a snapshot does"
        if checksum != _header_checksum(header):
            return "damaged", "offset 0: the checksum of the header does not fit its bytes"
        if version > FORMAT_VERSION:
            return "newer", (
                f"offset 12: it is of format version {version}, this version reads up to {FORMAT_VERSION}: "
                "start the version that wrote it, or a later one"
            )
        if identity != self._identity:
            return "foreign", (
                f"offset 16: it belongs to the directory {identity.hex()}, and this one is {self._identity.hex()}"
            )
        if named != generation:
            return "foreign", f"offset 32: it was published as generation {named} and got another name since"
        return "whole", ""


class SnapshotWriter:
    """A snapshot that is being written; `SnapshotStore.begin` makes it.

    Either `publish` or `abandon` ends it. After any error only `abandon` is left.
    """

    def __init__(
        self,
        store: SnapshotStore,
        fs: FileSystem,
        directory: Path,
        generation: int,
        replay_position: int,
        created_ns: int,
        run: Runner,
    ) -> None:
        self.generation = generation
        self.replay_position = replay_position
        self.created_ns = created_ns
        self.size_bytes = 0
        """Bytes written so far."""
        self._store = store
        self._fs = fs
        self._run = run
        self._directory = directory
        self._path = directory / f"{generation:010}{_SUFFIX}"
        self._unfinished = directory / f"{generation:010}{_UNFINISHED}"
        self._seed = store._seed(generation)
        self._blocks = 0
        self._file: File = fs.create(self._unfinished)
        header = bytearray(
            _HEADER.pack(_MAGIC, 0, FORMAT_VERSION, store._identity, generation, replay_position, created_ns, 0)
        )
        struct.pack_into("<I", header, 8, _header_checksum(header))
        try:
            self._write_bytes([header])
        except BaseException:
            self.abandon_now()
            raise

    async def write(self, kind: int, stamp: int, buffers: Sequence[Buffer]) -> None:
        """Writes the joined buffers as one block; they may be used again when it returns.

        Raises:
            DiskFull: only `abandon` is left.
        """
        await self._run(lambda: self.write_now(kind, stamp, buffers))

    async def sync(self) -> None:
        """Returns when what was written so far is on the disk."""
        await self._run(self._file.sync)

    async def publish(self) -> SnapshotInfo:
        """Makes the snapshot the newest one, durably, and leaves those that are no longer kept to `discard`."""
        info: SnapshotInfo = await self._run(self.publish_now)
        return info

    async def abandon(self) -> None:
        """Leaves nothing of it."""
        await self._run(self.abandon_now)

    def write_now(self, kind: int, stamp: int, buffers: Sequence[Buffer]) -> None:
        """As `write`, blocking."""
        assert FOOTER < kind <= SALVAGED
        self._write_block(kind, stamp, buffers)

    def publish_now(self) -> SnapshotInfo:
        """As `publish`, blocking."""
        total = self.size_bytes + _FOOTER_BYTES
        self._write_block(FOOTER, self.replay_position, [_FOOTER.pack(total, self.replay_position, self.created_ns)])
        assert self.size_bytes == total
        self._file.sync()
        self._file.close()
        self._fs.rename(self._unfinished, self._path)
        self._fs.sync_directory(self._directory)
        self._store._set_old_aside()
        return SnapshotInfo(self._path, self.generation, total, self.replay_position, self.created_ns)

    def _write_block(self, kind: int, stamp: int, buffers: Sequence[Buffer]) -> None:
        length, checksum = 0, 0
        for buffer in buffers:
            length += len(buffer)
            checksum = crc32c.crc32c(buffer, checksum)
        padding = bytes(-length % _ALIGNMENT)
        checksum = crc32c.crc32c(padding, checksum)
        header = bytearray(_BLOCK.pack(0, checksum, stamp, length, self._blocks, kind))
        struct.pack_into("<I", header, 0, crc32c.crc32c(header[4:], self._seed))
        self._write_bytes([header, *buffers, padding])
        self._blocks += 1

    def _write_bytes(self, buffers: Sequence[Buffer]) -> None:
        self._file.write(self.size_bytes, buffers)
        self.size_bytes += sum(map(len, buffers))

    def abandon_now(self) -> None:
        """As `abandon`, blocking."""
        self._file.close()
        # Not there if it was renamed, and publishing it failed afterwards.
        with contextlib.suppress(FileNotFoundError):
            self._fs.remove(self._unfinished)


@dataclass(frozen=True)
class _Found:
    """A block whose header is whole."""

    offset: int
    checksum: int
    stamp: int
    length: int
    number: int
    kind: int

    @property
    def end(self) -> int:
        return self.offset + _BLOCK.size + self.length + -self.length % _ALIGNMENT

    def is_payload_whole(self, data: memoryview) -> bool:
        return crc32c.crc32c(data[self.offset + _BLOCK.size : self.end]) == self.checksum

    def block(self, data: memoryview) -> Block:
        start = self.offset + _BLOCK.size
        return Block(self.kind, self.stamp, data[start : start + self.length])


class _Survey:
    """What is whole in a file that may be damaged anywhere."""

    def __init__(self, data: memoryview, info: SnapshotInfo, seed: int) -> None:
        self.whole: list[Block] = []
        self.faults: list[str] = []
        self.replay_position: int | None = None
        self.created_ns = 0
        self._data = data
        self._seed = seed
        if info.damage:
            self.faults.append(info.damage)
        else:
            self.replay_position, self.created_ns = info.replay_position, info.created_ns
        self._walk(info.path)
        if self.replay_position is None:
            self._read_header()

    def _walk(self, path: Path) -> None:
        offset, number = _HEADER.size, 0
        while offset < len(self._data):
            found = _parse_block(self._data, offset, self._seed)
            if isinstance(found, str) or found.number < number:
                reason = found if isinstance(found, str) else f"block {found.number} stands there a second time"
                self.faults.append(_damaged(path, offset, reason).message)
                following = self._next_header(offset + _ALIGNMENT, number)
                if following is None:
                    return
                offset = following
                continue
            if found.number > number:
                last = f" to {found.number - 1}" if found.number - 1 > number else ""
                self.faults.append(_damaged(path, offset, f"before it block {number}{last} is missing").message)
            number = found.number + 1
            if not found.is_payload_whole(self._data):
                what = "the footer" if found.kind == FOOTER else f"block {found.number}"
                self.faults.append(_damaged(path, offset, f"the checksum of {what} does not fit its bytes").message)
            elif found.kind == FOOTER:
                _, self.replay_position, self.created_ns = _FOOTER.unpack(found.block(self._data).payload)
                if found.end < len(self._data):
                    self.faults.append(_damaged(path, found.end, "bytes behind the footer").message)
                return
            else:
                self.whole.append(found.block(self._data))
            offset = found.end
        self.faults.append(_damaged(path, len(self._data), "the footer is missing").message)

    def _next_header(self, start: int, number: int) -> int | None:
        """Where the next whole header of a block stands; blocks begin at multiples of 8."""
        stop = (len(self._data) - _BLOCK.size) // _ALIGNMENT * _ALIGNMENT
        for first in range(start, stop + 1, _COPY_BYTES):
            last = min(first + _COPY_BYTES, stop + _ALIGNMENT)
            words = np.frombuffer(self._data[first : last + _BLOCK.size - _ALIGNMENT], dtype="<u8")
            # Every header's last word is a number below 2**32, a kind, and three zero bytes.
            tails = words[_BLOCK.size // _ALIGNMENT - 1 :]
            for index in np.flatnonzero(tails < np.uint64(1 << 40)).tolist():
                offset = first + index * _ALIGNMENT
                found = _parse_block(self._data, offset, self._seed)
                if not isinstance(found, str) and found.number >= number:
                    return offset
        return None

    def _read_header(self) -> None:
        header = bytes(self._data[: _HEADER.size])
        if len(header) == _HEADER.size and header[:8] == _MAGIC:
            _, checksum, _, _, _, replay_position, created_ns, _ = _HEADER.unpack(header)
            # Of this directory: the blocks' checksums would not fit otherwise.
            if checksum == _header_checksum(header) and self.whole:
                self.replay_position, self.created_ns = replay_position, created_ns


def _parse_block(data: memoryview, offset: int, seed: int) -> _Found | str:
    """The header at `offset`, or what is wrong with it."""
    if offset + _BLOCK.size > len(data):
        return "the file ends within the header of a block"
    header = data[offset : offset + _BLOCK.size]
    checksum, payload_checksum, stamp, length, number, kind = _BLOCK.unpack(header)
    if checksum != crc32c.crc32c(header[4:], seed):
        return "the checksum of a block's header does not fit its bytes"
    found = _Found(offset, payload_checksum, stamp, length, number, kind)
    if found.end > len(data):
        return f"the file ends within block {number}"
    return found


def _read_footer(data: bytes, seed: int) -> tuple[int, int, int] | None:
    """Bytes of the file, replay position and time of beginning; None where these bytes are no footer."""
    if len(data) < _FOOTER_BYTES:
        return None
    view = memoryview(data)
    found = _parse_block(view, 0, seed)
    if isinstance(found, str) or found.kind != FOOTER or found.end != len(data) or not found.is_payload_whole(view):
        return None
    size, replay_position, created_ns = _FOOTER.unpack(found.block(view).payload)
    return size, replay_position, created_ns


def _header_checksum(header: Buffer) -> int:
    return crc32c.crc32c(header[12:], crc32c.crc32c(header[:8]))


def _damaged(path: Path, offset: int, reason: str) -> DataLoss:
    return DataLoss(f"{path}, offset {offset}: {reason}")
