"""What a stream has acknowledged: batches end in any order, acknowledgements go out in the order of their sequences.

sequences     1 ── 2 ── 3 ── 4 ── 5
in flight               3         5      so everything up to 2 can be acknowledged; 4 has to wait for 3
"""

from __future__ import annotations

from sortedcontainers import SortedDict, SortedList

from userprofile.v1 import event_pb2, event_service_pb2

REJECTED_PER_RESPONSE = 10_000
"""Once a response names so many refused events, later batches go into the next one."""

Rejected = tuple[int, str, str]
"""(index, field, reason)"""


class Acknowledgements:
    """The batches of one stream.

    >>> ledger = Acknowledgements(0)
    >>> ledger.begin(1, []); ledger.begin(2, []); ledger.end(2)
    >>> ledger.take() is None
    True
    >>> ledger.end(1); ledger.take().sequence
    2

    Args:
        acknowledged: everything up to this sequence is known to be durable.
    """

    def __init__(self, acknowledged: int) -> None:
        self._acknowledged = acknowledged
        self._highest = acknowledged
        self._in_flight: SortedList[int] = SortedList()
        self._rejected: SortedDict[int, list[Rejected]] = SortedDict()
        self._due = False

    @property
    def acknowledged(self) -> int:
        """Everything up to here was told to be durable."""
        return self._acknowledged

    @property
    def in_flight(self) -> int:
        """Batches that have not ended."""
        return len(self._in_flight)

    def begin(self, sequence: int, rejected: list[Rejected]) -> None:
        """A batch is on its way; of it, some events were refused. Sequences ascend."""
        assert sequence > self._highest
        self._highest = sequence
        self._in_flight.add(sequence)
        if rejected:
            self._rejected[sequence] = rejected

    def end(self, sequence: int) -> None:
        """A batch is durable and readable."""
        self._in_flight.remove(sequence)
        self._due = self._due or self._reached() > self._acknowledged

    def repeat(self, sequence: int, rejected: list[Rejected]) -> None:
        """A batch came that had been acknowledged before: its sender is to hear of it again."""
        if rejected:
            self._rejected[sequence] = rejected
        self._due = True

    def take(self) -> event_service_pb2.StreamEventsResponse | None:
        """What is to be told now: as many batches as are done; None where nothing is."""
        if not self._due:
            return None
        sequence = max(self._reached(), self._acknowledged)
        self._due = False
        response = event_service_pb2.StreamEventsResponse()
        while self._rejected and self._rejected.peekitem(0)[0] <= sequence:
            if len(response.rejected) >= REJECTED_PER_RESPONSE:
                # The batch that comes next in `_rejected` is told in the next response, and so is all that follows it.
                sequence = max(self._rejected.peekitem(0)[0] - 1, self._acknowledged)
                self._due = True
                break
            refused_in, events = self._rejected.popitem(0)
            response.rejected.extend(
                event_pb2.RejectedEvent(sequence=refused_in, index=index, field=field, reason=reason)
                for index, field, reason in events
            )
        response.sequence = self._acknowledged = sequence
        return response

    def _reached(self) -> int:
        """Everything up to here is durable and readable."""
        return self._in_flight[0] - 1 if self._in_flight else self._highest

    def check_invariants(self) -> None:
        """Asserts that nothing in flight is acknowledged."""
        assert not self._in_flight or self._acknowledged < self._in_flight[0]
        assert not self._in_flight or self._in_flight[-1] <= self._highest
