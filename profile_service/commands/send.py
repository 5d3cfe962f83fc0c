"""Sends files, or events at hand, through a producer, and keeps count of what became of them.

A file's blocks are the batches of a producer that is named by the file: its content, and how the command says to read
it. A run that finds the producer known begins at the first block all the same. What the service holds is not counted
again; sent all the same, it brings what was refused of it, so that the summary is that of the whole file.
"""

from __future__ import annotations

import contextlib
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

from profile_service.commands.connection import CALL_TIMEOUT_S, client_error
from profile_service.commands.terminal import plain
from profile_service.files.blocks import Block, cut_blocks
from profile_service.files.chunk import Chunk
from profile_service.files.encode import EncodedEvents
from profile_service.files.errors import FileError
from profile_service.files.mapping import Attributes, Mapping, Wanted
from profile_service.files.source import EventFile, identity, open_events, version_of
from profile_service.files.tally import Tally

if TYPE_CHECKING:
    from profile_client import Producer, ProfileClient, Rejected

BATCH_BYTES = 8 << 20
"""A block that is larger goes in several messages."""

WINDOW_BYTES = 16 << 20
REPLAY_BATCH = 2_000
FIRST_CALL_TIMEOUT_S = 5.0
"""How long a service may be away when the run begins: later it is waited for, at first most likely nobody is there."""


@dataclass(frozen=True)
class Sending:
    """How files are sent."""

    batch_rows: int
    producer_id: str | None
    """Who sends; None for one that is named by the file alone."""
    give_up_s: float
    """How long to go on while nothing is acknowledged."""


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
    sending: Sending,
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
    with connected(address) as client:
        attributes = _attributes(client)
        mappings = [file.mapping(wanted, attributes) for file in files]
        with progress_bar(remarks) as progress:
            for file, mapping in zip(files, mappings, strict=True):
                task = progress.add_task(plain(file.path.name), total=1.0, events=0, producer=None)
                version = version_of(file.path)
                circumstances = (type(file).__name__, delimiter, wanted.describe(), sending.batch_rows)
                name = f"{sending.producer_id or 'ingest'}-{identity(file.path, *circumstances)}"
                _FileSender(client, file, mapping, name, sending, tally, progress, task).send()
                if version_of(file.path) != version:
                    tally.errors.append(
                        f"{file.path}: was changed while it was sent. What was sent of it is counted; sent again, it "
                        "is another file, and counts from its first row"
                    )


def replay(parts: Iterable[EncodedEvents], total: int, address: str, remarks: Console, stop: Stoppable) -> int:
    """Sends events that are at hand, and returns, when they are readable, how many there were."""
    from profile_client import ProducerOptions

    in_flight: deque[tuple[int, int]] = deque()
    with progress_bar(remarks) as progress, connected(address) as client:
        task = progress.add_task("replaying the sample", total=total, events=0, producer=None)

        def acknowledged(upto: int, _rejected: Sequence[Rejected]) -> None:
            while in_flight and in_flight[0][0] <= upto:
                progress.update(task, completed=in_flight[0][1], events=in_flight[0][1])
                in_flight.popleft()

        with client.producer(options=ProducerOptions(on_acknowledged=acknowledged)) as producer:
            batches = ((part, *run) for part in parts for run in part.batches(REPLAY_BATCH, BATCH_BYTES))
            for sequence, (part, start, end) in enumerate(batches, start=1):
                if stop.asked:
                    break
                in_flight.append((sequence, producer.sent_events + end - start))
                producer.send_serialized_batch(part.run(start, end), end - start, sequence=sequence)
            return producer.sent_events


@contextmanager
def connected(address: str) -> Iterator[ProfileClient]:
    """A client of the service at `address`; its errors become errors of the command."""
    from profile_client import ProfileClient, ProfileClientError

    with ProfileClient(address, timeout_s=CALL_TIMEOUT_S) as client:
        try:
            yield client
        except ProfileClientError as error:
            raise client_error(address, error) from error


