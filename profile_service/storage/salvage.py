"""What is readable in a damaged log: to show it, and to keep it when the rest is given up.

Salvaging rewrites each damaged segment, after a copy of it was put aside. Whatever is readable keeps its place and so
its position, before and behind the damage:

    found                                               | written
    ----------------------------------------------------+------------------------------------------------------------
    a damaged stretch within a segment                  | RECORD_HOLE over it
    the segment's own header damaged, or its name wrong | a new header, the right name
    a segment cut short, or grown                       | its size again; RECORD_HOLE over what was cut off
    records, or whole segments, missing before the next | RECORD_HOLE, or RECORD_GAP where the positions are in no file
    a segment of another log                            | nothing: it is only put aside
    a torn tail                                         | nothing: opening the log cuts it

Where the log ends in damage, the hole reaches as far as anything was written, so that no position is given twice.
Salvaging may itself be interrupted at any point, and run again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from profile_service.errors import DataLoss
from profile_service.storage.fs import Buffer, FileSystem
from profile_service.storage.record import (
    ALIGNMENT,
    FIRST_RESERVED_TYPE,
    RECORD_GAP,
    RECORD_HOLE,
    Header,
    encode,
    find_headers,
    identity_seed,
    payload_of,
    record_bytes,
)
from profile_service.storage.segment import (
    SEGMENT_HEADER_BYTES,
    Found,
    SegmentHeader,
    decode_segment_header,
    encode_segment_header,
    first_of_name,
    judge,
    last_nonzero,
    segment_name,
    temporary_name,
)

_BLOCK_BYTES = 4096
_EMPTY_SEGMENT_BYTES = 4096
_EMPTY_RECORD_BYTES = record_bytes(0)
_GAP_RECORD_BYTES = record_bytes(8)
# Zeros would look like what a crash leaves.
_FILLER = b"\xa5"


@dataclass(frozen=True)
class Damage:
    """A stretch of a file that is not what was written."""

    offset: int
    size_bytes: int
    position: int
    """In the log, of its first byte."""
    reason: str


@dataclass(frozen=True)
class SegmentFinding:
    """What a segment holds."""

    path: Path
    size_bytes: int
    """Of the file, as it is."""
    first: int
    """Position of its first record."""
    end: int
    """Position behind its last readable record."""
    record_count: int
    """Readable ones, without holes and other records of the log itself."""
    hole_bytes: int
    """Given up by an earlier salvage."""
    durable_position: int
    """The highest position that a record in it knows to be synced."""
    torn_bytes: int
    """Of a write that a crash cut short, which is no damage: opening the log removes it."""
    damages: tuple[Damage, ...]
    foreign: bool
    """It belongs to another log."""
    opens: bool
    """Its header, name and size are as they should be, which is what opening the log asks of every segment."""

    @property
    def whole(self) -> bool:
        """Nothing of it is damaged."""
        return not self.damages


@dataclass
class _Survey:
    """A segment while it is looked at.

    Attributes:
        view: the file, without what is behind the segment's end.
        file_bytes: what the file has.
        header: as it should be.
        records: offset and header of each readable record.
        ours: False for a segment of another log.
        opens: whether header, name and size are as they should be.
        stop: offset of what comes behind the last readable record.
        end: position of what comes there; not that of `stop` after a gap.
        tail_end: offset behind the last byte that may have belonged to a record.
    """

    path: Path
    view: memoryview
    file_bytes: int
    header: SegmentHeader
    records: list[tuple[int, Header]] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)
    ours: bool = True
    opens: bool = True
    torn_bytes: int = 0
    stop: int = SEGMENT_HEADER_BYTES
    end: int = 0
    tail_end: int = SEGMENT_HEADER_BYTES

    def position(self, offset: int) -> int:
        return self.header.first + offset - SEGMENT_HEADER_BYTES

    def damage(self, offset: int, end: int, reason: str) -> None:
        self.damages.append(Damage(offset, end - offset, self.position(max(offset, SEGMENT_HEADER_BYTES)), reason))


def inspect_log(fs: FileSystem, directory: Path, identity: bytes | None = None) -> list[SegmentFinding]:
    """What each segment of a log holds, in order; says what is damaged, raises nothing for it.

    Args:
        fs: where the directory is; nothing is written.
        directory: of the log.
        identity: of the log; by default what its segments say.

    Raises:
        FileNotFoundError: there is no such directory.
        StartupError: a newer version wrote it.
    """
    return [_finding(survey) for survey in _survey(fs, directory, identity)]


def salvage_log(fs: FileSystem, directory: Path, backup_directory: Path, identity: bytes) -> list[SegmentFinding]:
    """Gives up what is damaged in a log, so that it can be opened; keeps every record that is readable.

    Args:
        fs: where the directories are.
        directory: of the log, which nobody else may use.
        backup_directory: gets a copy of each segment before it is changed; made when it is missing.
        identity: of the log.

    Returns:
        What was found before, as `inspect_log` says it; those that were not whole are the ones that were rewritten.

    Raises:
        DiskFull: no room for a copy, or for a rewritten segment; run it again when there is.
        DataLoss: nothing can be made of it.
        StartupError: a newer version wrote it.
    """
    surveys = _survey(fs, directory, identity)
    findings = [_finding(survey) for survey in surveys]
    ours = [survey for survey in surveys if survey.ours]
    for survey in surveys:
        if not survey.ours:
            _put_aside(fs, survey, backup_directory)
            fs.remove(survey.path)
    for number, survey in enumerate(ours):
        following = ours[number + 1] if number + 1 < len(ours) else None
        if survey.damages:
            _put_aside(fs, survey, backup_directory)
            _rewrite(fs, directory, survey, following.header.first if following else None, identity)
        if following is None and survey.records and survey.records[-1][1].type == RECORD_GAP:
            # The segment behind the gap is lost: an empty one takes its place.
            image = bytearray(_EMPTY_SEGMENT_BYTES)
            image[:SEGMENT_HEADER_BYTES] = encode_segment_header(identity, survey.end, len(image))
            _write_segment(fs, directory, survey.end, image)
    fs.sync_directory(directory)
    return findings


# --- looking ---


def _survey(fs: FileSystem, directory: Path, identity: bytes | None) -> list[_Survey]:
    found = []
    for name in fs.names(directory):
        first = first_of_name(name)
        if first is not None:
            view, unreadable = _read(fs, directory / name)
            found.append((directory / name, first, view, unreadable, decode_segment_header(view)))
    if identity is None:
        said = [header.identity for *_, header in found if isinstance(header, SegmentHeader)]
        identity = max(said, key=said.count, default=bytes(16))
    surveys = []
    for path, first, view, unreadable, header in found:
        survey = _Survey(path, view, len(view), SegmentHeader(identity, first, max(len(view), _EMPTY_SEGMENT_BYTES)))
        surveys.append(survey)
        for offset, reason in unreadable:
            survey.damage(offset, min(offset + _BLOCK_BYTES, len(view)), reason)
        _check_header(survey, header)
        survey.end = survey.header.first
    surveys.sort(key=lambda survey: survey.header.first)
    ours = [survey for survey in surveys if survey.ours]
    seed = identity_seed(identity)
    for survey in ours:
        _walk(survey, seed, last=survey is ours[-1] and not survey.damages)
    for survey, following in pairwise(ours):
        _check_joint(survey, following.header.first)
    return surveys


def _read(fs: FileSystem, path: Path) -> tuple[memoryview, list[tuple[int, str]]]:
    """A file with zeros for the blocks that the disk cannot read, and offset and error of each of these."""
    try:
        return fs.map(path), []
    except OSError:
        file = fs.open(path)
    try:
        data = bytearray(file.size)
        unreadable = []
        for offset in range(0, len(data), _BLOCK_BYTES):
            try:
                block = file.read(offset, _BLOCK_BYTES)
                data[offset : offset + len(block)] = block
            except OSError as error:
                unreadable.append((offset, f"the disk cannot read it: {error}"))
        return memoryview(data).toreadonly(), unreadable
    finally:
        file.close()


def _check_header(survey: _Survey, header: SegmentHeader | str) -> None:
    """Compares what the segment says of itself with what it should say; its word counts where its checksum is right."""
    size_bytes = len(survey.view)
    expected = survey.header
    survey.opens = header == expected._replace(size_bytes=size_bytes)
    if isinstance(header, str):
        survey.damage(0, min(size_bytes, SEGMENT_HEADER_BYTES), header)
        return
    if header.identity != expected.identity:
        survey.ours = False
        survey.damage(0, size_bytes, "the segment belongs to another log")
        return
    survey.header = header
    if header.first != expected.first:
        survey.damage(0, SEGMENT_HEADER_BYTES, f"by its header the segment begins at position {header.first}")
    if header.size_bytes > size_bytes:
        survey.damage(size_bytes, header.size_bytes, f"the file is cut short: it should have {header.size_bytes} bytes")
    elif header.size_bytes < size_bytes:
        survey.damage(header.size_bytes, size_bytes, f"the file has grown: it should have {header.size_bytes} bytes")
        survey.view = survey.view[: header.size_bytes]


def _walk(survey: _Survey, seed: int, *, last: bool) -> None:
    """Finds every readable record, and what is damaged in between."""
    view, first = survey.view, survey.header.first
    size = len(view) // ALIGNMENT * ALIGNMENT
    offset = SEGMENT_HEADER_BYTES
    while offset < size:
        judgement = judge(view, first, offset, seed, last=last)
        header = judgement.header
        if judgement.found is Found.RECORD:
            assert header is not None
            survey.records.append((offset, header))
            offset += header.size_bytes
            survey.stop = offset
            survey.end = survey.position(offset)
            if header.type == RECORD_GAP:
                survey.end = int.from_bytes(payload_of(view, *survey.records[-1]), "little")
                break
        elif judgement.found is Found.DAMAGED:
            resumed = offset + header.size_bytes if header is not None else _next_header(survey, offset, seed)
            if resumed is None:
                written = last_nonzero(view, offset, len(view)) + 1
                survey.damage(offset, written, judgement.reason)
                survey.tail_end = written
                break
            survey.damage(offset, resumed, judgement.reason)
            offset = resumed
            survey.tail_end = resumed
        else:
            if judgement.found is Found.TORN:
                survey.torn_bytes = last_nonzero(view, offset, len(view)) + 1 - offset
            break


def _next_header(survey: _Survey, offset: int, seed: int) -> int | None:
    start = offset + ALIGNMENT
    for found, header in find_headers(survey.view, start, survey.position(start), seed):
        if found + header.size_bytes <= len(survey.view):
            return found
    return None


def _check_joint(survey: _Survey, following: int) -> None:
    """Notes what is wrong between the end of a segment and the begin of the next one."""
    if any(damage.offset >= survey.stop for damage in survey.damages):
        return  # noted already
    if survey.end < following:
        reason = f"positions {survey.end} to {following} are missing"
        survey.damages.append(Damage(survey.stop, 0, survey.end, reason))
    elif survey.end > following:
        reason = f"the next segment begins at position {following}, which this one holds, too"
        survey.damages.append(Damage(survey.stop, 0, following, reason))
    else:
        written = last_nonzero(survey.view, survey.stop, len(survey.view)) + 1
        if written:
            survey.damage(survey.stop, written, "behind the last record there are not only zeros")


def _finding(survey: _Survey) -> SegmentFinding:
    headers = [header for _, header in survey.records]
    return SegmentFinding(
        path=survey.path,
        size_bytes=survey.file_bytes,
        first=survey.header.first,
        end=survey.end,
        record_count=sum(header.type < FIRST_RESERVED_TYPE for header in headers),
        hole_bytes=sum(header.size_bytes for header in headers if header.type == RECORD_HOLE),
        durable_position=max((header.durable for header in headers), default=0),
        torn_bytes=survey.torn_bytes,
        damages=tuple(sorted(survey.damages, key=lambda damage: damage.offset)),
        foreign=not survey.ours,
        opens=survey.opens,
    )


# --- keeping ---


def _put_aside(fs: FileSystem, survey: _Survey, backup_directory: Path) -> None:
    """Copies a segment as it is, under a name that nothing has yet."""
    fs.make_directory(backup_directory)
    taken = set(fs.names(backup_directory))
    number = 0
    name = survey.path.name
    while name in taken:
        number += 1
        name = f"{survey.path.name}.{number}"
    view, _ = _read(fs, survey.path)
    file = fs.create(backup_directory / name)
    try:
        file.write(0, [view])
        file.sync()
    finally:
        file.close()
    fs.sync_directory(backup_directory)


def _rewrite(fs: FileSystem, directory: Path, survey: _Survey, following: int | None, identity: bytes) -> None:
    """Writes a segment anew: what is readable at its place, holes in between, up to where the next one begins."""
    first, size_bytes = survey.header.first, survey.header.size_bytes
    seed = identity_seed(identity)
    end_offset = size_bytes if following is None else following - first + SEGMENT_HEADER_BYTES
    image = bytearray(size_bytes)
    image[:SEGMENT_HEADER_BYTES] = encode_segment_header(identity, first, size_bytes)
    offset = SEGMENT_HEADER_BYTES  # everything before is decided
    for start, record in survey.records:
        if start + record.size_bytes > end_offset:
            break
        _cover(survey, image, offset, start, seed)
        offset = start + record.size_bytes
        image[start:offset] = survey.view[start:offset]
    if following is None:
        # As far as anything was written; to the end where that is not known.
        if survey.file_bytes < size_bytes:
            limit = size_bytes
        elif survey.tail_end > offset:
            limit = max(-(-survey.tail_end // ALIGNMENT) * ALIGNMENT, offset + _EMPTY_RECORD_BYTES)
        else:
            limit = offset
        if min(limit, size_bytes) - offset >= _EMPTY_RECORD_BYTES:
            _cover(survey, image, offset, min(limit, size_bytes), seed)
    elif end_offset <= size_bytes and survey.end != following:
        _cover(survey, image, offset, end_offset, seed)
    _write_segment(fs, directory, first, image)
    if survey.path.name != segment_name(first):
        fs.remove(survey.path)
    if following is not None and end_offset > size_bytes and survey.end != following:
        _write_gap(fs, directory, survey, offset, following, identity)


def _cover(survey: _Survey, image: bytearray, start: int, end: int, seed: int) -> None:
    """Puts a hole between two offsets."""
    if start == end:
        return
    if end - start < _EMPTY_RECORD_BYTES:
        raise DataLoss(f"{survey.path}: {end - start} bytes from byte {start} on are too few to say that they are lost")
    position = survey.position(start)
    filler = _FILLER * (end - start - _EMPTY_RECORD_BYTES)
    image[start:end] = b"".join(
        encode(RECORD_HOLE, [filler], position=position, durable=position, offset=start, seed=seed)
    )


def _write_gap(fs: FileSystem, directory: Path, survey: _Survey, offset: int, following: int, identity: bytes) -> None:
    """Writes a segment for positions that no file has: it says where the log goes on."""
    position = survey.position(offset)
    if following - position < _GAP_RECORD_BYTES:
        raise DataLoss(f"{survey.path}: positions {position} to {following} are too few to say that they are lost")
    record = encode(
        RECORD_GAP,
        [following.to_bytes(8, "little")],
        position=position,
        durable=position,
        offset=SEGMENT_HEADER_BYTES,
        seed=identity_seed(identity),
    )
    header = encode_segment_header(identity, position, SEGMENT_HEADER_BYTES + _GAP_RECORD_BYTES)
    _write_segment(fs, directory, position, b"".join([header, *record]))


def _write_segment(fs: FileSystem, directory: Path, first: int, image: Buffer) -> None:
    """Writes a segment under a temporary name, then gives it its own, in place of what has it."""
    temporary = directory / temporary_name(0)
    if temporary.name in fs.names(directory):
        fs.remove(temporary)
    file = fs.create(temporary)
    try:
        file.write(0, [image])
        file.sync()
    finally:
        file.close()
    fs.rename(temporary, directory / segment_name(first))
    fs.sync_directory(directory)
