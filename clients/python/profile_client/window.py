"""The producer's bookkeeping, without I/O: what waits, what is on its way, what is answered.

    add ─▶ open batch ─▶ (full, or old, or flushed) sealed ─▶ take: on its way ─▶ acknowledge: gone
    add_batch ──────────────────────────────────────▶ ▲                │
                                                      └── connected ───┘

Every batch is kept until it is answered. After a broken stream everything unanswered goes again under the same numbers,
also what the service says to hold already: it does not count that again, but it tells again what was refused of it,
which may have been lost with the stream.

Batches are numbered on from what the service holds when the first stream is open, or by whoever adds them.

The owner of the window locks around it. Times are monotonic, in seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from profile_client.errors import ProfileClientError, Rejected
from profile_client.events import EVENT_BYTES, unframe
from profile_client.options import ProducerOptions

MOST_REJECTED_KEPT = 10_000
"""Refused events that are kept for the next flush; beyond it they are counted only."""

EMPTY_BATCH_BYTES = 256
"""What a batch without events counts against the bound of what is held."""


@dataclass
class Batch:
    """A sealed batch."""

    body: bytes
    events: int
    position: int
    """Events added before its first one."""
    sequence: int = 0
    """Its number; 0 before it was first on its way."""
    is_whole: bool = False
    """Whether it was added as a whole: whoever did that knows its events."""

    @property
    def size_bytes(self) -> int:
        """What it counts against the bound of what is held."""
        return len(self.body) or EMPTY_BATCH_BYTES


@dataclass
class ProducerWindow:
    """One producer's batches.

    >>> window = ProducerWindow(ProducerOptions())
    >>> window.connected(0)
    >>> window.add(b"...", now=0.0); window.seal(now=0.0); window.take(now=0.0).sequence
    1
    >>> window.acknowledge(1, (), now=0.0); window.is_idle
    ()
    True
    """

    options: ProducerOptions
    acknowledged_sequence: int = 0
    """The service holds every batch up to this one."""
    acknowledged_events: int = 0
    """Events of this producer object that are answered, the refused ones included."""
    acknowledged_batches: int = 0
    """Their batches."""
    rejected_events: int = 0
    """Those of the events that were refused."""
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
    _waiting_since: float | None = None
    """Since when there are sealed batches and none is answered."""
    _next_sequence: int | None = None
    """Of the next batch that has none; None before the first stream was open."""
    _given_sequence: int | None = None
    """The last number that was given with a batch; 0 where batches come without; None before the first came."""
    _known_sequence: int | None = None
    """The highest number that the service may hold by what it said at first and what went to it since."""
    _rejected: list[Rejected] = field(default_factory=list)
    _rejected_unreported: int = 0

    # --- the program's side ---

    def has_room(self, size: int) -> bool:
        """Whether so many bytes may be added now; with nothing held they always may."""
        return self._held_bytes == 0 or self._held_bytes + size <= self.options.buffer_bytes

    def add(self, element: bytes, now: float) -> None:
        """Takes a framed event.

        Raises:
            ValueError: the batches of this producer come with their numbers.
        """
        if self._given_sequence is None:
            self._given_sequence = 0
        elif self._given_sequence:
            raise ValueError("the batches of this producer come with numbers of their own; single events have none")
        if self._open and self._open_bytes + len(element) > self.options.batch_bytes:
            self.seal(now)
        if not self._open:
            self._open_since = now
        self._open.append(element)
        self._open_bytes += len(element)
        self._held_bytes += len(element)
        self.sent_events += 1
        if len(self._open) >= self.options.batch_events:
            self.seal(now)

    def check_batch(self, body: bytes, events: int, sequence: int | None) -> None:
        """Refuses what `add_batch` cannot take.

        Raises:
            ValueError: the number is not the next one, batches came without a number before, or it is too large.
        """
        given = self._given_sequence
        if sequence is None:
            if given:
                raise ValueError("batches of this producer came with numbers; every later one needs its own")
        elif sequence < 1 or (given and sequence != given + 1):
            raise ValueError(f"sequence must be {given + 1 if given else '1 or more'}, is {sequence}")
        elif given == 0:
            raise ValueError("batches of this producer came without numbers; so must every later one")
        if len(body) > EVENT_BYTES:
            raise ValueError(f"a batch must be at most {EVENT_BYTES} bytes, is {len(body)}")
        if events < 0 or bool(body) != bool(events):
            raise ValueError(f"{len(body)} bytes cannot be {events} events")

    def add_batch(self, body: bytes, events: int, sequence: int | None, now: float) -> None:
        """Takes framed events as a batch, with its number or without; raises as `check_batch` does."""
        self.check_batch(body, events, sequence)
        self.seal(now)
        self._given_sequence = sequence or 0
        batch = Batch(body, events, self.sent_events, sequence or 0, is_whole=True)
        self.sent_events += events
        self._held_bytes += batch.size_bytes
        self._append(batch, now)

    def seal(self, now: float) -> None:
        """Closes the open batch, if it has events."""
        if self._open:
            count = len(self._open)
            batch = Batch(b"".join(self._open), count, self.sent_events - count)
            self._open, self._open_bytes = [], 0
            self._append(batch, now)

    def _append(self, batch: Batch, now: float) -> None:
        self._sealed.append(batch)
        self.sealed_batches += 1
        if self._waiting_since is None:
            self._waiting_since = now

    def take_rejected(self) -> tuple[list[Rejected], int]:
        """What was refused since this was last asked: the first of it, and how much in all."""
        answer = self._rejected, self._rejected_unreported
        self._rejected, self._rejected_unreported = [], 0
        return answer

    def unacknowledged(self) -> Iterator[bytes]:
        """The serialized events that are not answered, in their order."""
        for batch in (*self._in_flight, *self._sealed):
            yield from unframe(batch.body)
        for element in self._open:
            yield from unframe(element)

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
        """A stream is open, and the service holds every batch up to `sequence`: what is unanswered is to go again."""
        if self._known_sequence is None:
            self._known_sequence = sequence
            self._next_sequence = sequence + 1
        elif self._repeats:
            # It knew more than it said at first, of batches that an earlier process sent and that are sent here again.
            self._known_sequence = max(self._known_sequence, sequence)
        elif sequence > self._known_sequence:
            self.failure = ProfileClientError(
                f"the service holds batch {sequence} of this producer_id, and only {self._known_sequence} were sent "
                "here: another producer uses the same producer_id"
            )
            return
        self.acknowledged_sequence = max(self.acknowledged_sequence, sequence)
        self._sealed.extendleft(reversed(self._in_flight))
        self._in_flight.clear()

    @property
    def _repeats(self) -> bool:
        """Whether another process with the same producer_id makes the same batches."""
        return bool(self._given_sequence) or self.options.linger_s == float("inf")

    def take(self, now: float) -> Batch | None:
        """The next batch to send, numbered; None when there is none, or enough is on its way."""
        assert self._next_sequence is not None
        assert self._known_sequence is not None
        if len(self._in_flight) >= self.options.in_flight_batches:
            return None
        if not self._sealed and self._open and self.due_in_s(now) == 0.0:
            self.seal(now)
        if not self._sealed:
            return None
        batch = self._sealed.popleft()
        if not batch.sequence:
            batch.sequence = self._next_sequence
            self._next_sequence += 1
        self._known_sequence = max(self._known_sequence, batch.sequence)
        self._in_flight.append(batch)
        return batch

    def due_in_s(self, now: float) -> float | None:
        """How long until the open batch has lingered enough; None when none is open, or it lingers for ever."""
        if not self._open or self.options.linger_s == float("inf"):
            return None
        return max(0.0, self._open_since + self.options.linger_s - now)

    def stalled_s(self, now: float) -> float:
        """For how long batches have waited and none was answered; 0 where none waits."""
        return 0.0 if self._waiting_since is None else now - self._waiting_since

    def acknowledge(self, sequence: int, rejected: Iterable[Rejected], now: float) -> tuple[Rejected, ...]:
        """Every batch up to `sequence` is durable, but for the events refused; returns those, with their places."""
        self.acknowledged_sequence = max(self.acknowledged_sequence, sequence)
        placed = self._placed(tuple(rejected))
        while self._in_flight and self._in_flight[0].sequence <= sequence:
            batch = self._in_flight.popleft()
            self._held_bytes -= batch.size_bytes
            self.acknowledged_events += batch.events
            self.acknowledged_batches += 1
            self._waiting_since = now
        if not self._in_flight and not self._sealed:
            self._waiting_since = None
        self.rejected_events += len(placed)
        self._rejected_unreported += len(placed)
        self._rejected.extend(placed[: max(0, MOST_REJECTED_KEPT - len(self._rejected))])
        return placed

    def _placed(self, rejected: Sequence[Rejected]) -> tuple[Rejected, ...]:
        """The refused events with their positions, and with their bytes unless they came in a batch of the caller's."""
        batches = {batch.sequence: batch for batch in self._in_flight} if rejected else {}
        events: dict[int, list[bytes]] = {}
        answer = []
        for each in rejected:
            batch = batches.get(each.sequence)
            if batch is None or not 0 <= each.index < batch.events:
                answer.append(each)
            elif batch.is_whole:
                answer.append(replace(each, position=batch.position + each.index))
            else:
                if batch.sequence not in events:
                    events[batch.sequence] = list(unframe(batch.body))
                serialized = events[batch.sequence][each.index]
                answer.append(replace(each, position=batch.position + each.index, serialized=serialized))
        return tuple(answer)

    def check_invariants(self) -> None:
        """Numbers rise without a gap, and events and bytes add up; for tests."""
        held = (*self._in_flight, *self._sealed)
        numbers = [batch.sequence for batch in held if batch.sequence]
        assert not numbers or numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert all(batch.sequence for batch in self._in_flight)
        if self._given_sequence:
            assert not numbers or numbers[-1] == self._given_sequence
        else:
            assert not numbers or self._next_sequence is None or numbers[-1] < self._next_sequence
        assert sum(b.size_bytes for b in held) + sum(map(len, self._open)) == self._held_bytes
        assert sum(map(len, self._open)) == self._open_bytes
        assert self.acknowledged_events + sum(b.events for b in held) + len(self._open) == self.sent_events
        assert self.acknowledged_batches + len(held) == self.sealed_batches
        assert [b.position for b in held] == [
            self.acknowledged_events + sum(p.events for p in held[:i]) for i in range(len(held))
        ]
        assert len(self._in_flight) <= self.options.in_flight_batches
        assert (self._waiting_since is None) == (not held)
