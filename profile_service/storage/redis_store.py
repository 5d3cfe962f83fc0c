"""Redis or Valkey as the place where profiles live: opaque rows by key, and what has to change together with them.

    claim  ─▶ who owns which partitions, of a group at a time; refused to an owner of an earlier epoch
    fetch  ─▶ rows in one MGET a group
    write  ─▶ a group's rows, sequences, ids and sums in one script, if the writer still owns its partitions, and the
              store still holds what the writer wrote before

`redis_client` is how it is asked and what that may raise, `redis_keys` says where everything is, `redis_scripts` what
runs as one step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from profile_service.errors import StartupError
from profile_service.storage import redis_scripts
from profile_service.storage.redis_client import (
    TIMEOUT_S,
    Fenced,
    RedisClient,
    StoreBehind,
    StoreEmptied,
    StoreFault,
    StoreUrl,
)
from profile_service.storage.redis_keys import GROUPS, Keys

UNFINISHED = "unfinished"
"""Field of the meta of a store that is being filled from elsewhere."""
FORMAT = 1
"""Version of what is stored, but for rows, which say theirs themselves."""
LEASE_MS = 5_000
"""A service that does not renew its lease for so long has gone."""


@dataclass
class Meta:
    """What a store was made with."""

    store_id: str
    partition_bits: int
    schemas: dict[str, str]
    """By fingerprint: the text of every schema that rows may be of."""
    layouts: dict[str, str]
    """By fingerprint: which slots of a row each feature owns, as whoever wrote the rows had it."""


@dataclass
class GroupWrite:
    """What changes in one partition group, together or not at all."""

    group: int
    partitions: Sequence[int]
    """Those that are written to."""
    segment: int
    writes: int
    """How many writes the store must have seen of this owner in this group."""
    fingerprint: str
    row_ms: int
    """How long rows stay; 0 for ever."""
    producer_ms: int
    """How long what is known of a producer stays."""
    population: bytes = b""
    new_users: int = 0
    producers: dict[str, dict[str, int]] = field(default_factory=dict)
    requests: Chunk | None = None
    event_ids: Chunk | None = None
    user_ids: list[bytes] = field(default_factory=list)
    rows: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Chunk:
    """Entries of a bounded list."""

    data: bytes
    """u4 seconds since 1970, u4 count, entries."""
    count: int
    most: int
    """The list is cut to so many entries, by whole chunks."""
    oldest_s: int
    """Chunks of an earlier time go."""


@dataclass
class GroupState:
    """What a partition group holds beside rows and producers."""

    population: dict[int, bytes]
    """By segment."""
    users: dict[int, int]
    """By segment."""
    requests: list[bytes]
    event_ids: list[bytes]


class RedisStore:
    """One store, on one event loop.

    Args:
        url: where it is.
        keys: where things are in it; None before `read_meta` has said how many partitions there are.
    """

    def __init__(self, url: StoreUrl, partition_bits: int = 0, *, timeout_s: float = TIMEOUT_S) -> None:
        self.url = url
        self.keys = Keys(url.prefix, partition_bits)
        self._client = RedisClient(url, timeout_s)

    async def close(self) -> None:
        """Ends its connections."""
        await self._client.close()

    def for_partitions(self, partition_bits: int) -> None:
        """From now on the keys are those of a store with so many partitions."""
        self.keys = Keys(self.url.prefix, partition_bits)

    # --- what a store is ---

    async def read_meta(self) -> Meta | None:
        """None for a store that was never used. Raises StartupError for one of a later format."""
        found = {
            key.decode(): value.decode() for key, value in (await self._client.call("HGETALL", self.keys.meta)).items()
        }
        if UNFINISHED in found:
            raise StartupError(
                f"{self.url.shown}: a migration into it was interrupted: run `profile-service migrate` again, or give "
                "another prefix"
            )
        if "format" not in found:
            # Or one that an earlier version had only begun to make.
            return None
        if int(found["format"]) != FORMAT:
            raise StartupError(
                f"{self.url.shown}: its format is {found['format']}, this version writes {FORMAT}: start the version "
                "that wrote it, or a later one"
            )
        return Meta(
            found["id"],
            int(found["partition_bits"]),
            {name.partition(":")[2]: text for name, text in found.items() if name.startswith("schema:")},
            {name.partition(":")[2]: text for name, text in found.items() if name.startswith("layout:")},
        )

    async def make_meta(self, meta: Meta) -> bool:
        """Makes a store of one that was never used; returns whether it was nobody else who did."""
        fields: list[Any] = ["id", meta.store_id, "format", FORMAT, "partition_bits", meta.partition_bits]
        for fingerprint, text in meta.schemas.items():
            fields += (f"schema:{fingerprint}", text, f"layout:{fingerprint}", meta.layouts[fingerprint])
        return bool(await self._client.run(redis_scripts.MAKE_META, [self.keys.meta], fields))

    async def begin_import(self, meta: Meta, progress: Callable[[int], None] = lambda keys: None) -> None:
        """Makes a store that nobody may use before `finish_import`. Of an import that was interrupted nothing stays:
        its source may have changed since. `progress` hears how many keys were removed.

        Raises StartupError where there is a store that is not such an import.
        """
        held = await self._client.call("HGETALL", self.keys.meta)
        interrupted = UNFINISHED.encode() in held
        if b"format" in held and not interrupted:
            raise StartupError(f"{self.url.shown} holds profiles already; give another prefix, or remove its keys")
        if await self._was_owned():
            raise StartupError(
                f"{self.url.shown} was served, and has lost its meta; give another prefix, or remove its keys"
            )
        await self._client.call("HSET", self.keys.meta, UNFINISHED, 1)
        if interrupted:
            await self._remove_import(progress)
        if others := [name for name in held if name != UNFINISHED.encode()]:
            await self._client.call("HDEL", self.keys.meta, *others)
        await self._client.call("HSET", self.keys.meta, "id", meta.store_id, "format", FORMAT)
        await self._client.call("HSET", self.keys.meta, "partition_bits", meta.partition_bits)
        for fingerprint, text in meta.schemas.items():
            await self.add_schema(fingerprint, text, meta.layouts[fingerprint])

    async def _was_owned(self) -> bool:
        """Whether shards have ever written here; an import never makes an owner."""
        found = [await self._client.call("EXISTS", self.keys.of_group(group, "owners")) for group in range(GROUPS)]
        return any(found)

    async def _remove_import(self, progress: Callable[[int], None]) -> None:
        """Removes all that an import has written, but for the meta."""
        removed = 0
        # Whatever number of partitions it had.
        for group in range(GROUPS):
            # Braces are in no prefix, so this is where no other store's keys begin.
            before = self.keys.of_group(group, "")
            async for found in self._client.scan(before):
                removed += await self._client.call("UNLINK", *(before + rest for rest in found))
                progress(removed)
        for key in (self.keys.carried_event_ids, self.keys.epoch):
            await self._client.call("UNLINK", key)

    async def finish_import(self) -> None:
        """From now on it may be used."""
        await self._client.call("HDEL", self.keys.meta, UNFINISHED)

    async def put_sums(self, group: int, fingerprint: str, segment: int, population: bytes, users: int) -> None:
        """Writes the sums of a segment, and how many users it has made."""
        await self._client.call("HSET", self.keys.population(group, fingerprint), segment, population)
        await self._client.call("HSET", self.keys.of_group(group, "counters"), f"users:{segment}", users)

    async def put_producer(self, group: int, producer_id: str, fields: Mapping[str, int], left_ms: int) -> None:
        """Writes what a group knows of a producer, for so long."""
        key = self.keys.producer(group, producer_id)
        await self._client.call("HSET", key, *(part for item in fields.items() for part in item))
        await self._client.call("PEXPIRE", key, left_ms)

    async def put_requests(self, group: int, chunk: bytes, count: int) -> None:
        """Appends requests to those of a group."""
        await self._client.call("RPUSH", self.keys.of_group(group, "requests"), chunk)
        await self._client.call("HINCRBY", self.keys.of_group(group, "counters"), "requests", count)

    async def put_carried(self, chunk: bytes, left_ms: int) -> None:
        """Appends event ids that every owner is to know, for so long."""
        await self._client.call("RPUSH", self.keys.carried_event_ids, chunk)
        await self._client.call("PEXPIRE", self.keys.carried_event_ids, left_ms)

    async def carried(self) -> list[bytes]:
        """The event ids that every owner is to know, in chunks."""
        chunks: list[bytes] = await self._client.call("LRANGE", self.keys.carried_event_ids, 0, -1)
        return chunks

    async def add_schema(self, fingerprint: str, text: str, layout: str) -> None:
        """From now on rows may be of this schema, too."""
        await self._client.call("HSET", self.keys.meta, f"schema:{fingerprint}", text, f"layout:{fingerprint}", layout)

    async def drop_schema(self, fingerprint: str) -> None:
        """No row is of this schema any more."""
        await self._client.call("HDEL", self.keys.meta, f"schema:{fingerprint}", f"layout:{fingerprint}")

    async def epoch(self) -> int:
        """The highest epoch that was given out, or that an owner has."""
        held = int(await self._client.call("GET", self.keys.epoch) or 0)
        for owners in await asyncio.gather(*(self.owners(group) for group in range(self.keys.groups))):
            held = max([held, *(int(owner.partition(":")[0]) for owner in owners.values())])
        return held

    async def raise_epoch(self, epoch: int) -> None:
        """Notes that this epoch was given out."""
        await self._client.run(redis_scripts.RAISE_EPOCH, [self.keys.epoch], [epoch])

    async def owners(self, group: int) -> dict[int, str]:
        """epoch:token of each partition's owner."""
        found = await self._client.call("HGETALL", self.keys.of_group(group, "owners"))
        return {int(key): value.decode() for key, value in found.items() if key.isdigit()}

    async def take_lease(self, who: str) -> str | None:
        """Takes or renews the lease for LEASE_MS; returns who else has it, None where it is ours."""
        held = await self._client.run(redis_scripts.LEASE, [self.keys.lease], [who, LEASE_MS])
        return None if held is None else held.decode()

    async def release_lease(self, who: str) -> None:
        """Gives the lease back, if it is ours."""
        await self._client.run(redis_scripts.RELEASE, [self.keys.lease], [who])

    async def probe(self) -> None:
        """Returns where it takes writes. Raises StoreFull or StoreAway."""
        await self._client.call("SET", self.keys.epoch + b":probe", "1", "PX", 1)

    async def sync_mode(self) -> str:
        """When what it answers is on its disk, as far as it tells: its `appendfsync`, or "none"."""
        try:
            found = await self._client.call("CONFIG", "GET", "append*")
        except StoreFault:
            # Hosted ones do not tell.
            return "unknown"
        held = {_text(key): _text(value) for key, value in found.items()}
        return held.get("appendfsync", "unknown") if held.get("appendonly") == "yes" else "none"

    # --- what it holds ---

    async def claim(self, group: int, partitions: Sequence[int], segment: int, owner: str) -> None:
        """Makes `owner`, epoch:token, the owner of these partitions of a group. Raises Fenced."""
        epoch, _, token = owner.partition(":")
        answer = await self._client.run(
            redis_scripts.CLAIM, [self.keys.of_group(group, "owners")], [epoch, token, segment, *partitions]
        )
        if answer[0] == b"STALE":
            raise Fenced(f"the partitions have an owner of epoch {_text(answer[1])}, this one is of epoch {epoch}")

    async def written(self, group: int, segment: int) -> tuple[str, int]:
        """Who owns the segment, epoch:token, and how many writes the store has seen of them; "" and 0 for nobody."""
        owner, writes = await self._client.call(
            "HMGET", self.keys.of_group(group, "owners"), segment, f"writes:{segment}"
        )
        return _text(owner or b""), int(writes or 0)

    async def read_group(self, group: int, fingerprint: str) -> GroupState:
        """What a group holds beside rows and producers."""
        counters, population, requests, event_ids = await asyncio.gather(
            self._client.call("HGETALL", self.keys.of_group(group, "counters")),
            self.read_population(group, fingerprint),
            self._client.call("LRANGE", self.keys.of_group(group, "requests"), 0, -1),
            self._client.call("LRANGE", self.keys.of_group(group, "event-ids"), 0, -1),
        )
        users = {
            int(name.partition(b":")[2]): int(value) for name, value in counters.items() if name.startswith(b"users:")
        }
        return GroupState(population, users, requests, event_ids)

    async def read_population(self, group: int, fingerprint: str) -> dict[int, bytes]:
        """The sums of a group, by segment."""
        found = await self._client.call("HGETALL", self.keys.population(group, fingerprint))
        return {int(segment): packed for segment, packed in found.items()}

    async def read_producers(self, group: int, producer_ids: Sequence[str]) -> list[dict[str, int]]:
        """What a group knows of each producer, by field; empty for one that it does not know."""
        answers = await asyncio.gather(
            *(self._client.call("HGETALL", self.keys.producer(group, producer_id)) for producer_id in producer_ids)
        )
        return [{_text(name): int(value) for name, value in found.items()} for found in answers]

    async def fetch(self, group: int, fingerprint: str, user_ids: Sequence[bytes]) -> list[bytes | None]:
        """The rows of users of a group, in their order; None for users who have none."""
        before = self.keys.rows(group, fingerprint)
        found: list[bytes | None] = await self._client.call("MGET", *[before + user_id for user_id in user_ids])
        return found

    async def write(self, owner: str, write: GroupWrite) -> None:
        """Does all of it, or nothing. Raises any StoreFault; only after StoreAway it may have been done."""
        keys = self.keys
        before = keys.rows(write.group, write.fingerprint)
        named = [
            keys.of_group(write.group, "owners"),
            keys.of_group(write.group, "counters"),
            keys.population(write.group, write.fingerprint),
            keys.of_group(write.group, "requests"),
            keys.of_group(write.group, "event-ids"),
            *(keys.producer(write.group, producer_id) for producer_id in write.producers),
            *(before + user_id for user_id in write.user_ids),
        ]
        arguments: list[Any] = [
            owner,
            write.segment,
            write.writes,
            write.row_ms,
            write.producer_ms,
            len(write.partitions),
            len(write.producers),
            write.population,
            write.new_users,
        ]
        for chunk in (write.requests, write.event_ids):
            arguments += [b"", 0, 0, 0] if chunk is None else [chunk.data, chunk.count, chunk.most, chunk.oldest_s]
        arguments += write.partitions
        for fields in write.producers.values():
            arguments.append(2 * len(fields))
            for name, value in fields.items():
                arguments += (name, value)
        arguments += write.rows
        match await self._client.run(redis_scripts.WRITE, named, arguments):
            case [b"FENCED", holder]:
                raise Fenced(f"the partitions belong to {_text(holder)} now, this owner is {owner}")
            case [b"EMPTIED"]:
                raise StoreEmptied(f"{self.url.shown} does not know its owner any more: it has lost its data")
            case [b"BEHIND", writes]:
                raise StoreBehind(
                    f"{self.url.shown} has seen {_text(writes) or 'none'} of {write.writes} writes: it has lost the "
                    "last ones"
                )

    def scan_rows(self, group: int, fingerprint: str) -> AsyncIterator[list[bytes]]:
        """The ids of all users of a group whose rows are of this schema, in pieces; one may come twice."""
        return self._client.scan(self.keys.rows(group, fingerprint))

    async def scan_producers(self, group: int) -> AsyncIterator[list[str]]:
        """The ids of all producers that a group knows, in pieces; one may come twice."""
        async for found in self._client.scan(self.keys.producer(group, "")):
            yield [producer_id.decode() for producer_id in found]

    async def put_rows(
        self, group: int, fingerprint: str, user_ids: Sequence[bytes], rows: Sequence[bytes], left_ms: Sequence[int]
    ) -> None:
        """Writes rows that nobody else writes meanwhile, each with the time that it has left; 0 for ever."""
        before = self.keys.rows(group, fingerprint)
        commands = (_set(before + user, row, left) for user, row, left in zip(user_ids, rows, left_ms, strict=True))
        await self._client.pipe(commands, together=False)

    async def times_left(self, group: int, fingerprint: str, user_ids: Sequence[bytes]) -> list[int | None]:
        """Milliseconds that rows have left; 0 for ever, None for a row that is not there."""
        before = self.keys.rows(group, fingerprint)
        found = await self._client.pipe((("PTTL", before + user_id) for user_id in user_ids), together=False)
        return [{-2: None, -1: 0}.get(left, max(1, left)) for left in found]

    async def move_rows(
        self,
        group: int,
        old: str,
        new: str,
        user_ids: Sequence[bytes],
        rows: Sequence[bytes],
        left_ms: Sequence[int],
    ) -> None:
        """Puts rows of another schema in the place of the users' rows, all of them or none."""
        before, after = self.keys.rows(group, old), self.keys.rows(group, new)
        commands = [_set(after + user, row, left) for user, row, left in zip(user_ids, rows, left_ms, strict=True)]
        await self._client.pipe([*commands, ("UNLINK", *(before + user for user in user_ids))], together=True)

    async def move_population(self, group: int, old: str, new: str, sums: Mapping[int, bytes]) -> None:
        """Puts sums of another schema in the place of a group's, all of them or none."""
        if sums:
            put = ("HSET", self.keys.population(group, new), *chain.from_iterable(sums.items()))
            await self._client.pipe([put, ("UNLINK", self.keys.population(group, old))], together=True)

    async def drop_rows(self, group: int, fingerprint: str, user_ids: Sequence[bytes]) -> None:
        """Removes rows."""
        before = self.keys.rows(group, fingerprint)
        await self._client.call("UNLINK", *[before + user_id for user_id in user_ids])


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _set(key: bytes, row: bytes, left_ms: int) -> tuple[Any, ...]:
    """Of a row that has so long left; 0 for ever."""
    return ("SET", key, row, "PX", left_ms) if left_ms else ("SET", key, row)
