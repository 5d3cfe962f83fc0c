"""What a store is made with, and what happens to its rows when the schema changes.

a store that was never used          is made, with the partitions that were asked for
its rows are of this schema          nothing
its rows are of another one          every row is rewritten under the new schema's key, in small steps, while no
                                     service runs: each step leaves a row under one of the two keys, so whoever was
                                     interrupted begins again where it stopped, or goes back
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from profile_service.domain.index import Strings
from profile_service.domain.layout import Layout
from profile_service.domain.migrate import compare, migrate
from profile_service.domain.packing import Packing, pack_rows, unpack_rows
from profile_service.domain.schema import Schema, parse_schema
from profile_service.domain.table import ProfileTable
from profile_service.errors import StartupError
from profile_service.shard.state_blocks import describe_layouts
from profile_service.storage.redis_store import Meta, RedisStore

STEP_USERS = 1_000

Progress = Callable[[str], None]


def meta_of(schema: Schema, partition_bits: int) -> Meta:
    """A new store's."""
    layout = describe_layouts(Layout.compile(schema), Layout.compile(schema, population=True)).decode()
    return Meta(secrets.token_hex(16), partition_bits, {schema.fingerprint: schema.text}, {schema.fingerprint: layout})


async def prepare(
    store: RedisStore,
    schema: Schema,
    *,
    reset_features: Collection[str],
    partition_bits: int,
    progress: Progress = lambda message: None,
) -> Meta:
    """Makes a new store, or brings what is stored to this schema; no service may run on the store. From then on the
    store's keys are known.

    Raises:
        SchemaChangeRefused: rows of the schema before cannot become rows of `schema`; nothing has changed.
        StartupError: the store is of another version.
        StoreFault: it cannot be asked.
    """
    new = meta_of(schema, partition_bits)
    meta = await store.read_meta()
    if meta is None:
        await store.make_meta(new)
        meta = await store.read_meta()
        assert meta is not None
    store.for_partitions(meta.partition_bits)
    check_layout(store, meta, schema)
    others = {
        fingerprint: parse_schema(text, "the store's schema")
        for fingerprint, text in meta.schemas.items()
        if fingerprint != schema.fingerprint
    }
    for old in others.values():
        compare(old, schema, reset_features).raise_faults()
    await store.add_schema(schema.fingerprint, schema.text, new.layouts[schema.fingerprint])
    for fingerprint, old in others.items():
        await _convert(store, old, schema, reset_features, progress)
        await store.drop_schema(fingerprint)
    return Meta(meta.store_id, meta.partition_bits, new.schemas, new.layouts)


def check_layout(store: RedisStore, meta: Meta, schema: Schema) -> None:
    """Raises StartupError where rows of this schema were laid out otherwise than by this version."""
    here = meta_of(schema, meta.partition_bits).layouts[schema.fingerprint]
    if meta.layouts.get(schema.fingerprint, here) != here:
        raise StartupError(
            f"{store.url.shown}: its rows were laid out by a version that does so otherwise; start that version, or "
            "give another prefix: --store redis://…?prefix=NAME"
        )


async def _convert(
    store: RedisStore, old: Schema, new: Schema, reset_features: Collection[str], progress: Progress
) -> None:
    done = 0
    for group in range(store.keys.groups):
        async for piece in stored_rows(store, old, group):
            packed = convert_rows(piece, old, new, reset_features)
            await store.move_rows(group, old.fingerprint, new.fingerprint, piece.user_ids, packed, piece.left_ms)
            done += len(packed)
            progress(f"bringing stored profiles to the changed schema: {done:,} done")
        state = await store.read_group(group, old.fingerprint)
        sums = {
            segment: convert_population(packed, old, new, reset_features)
            for segment, packed in state.population.items()
        }
        await store.move_population(group, old.fingerprint, new.fingerprint, sums)


@dataclass
class StoredRows:
    """Some rows of a partition group."""

    user_ids: list[bytes]
    rows: list[bytes]
    left_ms: list[int]
    """How long each stays; 0 for ever."""


async def stored_rows(store: RedisStore, schema: Schema, group: int) -> AsyncIterator[StoredRows]:
    """All rows of a group, in pieces, each once as long as nobody writes."""
    async for user_ids in store.scan_rows(group, schema.fingerprint):
        for start in range(0, len(user_ids), STEP_USERS):
            # A scan may name one twice; a row that has moved or expired meanwhile is gone.
            some = list(dict.fromkeys(user_ids[start : start + STEP_USERS]))
            rows = await store.fetch(group, schema.fingerprint, some)
            left = await store.times_left(group, schema.fingerprint, some)
            # One that expired in between is not to stay for ever.
            held = [one for one in zip(some, rows, left, strict=True) if None not in one]
            if held:
                yield StoredRows(*(list(column) for column in zip(*held, strict=True)))


def convert_rows(piece: StoredRows, old: Schema, new: Schema, reset_features: Collection[str]) -> list[bytes]:
    """The rows as those of another schema."""
    table = small_table(old, len(piece.rows))
    load_packed(table, piece.user_ids, piece.rows)
    return pack_table(migrate(table, new, reset_features), piece.user_ids)


def convert_population(packed: bytes, old: Schema, new: Schema, reset_features: Collection[str]) -> bytes:
    """The sums as those of another schema."""
    table = small_table(old, 1)
    table.population.unpack(packed, table.texts)
    table = migrate(table, new, reset_features)
    return table.population.pack(table.texts)


def small_table(schema: Schema, users: int) -> ProfileTable:
    """A table for so many users."""
    texts = 1024 + users * len(Packing.of(Layout.compile(schema)).text_bytes_at)
    return ProfileTable(schema, most_users=users, most_texts=texts)


def load_packed(table: ProfileTable, user_ids: Sequence[bytes], packed: Sequence[bytes]) -> None:
    """Takes packed rows into a table that has room for them. Raises DataLoss where one is damaged."""
    users = Strings.join(user_ids)
    table.load_rows(users.length, users.joined(), unpack_rows(Packing.of(table.layout), packed, table.texts))


def pack_table(table: ProfileTable, user_ids: Sequence[bytes]) -> list[bytes]:
    """The packed rows of users whom the table has."""
    numbers = table.users.get_many(Strings.join(user_ids))
    assert (numbers >= 0).all()
    return pack_rows(Packing.of(table.layout), table.rows, np.ascontiguousarray(numbers), table.texts)
