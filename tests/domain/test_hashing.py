"""XXH64 is that of the xxhash package: clients route by it."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import xxhash

from profile_service.domain.hashing import xxh64


@pytest.mark.parametrize("hash_seed", [0, 1, 0x9E3779B97F4A7C15, 2**63, 2**64 - 1])
def test_every_length_hashes_as_the_xxhash_package_does(hash_seed: int, seed: int) -> None:
    random = Random(seed)
    content = random.randbytes(300)
    buffer = np.frombuffer(content, np.uint8)
    for length in range(201):
        start = random.randrange(len(content) - length + 1)
        expected = xxhash.xxh64_intdigest(content[start : start + length], seed=hash_seed)
        assert int(xxh64(buffer, start, length, np.uint64(hash_seed))) == expected, (start, length)


def test_a_megabyte_hashes_as_the_xxhash_package_does() -> None:
    content = bytes(range(256)) * 4096
    assert int(xxh64(np.frombuffer(content, np.uint8), 0, len(content), 0)) == xxhash.xxh64_intdigest(content)
