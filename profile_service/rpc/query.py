"""The way out: profiles by user, and the population. Profile bytes pass through undecoded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from profile_service.config import Limits
from profile_service.errors import InvalidArgument, NotFound
from profile_service.rpc.requests import parse
from profile_service.wire.framing import message_field
from userprofile.v1 import profile_service_pb2

_PROFILES_FIELD = profile_service_pb2.BatchGetProfilesResponse.PROFILES_FIELD_NUMBER
_MISSING_FIELD = profile_service_pb2.BatchGetProfilesResponse.MISSING_USER_IDS_FIELD_NUMBER


class Reader(Protocol):
    """Where profiles come from: every shard by way of a router, or one shard."""

    async def read(
        self, user_ids: Sequence[str], features: Sequence[str], deadline_s: float | None = None
    ) -> list[bytes]:
        """Encoded profiles in the order of `user_ids`, empty for users never seen."""

    async def population(self, features: Sequence[str], deadline_s: float | None = None) -> bytes:
        """All users as one encoded profile."""


class Query:
    """Answers questions about profiles.

    Args:
        feature_names: what the schema has; None where the reader itself refuses others.
    """

    def __init__(self, reader: Reader, limits: Limits, feature_names: Iterable[str] | None = None) -> None:
        self._reader = reader
        self._limits = limits
        self._feature_names = None if feature_names is None else frozenset(feature_names)

    async def get_profile(self, request: bytes, deadline_s: float | None) -> bytes:
        """An encoded GetProfileRequest for an encoded Profile. Raises NotFound for a user never seen."""
        asked = parse(profile_service_pb2.GetProfileRequest, request)
        self._check_user("user_id", asked.user_id)
        self._check_features(asked.features)
        (profile,) = await self._reader.read([asked.user_id], asked.features, deadline_s)
        if not profile:
            raise NotFound(f"user {asked.user_id!r} was never seen")
        return profile

    async def batch_get_profiles(self, request: bytes, deadline_s: float | None) -> bytes:
        """An encoded BatchGetProfilesRequest for an encoded BatchGetProfilesResponse, in the order asked for."""
        asked = parse(profile_service_pb2.BatchGetProfilesRequest, request)
        if not 1 <= len(asked.user_ids) <= self._limits.users_per_read:
            raise InvalidArgument(
                "user_ids", f"must be 1 to {self._limits.users_per_read} users, are {len(asked.user_ids)}"
            )
        for index, user_id in enumerate(asked.user_ids):
            if not 1 <= len(user_id.encode()) <= self._limits.user_id_bytes:
                self._check_user(f"user_ids[{index}]", user_id)
        self._check_features(asked.features)
        profiles = await self._reader.read(asked.user_ids, asked.features, deadline_s)
        pieces: list[bytes] = []
        for profile in profiles:
            if profile:
                pieces += (message_field(_PROFILES_FIELD, profile), profile)
        for user_id, profile in zip(asked.user_ids, profiles, strict=True):
            if not profile:
                missing = user_id.encode()
                pieces += (message_field(_MISSING_FIELD, missing), missing)
        return b"".join(pieces)

    async def get_population(self, request: bytes, deadline_s: float | None) -> bytes:
        """An encoded GetPopulationRequest for an encoded Profile over all users."""
        asked = parse(profile_service_pb2.GetPopulationRequest, request)
        self._check_features(asked.features)
        return await self._reader.population(asked.features, deadline_s)

    def _check_user(self, field: str, user_id: str) -> None:
        size = len(user_id.encode())
        if not 1 <= size <= self._limits.user_id_bytes:
            raise InvalidArgument(field, f"must be 1 to {self._limits.user_id_bytes} bytes, is {size}")

    def _check_features(self, features: Sequence[str]) -> None:
        if self._feature_names is None:
            return
        for index, name in enumerate(features):
            if name not in self._feature_names:
                known = ", ".join(sorted(self._feature_names))
                raise InvalidArgument(f"features[{index}]", f"the schema has no feature {name!r}; it has {known}")
