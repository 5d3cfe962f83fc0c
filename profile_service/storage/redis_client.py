"""A client of Redis or Valkey, of one server or of a cluster: where it is, what can go wrong with it, and how it is
asked.

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
import functools
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import hiredis
import redis.asyncio
import redis.exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from profile_service.errors import StartupError

SCHEMES = ("redis", "rediss")
DEFAULT_PREFIX = "profiles"
TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0
CONNECTIONS = 32
"""To a server; so many requests are under way at a time, the others wait in line."""
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


class RedisClient:
    """Connections to one store, on one event loop. Every method raises StoreFault."""

    def __init__(self, url: StoreUrl, timeout_s: float) -> None:
        self._is_cluster = url.cluster
        self._shown = url.shown
        self._timeout_s = timeout_s
        self._redis = _connections(url, timeout_s)
        # A server's pool lets requests wait for a connection; a node's of a cluster would refuse them at once.
        self._line: AbstractAsyncContextManager[None] = asyncio.Semaphore(CONNECTIONS) if url.cluster else nullcontext()
        self._known: dict[str, str] = {}
        """Scripts that the server has, or had, and their SHA-1."""

    async def close(self) -> None:
        """Ends the connections."""
        await self._redis.aclose()

    async def call(self, *command: Any) -> Any:
        """One command."""
        return await self._guard(lambda: self._redis.execute_command(*command))

    async def pipe(self, commands: Iterable[Sequence[Any]], *, together: bool) -> list[Any]:
        """Several commands, sent at once; `together` all of them are done or none. Their keys are of one hash tag."""

        async def send() -> list[Any]:
            pipe = self._redis.pipeline(transaction=together)
            for command in commands:
                pipe.execute_command(*command)
            answers: list[Any] = await pipe.execute()
            return answers

        return await self._guard(send)

    async def run(self, script: str, keys: Sequence[bytes], arguments: Sequence[Any]) -> Any:
        """One script, as one step; the text itself is sent where it is not known yet."""
        if script in self._known:
            try:
                return await self.call("EVALSHA", self._known[script], len(keys), *keys, *arguments)
            except _UnknownScript:
                pass
        self._known[script] = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
        return await self.call("EVAL", script, len(keys), *keys, *arguments)

    async def scan(self, before: bytes) -> AsyncIterator[list[bytes]]:
        """What follows in all keys that begin so, in pieces; one may come twice."""
        pattern = (
            before.replace(b"\\", b"\\\\").replace(b"*", b"\\*").replace(b"?", b"\\?").replace(b"[", b"\\[") + b"*"
        )
        cursor = 0
        while True:
            following, found = await self._guard(functools.partial(self._scan_some, before, pattern, cursor))
            # A cluster's client says it by node.
            cursor = int(next(iter(following.values())) if isinstance(following, dict) else following)
            if found:
                yield [key[len(before) :] for key in found]
            if not cursor:
                return

    async def _scan_some(self, before: bytes, pattern: bytes, cursor: int) -> Any:
        # The node of a cluster that has them all.
        where = {"target_nodes": self._redis.get_node_from_key(before.decode())} if self._is_cluster else {}
        return await self._redis.execute_command("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_KEYS, **where)

    async def _guard(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer, in time, which begins in the line; the library's errors become ours."""
        try:
            # The library's own limit is for each piece of an answer.
            async with asyncio.timeout(self._timeout_s + CONNECT_TIMEOUT_S), self._line:
                if self._is_cluster:
                    # Before it knows the nodes, redis-py sends what comes to any of them.
                    await self._redis.initialize()
                return await ask()
        except (TimeoutError, redis.exceptions.TimeoutError):
            raise StoreAway(f"{self._shown} does not answer within {self._timeout_s:g} s") from None
        except redis.exceptions.NoScriptError:
            raise _UnknownScript("unknown script") from None
        except redis.exceptions.ResponseError as error:
            text = str(error)
            if isinstance(error, redis.exceptions.OutOfMemoryError) or "OOM " in text:
                raise StoreFull(f"{self._shown} has no memory left (maxmemory)") from None
            raise StoreAway(f"{self._shown} refuses: {text}") from None
        except (redis.exceptions.RedisError, redis.exceptions.RedisClusterException, OSError) as error:
            # The second is no RedisError: of a cluster no node of which answers, or that serves not every slot.
            raise StoreAway(f"{self._shown} cannot be reached: {error}") from None
        except AttributeError as error:
            # When a node fails, redis-py closes connections that others have just taken and then find without a socket.
            if not self._is_cluster:
                raise
            raise StoreAway(f"{self._shown} cannot be reached: a connection was closed ({error})") from None


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


def _connections(url: StoreUrl, timeout_s: float) -> Any:
    """A client that tries nothing twice: whoever asks knows what may be asked again."""
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_keepalive": True,
        "retry": Retry(NoBackoff(), 0),
    }
    if url.cluster:
        return redis.asyncio.RedisCluster.from_url(
            url.url,
            # Of each node. One that is being closed after a fault still counts.
            max_connections=2 * CONNECTIONS,
            # Else each fifth answer that a slot has moved would cut off all requests that are under way.
            reinitialize_steps=0,
            **options,
        )
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url.url, max_connections=CONNECTIONS, timeout=timeout_s, **options
    )
    pool.connection_class = _PackingTls if pool.connection_class is redis.asyncio.SSLConnection else _Packing
    return redis.asyncio.Redis.from_pool(pool)
