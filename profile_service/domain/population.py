"""All users as one profile: the same slots and kernels as a user's row, in one row that is 64 bits wide.

Each shard adds every event to its own population row. `PopulationRow.to_state` makes that portable; `Population.merge`
adds the states of all shards up, which gives the prior of the categoricals and the answer of GetPopulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np

from profile_service.domain.features.base import VIEW_DTYPES, RowViews
from profile_service.domain.features.categorical import CategoricalFeature
from profile_service.domain.header import merge_header
from profile_service.domain.index import ByteIndex, Strings
from profile_service.domain.layout import EVENT_COUNT, Layout
from profile_service.domain.packing import Packing, pack_rows, unpack_rows
from profile_service.domain.profile import Encoder, Priors
from profile_service.domain.schema import Schema
from profile_service.errors import ResourceExhausted
from userprofile.internal.v1 import population_pb2


class PopulationRow:
    """The sums of one shard."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self.layout = Layout.compile(schema, population=True)
        self.views = self.layout.wide_row()
        """One row, whose `f4` view has 64 bits."""
        self._packing = Packing.of_population(self.layout)

    def copy(self) -> bytes:
        """The row's bytes, for `load`."""
        return b"".join(view.tobytes() for view in self.views)

    def load(self, copied: bytes | memoryview) -> None:
        """Takes the row that was copied.

        Raises:
            ValueError: it is not of this schema.
        """
        if len(copied) != sum(view.nbytes for view in self.views):
            raise ValueError(f"{len(copied)} bytes are not a population of this schema")
        at = 0
        for view in self.views:
            view[:] = np.frombuffer(copied, view.dtype, view.size, at).reshape(view.shape)
            at += view.nbytes

    @property
    def event_count(self) -> int:
        """Events counted into it."""
        return int(self.views.i8[0, EVENT_COUNT])

    def pack(self, texts: ByteIndex) -> bytes:
        """The row as a store holds it; `texts` is what its interned ids stand for."""
        row = np.frombuffer(self.copy(), np.uint8).reshape(1, -1)
        (packed,) = pack_rows(self._packing, row, np.zeros(1, np.int64), texts)
        return packed

    def unpack(self, packed: bytes, texts: ByteIndex) -> None:
        """Takes what `pack` gave; its texts are interned in `texts`.

        Raises:
            DataLoss: it is damaged, or of another schema.
        """
        self.load(unpack_rows(self._packing, [packed], texts).tobytes())

    def add(self, other: PopulationRow) -> None:
        """Adds another row's sums, whose interned ids are of the same texts."""
        merge_header(self.views.i8, 0, other.views.i8, 0)
        for feature in self.layout.features:
            feature.merge(self.views, 0, other.views, 0)

    def add_state(self, encoded: bytes, texts: ByteIndex) -> None:
        """Adds the sums of another shard, an encoded PopulationState; its texts get numbers of `texts`.

        Raises:
            ValueError: it is of another schema.
            ResourceExhausted: there is no room for the texts.
        """
        state = self.check(encoded, texts)
        numbers = texts.add(text.encode() for text in state.texts)
        _merge(self.layout, self.views, state, [number + 1 for number in numbers])

    def check(self, encoded: bytes, texts: ByteIndex) -> population_pb2.PopulationState:
        """The state that `add_state` would add. Raises what `add_state` would raise."""
        state = population_pb2.PopulationState.FromString(encoded)
        if state.schema_fingerprint != self._schema.fingerprint:
            raise ValueError("the sums are of another schema")
        if not texts.make_room(len(state.texts), sum(len(text.encode()) for text in state.texts)):
            raise ResourceExhausted("there is no room for the texts of another shard's sums", retry_after_s=10.0)
        return state

    def relaid(self, encoded: bytes, relay: Callable[[bytes], bytes]) -> bytes:
        """An encoded PopulationState whose row, of another layout, becomes one of this layout by `relay`.

        Raises:
            ValueError: it does not.
        """
        state = population_pb2.PopulationState.FromString(encoded)
        row = relay(b"".join(getattr(state, name) for name in VIEW_DTYPES))
        if len(row) != sum(view.nbytes for view in self.views):
            raise ValueError(f"{len(row)} bytes are not a population of this schema")
        at = 0
        for name, view in zip(VIEW_DTYPES, self.views, strict=True):
            setattr(state, name, row[at : at + view.nbytes])
            at += view.nbytes
        return state.SerializeToString()

    def to_state(self, texts: ByteIndex) -> bytes:
        """An encoded PopulationState; `texts` is what the row's interned ids stand for."""
        u4 = self.views.u4.copy()
        numbers: dict[int, int] = {}
        for feature in self.layout.features:
            for first, count in feature.strings():
                for slot in range(first, first + count):
                    held = int(u4[0, slot])
                    if held:
                        u4[0, slot] = numbers.setdefault(held, len(numbers) + 1)
        return population_pb2.PopulationState(
            f8=self.views.f8.tobytes(),
            i8=self.views.i8.tobytes(),
            f4=self.views.f4.tobytes(),
            u4=u4.tobytes(),
            u1=self.views.u1.tobytes(),
            texts=[texts.bytes_of(held - 1).decode() for held in numbers],
            schema_fingerprint=self._schema.fingerprint,
        ).SerializeToString()


