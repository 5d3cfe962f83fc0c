"""The producer's bookkeeping, without I/O: what waits, what is on its way, what is answered.

    add ─▶ open batch ─▶ (full, or old, or flushed) sealed ─▶ take: numbered, on its way ─▶ acknowledge: gone
                                                                        ▲                │
                                                                        └── connected ───┘

Every batch is kept until it is answered. After a broken stream the service says up to which sequence it holds
everything; the rest goes again under the same numbers, so that the service can tell what it has.

Batches that the service turns out to hold although their answer was lost with the stream are durable, but what was
refused of them is not known. They are asked for once more: the new stream carries them alone and is then half-closed;
when the service has ended it too, every answer has come, and an ordinary stream follows.

    connected(n), nothing unanswered up to n ──▶ ordinary stream
    connected(n), batches unanswered up to n ──▶ asking stream: those batches, half-close ─▶ ended ─▶ connected(…)

The owner of the window locks around it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from profile_client.errors import ProfileClientError, Rejected
from profile_client.events import unframe
from profile_client.options import ProducerOptions

MOST_REJECTED_KEPT = 10_000
"""Refused events that are kept for the next flush; beyond it they are counted only."""


@dataclass
class Batch:
    """A sealed batch."""

    body: bytes
    events: int
    position: int
    """Events added before its first one."""
    sequence: int = 0
    """Its number; 0 before it was first on its way."""


@dataclass
class ProducerWindow:
    """One producer's batches.

    >>> window = ProducerWindow(ProducerOptions())
    >>> window.connected(0)
    >>> window.add(b"...", now=0.0); window.seal(); window.take(now=0.0).sequence
    1
    >>> window.acknowledge(1, ()); window.is_idle
    ()
    True
    """

    options: ProducerOptions
    acknowledged_sequence: int = 0
    """The service holds every batch up to this one."""
    acknowledged_events: int = 0
    """Events of this producer object that are answered, the refused ones included."""
    rejected_events: int = 0
    """Those of them that were refused."""
    sent_events: int = 0
    """Events ever added."""
    sealed_batches: int = 0
    """Batches ever sealed."""
    failure: ProfileClientError | None = None
    """Why the producer can go on no more."""
    _open: list[bytes] = field(default_factory=list)
    _open_bytes: int = 0
    _open_since: float = 0.0
    _sealed: deque[Batch] = field(default_factory=deque)
    _in_flight: deque[Batch] = field(default_factory=deque)
    _held_bytes: int = 0
    _next_sequence: int = 0
    _asking_to: int = 0
    """On an asking stream: the last batch that it asks for."""
    _asked: dict[tuple[int, int], Rejected] = field(default_factory=dict)
    """What the asking stream answered so far."""
    _rejected: list[Rejected] = field(default_factory=list)
    _rejected_unreported: int = 0

    # --- the program's side ---

    def has_room(self, size: int) -> bool:
        """Whether an event of that size may be added now; one alone always may."""
        return self._held_bytes == 0 or self._held_bytes + size <= self.options.buffer_bytes

    def add(self, element: bytes, now: float) -> None:
        """Takes a framed event; `now` is a monotonic time in seconds."""
        if self._open and self._open_bytes + len(element) > self.options.batch_bytes:
            self.seal()
        if not self._open:
            self._open_since = now
        self._open.append(element)
        self._open_bytes += len(element)
        self._held_bytes += len(element)
        self.sent_events += 1
        if len(self._open) >= self.options.batch_events:
            self.seal()

    def seal(self) -> None:
        """Closes the open batch, if it has events."""
        if self._open:
            count = len(self._open)
            self._sealed.append(Batch(b"".join(self._open), count, self.sent_events - count))
            self._open, self._open_bytes = [], 0
            self.sealed_batches += 1

    def take_rejected(self) -> tuple[list[Rejected], int]:
        """What was refused since this was last asked: the first of it, and how much in all."""
        answer = self._rejected, self._rejected_unreported
        self._rejected, self._rejected_unreported = [], 0
        return answer

    @property
    def is_idle(self) -> bool:
        """Whether everything added is answered."""
        return not (self._open or self._sealed or self._in_flight)

    @property
    def calls_for_sender(self) -> bool:
        """After `add`: whether a batch was begun or sealed, so that whoever sends has to look."""
        return len(self._open) <= 1

    # --- the stream's side ---

    def connected(self, sequence: int) -> None:
        """A stream is open, and the service holds every batch up to `sequence`: the rest is to go again."""
        if not self._next_sequence:
            self._next_sequence = sequence + 1
        elif sequence >= self._next_sequence:
            self.failure = ProfileClientError(
                f"the service holds batch {sequence} of this producer_id, and only {self._next_sequence - 1} were sent "
                "here: another producer uses the same producer_id"
            )
            return
        self.acknowledged_sequence = max(self.acknowledged_sequence, sequence)
        self._sealed.extendleft(reversed(self._in_flight))
        self._in_flight.clear()
        self._asked.clear()
        self._asking_to = sequence if self._sealed and 0 < self._sealed[0].sequence <= sequence else 0

    def take(self, now: float) -> Batch | None:
        """The next batch to send, numbered; None when there is none, or enough is on its way."""
        if self._asking_to:
            return self._take_sealed() if self._sealed and 0 < self._sealed[0].sequence <= self._asking_to else None
        if len(self._in_flight) >= self.options.in_flight_batches:
            return None
        if not self._sealed and self._open and self.due_in_s(now) == 0.0:
            self.seal()
        return self._take_sealed() if self._sealed else None

    def _take_sealed(self) -> Batch:
        batch = self._sealed.popleft()
        if not batch.sequence:
            batch.sequence = self._next_sequence
            self._next_sequence += 1
        self._in_flight.append(batch)
        return batch

    def due_in_s(self, now: float) -> float | None:
        """How long until the open batch has lingered enough; None when none is open, or it lingers for ever."""
        if not self._open or self.options.linger_s == float("inf"):
            return None
        return max(0.0, self._open_since + self.options.linger_s - now)

    @property
    def is_asked(self) -> bool:
        """Whether this is an asking stream and has sent all that it asks for: the sender is to half-close."""
        return bool(self._asking_to) and not (self._sealed and 0 < self._sealed[0].sequence <= self._asking_to)

    def acknowledge(self, sequence: int, rejected: Iterable[Rejected]) -> tuple[Rejected, ...]:
        """Every batch up to `sequence` is durable, but for the events refused; returns those, with their places."""
        self.acknowledged_sequence = max(self.acknowledged_sequence, sequence)
        if self._asking_to:
            # Such an answer names the highest batch held, not the one looked at: the stream's end is what counts.
            self._asked.update(((r.sequence, r.index), r) for r in rejected)
            return ()
        return self._answered(sequence, tuple(rejected))

    def ended(self) -> tuple[Rejected, ...]:
        """The stream has ended without an error; returns what it tells of refused events."""
        if not self.is_asked:
            return ()
        sequence, self._asking_to = self._asking_to, 0
        rejected = tuple(self._asked[key] for key in sorted(self._asked))
        self._asked.clear()
        return self._answered(sequence, rejected)

    def _answered(self, sequence: int, rejected: tuple[Rejected, ...]) -> tuple[Rejected, ...]:
        placed = self._placed(rejected) if rejected else ()
        for queue in (self._in_flight, self._sealed):
            while queue and 0 < queue[0].sequence <= sequence:
                batch = queue.popleft()
                self._held_bytes -= len(batch.body)
                self.acknowledged_events += batch.events
        self.rejected_events += len(placed)
        self._rejected_unreported += len(placed)
        self._rejected.extend(placed[: max(0, MOST_REJECTED_KEPT - len(self._rejected))])
        return placed

    def _placed(self, rejected: Sequence[Rejected]) -> tuple[Rejected, ...]:
        """The refused events with their positions and bytes, which their batches still hold."""
        batches = {batch.sequence: batch for batch in self._in_flight}
        events = {
            number: list(unframe(batches[number].body)) for number in {r.sequence for r in rejected} & set(batches)
        }
        return tuple(
            replace(r, position=batches[r.sequence].position + r.index, serialized=events[r.sequence][r.index])
            if r.sequence in events and 0 <= r.index < len(events[r.sequence])
            else r
            for r in rejected
        )

    def check_invariants(self) -> None:
        """Numbers rise without a gap, and events and bytes add up; for tests."""
        held = (*self._in_flight, *self._sealed)
        numbers = [batch.sequence for batch in held if batch.sequence]
        assert not numbers or numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert all(batch.sequence for batch in self._in_flight)
        assert not numbers or numbers[-1] < self._next_sequence
        assert sum(len(b.body) for b in held) + sum(map(len, self._open)) == self._held_bytes
        assert sum(map(len, self._open)) == self._open_bytes
        assert self.acknowledged_events + sum(b.events for b in held) + len(self._open) == self.sent_events
        assert [b.position for b in held] == [
            self.acknowledged_events + sum(p.events for p in held[:i]) for i in range(len(held))
        ]
        assert len(self._in_flight) <= self.options.in_flight_batches
