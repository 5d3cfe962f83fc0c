"""How a producer batches, how much it holds, and when it gives up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from profile_client.errors import Rejected
from profile_client.events import EVENT_BYTES

BATCH_EVENTS = 10_000
"""Most events of a batch that the service takes unless told otherwise."""


@dataclass(frozen=True)
class ProducerOptions:
    """How a producer batches, how much it holds, and when it gives up.

    >>> ProducerOptions(linger_s=0.05).batch_events
    2000
    """

    batch_events: int = 2_000
    """A batch is sent when it has so many events,"""
    batch_bytes: int = 1 << 20
    """or so many bytes,"""
    linger_s: float = 0.01
    """or its first event has waited so long. Infinite: then batches depend on nothing but what is sent and flushed. A
    producer needs that if it goes on after a crash and sends again what follows its acknowledged sequence."""
    buffer_bytes: int = 32 << 20
    """Bytes that may wait or be on their way before `send` waits."""
    in_flight_batches: int = 16
    """Batches on their way at once."""
    reconnect_s: tuple[float, float] = (0.05, 2.0)
    """First and longest wait before the stream is opened again."""
    give_up_s: float = 600.0
    """A producer that has something to deliver fails when nothing of it was acknowledged for so long: `send` and
    `flush` then raise, and `unacknowledged` gives what was not delivered. Until then it tries again and again, and
    `send` waits when the buffer is full."""
    on_acknowledged: Callable[[int, Sequence[Rejected]], object] | None = None
    """Called with the number up to which every batch is durable, and with the events that were refused in the batches
    that are acknowledged now. It is called where the stream is read, before `flush` returns, under the producer's lock:
    it must be quick, and must not send or flush. `flush` raises refused events all the same. If it raises, the producer
    fails."""

    def __post_init__(self) -> None:
        first_s, longest_s = self.reconnect_s
        faults = [
            f"{name} must be {rule}, is {value}"
            for name, value, rule, holds in (
                ("batch_events", self.batch_events, f"1 to {BATCH_EVENTS}", 1 <= self.batch_events <= BATCH_EVENTS),
                ("batch_bytes", self.batch_bytes, f"1 to {EVENT_BYTES}", 1 <= self.batch_bytes <= EVENT_BYTES),
                ("linger_s", self.linger_s, "0 or more", self.linger_s >= 0),
                ("buffer_bytes", self.buffer_bytes, "batch_bytes or more", self.buffer_bytes >= self.batch_bytes),
                ("in_flight_batches", self.in_flight_batches, "1 or more", self.in_flight_batches >= 1),
                ("reconnect_s", self.reconnect_s, "two times above 0, ascending", 0 < first_s <= longest_s),
                ("give_up_s", self.give_up_s, "0 or more", self.give_up_s >= 0),
            )
            if not holds
        ]
        if faults:
            raise ValueError("; ".join(faults))