class Population:
    """The sums over all users of all shards at one moment."""

    def __init__(self, schema: Schema) -> None:
        self._layout = Layout.compile(schema, population=True)
        self._views = self._layout.wide_row()
        self._texts: list[bytes] = []
        self._categoricals = [f for f in self._layout.features if isinstance(f, CategoricalFeature)]

    @classmethod
    def merge(cls, schema: Schema, states: Iterable[bytes]) -> Population:
        """The sum of the shards' states. A state of another schema is left out: its shard is about to be replaced."""
        population = cls(schema)
        numbers: dict[str, int] = {}
        for encoded in states:
            state = population_pb2.PopulationState.FromString(encoded)
            if state.schema_fingerprint == schema.fingerprint:
                population._add(state, numbers)
        population._texts = [text.encode() for text in numbers]
        return population

    @cached_property
    def _encoder(self) -> Encoder:
        texts = ByteIndex(len(self._texts), sum(map(len, self._texts)))
        texts.add(self._texts)
        return Encoder(self._layout, self._views, texts.arrays.entries, texts.arrays.arena)

    def _add(self, state: population_pb2.PopulationState, numbers: dict[str, int]) -> None:
        here = [numbers.setdefault(text, len(numbers) + 1) for text in state.texts]
        _merge(self._layout, self._views, state, here)

    @cached_property
    def priors(self) -> Priors:
        """What categoricals take for likely."""
        weights = [self._views.f4[0, f.slot : f.slot + len(f.labels)] for f in self._categoricals]
        landmarks = [self._views.i8[0, f.landmark] for f in self._categoricals]
        return Priors(np.concatenate([np.zeros(0), *weights]), np.array(landmarks, np.int64))

    def profile(self, read_ns: int, names: Sequence[str] = ()) -> bytes:
        """An encoded Profile without a user id, of the features named, or of all."""
        (profile,) = self._encoder.encode(np.zeros(1, np.int64), Strings.join([b""]), read_ns, names, self.priors)
        return profile


def _merge(layout: Layout, views: RowViews, state: population_pb2.PopulationState, text_ids: Sequence[int]) -> None:
    """Adds the state to the row; its texts are known there by these ids."""
    found = {}
    for name, dtype in VIEW_DTYPES.items():
        wide = np.dtype(np.float64) if name == "f4" else dtype
        found[name] = np.frombuffer(getattr(state, name), dtype=wide).reshape(1, -1).copy()
    translated = np.array([0, *text_ids], np.uint32)
    for feature in layout.features:
        for first, count in feature.strings():
            found["u4"][0, first : first + count] = translated[found["u4"][0, first : first + count]]
    source = RowViews(**found)
    merge_header(views.i8, 0, source.i8, 0)
    for feature in layout.features:
        feature.merge(views, 0, source, 0)
