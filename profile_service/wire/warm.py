"""All kernels of `wire`, compiled or loaded before anything waits for them: those of a frontend, and those of a shard.

Numba compiles a kernel at its first call, which takes seconds where its cache has nothing; without this the first
event that is refused would hold up a frontend's loop. Both run once before the processes start: those then load what
that left, each its own half.
"""

from __future__ import annotations

import numpy as np

from profile_service.config import Limits
from profile_service.wire.decode import decode_events
from profile_service.wire.gather import gather, gather_events, split_by_owner
from profile_service.wire.json_text import JsonPlan
from profile_service.wire.plan import WirePlan
from profile_service.wire.scan import scan_batch
from userprofile.v1 import profile_pb2

_VALID = b"\x0a\x06\x0a\x01u\x12\x01v"
_REFUSED = b"\x0a\x00"


def warm_scanning() -> None:
    """What a frontend runs: scans, explains, splits and gathers; and writes answers as JSON."""
    scanned = scan_batch(_VALID + _REFUSED, _plan(), Limits(), 0)
    assert [index for index, _, _ in scanned.rejected()] == [1]
    order, _ = split_by_owner(scanned.user_hash, scanned.status, np.zeros(1, np.int32), 0, 1)
    assert gather(scanned.buffer, scanned.offset, scanned.length, order) == _VALID
    plan = JsonPlan.compile(profile_pb2.Profile.DESCRIPTOR)
    assert plan is not None
    assert plan.write(profile_pb2.Profile(user_id="u").SerializeToString())


def warm_decoding() -> None:
    """What a shard runs: gathers those that it does not hold yet, and decodes."""
    assert decode_events(gather_events(_VALID, np.zeros(1, np.int64)), _plan(), 0).count == 1


def _plan() -> WirePlan:
    return WirePlan.compile(["v"], ["text"], ["number"])
