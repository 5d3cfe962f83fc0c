"""What a frontend takes, a shard can log."""

from __future__ import annotations

from profile_service.config import MOST_MESSAGE_BYTES
from profile_service.shard.log_records import RECORD_OVERHEAD_BYTES
from profile_service.storage.record import MAX_PAYLOAD_BYTES


def test_the_largest_message_fits_into_a_record() -> None:
    assert MOST_MESSAGE_BYTES + RECORD_OVERHEAD_BYTES <= MAX_PAYLOAD_BYTES
