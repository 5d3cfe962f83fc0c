"""All that a service knows, from a data directory to a store or back, while no service runs on either.

    directory ─▶ each shard is recovered ─▶ packed rows, sums, producers, requests, event ids ─▶ store
    store ─▶ each shard's share is put into an empty state ─▶ a snapshot of it ─▶ directory

The source is tallied as it is sent: users, events, and a digest over every user's id and packed row, in whatever order.
Afterwards the target is read anew, as whoever starts on it would read it, and its tally has to be the same. What makes
events count once is in neither tally. In a store rows expire meanwhile: those whose time comes before both are read are
left out of both, each by what its own bytes say.

A target is marked as unfinished until that is done. One that was interrupted is begun again: what is left of it is
removed first.
"""

from __future__ import annotations

import asyncio
import shutil
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from profile_service.clock import system_clock
from profile_service.cluster.memory import stored_ownership
from profile_service.cluster.ownership import Ownership
from profile_service.cluster.store_lease import StoreLease
from profile_service.config import Capacity
from profile_service.domain.decay import NS
from profile_service.domain.index import ByteIndex
from profile_service.domain.layout import LAST_RECEIVED, Layout
from profile_service.domain.packing import HEAD_BYTES, Packing, pack_rows
from profile_service.domain.population import PopulationRow
from profile_service.domain.schema import Schema, parse_schema
from profile_service.errors import DataLoss, StartupError
from profile_service.shard.dedupe import NO_PARTITION, EventIds
from profile_service.shard.recovery import Recovered, recover
from profile_service.shard.run_writes import ACKNOWLEDGED, USED
from profile_service.shard.snapshotter import Snapshotter
from profile_service.shard.state import ShardState
from profile_service.shard.store_records import decode_requests, encode_event_ids, encode_requests, merged_event_ids
from profile_service.shard.stored_schema import load_packed, meta_of, stored_rows
from profile_service.storage.data_directory import DataDirectory, Holder, Manifest
from profile_service.storage.fs import LockHeld, RealFileSystem
from profile_service.storage.redis_client import StoreFault, StoreUrl
from profile_service.storage.redis_store import RedisStore
from profile_service.storage.wal import LogOptions

STEP_ROWS = 4_096
EVENT_IDS_A_CHUNK = 1 << 14
REQUESTS_A_CHUNK = 1 << 12
UNFINISHED_SUFFIX = ".migrating"
TIMEOUT_S = 60.0
"""How long the store may take for an answer: nobody waits behind it, and to give up costs all that was sent."""

EXPIRY_STEP_NS = 60 * NS
"""Rows are tallied by when they expire, in steps of this: a few ten thousand of them for a TTL of weeks."""
FOR_EVER = 1 << 62
"""The step of rows that do not expire."""

Progress = Callable[[str, int, int], None]
"""Hears what is being done, to how many (users, or keys that are removed), and how many there are; 0 where that is not
known."""


@dataclass(frozen=True)
class Tally:
    """What both sides have to hold alike."""

    users: int = 0
    events: int = 0
    digest: int = 0
    """The sum of the hashes of every user's id and packed row: their order does not matter."""
    expiring: int = field(default=0, compare=False)
    """Users beside these, whose time is up about now."""

    def __str__(self) -> str:
        left_out = f", and {self.expiring:,} whose time is up" if self.expiring else ""
        return f"{self.users:,} users, {self.events:,} events, digest {self.digest:016x}{left_out}"


