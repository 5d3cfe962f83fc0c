"""Rows of a store for other programs, which need the store and this module: no running service, no Ray.

    import redis
    from profile_service.stored_rows import StoredRows

    client = redis.Redis()
    rows = StoredRows.of(client.hgetall("profiles:meta"))     # the prefix of --store, "profiles" by default
    profile = rows.decode("u1", client.get(rows.key("u1")))   # a userprofile.v1.Profile, None for a user never seen
    profile.features["price"].distribution.mean

What is read so is what was acknowledged. Nobody but the service may write: its shards keep rows near, and do not look
whether somebody has changed them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import xxhash

from profile_service.clock import system_clock
from profile_service.domain.packed_profiles import PackedProfiles
from profile_service.domain.schema import parse_schema
from profile_service.storage.redis_keys import Keys
from userprofile.v1 import profile_pb2


class StoredRows:
    """How rows of one store are found and read.

    Args:
        schema: the schema file's text.
        partition_bits: of the store; its meta says so.
        prefix: of the store's keys.
    """

    def __init__(self, schema: str, partition_bits: int, prefix: str = "profiles") -> None:
        self._schema = parse_schema(schema, "the store's schema")
        self._keys = Keys(prefix, partition_bits)
        self._rows = PackedProfiles(self._schema, most_users=1)

    @classmethod
    def of(cls, meta: Mapping[bytes, bytes], prefix: str = "profiles") -> StoredRows:
        """As the hash PREFIX:meta says. Raises KeyError where that says nothing, and ValueError while the rows are
        being brought to a changed schema."""
        schemas = [text for name, text in meta.items() if name.startswith(b"schema:")]
        bits = int(meta[b"partition_bits"])
        if len(schemas) != 1:
            raise ValueError(f"the rows are of {len(schemas)} schemas just now")
        return cls(schemas[0].decode(), bits, prefix)

    def key(self, user_id: str) -> bytes:
        """Where the user's row is."""
        encoded = user_id.encode()
        partition = xxhash.xxh64_intdigest(encoded) >> (64 - self._keys.partition_bits)
        return self._keys.row(self._keys.group_of(partition), self._schema.fingerprint, encoded)

    def population_keys(self) -> list[bytes]:
        """Hashes whose values, all together, are the sums over all users: for `decode`."""
        return [self._keys.population(group, self._schema.fingerprint) for group in range(self._keys.groups)]

    def decode(
        self, user_id: str, value: bytes | None, *, read_ns: int | None = None, sums: Iterable[bytes] = ()
    ) -> profile_pb2.Profile | None:
        """The profile that a row holds, as of `read_ns` (nanoseconds since 1970), or of now; None where there is none,
        or one that was not heard of for the schema's TTL. Features with `prior: population` take the population's
        shares from `sums`, and without any take all values for equally likely.

        Raises:
            DataLoss: the value is damaged, or not a row of this schema.
        """
        held = list(sums)
        population = self._rows.population(held) if held else None
        when = system_clock() if read_ns is None else read_ns
        (encoded,) = self._rows.profiles([user_id], [value], when, population=population)
        return profile_pb2.Profile.FromString(encoded) if encoded else None
