"""What a stream has acknowledged: batches end in any order, acknowledgements go out in the order of their sequences.

sequences     1 ── 2 ── 3 ── 4 ── 5
in flight               3         5      so everything up to 2 can be acknowledged; 4 has to wait for 3

A stream may begin with batches that were acknowledged before it. They are acknowledged again one by one, so that each
answer names what was refused in the batches up to it, and no answer comes before the refusals that belong to it.

Sequences of a sparse stream leave some out. What is told is always the sequence of a batch that came.
"""

from __future__ import annotations

from collections import deque

from sortedcontainers import SortedDict

from userprofile.v1 import event_pb2, event_service_pb2

REJECTED_PER_RESPONSE = 10_000
"""Once a response names so many refused events, later batches go into the next one."""

Rejected = tuple[int, str, str]
"""(index, field, reason)"""


class Acknowledgements:
    """The batches of one stream, whose sequences ascend.

    >>> ledger = Acknowledgements(0)
    >>> ledger.begin(1, []); ledger.begin(2, []); ledger.end(2)
    >>> ledger.take() is None
    True
    >>> ledger.end(1); ledger.take().sequence
    2

    Args:
        held: everything up to this sequence was durable before the stream began.
    """

    def __init__(self, held: int) -> None:
        self.held = held
        self._last = 0
        self._ended = 0
        """Every batch of the stream up to this one has ended; 0 where not even the first one has."""
        self._told = 0
        self._in_flight: set[int] = set()
        self._waiting: deque[int] = deque()
        """The batches after `_ended`, in order."""
        self._rejected: SortedDict[int, list[Rejected]] = SortedDict()
        self._rejected_count = 0

    @property
    def acknowledged(self) -> int:
        """Everything up to here is durable and readable."""
        return max(self.held, self._ended)

    @property
    def in_flight(self) -> int:
        """Batches that have not ended."""
        return len(self._in_flight)

    @property
    def rejected_count(self) -> int:
        """Refused events that are still to be told."""
        return self._rejected_count

    def begin(self, sequence: int, rejected: list[Rejected]) -> None:
        """A batch is on its way; of it, some events were refused."""
        self._in_flight.add(sequence)
        self._came(sequence, rejected)

    def end(self, sequence: int) -> None:
        """A batch is durable and readable."""
        self._in_flight.remove(sequence)
        self._advance()

    def repeat(self, sequence: int, rejected: list[Rejected]) -> None:
        """A batch came that is held: its sender is to hear of it again."""
        assert sequence <= self.held
        self._came(sequence, rejected)

    def take(self) -> event_service_pb2.StreamEventsResponse | None:
        """What is to be told now: as many batches as are done; None where nothing is."""
        sequence = self._ended
        if sequence == self._told:
            return None
        response = event_service_pb2.StreamEventsResponse()
        refused_in = 0
        while self._rejected and self._rejected.peekitem(0)[0] <= sequence:
            if len(response.rejected) >= REJECTED_PER_RESPONSE:
                # The batch that comes next in `_rejected` is told in the next response, and so is all that follows it.
                sequence = refused_in
                break
            refused_in, events = self._rejected.popitem(0)
            self._rejected_count -= len(events)
            response.rejected.extend(
                event_pb2.RejectedEvent(sequence=refused_in, index=index, field=field, reason=reason)
                for index, field, reason in events
            )
        response.sequence = self._told = sequence
        return response

    def _came(self, sequence: int, rejected: list[Rejected]) -> None:
        assert sequence > self._last
        self._last = sequence
        self._waiting.append(sequence)
        self._advance()
        if rejected:
            self._rejected[sequence] = rejected
            self._rejected_count += len(rejected)

    def _advance(self) -> None:
        while self._waiting and self._waiting[0] not in self._in_flight:
            self._ended = self._waiting.popleft()

    def check_invariants(self) -> None:
        """Asserts that nothing in flight is acknowledged."""
        assert self._in_flight <= set(self._waiting)
        assert list(self._waiting) == sorted(self._waiting)
        assert not self._waiting or self._ended < self._waiting[0] <= self._waiting[-1] == self._last
        assert not self._in_flight or self.acknowledged < min(self._in_flight)
        assert self._told <= self._ended
        assert self._rejected_count == sum(map(len, self._rejected.values()))