class Tallying:
    """What one side holds, by when it expires: what is to be left out is known only when both sides are read."""

    def __init__(self, schema: Schema) -> None:
        self.users = 0
        self.events = 0
        self._ttl_ns = _ttl_ns(schema)
        self._heard_at = HEAD_BYTES + 8 * (Layout.compile(schema).counts["f8"] + LAST_RECEIVED)
        self._steps: dict[int, tuple[int, int]] = {}
        """Users and sum of hashes, by step."""

    def add(self, user_ids: Sequence[bytes], rows: Sequence[bytes]) -> None:
        """Takes in some packed rows."""
        self.users += len(rows)
        for user_id, row in zip(user_ids, rows, strict=True):
            step = FOR_EVER if self._ttl_ns is None else self._expiry_ns(row) // EXPIRY_STEP_NS
            users, digest = self._steps.get(step, (0, 0))
            self._steps[step] = users + 1, digest + xxhash.xxh64_intdigest(row, xxhash.xxh32_intdigest(user_id))

    def _expiry_ns(self, row: bytes) -> int:
        (heard_ns,) = struct.unpack_from("<q", row, self._heard_at)
        return int(heard_ns) + (self._ttl_ns or 0)

    def whole(self) -> Tally:
        """Of every row."""
        return self._since(0)

    def lasting(self, now_ns: int) -> Tally:
        """Of the rows that were in a store all the time until now. A step more is left out: the store's clock may have
        been set meanwhile."""
        return self._since(now_ns // EXPIRY_STEP_NS + 2)

    def _since(self, first: int) -> Tally:
        kept = [held for step, held in self._steps.items() if step >= first]
        users, digest = sum(held[0] for held in kept), sum(held[1] for held in kept)
        return Tally(users, self.events, digest % (1 << 64), self.users - users)


async def to_store(path: Path, url: StoreUrl, progress: Progress) -> Tally:
    """Takes all of a data directory into a store that is empty.

    Raises:
        StartupError: one of the two is in use, or the store is not empty.
        DataLoss: the directory is damaged, or what has arrived is not what was sent.
    """
    directory = _open(path)
    store = RedisStore(url, timeout_s=TIMEOUT_S)
    try:
        lease = await _take_lease(store)
        try:
            schema = _schema_of(directory)
            meta = meta_of(schema, directory.manifest.partition_bits)
            await store.begin_import(
                meta, lambda keys: progress("removing keys of the attempt that was interrupted", keys, 0)
            )
            store.for_partitions(meta.partition_bits)
            sent = Tallying(schema)
            ownership = _settled_ownership(directory)
            for shard_id in ownership.shard_ids:
                async with _recovered(directory, shard_id, schema) as recovered:
                    owned = ownership.owned_by(shard_id)
                    await _send_rows(store, schema, recovered.state, sent, progress)
                    await _send_rest(store, schema, recovered.state, owned)
                    sent.events += recovered.state.event_count
            await store.raise_epoch(directory.epoch())
            arrived = await _tally_store(store, schema, sent.users, progress)
            read_ns = system_clock()
            compared = _compare(sent.lasting(read_ns), arrived.lasting(read_ns))
            await store.finish_import()
        finally:
            lease.release()
    except StoreFault as fault:
        raise StartupError(fault.message) from None
    finally:
        directory.release()
        await store.close()
    return compared


async def to_directory(url: StoreUrl, path: Path, shards: int, progress: Progress) -> Tally:
    """Takes all of a store into a data directory that is not there yet.

    Raises as `to_store` does.
    """
    if await asyncio.to_thread(path.exists):
        raise StartupError(f"{path} is there already; name a directory that is not")
    unfinished = path.with_name(path.name + UNFINISHED_SUFFIX)
    await asyncio.to_thread(shutil.rmtree, unfinished, ignore_errors=True)
    store = RedisStore(url, timeout_s=TIMEOUT_S)
    try:
        lease = await _take_lease(store)
        try:
            meta = await store.read_meta()
            if meta is None:
                raise StartupError(f"{url.shown} holds nothing")
            if len(meta.schemas) != 1:
                raise StartupError(f"{url.shown} is being brought to another schema: start the service on it first")
            store.for_partitions(meta.partition_bits)
            (text,) = meta.schemas.values()
            schema = parse_schema(text, "the store's schema")
            manifest = Manifest.new(meta.partition_bits, shards)
            directory = DataDirectory.open(RealFileSystem(), unfinished.absolute(), manifest)
            try:
                directory.write_schema(text)
                directory.write_epoch(await store.epoch())
                read = Tallying(schema)
                known = await _read_known(store, schema)
                for shard_id in range(shards):
                    async with _recovered(directory, shard_id, schema) as recovered:
                        owned = Ownership.even(manifest.partition_bits, shards).owned_by(shard_id)
                        await _fill(recovered.state, store, schema, known, owned, read, progress)
                        read.events += recovered.state.event_count
                        await _snapshot(recovered)
                # Files forget nobody while no service runs on them.
                written = await _tally_directory(directory, schema, read.users, progress)
                compared = _compare(read.whole(), written.whole())
            finally:
                directory.release()
            await asyncio.to_thread(unfinished.rename, path)
        finally:
            lease.release()
    except StoreFault as fault:
        raise StartupError(fault.message) from None
    finally:
        await store.close()
    return compared


def _open(path: Path) -> DataDirectory:
    try:
        return DataDirectory.open_existing(RealFileSystem(), path.absolute())
    except LockHeld as held:
        raise StartupError(f"{path} is in use by {Holder.describe(held.holder)}; stop that service first") from None
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}") from None


