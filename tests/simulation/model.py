"""What must be true of a shard, told by plain dictionaries and lists from what was sent, answered and logged.

    Ledger      every event that was ever sent, and what its sender was told
    History     every record that was appended to the log, cut where a crash has cut it
    check       holds the one against the other, and the shard against both

Records are parsed here by hand: none of the shard's decisions is taken over.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from profile_service.shard.log_records import RECORD_EVENTS, RECORD_FORGET, RECORD_SCHEMA, decode_forget, decode_schema
from profile_service.wire.apply_request import decode_part
from tests.simulation.events import Event
from userprofile.internal.v1 import shard_log_pb2

Key = int | tuple[str, str]
"""What counts once: an event by its number, or by user and event id."""

Window = OrderedDict[Key, None]
"""Event ids that a shard must remember, the oldest first."""

NS = 10**9


class Violation(AssertionError):
    """The shard has broken a promise."""


@dataclass(frozen=True)
class Record:
    """One record of the log."""

    position: int
    kind: int
    payload: bytes
    appended_ns: int
    """The shard's clock when it was appended."""
    appended_s: float
    """The loop's time when it was appended."""
    events: tuple[Event, ...] = ()
    producer_id: str = ""
    sequence: int = 0
    acknowledged_sequence: int = 0
    arrival_time_ns: int = 0
    forgotten: tuple[str, ...] = ()
    schema: shard_log_pb2.SchemaRecord | None = None


@dataclass
class Ledger:
    """What was sent and what was answered."""

    known: dict[bytes, Event] = field(default_factory=dict)
    """By its encoding."""
    sent: dict[tuple[str, int, int], list[tuple[Event, ...]]] = field(default_factory=dict)
    """By producer, sequence and number of an event: the parts that held it."""
    promised: set[Key] = field(default_factory=set)
    """Acknowledged."""
    refused: set[Key] = field(default_factory=set)
    """Refused for good: nothing of it may be kept."""
    forgiven: set[Key] = field(default_factory=set)
    """Acknowledged and lost, in a mode that allows it."""

    def sending(self, producer_id: str, sequence: int, events: Sequence[Event]) -> None:
        """A part goes out."""
        part = tuple(events)
        for event in part:
            self.known[event.encoded] = event
            held = self.sent.setdefault((producer_id, sequence, event.number), [])
            if part not in held:
                held.append(part)

    def promise(self, events: Sequence[Event]) -> None:
        """The sender was told that they are counted."""
        self.promised.update(event.key for event in events if event.key not in self.forgiven)

    def forgive(self, events: Sequence[Event]) -> None:
        """They were lost, and that was allowed."""
        self.forgiven.update(event.key for event in events)
        self.promised -= self.forgiven

    def refuse(self, events: Sequence[Event]) -> None:
        """The sender was told that nothing is kept, and will not send them again."""
        self.refused.update(event.key for event in events)


class History:
    """The records of the log, as the shard appended them."""

    def __init__(self, ledger: Ledger, clock: Callable[[], int], time: Callable[[], float]) -> None:
        self.records: list[Record] = []
        self.end = 0
        """Position after the last record, as far as records tell."""
        self._ledger = ledger
        self._clock = clock
        self._time = time
        self.lost: list[Record] = []
        """Records that were gone when the log was opened, since somebody emptied the list."""

    def append(self, position: int, kind: int, payload: bytes) -> Record:
        """The shard appends a record."""
        if position < self.end:
            raise Violation(f"a record is appended at {position}, the one before it ends behind that, at {self.end}")
        record = self._parse(position, kind, payload)
        self.records.append(record)
        self.end = position + len(payload)
        return record

    def opened(self, position: int) -> None:
        """The log was opened anew, and found to end there."""
        kept = [record for record in self.records if record.position < position]
        lost = self.records[len(kept) :]
        if kept and kept[-1].position + len(kept[-1].payload) > position:
            raise Violation(f"the log ends at {position}, within the record at {kept[-1].position}")
        self.records, self.end = kept, kept[-1].position + len(kept[-1].payload) if kept else 0
        self.lost += lost

    def _parse(self, position: int, kind: int, payload: bytes) -> Record:
        moment = self._clock(), self._time()
        if kind == RECORD_FORGET:
            users = tuple(user.decode() for user in decode_forget(memoryview(payload)))
            return Record(position, kind, payload, *moment, forgotten=users)
        if kind == RECORD_SCHEMA:
            return Record(position, kind, payload, *moment, schema=decode_schema(memoryview(payload)))
        if kind != RECORD_EVENTS:
            raise Violation(f"a record of the unknown type {kind} is appended")
        part = decode_part(payload)
        events = []
        for encoded in elements(bytes(part.events)):
            event = self._ledger.known.get(encoded)
            if event is None:
                raise Violation(f"the record at {position} holds an event that nobody sent: {encoded!r}")
            events.append(event)
        if part.event_count != len(events):
            raise Violation(f"the record at {position} says {part.event_count} events and holds {len(events)}")
        return Record(
            position,
            kind,
            payload,
            *moment,
            tuple(events),
            part.producer_id,
            part.sequence,
            part.acknowledged_sequence,
            part.arrival_time_ns,
        )