class EventRate(ProgressColumn):
    """Events, and how many a second."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        events, elapsed = int(task.fields["events"]), task.finished_time or task.elapsed or 0.0
        rate = f"{events / elapsed:,.0f}" if elapsed > 0 else "–"
        return Text(f"{events:,} events  {rate}/s", style="cyan")


class Connection(ProgressColumn):
    """Says when the service is away: an interruption is no error, but a bar that stands still wants a reason."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        producer: Producer | None = task.fields["producer"]
        is_away = producer is not None and not task.finished and not producer.is_connected
        return Text("waiting for the service" if is_away else "", style="yellow")


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A bar that shows events and events a second."""
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), EventRate(), TimeRemainingColumn(),
        Connection(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield progress


@dataclass(frozen=True)
class _InFlight:
    """A batch that is on its way."""

    sequence: int
    rows: NDArray[np.int64]
    is_held: bool
    """Whether the service holds it from an earlier run."""
    done: float
    """How much of the file has been read with this batch."""


class _FileSender:
    """One file on its way: which rows each unacknowledged batch holds, so that a refused event is told by its row."""

    def __init__(
        self,
        client: ProfileClient,
        file: EventFile,
        mapping: Mapping,
        producer_id: str,
        sending: Sending,
        tally: Tally,
        progress: Progress,
        task: Any,
    ) -> None:
        self._client = client
        self._file = file
        self._mapping = mapping
        self._producer_id = producer_id
        self._sending = sending
        self._tally = tally
        self._progress = progress
        self._task = task
        self._lock = threading.Lock()
        self._events = 0

    def send(self) -> None:
        """Sends the file, and returns when all of it is readable."""
        with self._producer(self._producer_id) as (producer, in_flight):
            self._progress.update(self._task, producer=producer)
            held = producer.acknowledged_sequence(CALL_TIMEOUT_S)
            try:
                for block in cut_blocks(self._chunks(), self._sending.batch_rows):
                    self._send_block(producer, in_flight, block, is_held=block.number <= held)
            except FileError as error:
                self._tally.errors.append(error.message)
        self._progress.update(self._task, completed=1.0)

    def _chunks(self) -> Iterator[Chunk]:
        for chunk in self._file.chunks(self._mapping):
            with self._lock:
                self._tally.read += chunk.read
                self._tally.refused_before += len(chunk.refused)
                for row in chunk.refused:
                    self._tally.refuse(str(self._file.path), row.row, row.field, row.reason)
            yield chunk

    def _send_block(self, producer: Producer, in_flight: deque[_InFlight], block: Block, *, is_held: bool) -> None:
        if not is_held:
            self._tally.sent += len(block)
        if block.size_bytes <= BATCH_BYTES:
            in_flight.append(_InFlight(block.number, block.rows, is_held, block.done))
            producer.send_serialized_batch(block.body(), len(block), sequence=block.number)
            return
        # Too large for a message: it goes as a producer of its own, and then stands empty in its place.
        with self._producer(f"{self._producer_id}-{block.number}") as (own, own_in_flight):
            for sequence, (body, rows) in enumerate(block.parts(BATCH_BYTES), start=1):
                own_in_flight.append(_InFlight(sequence, rows, is_held, block.done))
                own.send_serialized_batch(body, len(rows), sequence=sequence)
        producer.send_serialized_batch(b"", 0, sequence=block.number)

    @contextmanager
    def _producer(self, producer_id: str) -> Iterator[tuple[Producer, deque[_InFlight]]]:
        """A producer and the place for what is on its way; at the end all of it is acknowledged."""
        from profile_client import ProducerOptions, RejectedEventsError

        in_flight: deque[_InFlight] = deque()
        options = ProducerOptions(
            buffer_bytes=WINDOW_BYTES,
            give_up_s=self._sending.give_up_s,
            on_acknowledged=lambda sequence, rejected: self._acknowledged(in_flight, sequence, rejected),
        )
        with self._client.producer(producer_id, options) as producer:
            yield producer, in_flight
            # They were told as they became known.
            with contextlib.suppress(RejectedEventsError):
                producer.flush()

    def _acknowledged(self, in_flight: deque[_InFlight], upto: int, rejected: Sequence[Rejected]) -> None:
        """Every batch up to `upto` is durable, except what was rejected of them."""
        with self._lock:
            done = []
            while in_flight and in_flight[0].sequence <= upto:
                done.append(in_flight.popleft())
            refused = dict.fromkeys((batch.sequence for batch in done), 0)
            rows = {batch.sequence: batch.rows for batch in done}
            for event in rejected:
                refused[event.sequence] += 1
                row = int(rows[event.sequence][event.index])
                self._tally.refuse(str(self._file.path), row, event.field, event.reason)
            for batch in done:
                counted = len(batch.rows) - refused[batch.sequence]
                self._events += len(batch.rows)
                self._tally.refused_by_service += refused[batch.sequence]
                if batch.is_held:
                    self._tally.held += counted
                else:
                    self._tally.accepted += counted
        if done:
            self._progress.update(self._task, completed=done[-1].done, events=self._events)


def _attributes(client: ProfileClient) -> Attributes:
    """The attributes that the features of the service's schema read."""
    from profile_service.domain.schema import parse_schema

    schema = parse_schema(client.get_schema(timeout_s=FIRST_CALL_TIMEOUT_S).yaml, "the service's schema")
    return Attributes(schema.text_attributes, schema.number_attributes)