async def _take_lease(store: RedisStore) -> StoreLease:
    lease = StoreLease(store.url)
    await lease.take(store, lambda message: None, lambda: False)
    return lease


def _schema_of(directory: DataDirectory) -> Schema:
    text = directory.schema_text()
    if text is None:
        raise StartupError(f"{directory.path} was never served")
    return parse_schema(text, f"the schema of {directory.path}")


def _settled_ownership(directory: DataDirectory) -> Ownership:
    """Who owns what. Raises StartupError where a change of it was begun and has not ended."""
    ownership = stored_ownership(RealFileSystem(), directory.path, directory.manifest)
    idle = set(ownership.shard_ids) - set(ownership.owners)
    if ownership.leftovers or ownership.retiring or idle:
        raise StartupError(
            f"{directory.path}: a change of owners was begun and has not ended; start the service, and `scale` it"
        )
    return ownership


class _recovered:  # noqa: N801  used as a function
    """A shard's state while a `with` lasts; its files are closed afterwards."""

    def __init__(self, directory: DataDirectory, shard_id: int, schema: Schema) -> None:
        self._recovering = recover(
            RealFileSystem(),
            directory.shard_directory(shard_id),
            schema,
            identity=directory.manifest.identity(shard_id),
            holder=Holder.this_process().encode(),
            reset_features=(),
            partition_bits=directory.manifest.partition_bits,
            capacity=Capacity(),
            options=LogOptions(),
            run=_in_thread,
            run_snapshots=_in_thread,
        )

    async def __aenter__(self) -> Recovered:
        self._held = await self._recovering
        return self._held

    async def __aexit__(self, *_: object) -> None:
        await self._held.log.close()
        self._held.lock.release()


async def _in_thread(work: Callable[[], Any], /) -> Any:
    return await asyncio.to_thread(work)


# --- into the store ---


def _packed(schema: Schema, state: ShardState) -> Iterator[tuple[list[bytes], list[bytes], NDArray[np.int64]]]:
    """All users of a state, some at a time: ids, packed rows, and when each was last heard of (ns since 1970)."""
    table = state.table
    packing = Packing.of(table.layout)
    numbers = table.users.numbers()
    for start in range(0, len(numbers), STEP_ROWS):
        chosen = np.ascontiguousarray(numbers[start : start + STEP_ROWS])
        heard = table.layout.views_of(table.rows[chosen]).i8[:, LAST_RECEIVED].copy()
        ids = [table.users.bytes_of(number) for number in chosen.tolist()]
        yield ids, pack_rows(packing, table.rows, chosen, table.texts), heard


