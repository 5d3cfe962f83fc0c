"""Sends files, or events at hand, through a producer's stream, and keeps count of what became of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from profile_service.commands.connection import CALL_TIMEOUT_S, connect
from profile_service.commands.stream import BatchStream
from profile_service.commands.terminal import plain
from profile_service.files.chunk import Chunk
from profile_service.files.encode import EncodedEvents
from profile_service.files.errors import FileError
from profile_service.files.mapping import Attributes, Wanted, describe
from profile_service.files.source import EventFile, identity, open_events
from profile_service.files.tally import Tally

if TYPE_CHECKING:
    import grpc

    from userprofile.v1 import event_pb2

BATCH_BYTES = 2 << 20
REPLAY_BATCH = 2_000


class Stoppable(Protocol):
    """Something that may want the sending to end early."""

    @property
    def asked(self) -> bool:
        """Whether it does."""


def send_files(
    paths: Sequence[Path],
    address: str,
    wanted: Wanted,
    format_name: str | None,
    delimiter: str | None,
    batch_events: int,
    producer_id: str | None,
    tally: Tally,
    remarks: Console,
) -> None:
    """Sends the files one after the other, and keeps count in `tally`.

    All are opened, and their columns found, before the first event is sent. A file that cannot be read on is left
    there, noted in `tally.errors`, and the next one begins.

    Raises:
        FileError: a file cannot be opened, or lacks a column; nothing was sent.
        CommandError: the service cannot be reached, or ends the stream.
    """
    files = [open_events(path, format_name, delimiter) for path in paths]
    with connect(address) as channel:
        schema_fingerprint, attributes = _schema(channel)
        mappings = [file.mapping(wanted, attributes) for file in files]
        with progress_bar(remarks) as progress:
            for file, mapping in zip(files, mappings, strict=True):
                circumstances = (batch_events, BATCH_BYTES, describe(mapping), schema_fingerprint)
                name = producer_id or f"ingest-{identity(file.path, *circumstances)}"
                name = name if producer_id is None or len(files) == 1 else f"{producer_id}-{identity(file.path)}"
                task = progress.add_task(plain(file.path.name), total=1.0, events=0)
                sender = _FileSender(file, tally, progress, task)
                with BatchStream(channel, address, name, sender.acknowledged) as stream:
                    sender.send(stream, file.chunks(mapping), batch_events)


def replay(parts: Iterable[EncodedEvents], total: int, address: str, remarks: Console, stop: Stoppable) -> int:
    """Sends events that are at hand, and returns, when they are readable, how many there were."""
    sent = sequence = 0
    in_flight: deque[tuple[int, int]] = deque()
    with progress_bar(remarks) as progress, connect(address) as channel:
        task = progress.add_task("replaying the sample", total=total, events=0)

        def acknowledged(upto: int, _rejected: Sequence[event_pb2.RejectedEvent]) -> None:
            while in_flight and in_flight[0][0] <= upto:
                progress.update(task, completed=in_flight[0][1], events=in_flight[0][1])
                in_flight.popleft()

        with BatchStream(channel, address, "demo", acknowledged) as stream:
            for part in parts:
                for start, end in part.batches(REPLAY_BATCH, BATCH_BYTES):
                    if stop.asked:
                        return sent
                    sequence += 1
                    sent += end - start
                    in_flight.append((sequence, sent))
                    stream.send(sequence, part.run(start, end))
    return sent


class EventRate(ProgressColumn):
    """Events, and how many a second."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        events, elapsed = int(task.fields["events"]), task.finished_time or task.elapsed or 0.0
        rate = f"{events / elapsed:,.0f}" if elapsed > 0 else "–"
        return Text(f"{events:,} events  {rate}/s", style="cyan")


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A bar that shows events and events a second."""
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), EventRate(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield progress


@dataclass(frozen=True)
class _InFlight:
    sequence: int
    rows: NDArray[np.int64]
    done: float
    """How much of the file has been read with this batch."""


class _FileSender:
    """One file on its way: which rows each unacknowledged batch holds, so that a refused event is told by its row."""

    def __init__(self, file: EventFile, tally: Tally, progress: Progress, task: Any) -> None:
        self._file = file
        self._tally = tally
        self._progress = progress
        self._task = task
        self._lock = threading.Lock()
        self._in_flight: deque[_InFlight] = deque()
        self._events = 0

    def send(self, stream: BatchStream, chunks: Iterator[Chunk], batch_events: int) -> None:
        """Sends every batch that the service does not hold yet, and returns when all are readable."""
        try:
            self._send(stream, chunks, batch_events)
        except FileError as error:
            self._tally.errors.append(error.message)
        stream.flush()
        self._progress.update(self._task, completed=1.0)

    def _send(self, stream: BatchStream, chunks: Iterator[Chunk], batch_events: int) -> None:
        sequence, held = 0, stream.held
        for chunk in chunks:
            with self._lock:
                self._tally.read += chunk.read
                self._tally.refused_before += len(chunk.refused)
                for row in chunk.refused:
                    self._tally.refuse(str(self._file.path), row.row, row.field, row.reason)
            for start, end in chunk.events.batches(batch_events, BATCH_BYTES):
                sequence += 1
                if sequence <= held:
                    self._tally.held += end - start
                    continue
                with self._lock:
                    self._tally.sent += end - start
                    self._in_flight.append(_InFlight(sequence, chunk.rows[start:end], chunk.done))
                stream.send(sequence, chunk.events.run(start, end))

    def acknowledged(self, upto: int, rejected: Sequence[event_pb2.RejectedEvent]) -> None:
        """Every batch up to `upto` is durable, except what was rejected of them."""
        with self._lock:
            done = [batch for batch in self._in_flight if batch.sequence <= upto]
            rows = {batch.sequence: batch.rows for batch in done}
            for event in rejected:
                if event.sequence in rows:
                    row = int(rows[event.sequence][event.index])
                    self._tally.refused_by_service += 1
                    self._tally.refuse(str(self._file.path), row, event.field, event.reason)
            for batch in done:
                self._in_flight.popleft()
                self._events += len(batch.rows)
                self._tally.acknowledged += len(batch.rows)
        if done:
            self._progress.update(self._task, completed=done[-1].done, events=self._events)


def _schema(channel: grpc.Channel) -> tuple[str, Attributes]:
    """Fingerprint of the service's schema, and the attributes that its features read."""
    from profile_service.domain.schema import parse_schema
    from userprofile.v1 import admin_service_pb2, admin_service_pb2_grpc

    stub = admin_service_pb2_grpc.AdminServiceStub(channel)
    answer = stub.GetSchema(admin_service_pb2.GetSchemaRequest(), timeout=CALL_TIMEOUT_S)
    schema = parse_schema(answer.yaml, "the service's schema")
    return answer.fingerprint, Attributes(schema.text_attributes, schema.number_attributes)
