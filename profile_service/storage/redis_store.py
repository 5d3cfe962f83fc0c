"""Redis or Valkey as the place where profiles live: opaque rows by key, and what has to change together with them.

    claim  ─▶ who owns which partitions, of a group at a time; refused to an owner of an earlier epoch
    fetch  ─▶ rows in one MGET a group
    write  ─▶ a group's rows, sequences, ids and sums in one script, if the writer still owns its partitions, and the
              store still holds what the writer wrote before

`redis_keys` says where everything is, `redis_scripts` what runs as one step.

Every call waits for `timeout_s` at most and is not repeated here: whoever wrote something cannot know what became of it
when no answer came. The next call connects anew. Errors:

StoreFault
├── StoreAway      no answer in time, no connection, or one that is loading, a replica, or refuses the password
├── StoreFull      no memory left for a write; this one changed nothing
├── Fenced         the partitions have another owner
├── StoreEmptied   nothing is known of the owner: the store was emptied, or came back without its data
└── StoreBehind    the last writes are gone: a replica took over that did not have them
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import hiredis
import redis.asyncio
import redis.exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from profile_service.errors import StartupError
from profile_service.storage import redis_scripts
from profile_service.storage.redis_keys import Keys

SCHEMES = ("redis", "rediss")
DEFAULT_PREFIX = "profiles"
TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0
CONNECTIONS = 32
UNFINISHED = "unfinished"
"""Field of the meta of a store that is being filled from elsewhere."""
FORMAT = 1
"""Version of what is stored, but for rows, which say theirs themselves."""
LEASE_MS = 5_000
"""A service that does not renew its lease for so long has gone."""
SCAN_KEYS = 1_000

Answer = TypeVar("Answer")


class StoreFault(Exception):
    """Base of what can go wrong with the store; `message` is for people."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class StoreAway(StoreFault, OSError):
    """It does not answer as it should. What was sent to it may have been done."""


class StoreFull(StoreFault):
    """It has no memory left; nothing was written."""


class Fenced(StoreFault):
    """The partitions have another owner; nothing was written."""


class StoreEmptied(StoreFault):
    """It does not know the owner any more; nothing was written."""


class StoreBehind(StoreFault):
    """It has lost writes that it had answered; nothing was written."""


