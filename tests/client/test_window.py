"""The producer's window under every interleaving: each batch reaches the service once and in order, nothing is
forgotten, and what is refused is told once, whichever answers were lost."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from profile_client import ProducerOptions, ProfileClientError, Rejected
from profile_client.events import EVENT_BYTES, frame, unframe
from profile_client.window import MOST_REJECTED_KEPT, Batch, ProducerWindow

BAD = b"!"

Answer = tuple[int, list[Rejected]]


class WindowMachine(RuleBasedStateMachine):
    """A window, a service that applies what it has not seen, and the two directions of the stream between them."""

    @initialize(held=st.integers(0, 5), repeats=st.booleans())
    def start(self, held: int, repeats: bool) -> None:
        linger_s = float("inf") if repeats else 1.0
        options = ProducerOptions(
            batch_events=3, batch_bytes=40, buffer_bytes=200, in_flight_batches=2, linger_s=linger_s
        )
        self.window = ProducerWindow(options)
        self.now = 0.0
        self.added: list[bytes] = []
        self.applied: list[bytes] = []
        self.told: list[Rejected] = []
        self.service_sequence = self.before = held
        self.to_service: list[Batch] = []
        self.to_producer: list[Answer] = []
        self.window.connected(held)

    @rule(size=st.integers(1, 30), bad=st.booleans())
    def add(self, size: int, bad: bool) -> None:
        event = (BAD if bad else b"x") * size
        if self.window.has_room(len(frame(event))):
            self.window.add(frame(event), self.now)
            self.added.append(event)

    @rule(bad=st.lists(st.booleans(), max_size=4))
    def add_batch(self, bad: list[bool]) -> None:
        events = [BAD if each else b"x" for each in bad]
        body = b"".join(map(frame, events))
        if self.window.has_room(len(body)):
            self.window.add_batch(body, len(events), None, self.now)
            self.added += events

    @rule()
    def flush(self) -> None:
        self.window.seal(self.now)

    @rule(seconds=st.floats(0, 1.5))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def send(self) -> None:
        batch = self.window.take(self.now)
        if batch is not None:
            self.to_service.append(batch)

    @rule(together=st.integers(1, 3))
    def serve(self, together: int) -> None:
        """The service looks at some batches, and answers for the last one with what it refused of them."""
        looked_at, refused = 0, []
        for batch in self.to_service[:together]:
            events = list(unframe(batch.body))
            assert batch.sequence <= self.service_sequence + 1, "a gap"
            if batch.sequence == self.service_sequence + 1:
                self.service_sequence = batch.sequence
                self.applied.extend(events)
            looked_at = batch.sequence
            refused += [
                Rejected(batch.sequence, index, "f", "r") for index, event in enumerate(events) if event.startswith(BAD)
            ]
        del self.to_service[:together]
        if looked_at:
            self.to_producer.append((looked_at, refused))

    @rule()
    def deliver(self) -> None:
        if self.to_producer:
            self.told.extend(self.window.acknowledge(*self.to_producer.pop(0), self.now))

    @rule(lag=st.integers(0, 2))
    def reconnect(self, lag: int) -> None:
        """Everything on the way is lost, both ways; the service says where it is, and may lag."""
        self.to_service, self.to_producer = [], []
        self.window.connected(max(self.before, self.window.acknowledged_sequence, self.service_sequence - lag))

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "window"):
            return
        self.window.check_invariants()
        assert self.window.failure is None
        assert self.applied == self.added[: len(self.applied)]
        assert self.window.acknowledged_events <= len(self.applied) <= self.window.sent_events
        expected = [
            position
            for position, event in enumerate(self.added[: self.window.acknowledged_events])
            if event.startswith(BAD)
        ]
        assert [r.position for r in self.told] == expected
        # Of a batch of the caller's own the caller knows the events.
        assert all(r.serialized in (b"", self.added[r.position]) for r in self.told)
        assert self.window.rejected_events == len(self.told)
        assert list(self.window.unacknowledged()) == self.added[self.window.acknowledged_events :]

    def teardown(self) -> None:
        if not hasattr(self, "window"):
            return
        self.window.seal(self.now)
        self.reconnect(0)
        while not self.window.is_idle:
            self.send()
            self.serve(1)
            self.deliver()
        self.adds_up()
        assert self.applied == self.added
        rejected, count = self.window.take_rejected()
        assert rejected == self.told
        assert count == len(self.told)
        assert self.window.stalled_s(self.now + 1e6) == 0.0


TestWindowMachine = WindowMachine.TestCase


def test_a_window_that_lingers_for_ever_sends_what_is_full_or_flushed() -> None:
    window = ProducerWindow(ProducerOptions(batch_events=2, linger_s=float("inf")))
    window.connected(0)
    window.add(frame(b"a"), 0.0)
    assert window.due_in_s(1e9) is None
    assert window.take(1e9) is None
    window.add(frame(b"b"), 0.0)
    assert window.take(0.0) is not None
    window.add(frame(b"c"), 0.0)
    window.seal(0.0)
    assert window.take(0.0) is not None
    window.check_invariants()


def test_a_service_ahead_of_its_producer_means_two_producers() -> None:
    window = ProducerWindow(ProducerOptions())
    window.connected(0)
    window.add(frame(b"a"), 0.0)
    window.seal(0.0)
    window.take(0.0)
    window.connected(2)
    assert isinstance(window.failure, ProfileClientError)
    assert "another producer uses the same producer_id" in str(window.failure)


def test_refused_events_are_kept_in_bounds_and_counted_beyond() -> None:
    window = ProducerWindow(ProducerOptions())
    window.connected(0)
    many = [Rejected(1, index, "f", "r") for index in range(MOST_REJECTED_KEPT + 5)]
    window.acknowledge(1, many, 0.0)
    rejected, count = window.take_rejected()
    assert (len(rejected), count) == (MOST_REJECTED_KEPT, MOST_REJECTED_KEPT + 5)
    assert window.take_rejected() == ([], 0)


def test_a_producer_that_repeats_is_not_taken_for_two_when_the_service_knew_more_than_it_said() -> None:
    window = ProducerWindow(ProducerOptions())
    window.connected(3)
    window.add_batch(frame(b"a"), 1, 1, 0.0)
    window.connected(9)
    assert window.failure is None
    assert window.acknowledged_sequence == 9
    # Batches that are held go to the service all the same: it tells what it refused of them.
    batch = window.take(0.0)
    assert batch is not None
    assert batch.sequence == 1
    window.check_invariants()


def test_numbers_are_given_with_every_batch_or_with_none_and_leave_no_gap() -> None:
    window = ProducerWindow(ProducerOptions())
    with pytest.raises(ValueError, match="1 or more, is 0"):
        window.add_batch(b"", 0, 0, 0.0)
    window.add_batch(b"", 0, 7, 0.0)
    with pytest.raises(ValueError, match="must be 8, is 9"):
        window.add_batch(b"", 0, 9, 0.0)
    with pytest.raises(ValueError, match="needs its own"):
        window.add_batch(b"", 0, None, 0.0)
    with pytest.raises(ValueError, match="single events"):
        window.add(frame(b"a"), 0.0)
    other = ProducerWindow(ProducerOptions())
    other.add(frame(b"a"), 0.0)
    with pytest.raises(ValueError, match="without numbers"):
        other.add_batch(b"", 0, 1, 0.0)
    for body, events in ((b"x", 0), (b"", 1), (bytes(EVENT_BYTES + 1), 1)):
        with pytest.raises(ValueError):
            window.add_batch(body, events, 8, 0.0)
    window.check_invariants()


def test_batches_without_events_fill_the_buffer_too() -> None:
    window = ProducerWindow(ProducerOptions(batch_bytes=1, buffer_bytes=1000))
    while window.has_room(0):
        window.add_batch(b"", 0, None, 0.0)
    assert window.sealed_batches == 4


def test_only_what_waits_to_be_acknowledged_stalls() -> None:
    window = ProducerWindow(ProducerOptions(linger_s=float("inf")))
    window.connected(0)
    window.add(frame(b"a"), 0.0)
    assert window.stalled_s(100.0) == 0.0, "nothing is to be sent yet"
    window.seal(100.0)
    assert window.stalled_s(105.0) == 5.0
    window.take(105.0)
    window.add_batch(b"", 0, None, 106.0)
    window.acknowledge(1, (), 110.0)
    assert window.stalled_s(111.0) == 1.0, "progress begins a new time"
    window.take(111.0)
    window.acknowledge(2, (), 112.0)
    assert window.stalled_s(200.0) == 0.0