def elements(encoded: bytes) -> Iterator[bytes]:
    """The elements of field 1, each without tag and length."""
    at = 0
    while at < len(encoded):
        if encoded[at] != 0x0A:
            raise Violation(f"events are not events alone: byte {at} of {encoded!r}")
        size = shift = 0
        while True:
            at += 1
            size |= (encoded[at] & 0x7F) << shift
            shift += 7
            if encoded[at] < 0x80:
                break
        yield encoded[at + 1 : at + 1 + size]
        at += 1 + size


@dataclass
class User:
    """A user as the surviving events make him."""

    events: list[Event] = field(default_factory=list)
    last_received_ns: int = 0


@dataclass
class Expected:
    """What a shard must show, by the records of its log."""

    users: dict[str, User] = field(default_factory=dict)
    event_count: int = 0
    counted: Counter[Key] = field(default_factory=Counter)
    acknowledged: Counter[str] = field(default_factory=Counter)
    """By producer: what its records tell of its acknowledgements."""


def expect(ledger: Ledger, history: History, *, most_event_ids: int, ttl_ns: int) -> Expected:
    """Counts the records' events, and asserts that each record holds all of its part that was not counted before, and
    nothing that was.

    Raises:
        Violation: an event is counted twice, a part is counted by half, a promised event is missing, a refused one is
            there, somebody was forgotten too early.
    """
    expected = Expected()
    window: Window = OrderedDict()
    for record in history.records:
        for user_id in record.forgotten:
            user = expected.users.pop(user_id, None)
            if user is None or user.last_received_ns >= record.appended_ns - ttl_ns:
                raise Violation(f"{user_id} is forgotten by the record at {record.position}, before the time")
        if record.producer_id and not record.producer_id.startswith("request:"):
            expected.acknowledged[record.producer_id] = max(
                expected.acknowledged[record.producer_id], record.acknowledged_sequence
            )
        if record.events:
            window = _admit(ledger, record, expected.counted, window, most_event_ids)
        for event in record.events:
            expected.counted[event.key] += 1
            user = expected.users.setdefault(event.user_id, User())
            user.events.append(event)
            user.last_received_ns = max(user.last_received_ns, record.arrival_time_ns)
        expected.event_count += len(record.events)
    missing = [key for key in ledger.promised if not expected.counted[key]]
    if missing:
        raise Violation(f"{len(missing)} acknowledged events are not in the log: {sorted(map(str, missing))[:10]}")
    kept = [key for key in ledger.refused if expected.counted[key]]
    if kept:
        raise Violation(f"{len(kept)} refused events are in the log: {sorted(map(str, kept))[:10]}")
    return expected


def _admit(ledger: Ledger, record: Record, counted: Counter[Key], window: Window, most_event_ids: int) -> Window:
    """Asserts that the record holds all that was new of a part that was sent; returns the event ids to remember."""
    first = record.events[0]
    parts = ledger.sent.get((record.producer_id, record.sequence, first.number), [])
    for part in parts:
        after = _admit_part(part, record.events, counted, ledger.forgiven, window, most_event_ids)
        if after is not None:
            return after
    raise Violation(
        f"the record at {record.position} (producer {record.producer_id!r}, batch {record.sequence}) holds "
        f"{[event.number for event in record.events]}, of parts {[[event.number for event in part] for part in parts]}"
        f"; counted before: {sorted({event.number for part in parts for event in part if counted[event.key]})}"
    )


def _admit_part(
    part: Sequence[Event],
    held: Sequence[Event],
    counted: Counter[Key],
    forgiven: set[Key],
    window: Window,
    most_event_ids: int,
) -> Window | None:
    """The event ids to remember after the part; None where `held` is not what was new of it."""
    window = window.copy()
    at = 0
    for event in part:
        is_next = at < len(held) and held[at] == event
        if event.event_id:
            if event.key in window:
                continue
            # Counted, but so long ago that the shard need not remember it.
            if not is_next and counted[event.key]:
                continue
        elif counted[event.key]:
            continue
        if not is_next:
            # Lost with later batches of its producer that are there again: it cannot come back.
            if event.key in forgiven:
                continue
            return None
        at += 1
        if event.event_id:
            window[event.key] = None
            if len(window) > most_event_ids:
                window.popitem(last=False)
    return window if at == len(held) else None
