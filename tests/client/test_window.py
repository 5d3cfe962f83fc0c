"""The producer's window under every interleaving: each batch reaches the service once and in order, nothing is
forgotten, and what is refused is told once, whichever answers were lost."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from profile_client import ProducerOptions, ProfileClientError, Rejected
from profile_client.events import frame, unframe
from profile_client.window import MOST_REJECTED_KEPT, Batch, ProducerWindow

BAD = b"!"

Answer = tuple[int, list[Rejected]]


class WindowMachine(RuleBasedStateMachine):
    """A window, a service that applies what it has not seen, and the two directions of the stream between them."""

    @initialize(held=st.integers(0, 5))
    def start(self, held: int) -> None:
        options = ProducerOptions(batch_events=3, batch_bytes=40, buffer_bytes=200, in_flight_batches=2, linger_s=1.0)
        self.window = ProducerWindow(options)
        self.now = 0.0
        self.added: list[bytes] = []
        self.applied: list[bytes] = []
        self.told: list[Rejected] = []
        self.service_sequence = self.before = self.looked_at = held
        self.to_service: list[Batch] = []
        self.refused_unanswered: list[Rejected] = []
        self.to_producer: list[Answer] = []
        self.window.connected(held)

    @rule(size=st.integers(1, 30), bad=st.booleans())
    def add(self, size: int, bad: bool) -> None:
        event = (BAD if bad else b"x") * size
        if self.window.has_room(len(frame(event))):
            self.window.add(frame(event), self.now)
            self.added.append(event)

    @rule()
    def flush(self) -> None:
        self.window.seal()

    @rule(seconds=st.floats(0, 1.5))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def send(self) -> None:
        batch = self.window.take(self.now)
        if batch is not None:
            self.to_service.append(batch)

    @rule()
    def serve(self) -> None:
        """The service looks at the next batch; it answers for all that it has looked at when it comes to that."""
        if not self.to_service:
            return
        batch = self.to_service.pop(0)
        events = list(unframe(batch.body))
        assert batch.sequence <= self.service_sequence + 1, "a gap"
        if batch.sequence == self.service_sequence + 1:
            self.service_sequence = batch.sequence
            self.applied.extend(events)
        self.looked_at = max(self.looked_at, batch.sequence)
        self.refused_unanswered.extend(
            Rejected(batch.sequence, index, "f", "r") for index, event in enumerate(events) if event.startswith(BAD)
        )

    @rule()
    def answer(self) -> None:
        """The answer names the highest batch that this stream began with or has brought."""
        self.to_producer.append((self.looked_at, self.refused_unanswered))
        self.refused_unanswered = []

    @rule()
    def deliver(self) -> None:
        if self.to_producer:
            self.told.extend(self.window.acknowledge(*self.to_producer.pop(0)))

    @rule()
    def end(self) -> None:
        """The service ends a stream that was half-closed when it has answered everything."""
        if self.window.is_asked and not self.to_service:
            self.answer()
            while self.to_producer:
                self.deliver()
            self.told.extend(self.window.ended())
            self.reconnect(0)

    @rule(lag=st.integers(0, 2))
    def reconnect(self, lag: int) -> None:
        """Everything on the way is lost, both ways; the service says where it is, and may lag."""
        self.to_service, self.to_producer, self.refused_unanswered = [], [], []
        self.looked_at = max(self.before, self.window.acknowledged_sequence, self.service_sequence - lag)
        self.window.connected(self.looked_at)

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "window"):
            return
        self.window.check_invariants()
        assert self.window.failure is None
        assert self.applied == self.added[: len(self.applied)]
        assert self.window.acknowledged_events <= len(self.applied) <= self.window.sent_events
        expected = [
            (position, event)
            for position, event in enumerate(self.added[: self.window.acknowledged_events])
            if event.startswith(BAD)
        ]
        assert sorted((r.position, r.serialized) for r in self.told) == expected
        assert self.window.rejected_events == len(self.told)

    def teardown(self) -> None:
        if not hasattr(self, "window"):
            return
        self.window.seal()
        self.reconnect(0)
        while not self.window.is_idle:
            self.send()
            self.serve()
            self.answer()
            self.deliver()
            self.end()
        self.adds_up()
        assert self.applied == self.added
        rejected, count = self.window.take_rejected()
        assert rejected == self.told
        assert count == len(self.told)


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
    window.seal()
    assert window.take(0.0) is not None
    window.check_invariants()


def test_a_service_ahead_of_its_producer_means_two_producers() -> None:
    window = ProducerWindow(ProducerOptions())
    window.connected(0)
    window.add(frame(b"a"), 0.0)
    window.seal()
    window.take(0.0)
    window.connected(2)
    assert isinstance(window.failure, ProfileClientError)
    assert "another producer uses the same producer_id" in str(window.failure)


def test_refused_events_are_kept_in_bounds_and_counted_beyond() -> None:
    window = ProducerWindow(ProducerOptions())
    window.connected(0)
    many = [Rejected(1, index, "f", "r") for index in range(MOST_REJECTED_KEPT + 5)]
    window.acknowledge(1, many)
    rejected, count = window.take_rejected()
    assert (len(rejected), count) == (MOST_REJECTED_KEPT, MOST_REJECTED_KEPT + 5)
    assert window.take_rejected() == ([], 0)
