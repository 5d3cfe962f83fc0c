"""A producer's batches on their way to the owners.

    Lane    the batches of one stream, in the order of their sequences; a call of its own has a lane of its own
    Batch   one of them: done when every owner has applied its part
    Part    what of a batch goes to one owner

Within a lane no part may overtake another on the way to an owner: the owner takes a sequence that it has passed for a
repetition and skips it. So when a batch fails, every later batch of its lane fails with it, and what was not sent yet
is dropped.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from profile_service.errors import ProfileServiceError
from profile_service.wire.apply_request import ApplyPart


class Lane:
    """An ordered run of batches with one fate.

    Args:
        producer_id: empty for batches that are counted as often as they are sent.
        patient: whether a full owner is waited for; otherwise it is an error.
    """

    def __init__(self, producer_id: str, *, patient: bool) -> None:
        self.producer_id = producer_id
        self.patient = patient
        self.error: ProfileServiceError | None = None
        self._open: set[Batch] = set()

    def open_batch(self, parts: int) -> Batch:
        """A new batch of so many parts. Raises what the lane failed with."""
        if self.error is not None:
            raise self.error
        batch = Batch(self, parts)
        self._open.add(batch)
        batch.done.add_done_callback(lambda _: self._open.discard(batch))
        if not parts:
            batch.done.set_result(None)
        return batch

    def fail(self, error: ProfileServiceError) -> None:
        """Ends the lane: every batch that is not done fails, and so will every later one."""
        if self.error is None:
            self.error = error
        for batch in list(self._open):
            if not batch.done.done():
                batch.done.set_exception(error)
                # Whoever waited may have gone away; the error is then nobody's.
                batch.done.exception()


class Batch:
    """One batch; `done` ends when all its parts are durable and readable, or with the error of the first that is
    not."""

    def __init__(self, lane: Lane, parts: int) -> None:
        self.lane = lane
        self.parts = parts
        """Owners that it goes to."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._missing = parts

    def part_applied(self) -> None:
        """One part is durable and readable."""
        self._missing -= 1
        if not self._missing and not self.done.done():
            self.done.set_result(None)

    def split_further(self, parts: int) -> None:
        """One part goes to so many owners instead."""
        self.parts += parts - 1
        self._missing += parts - 1


@dataclass(eq=False)
class Part:
    """What of a batch goes to one owner."""

    batch: Batch
    serial: int
    """Rises with each part that the router makes: the order in which parts of a lane must be sent."""
    content: ApplyPart
    alone: bool = field(default=False)
    """Sent in a message of its own, after a message that held it was refused as malformed."""

    @property
    def dropped(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.batch.done.done()

    @property
    def size_bytes(self) -> int:
        """What it counts against bounds."""
        return self.content.size_bytes
