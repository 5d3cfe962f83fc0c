"""All users as one profile: the same slots and kernels as a user's row, in one row that is 64 bits wide.

Each shard adds every event to its own population row. `PopulationRow.to_state` makes that portable; `Population.merge`
adds the states of all shards up, which gives the prior of the categoricals and the answer of GetPopulation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        views = {}
        for name, dtype in VIEW_DTYPES.items():
            wide = np.dtype(np.float64) if name == "f4" else dtype
            views[name] = np.frombuffer(getattr(state, name), dtype=wide).reshape(1, -1).copy()
        translated = np.array([0, *(numbers.setdefault(text, len(numbers) + 1) for text in state.texts)], np.uint32)
        for feature in self._layout.features:
            for first, count in feature.strings():
                views["u4"][0, first : first + count] = translated[views["u4"][0, first : first + count]]
        source = RowViews(**views)
        merge_header(self._views.i8, 0, source.i8, 0)
        for feature in self._layout.features:
            feature.merge(self._views, 0, source, 0)

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
