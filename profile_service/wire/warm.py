"""All kernels of `wire`, compiled before anything waits for them.

Numba compiles a kernel at its first call, which takes seconds where its cache has nothing; without this the first
event that is refused would hold up a frontend's loop. Run it once before the processes start: they then load what it
left.
"""

from __future__ import annotations

import numpy as np

from profile_service.config import Limits
from profile_service.wire.decode import decode_events
from profile_service.wire.gather import gather, gather_events, split_by_owner
from profile_service.wire.plan import WirePlan
from profile_service.wire.scan import scan_batch

_VALID_AND_REFUSED = b"\x0a\x06\x0a\x01u\x12\x01v" + b"\x0a\x00"


def compile_kernels() -> None:
    """Scans, explains, splits, gathers and decodes one event, and so compiles or loads every kernel on its way."""
    plan = WirePlan.compile(["v"], ["text"], ["number"])
    scanned = scan_batch(_VALID_AND_REFUSED, plan, Limits(), 0)
    assert [index for index, _, _ in scanned.rejected()] == [1]
    order, _ = split_by_owner(scanned.user_hash, scanned.status, np.zeros(1, np.int32), 0, 1)
    events = gather(scanned.buffer, scanned.offset, scanned.length, order)
    assert decode_events(gather_events(events, np.zeros(1, np.int64)), plan, 0).count == 1
