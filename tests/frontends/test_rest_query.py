"""Query parameters become fields, and what is none is refused by its name."""

from __future__ import annotations

import contextlib
from typing import Any
from urllib.parse import quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profile_service.errors import InvalidArgument
from profile_service.frontends.rest.query import fill_from_query, refuse_query
from userprofile.v1.admin_service_pb2 import GetStatusResponse, MovePartitionsRequest
from userprofile.v1.event_pb2 import Event
from userprofile.v1.profile_service_pb2 import (
    BatchGetProfilesRequest,
    DeleteProfileResponse,
    GetProfileRequest,
    MergeProfilesResponse,
)

TAKEN = [
    (GetProfileRequest, "features=color&features=price", {"features": ["color", "price"]}),
    (GetProfileRequest, "", {}),
    (GetProfileRequest, "&&features=color&", {"features": ["color"]}),
    (GetProfileRequest, "features=", {"features": [""]}),
    (GetProfileRequest, "features", {"features": [""]}),
    (GetProfileRequest, "features=a=b", {"features": ["a=b"]}),
    (GetProfileRequest, "features=a+b%2Bc%26d", {"features": ["a b+c&d"]}),
    (GetProfileRequest, "%66eatures=M%C3%BCller", {"features": ["Müller"]}),
    (BatchGetProfilesRequest, "user_ids=a&userIds=b&user_ids=a%2Fc", {"user_ids": ["a", "b", "a/c"]}),
    (DeleteProfileResponse, "deleted=true&purgedFromStorage=false", {"deleted": True}),
    (
        MovePartitionsRequest,
        "partitions=1&partitions=-2&target_shard_id=3",
        {"partitions": [1, -2], "target_shard_id": 3},
    ),
    (
        GetStatusResponse,
        "userCount=9007199254740993&bytesPerUser=1.5",
        {"user_count": 2**53 + 1, "bytes_per_user": 1.5},
    ),
    (MergeProfilesResponse, "profile.userId=a&profile.event_count=2", {"profile": {"user_id": "a", "event_count": 2}}),
]

REFUSED = [
    (GetProfileRequest, "feature=color", "feature", "is not a query parameter of GetProfileRequest"),
    (GetProfileRequest, "features=a&$alt=json", "$alt", "is not a query parameter"),
    (GetProfileRequest, "features.name=a", "features.name", "is not a query parameter"),
    (GetProfileRequest, "user_id=b", "user_id", "must be given by the path alone"),
    (GetProfileRequest, "userId=b", "userId", "must be given by the path alone"),
    (GetProfileRequest, "features=%FF", "features", "must be UTF-8"),
    (GetProfileRequest, "features=%F", "features", "must be percent-encoded"),
    (GetProfileRequest, "%FF=1", "query", "must be UTF-8"),
    (GetProfileRequest, "=1", "", "is not a query parameter"),
    (DeleteProfileResponse, "deleted=yes", "deleted", 'must be true or false, is "yes"'),
    (DeleteProfileResponse, "deleted=true&deleted=true", "deleted", "must be given once"),
    (MovePartitionsRequest, "partitions=1&partitions=x", "partitions[1]", 'must be a whole number of 32 bits, is "x"'),
    (MovePartitionsRequest, "targetShardId=2147483648", "target_shard_id", "must be a whole number of 32 bits"),
    (GetStatusResponse, "start_time=noon", "start_time", "must be a time such as"),
    (GetStatusResponse, "bytes_per_user=much", "bytes_per_user", "must be a number"),
    (Event, "attributes=red", "attributes", "must be an object"),
    (MergeProfilesResponse, "profile=a", "profile", "must be an object"),
    (MergeProfilesResponse, "profile=a&profile.user_id=b", "profile.user_id", "must not be given beside profile"),
    (MergeProfilesResponse, "profile.user_id=b&profile=a", "profile", "must be given once"),
    (MergeProfilesResponse, "profile.colour=b", "profile.colour", "is not a query parameter"),
]


@pytest.mark.parametrize(("kind", "query", "fields"), TAKEN)
def test_a_query_sets_fields(kind: Any, query: str, fields: dict[str, Any]) -> None:
    message = kind()
    fill_from_query(message, query.encode(), ())
    assert message == kind(**fields)


@pytest.mark.parametrize(("kind", "query", "field", "reason"), REFUSED)
def test_a_wrong_parameter_is_named(kind: Any, query: str, field: str, reason: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        fill_from_query(kind(), query.encode(), ("user_id",))
    (violation,) = raised.value.violations
    assert violation.field == field
    assert violation.description.startswith(reason)


@given(st.lists(st.text(), max_size=5))
def test_any_text_comes_through_a_query(names: list[str]) -> None:
    message = GetProfileRequest()
    fill_from_query(message, "&".join(f"features={quote_plus(name)}" for name in names).encode(), ())
    assert list(message.features) == names


@given(st.binary(max_size=60))
def test_any_query_is_taken_or_refused(query: bytes) -> None:
    for prefix in (b"", b"features=", b"user_id"):
        with contextlib.suppress(InvalidArgument):
            fill_from_query(GetProfileRequest(), prefix + query, ())


def test_a_method_with_a_body_takes_no_query() -> None:
    refuse_query(b"", MovePartitionsRequest.DESCRIPTOR)
    with pytest.raises(InvalidArgument, match="user_ids: must be in the body, as a field of MovePartitionsRequest"):
        refuse_query(b"user_ids=a&b=c", MovePartitionsRequest.DESCRIPTOR)
