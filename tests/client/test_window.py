"""The producer's window under every interleaving: each batch reaches the service once and in order, and nothing is
forgotten."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from profile_client.window import Batch, ProducerOptions, ProducerWindow


class WindowMachine(RuleBasedStateMachine):
    """A window, the batches on the wire, and a service that applies what it has not seen."""

    @initialize(held=st.integers(0, 5))
    def start(self, held: int) -> None:
        options = ProducerOptions(batch_events=3, batch_bytes=40, buffer_bytes=200, in_flight_batches=2, linger_s=1.0)
        self.window = ProducerWindow(options)
        self.now = 0.0
        self.service_sequence = self.before = held
        self.service_events = 0
        self.wire: list[Batch] = []
        self.window.connected(held)

    @rule(size=st.integers(1, 30))
    def add(self, size: int) -> None:
        if self.window.has_room(size):
            self.window.add(b"x" * size, self.now)

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
            self.wire.append(batch)

    @rule(acknowledge=st.booleans())
    def receive(self, acknowledge: bool) -> None:
        """The service applies the next batch on the wire; its acknowledgement may be lost."""
        if not self.wire:
            return
        batch = self.wire.pop(0)
        if batch.sequence > self.service_sequence:
            assert batch.sequence == self.service_sequence + 1
            self.service_sequence = batch.sequence
            self.service_events += batch.events
        if acknowledge:
            self.window.acknowledge(batch.sequence, ())

    @rule(lag=st.integers(0, 2))
    def reconnect(self, lag: int) -> None:
        """Everything on the wire is lost; the service says where it is, and may lag."""
        self.wire.clear()
        self.window.connected(max(self.before, self.window.acknowledged_sequence, self.service_sequence - lag))

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "window"):
            self.window.check_invariants()
            assert self.window.acknowledged_events <= self.service_events <= self.window.sent_events

    def teardown(self) -> None:
        if not hasattr(self, "window"):
            return
        self.window.seal()
        self.reconnect(0)
        while not self.window.is_idle:
            self.send()
            self.receive(True)
        assert self.service_events == self.window.sent_events == self.window.acknowledged_events


TestWindowMachine = WindowMachine.TestCase
