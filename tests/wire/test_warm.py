"""After warming up, nothing of `wire` compiles any more."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from profile_service.config import Limits
from profile_service.wire import decode, frame, gather, json_text, scan, work
from profile_service.wire.plan import WirePlan
from profile_service.wire.warm import warm_decoding, warm_scanning
from userprofile.v1.admin_service_pb2 import GetStatusResponse

KERNELS = [
    scan._scan,
    scan._explain,
    decode._decode,
    frame._check_frame,
    gather._gathered_size,
    gather._gather,
    gather._split_by_owner,
    json_text._write,
    work.make_work,
]


def signatures() -> list[int]:
    return [len(cast(Any, kernel).signatures) for kernel in KERNELS]


def test_another_schema_and_another_message_need_no_other_kernels() -> None:
    warm_scanning()
    warm_decoding()
    compiled = signatures()
    plan = WirePlan.compile(["view", "contact"], [], ["price", "mileage"])
    scanned = scan.scan_batch(memoryview(bytearray(b"\x0a\x00\x12\x01n")), plan, Limits(), 2**62)
    assert len(scanned.rejected()) == 1
    chosen = np.flatnonzero(scanned.status)
    assert bytes(gather.gather(scanned.buffer, scanned.offset, scanned.length, chosen)) == b"\x0a\x00"
    gather.split_by_owner(scanned.user_hash, scanned.status, np.zeros(256, np.int32), 8, 3)
    decode.decode_events(b"", plan, 0)
    texts = json_text.JsonPlan.compile(GetStatusResponse.DESCRIPTOR)
    assert texts is not None
    assert texts.write(b"") is not None
    assert signatures() == compiled