@dataclass(frozen=True)
class StoreUrl:
    """`redis://[[user]:password@]host[:port][/db][?prefix=NAME&cluster=true]`, `rediss://` for TLS; further options are
    those of redis-py's `from_url`, as `ssl_ca_certs`.

    >>> StoreUrl.parse("redis://:secret@cache:6379/2?prefix=shop").shown
    'redis://cache:6379/2?prefix=shop'
    """

    url: str
    """As redis-py takes it."""
    prefix: str
    cluster: bool
    shown: str
    """Without the password."""

    @classmethod
    def parse(cls, url: str) -> StoreUrl:
        """Raises StartupError where it cannot be one."""
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        host = parts.netloc.rpartition("@")[2]
        said = urlencode({name: value for name, value in options.items() if "password" not in name})
        shown = f"{parts.scheme}://{host}{parts.path}{'?' if said else ''}{said}"
        prefix = options.pop("prefix", DEFAULT_PREFIX)
        cluster = options.pop("cluster", "false")
        faults = []
        if parts.scheme not in SCHEMES:
            faults.append("it must be local, or begin with redis:// or rediss://")
        if not host:
            faults.append("it names no host")
        if not prefix or set("{}") & set(prefix):
            faults.append("the prefix must not be empty, and have no braces")
        if cluster not in ("true", "false"):
            faults.append("cluster must be true or false")
        try:
            _ = parts.port
        except ValueError as error:
            faults.append(str(error))
        if faults:
            raise StartupError(f"--store {shown}: {'; '.join(faults)}")
        whole = urlunsplit((parts.scheme, parts.netloc, parts.path, urlencode(options), ""))
        return cls(whole, prefix, cluster == "true", shown)


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
        self._timeout_s = timeout_s
        self._redis = _client(url, timeout_s)
        self._known: dict[str, str] = {}
        """Scripts that the server has, or had, and their SHA-1."""

    async def close(self) -> None:
        """Ends its connections."""
        await self._redis.aclose()

    def for_partitions(self, partition_bits: int) -> None:
        """From now on the keys are those of a store with so many partitions."""
        self.keys = Keys(self.url.prefix, partition_bits)

    # --- what a store is ---

    async def read_meta(self) -> Meta | None:
        """None for a store that was never used. Raises StartupError for one of a later format."""
        found = {key.decode(): value.decode() for key, value in (await self._call("HGETALL", self.keys.meta)).items()}
        if not found:
            return None
        if UNFINISHED in found:
            raise StartupError(
                f"{self.url.shown}: a migration into it was interrupted: run `profile-service migrate` again, or give "
                "another prefix"
            )
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
        made = await self._call("HSETNX", self.keys.meta, "id", meta.store_id)
        if made:
            await self._call("HSET", self.keys.meta, "format", FORMAT, "partition_bits", meta.partition_bits)
            for fingerprint, text in meta.schemas.items():
                await self.add_schema(fingerprint, text, meta.layouts[fingerprint])
        return bool(made)

    async def begin_import(self, meta: Meta) -> None:
        """Makes a store that nobody may use before `finish_import`. Raises StartupError where there is one."""
        held = await self._call("HGETALL", self.keys.meta)
        if held and UNFINISHED.encode() not in held:
            raise StartupError(f"{self.url.shown} holds profiles already; give another prefix, or remove its keys")
        await self._call("HSET", self.keys.meta, UNFINISHED, 1, "id", meta.store_id, "format", FORMAT)
        await self._call("HSET", self.keys.meta, "partition_bits", meta.partition_bits)
        for fingerprint, text in meta.schemas.items():
            await self.add_schema(fingerprint, text, meta.layouts[fingerprint])
        # Of an import that was interrupted; rows are written over.
        keys = Keys(self.url.prefix, meta.partition_bits)
        for group in range(keys.groups):
            for name in ("counters", "requests"):
                await self._call("UNLINK", keys.of_group(group, name))
        await self._call("UNLINK", keys.carried_event_ids)

    async def finish_import(self) -> None:
        """From now on it may be used."""
        await self._call("HDEL", self.keys.meta, UNFINISHED)

    async def put_sums(self, group: int, fingerprint: str, segment: int, population: bytes, users: int) -> None:
        """Writes the sums of a segment, and how many users it has made."""
        await self._call("HSET", self.keys.population(group, fingerprint), segment, population)
        await self._call("HSET", self.keys.of_group(group, "counters"), f"users:{segment}", users)

    async def put_producer(self, group: int, producer_id: str, fields: Mapping[str, int], left_ms: int) -> None:
        """Writes what a group knows of a producer, for so long."""
        key = self.keys.producer(group, producer_id)
        await self._call("HSET", key, *(part for item in fields.items() for part in item))
        await self._call("PEXPIRE", key, left_ms)

    async def put_requests(self, group: int, chunk: bytes, count: int) -> None:
        """Appends requests to those of a group."""
        await self._call("RPUSH", self.keys.of_group(group, "requests"), chunk)
        await self._call("HINCRBY", self.keys.of_group(group, "counters"), "requests", count)

    async def put_carried(self, chunk: bytes, left_ms: int) -> None:
        """Appends event ids that every owner is to know, for so long."""
        await self._call("RPUSH", self.keys.carried_event_ids, chunk)
        await self._call("PEXPIRE", self.keys.carried_event_ids, left_ms)

    async def carried(self) -> list[bytes]:
        """The event ids that every owner is to know, in chunks."""
        chunks: list[bytes] = await self._call("LRANGE", self.keys.carried_event_ids, 0, -1)
        return chunks

    async def add_schema(self, fingerprint: str, text: str, layout: str) -> None:
        """From now on rows may be of this schema, too."""
        await self._call("HSET", self.keys.meta, f"schema:{fingerprint}", text, f"layout:{fingerprint}", layout)

    async def drop_schema(self, fingerprint: str) -> None:
        """No row is of this schema any more."""
        await self._call("HDEL", self.keys.meta, f"schema:{fingerprint}", f"layout:{fingerprint}")

    async def epoch(self) -> int:
        """The highest epoch that was given out, or that an owner has."""
        held = int(await self._call("GET", self.keys.epoch) or 0)
        for owners in await asyncio.gather(*(self.owners(group) for group in range(self.keys.groups))):
            held = max([held, *(int(owner.partition(":")[0]) for owner in owners.values())])
        return held

    async def raise_epoch(self, epoch: int) -> None:
        """Notes that this epoch was given out."""
        await self._run(redis_scripts.RAISE_EPOCH, [self.keys.epoch], [epoch])

    async def owners(self, group: int) -> dict[int, str]:
        """epoch:token of each partition's owner."""
        found = await self._call("HGETALL", self.keys.of_group(group, "owners"))
        return {int(key): value.decode() for key, value in found.items() if key.isdigit()}

    async def take_lease(self, who: str) -> str | None:
        """Takes or renews the lease for LEASE_MS; returns who else has it, None where it is ours."""
        held = await self._run(redis_scripts.LEASE, [self.keys.lease], [who, LEASE_MS])
        return None if held is None else held.decode()

    async def release_lease(self, who: str) -> None:
        """Gives the lease back, if it is ours."""
        await self._run(redis_scripts.RELEASE, [self.keys.lease], [who])

    async def probe(self) -> None:
        """Returns where it takes writes. Raises StoreFull or StoreAway."""
        await self._call("SET", self.keys.epoch + b":probe", "1", "PX", 1)

    async def sync_mode(self) -> str:
        """When what it answers is on its disk, as far as it tells: its `appendfsync`, or "none"."""
        try:
            found = await self._call("CONFIG", "GET", "append*")
        except StoreFault:
            # Hosted ones do not tell.
            return "unknown"
        held = {_text(key): _text(value) for key, value in found.items()}
        return held.get("appendfsync", "unknown") if held.get("appendonly") == "yes" else "none"

    # --- what it holds ---

    async def claim(self, group: int, partitions: Sequence[int], segment: int, owner: str) -> None:
        """Makes `owner`, epoch:token, the owner of these partitions of a group. Raises Fenced."""
        epoch, _, token = owner.partition(":")
        answer = await self._run(
            redis_scripts.CLAIM, [self.keys.of_group(group, "owners")], [epoch, token, segment, *partitions]
        )
        if answer[0] == b"STALE":
            raise Fenced(f"the partitions have an owner of epoch {_text(answer[1])}, this one is of epoch {epoch}")

    async def written(self, group: int, segment: int) -> tuple[str, int]:
        """Who owns the segment, epoch:token, and how many writes the store has seen of them; "" and 0 for nobody."""
        owner, writes = await self._call("HMGET", self.keys.of_group(group, "owners"), segment, f"writes:{segment}")
        return _text(owner or b""), int(writes or 0)

    async def read_group(self, group: int, fingerprint: str) -> GroupState:
        """What a group holds beside rows and producers."""
        counters, population, requests, event_ids = await asyncio.gather(
            self._call("HGETALL", self.keys.of_group(group, "counters")),
            self.read_population(group, fingerprint),
            self._call("LRANGE", self.keys.of_group(group, "requests"), 0, -1),
            self._call("LRANGE", self.keys.of_group(group, "event-ids"), 0, -1),
        )
        users = {
            int(name.partition(b":")[2]): int(value) for name, value in counters.items() if name.startswith(b"users:")
        }
        return GroupState(population, users, requests, event_ids)

    async def read_population(self, group: int, fingerprint: str) -> dict[int, bytes]:
        """The sums of a group, by segment."""
        found = await self._call("HGETALL", self.keys.population(group, fingerprint))
        return {int(segment): packed for segment, packed in found.items()}

    async def read_producers(self, group: int, producer_ids: Sequence[str]) -> list[dict[str, int]]:
        """What a group knows of each producer, by field; empty for one that it does not know."""
        answers = await asyncio.gather(
            *(self._call("HGETALL", self.keys.producer(group, producer_id)) for producer_id in producer_ids)
        )
        return [{_text(name): int(value) for name, value in found.items()} for found in answers]

    async def fetch(self, group: int, fingerprint: str, user_ids: Sequence[bytes]) -> list[bytes | None]:
        """The rows of users of a group, in their order; None for users who have none."""
        before = self.keys.rows(group, fingerprint)
        found: list[bytes | None] = await self._call("MGET", *[before + user_id for user_id in user_ids])
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
        match await self._run(redis_scripts.WRITE, named, arguments):
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
        return self._scan_all(self.keys.rows(group, fingerprint))

    async def scan_producers(self, group: int) -> AsyncIterator[list[str]]:
        """The ids of all producers that a group knows, in pieces; one may come twice."""
        async for found in self._scan_all(self.keys.producer(group, "")):
            yield [producer_id.decode() for producer_id in found]

    async def _scan_all(self, before: bytes) -> AsyncIterator[list[bytes]]:
        """What follows in all keys that begin so."""
        pattern = (
            before.replace(b"\\", b"\\\\").replace(b"*", b"\\*").replace(b"?", b"\\?").replace(b"[", b"\\[") + b"*"
        )
        cursor = 0
        while True:
            cursor, found = await self._scan(cursor, pattern, before)
            if found:
                yield [key[len(before) :] for key in found]
            if not cursor:
                return

    async def put_rows(
        self, group: int, fingerprint: str, user_ids: Sequence[bytes], rows: Sequence[bytes], left_ms: Sequence[int]
    ) -> None:
        """Writes rows that nobody else writes meanwhile, each with the time that it has left; 0 for ever."""
        before = self.keys.rows(group, fingerprint)
        pipe = self._redis.pipeline(transaction=False)
        for user_id, row, left in zip(user_ids, rows, left_ms, strict=True):
            pipe.set(before + user_id, row, px=left or None)
        await self._guard(pipe.execute())

    async def times_left(self, group: int, fingerprint: str, user_ids: Sequence[bytes]) -> list[int]:
        """Milliseconds that rows have left; 0 for ever, or for a row that is not there."""
        before = self.keys.rows(group, fingerprint)
        pipe = self._redis.pipeline(transaction=False)
        for user_id in user_ids:
            pipe.pttl(before + user_id)
        return [max(0, left) for left in await self._guard(pipe.execute())]

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
        pipe = self._redis.pipeline(transaction=True)
        for user_id, row, left in zip(user_ids, rows, left_ms, strict=True):
            pipe.set(after + user_id, row, px=left or None)
            # A cluster's pipeline has an `unlink` of its own, which is not part of it.
            pipe.execute_command("UNLINK", before + user_id)
        await self._guard(pipe.execute())

    async def move_population(self, group: int, old: str, new: str, sums: Mapping[int, bytes]) -> None:
        """Puts sums of another schema in the place of a group's, all of them or none."""
        if sums:
            pipe = self._redis.pipeline(transaction=True)
            pipe.hset(self.keys.population(group, new), mapping=dict(sums))
            pipe.execute_command("UNLINK", self.keys.population(group, old))
            await self._guard(pipe.execute())

    async def drop_rows(self, group: int, fingerprint: str, user_ids: Sequence[bytes]) -> None:
        """Removes rows."""
        before = self.keys.rows(group, fingerprint)
        await self._call("UNLINK", *[before + user_id for user_id in user_ids])

    # --- how it is asked ---

    async def _scan(self, cursor: int, pattern: bytes, key: bytes) -> tuple[int, list[bytes]]:
        """A piece of the keys on the node that has this one."""
        where = {"target_nodes": self._redis.get_node_from_key(_text(key))} if self.url.cluster else {}
        command = ("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_KEYS)
        following, found = await self._guard(self._redis.execute_command(*command, **where))
        # A cluster's client says it by node.
        return int(next(iter(following.values())) if isinstance(following, dict) else following), found

    async def _call(self, *command: Any) -> Any:
        return await self._guard(self._redis.execute_command(*command))

    async def _run(self, script: str, keys: Sequence[bytes], arguments: Sequence[Any]) -> Any:
        """One script, as one step; the text itself is sent where it is not known yet."""
        if script in self._known:
            try:
                return await self._call("EVALSHA", self._known[script], len(keys), *keys, *arguments)
            except _UnknownScript:
                pass
        self._known[script] = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
        return await self._call("EVAL", script, len(keys), *keys, *arguments)

    async def _guard(self, answer: Awaitable[Answer]) -> Answer:
        """The answer, in time; the library's errors become ours."""
        try:
            # The library's own limit is for each piece of an answer.
            async with asyncio.timeout(self._timeout_s + CONNECT_TIMEOUT_S):
                return await answer
        except (TimeoutError, redis.exceptions.TimeoutError):
            raise StoreAway(f"{self.url.shown} does not answer within {self._timeout_s:g} s") from None
        except redis.exceptions.NoScriptError:
            raise _UnknownScript("unknown script") from None
        except redis.exceptions.ResponseError as error:
            text = str(error)
            if isinstance(error, redis.exceptions.OutOfMemoryError) or "OOM " in text:
                raise StoreFull(f"{self.url.shown} has no memory left (maxmemory)") from None
            raise StoreAway(f"{self.url.shown} refuses: {text}") from None
        except (redis.exceptions.RedisError, OSError) as error:
            raise StoreAway(f"{self.url.shown} cannot be reached: {error}") from None


class _Packing(redis.asyncio.Connection):
    """Commands of thousands of arguments are put together by hiredis, in a tenth of the time."""

    def pack_command(self, *args: Any) -> list[bytes]:
        return [hiredis.pack_command(args)]


class _PackingTls(redis.asyncio.SSLConnection):
    """The same over TLS."""

    def pack_command(self, *args: Any) -> list[bytes]:
        return [hiredis.pack_command(args)]


class _UnknownScript(StoreFault):
    """The server was started anew."""


def _client(url: StoreUrl, timeout_s: float) -> Any:
    """A client that tries nothing twice: whoever asks knows what may be asked again."""
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_keepalive": True,
        "retry": Retry(NoBackoff(), 0),
    }
    if url.cluster:
        return redis.asyncio.RedisCluster.from_url(url.url, max_connections=CONNECTIONS, **options)
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url.url, max_connections=CONNECTIONS, timeout=timeout_s, **options
    )
    pool.connection_class = _PackingTls if pool.connection_class is redis.asyncio.SSLConnection else _Packing
    return redis.asyncio.Redis.from_pool(pool)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
