"""`POST /v1/events:ingest`: one bad event never spoils its batch, in JSON as little as in protobuf.

Events are read one by one. Those that are no event at all (`"userId": 5`, `"time": "yesterday"`, a misspelt field) are
answered here, by their position in the caller's array; the others go on, and what is refused of them comes back under
the positions that the caller knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from profile_service.errors import InvalidArgument
from profile_service.frontends.rest.json_in import fill
from userprofile.v1.event_pb2 import Event, RejectedEvent
from userprofile.v1.event_service_pb2 import IngestEventsRequest, IngestEventsResponse

METHOD = "userprofile.v1.EventService/IngestEvents"


@dataclass(frozen=True)
class ReadBatch:
    """A batch as far as it could be read."""

    request: IngestEventsRequest
    """The events that could be read, and everything but events."""
    positions: Sequence[int]
    """Where each of them was in the caller's array."""
    unread: Sequence[RejectedEvent]
    """The others, by position."""

    def answer(self, response: IngestEventsResponse) -> IngestEventsResponse:
        """What the caller is told, from what the service said of the events that could be read."""
        if not self.unread:
            return response
        for rejected in response.rejected:
            rejected.index = self.positions[rejected.index]
        every = sorted((*response.rejected, *self.unread), key=lambda rejected: rejected.index)
        return IngestEventsResponse(accepted_count=response.accepted_count, rejected=every)


def read_batch(tree: dict[str, Any], most_events: int) -> ReadBatch:
    """Reads the JSON of an IngestEventsRequest; raises InvalidArgument for what is wrong with the batch as a whole."""
    events = tree.get("events")
    if not isinstance(events, list):
        # Nothing to read one by one; null is the same as absent, anything else is refused by name.
        request = IngestEventsRequest()
        fill(request, tree)
        return ReadBatch(request, (), ())
    if len(events) > most_events:
        raise InvalidArgument("events", f"must be at most {most_events} events, are {len(events)}")
    request = IngestEventsRequest()
    fill(request, {name: value for name, value in tree.items() if name != "events"})
    positions = []
    unread = []
    for position, each in enumerate(events):
        event = Event()
        try:
            fill(event, each)
        except InvalidArgument as error:
            (violation,) = error.violations
            unread.append(RejectedEvent(index=position, field=violation.field, reason=violation.description))
        else:
            request.events.append(event)
            positions.append(position)
    return ReadBatch(request, positions, unread)
