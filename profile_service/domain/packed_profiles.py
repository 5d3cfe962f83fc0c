"""Packed rows as profiles, without the table that they came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from profile_service.domain.index import Strings
from profile_service.domain.packing import Packing, unpack_rows
from profile_service.domain.population import Population, PopulationRow
from profile_service.domain.schema import Schema
from profile_service.domain.table import ProfileTable


class PackedProfiles:
    """Reads packed rows of one schema.

    Args:
        most_users: rows of one call.
    """

    def __init__(self, schema: Schema, most_users: int = 1_000) -> None:
        self.schema = schema
        self._table = ProfileTable(schema, most_users=most_users, most_texts=1)
        self._packing = Packing.of(self._table.layout)
        texts = max(1, most_users * len(self._packing.text_bytes_at))
        self._table = ProfileTable(schema, most_users=most_users, most_texts=texts)

    def profiles(
        self,
        user_ids: Sequence[str],
        packed: Sequence[bytes | None],
        read_ns: int,
        names: Sequence[str] = (),
        population: Population | None = None,
    ) -> list[bytes]:
        """Encoded Profiles as of `read_ns`, in the order of `user_ids`; empty where there is no row, or one that was
        not heard of for the schema's TTL. See `ProfileTable.profiles`. Raises DataLoss where a row is damaged."""
        table = self._table
        table.clear()
        table.texts.clear()
        users = Strings.join([user_id.encode() for user_id in user_ids])
        held = {user_id: row for user_id, row in zip(user_ids, packed, strict=True) if row is not None}
        known = Strings.join([user_id.encode() for user_id in held])
        rows = unpack_rows(self._packing, list(held.values()), table.texts)
        table.load_rows(known.length, known.joined(), rows)
        return table.profiles(users, read_ns, names, population)

    def population(self, packed: Iterable[bytes]) -> Population:
        """The sums of all owners together. Raises DataLoss where one is damaged."""
        table = self._table
        table.texts.clear()
        total = PopulationRow(self.schema)
        for one in packed:
            row = PopulationRow(self.schema)
            row.unpack(one, table.texts)
            total.add(row)
        return Population.merge(self.schema, [total.to_state(table.texts)])
