"""Which partition a user falls into: `xxh64(user_id) >> (64 - bits)`. Every language has XXH64, so clients can route by
it."""

from __future__ import annotations

import xxhash

MAX_PARTITION_BITS = 16


def user_hash(user_id: str) -> int:
    """XXH64 (seed 0) of the id's UTF-8 bytes.

    >>> user_hash("u1") == xxhash.xxh64_intdigest(b"u1")
    True
    """
    return xxhash.xxh64_intdigest(user_id.encode())


def partition_of(hashed: int, bits: int) -> int:
    """The partition, 0 to 2**bits - 1, of a user with this hash.

    >>> partition_of(0xFF00000000000000, 8)
    255
    """
    return hashed >> (64 - bits)
