"""The producer's bookkeeping, without I/O: what waits, what is on its way, what is acknowledged.

    add ─▶ open batch ─▶ (full, or old, or flushed) sealed ─▶ take: numbered, on its way ─▶ acknowledge: gone
                                                                        ▲                │
                                                                        └── reconnect ───┘

Every batch is kept until it is acknowledged. After a broken stream the service says up to which sequence it holds
everything; the rest goes again under the same numbers, so that the service can tell what it has. The owner of the
window locks around it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from profile_client.errors import ProfileClientError, Rejected

MOST_REJECTED_KEPT = 10_000


@dataclass(frozen=True)
class ProducerOptions:
    """How a producer batches and how much it holds."""

    batch_events: int = 2_000
    """A batch is sent when it has so many events,"""
    batch_bytes: int = 1 << 20
    """or so many bytes,"""
    linger_s: float = 0.01
    """or its first event has waited so long."""
    buffer_bytes: int = 32 << 20
    """Bytes that may wait or be on their way before `send` waits."""
    in_flight_batches: int = 16
    """Batches on their way at once."""
    reconnect_s: tuple[float, float] = (0.05, 2.0)
    """First and longest wait before the stream is opened again."""
    give_up_s: float = 60.0
    """After so long without a working stream the producer fails."""

    def __post_init__(self) -> None:
        if not 1 <= self.batch_events <= 10_000:
            raise ValueError(f"batch_events must be 1 to 10000, is {self.batch_events}")
        if not 1 <= self.batch_bytes <= 15 << 20:
            raise ValueError(f"batch_bytes must be 1 to {15 << 20}, is {self.batch_bytes}")
        if self.buffer_bytes < self.batch_bytes:
            raise ValueError("buffer_bytes must not be below batch_bytes")
        if self.in_flight_batches < 1:
            raise ValueError(f"in_flight_batches must be at least 1, is {self.in_flight_batches}")


@dataclass
class Batch:
    """A sealed batch."""

    body: bytes
    events: int
    sequence: int = 0
    """Its number; 0 before it was first on its way."""


@dataclass
class ProducerWindow:
    """One producer's batches."""

    options: ProducerOptions
    acknowledged_sequence: int = 0
    """The service holds every batch up to this one."""
    acknowledged_events: int = 0
    """Events of this producer object that are acknowledged, the refused ones included."""
    rejected_events: int = 0
    """Those of them that were refused."""
    sent_events: int = 0
    """Events ever added."""
    failure: ProfileClientError | None = None
    """Why the producer can go on no more."""
    _open: list[bytes] = field(default_factory=list)
    _open_bytes: int = 0
    _open_since: float = 0.0
    _sealed: deque[Batch] = field(default_factory=deque)
    _in_flight: deque[Batch] = field(default_factory=deque)
    _held_bytes: int = 0
    _next_sequence: int = 0
    _rejected: list[Rejected] = field(default_factory=list)
    _rejected_unreported: int = 0

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
            self._sealed.append(Batch(b"".join(self._open), len(self._open)))
            self._open, self._open_bytes = [], 0

    def due_in_s(self, now: float) -> float | None:
        """How long until the open batch has lingered enough; None when none is open."""
        return max(0.0, self._open_since + self.options.linger_s - now) if self._open else None

    def connected(self, sequence: int) -> None:
        """A stream is open, and the service holds every batch up to `sequence`: the rest is to go again."""
        if not self._next_sequence:
            self._next_sequence = sequence + 1
        self.acknowledge(sequence, ())
        self._sealed.extendleft(reversed(self._in_flight))
        self._in_flight.clear()

    def take(self, now: float) -> Batch | None:
        """The next batch to send, numbered; None when there is none, or enough is on its way."""
        if len(self._in_flight) >= self.options.in_flight_batches:
            return None
        if not self._sealed and self._open and self.due_in_s(now) == 0.0:
            self.seal()
        if not self._sealed:
            return None
        batch = self._sealed.popleft()
        if not batch.sequence:
            batch.sequence = self._next_sequence
            self._next_sequence += 1
        self._in_flight.append(batch)
        return batch

    def acknowledge(self, sequence: int, rejected: tuple[Rejected, ...]) -> None:
        """Every batch up to `sequence` is durable, but for the events refused."""
        for queue in (self._in_flight, self._sealed):
            while queue and 0 < queue[0].sequence <= sequence:
                batch = queue.popleft()
                self._held_bytes -= len(batch.body)
                self.acknowledged_events += batch.events
        self.acknowledged_sequence = max(self.acknowledged_sequence, sequence)
        self.rejected_events += len(rejected)
        self._rejected_unreported += len(rejected)
        self._rejected.extend(rejected[: max(0, MOST_REJECTED_KEPT - len(self._rejected))])

    def take_rejected(self) -> tuple[list[Rejected], int]:
        """What was refused since this was last asked: the first of it, and how much in all."""
        answer = self._rejected, self._rejected_unreported
        self._rejected, self._rejected_unreported = [], 0
        return answer

    @property
    def is_idle(self) -> bool:
        """Whether everything added is acknowledged."""
        return not (self._open or self._sealed or self._in_flight)

    def check_invariants(self) -> None:
        """Numbers rise without a gap, and bytes add up; for tests."""
        numbers = [batch.sequence for batch in (*self._in_flight, *self._sealed) if batch.sequence]
        assert numbers == sorted(set(numbers))
        assert not numbers or numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert not numbers or numbers[0] > self.acknowledged_sequence
        held = sum(len(b.body) for b in (*self._in_flight, *self._sealed)) + sum(map(len, self._open))
        assert held == self._held_bytes
        waiting = sum(b.events for b in (*self._in_flight, *self._sealed)) + len(self._open)
        assert self.acknowledged_events + waiting == self.sent_events
        assert len(self._in_flight) <= self.options.in_flight_batches