async def _send_rows(store: RedisStore, schema: Schema, state: ShardState, sent: Tallying, progress: Progress) -> None:
    total, ttl_ns = sent.users + len(state.table), _ttl_ns(schema)
    for ids, rows, heard_ns in _packed(schema, state):
        left = np.zeros(len(ids), np.int64)
        kept = np.ones(len(ids), np.bool_)
        if ttl_ns is not None:
            # Rounded up: a row is there until its time has come, whenever it is sent.
            left = -((system_clock() - ttl_ns - heard_ns) // 1_000_000)
            kept = left > 0
        places = np.flatnonzero(kept).tolist()
        by_group: dict[int, list[int]] = {}
        for place in places:
            by_group.setdefault(_group_of(store, ids[place]), []).append(place)
        await asyncio.gather(
            *(
                store.put_rows(
                    group,
                    schema.fingerprint,
                    [ids[place] for place in some],
                    [rows[place] for place in some],
                    [int(left[place]) for place in some],
                )
                for group, some in by_group.items()
            )
        )
        sent.add([ids[place] for place in places], [rows[place] for place in places])
        progress("sending users", sent.users, total)


async def _send_rest(store: RedisStore, schema: Schema, state: ShardState, owned: Sequence[int]) -> None:
    """What a shard knows beside its rows. Its sums go under its lowest partition, whoever owns that next."""
    capacity, keys, now_s = Capacity(), store.keys, system_clock() // NS
    population, segment = state.table.population, owned[0]
    await store.put_sums(
        keys.group_of(segment), schema.fingerprint, segment, population.pack(state.table.texts), len(state.table)
    )
    groups = {group: [p for p in owned if keys.group_of(p) == group] for group in {keys.group_of(p) for p in owned}}
    for producer in state.producers.producers(0, state.producers.places):
        left_ms = (producer.used_ns - system_clock()) // 1_000_000 + int(capacity.producer_window_s * 1000)
        for group, mine in groups.items():
            fields = {str(p): int(producer.last[p]) for p in mine if producer.last[p]}
            fields |= {ACKNOWLEDGED: producer.acknowledged, USED: producer.used_ns}
            await store.put_producer(group, producer.producer_id, fields, max(1, left_ms))
    requests = state.producers.requests(*state.producers.requests_held)
    for group, mine in groups.items():
        reached = [(r.request_id, [p for p in mine if r.reached >> p & 1], r.used_ns) for r in requests]
        reached = [request for request in reached if request[1]]
        for start in range(0, len(reached), REQUESTS_A_CHUNK):
            some = reached[start : start + REQUESTS_A_CHUNK]
            await store.put_requests(group, encode_requests(some), len(some))
    first, last = state.event_ids.held
    for start in range(first, last, EVENT_IDS_A_CHUNK):
        copied, times, _ = state.event_ids.copy(start, min(start + EVENT_IDS_A_CHUNK, last))
        oldest = now_s - int(capacity.event_id_window_s)
        if len(copied) and int(times[-1]) // NS > oldest:
            # Whose they are their keys do not tell: every owner takes all of them, until they are forgotten.
            await store.put_carried(encode_event_ids(copied, times), int(capacity.event_id_window_s * 1000))


async def _tally_store(store: RedisStore, schema: Schema, users: int, progress: Progress) -> Tallying:
    tally = Tallying(schema)
    for group in range(store.keys.groups):
        async for ids, rows in _rows_once(store, schema, group):
            tally.add(ids, rows)
            progress("checking users", tally.users, users)
        for packed in (await store.read_population(group, schema.fingerprint)).values():
            tally.events += _events_of(schema, packed)
    return tally


async def _rows_once(store: RedisStore, schema: Schema, group: int) -> AsyncIterator[tuple[list[bytes], list[bytes]]]:
    """All users of a group and their rows, in pieces. A scan may name one again much later, when keys go meanwhile."""
    seen: set[bytes] = set()
    async for piece in stored_rows(store, schema, group):
        new = [place for place, user_id in enumerate(piece.user_ids) if user_id not in seen]
        seen.update(piece.user_ids)
        yield [piece.user_ids[place] for place in new], [piece.rows[place] for place in new]


# --- into a directory ---


@dataclass
class _Known:
    """What a store knows beside rows, whatever its partition."""

    producers: list[tuple[str, NDArray[np.int64], int, int]]
    requests: list[tuple[str, NDArray[np.int64], int]]
    event_ids: tuple[NDArray[np.uint64], NDArray[np.int64]]
    population: dict[int, bytes]
    """By segment."""


async def _read_known(store: RedisStore, schema: Schema) -> _Known:
    chunks = await store.carried()
    population: dict[int, bytes] = {}
    requests: list[tuple[str, NDArray[np.int64], int]] = []
    found: dict[str, dict[str, int]] = {}
    for group in range(store.keys.groups):
        state = await store.read_group(group, schema.fingerprint)
        population |= state.population
        chunks += state.event_ids
        requests += [request for chunk in state.requests for request in decode_requests(chunk)]
        async for producer_ids in store.scan_producers(group):
            answers = await store.read_producers(group, producer_ids)
            for producer_id, fields in zip(producer_ids, answers, strict=True):
                held = found.setdefault(producer_id, {})
                for name, value in fields.items():
                    held[name] = max(value, held.get(name, 0))
    producers = []
    for producer_id, fields in found.items():
        last = np.zeros(1 << store.keys.partition_bits, np.int64)
        for name, value in fields.items():
            if name.isdigit():
                last[int(name)] = value
        producers.append((producer_id, last, fields.get(ACKNOWLEDGED, 0), fields.get(USED, 0)))
    requests.sort(key=lambda request: request[2])
    return _Known(producers, requests, merged_event_ids(chunks), population)


async def _fill(
    state: ShardState,
    store: RedisStore,
    schema: Schema,
    known: _Known,
    owned: Sequence[int],
    read: Tallying,
    progress: Progress,
) -> None:
    """Puts a shard's share into its empty state."""
    mine = set(owned)
    for group in sorted({store.keys.group_of(p) for p in owned}):
        async for found_ids, found_rows in _rows_once(store, schema, group):
            places = [n for n, user_id in enumerate(found_ids) if _partition_of(store, user_id) in mine]
            ids, rows = [found_ids[n] for n in places], [found_rows[n] for n in places]
            load_packed(state.table, ids, rows)
            read.add(ids, rows)
            progress("reading users", read.users, 0)
    for segment, packed in known.population.items():
        if segment in mine:
            part = PopulationRow(schema)
            part.unpack(packed, state.table.texts)
            state.table.population.add(part)
    state.event_count = state.table.population.event_count
    state.producers.load_producers(known.producers)
    for request_id, partitions, when in known.requests:
        state.producers.note(request_id, 0, 0, partitions, when)
    state.producers.finish_load()
    keys, times = known.event_ids
    # Whose they are their keys do not tell.
    state.event_ids.load(EventIds(keys, times, np.full(len(keys), NO_PARTITION, np.int32)))


async def _snapshot(recovered: Recovered) -> None:
    """Writes a snapshot of the state, in which alone it is."""
    snapshotter = Snapshotter(
        recovered.snapshots,
        recovered.state,
        recovered.log,
        clock=system_clock,
        last=recovered.snapshot,
        log_bytes=1 << 60,
        interval_s=1e9,
    )
    ready = asyncio.Event()
    snapshotter.on_ready(ready.set)
    published = asyncio.ensure_future(snapshotter.request())
    published.add_done_callback(lambda _: ready.set())
    while not published.done():
        if not await snapshotter.step():
            await ready.wait()
            ready.clear()
        await asyncio.sleep(0)
    await published
    await snapshotter.close()


async def _tally_directory(directory: DataDirectory, schema: Schema, users: int, progress: Progress) -> Tallying:
    tally = Tallying(schema)
    for shard_id in directory.shard_ids():
        async with _recovered(directory, shard_id, schema) as recovered:
            for ids, rows, _ in _packed(schema, recovered.state):
                tally.add(ids, rows)
                progress("checking users", tally.users, users)
            tally.events += recovered.state.event_count
    return tally


def _compare(sent: Tally, arrived: Tally) -> Tally:
    if sent != arrived:
        raise DataLoss(f"what has arrived ({arrived}) is not what was sent ({sent}); the target is not to be used")
    return sent


def _ttl_ns(schema: Schema) -> int | None:
    return None if schema.ttl_s is None else int(schema.ttl_s * NS)


def _events_of(schema: Schema, packed: bytes) -> int:
    row = PopulationRow(schema)
    row.unpack(packed, ByteIndex(1 << 16, 1 << 24))
    return row.event_count


def _partition_of(store: RedisStore, user_id: bytes) -> int:
    return int(xxhash.xxh64_intdigest(user_id) >> (64 - store.keys.partition_bits))


def _group_of(store: RedisStore, user_id: bytes) -> int:
    return store.keys.group_of(_partition_of(store, user_id))
