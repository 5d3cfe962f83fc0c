"""Any text of 1 to 256 bytes is a user id, and works in a REST path, percent-encoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.e2e.calls import GrpcCaller, HttpCaller, new_user
from tests.e2e.serving import ServeProcess
from tests.e2e.stores import IN_BOTH_STORES

pytestmark = IN_BOTH_STORES


@pytest.fixture
def rpc(service: ServeProcess) -> Iterator[GrpcCaller]:
    with GrpcCaller(service.grpc_address) as caller:
        yield caller


@pytest.fixture
def rest(service: ServeProcess) -> HttpCaller:
    return HttpCaller(service.http_address)


def view(user_id: str) -> dict[str, Any]:
    return {"userId": user_id, "type": "view"}


STRANGE = [
    "a/b", "/", "//", "a/", "a:b", "u:watch", "u:rankItems", ":", "100%", "%2F", "%", "😀", "e\u0301", "a b", " ",
    ".", "..", "a.b", "../../etc", "a?b=c", "a#b", "a&b=c", "a+b", "a%20b", "tab\there", "line\nbreak", "nul\0",
    "\"'\\", "batchGet", "Ω" * 128, "user\u202egnp",
]  # fmt: skip


def escaped(user_id: str) -> str:
    """Every byte that is not a letter or digit, also those that a path might hold as they are."""
    return "".join(chr(byte) if chr(byte).isalnum() and byte < 128 else f"%{byte:02X}" for byte in user_id.encode())


@pytest.mark.parametrize("user_id", STRANGE, ids=ascii)
def test_any_user_id_works_in_a_rest_path(rest: HttpCaller, rpc: GrpcCaller, user_id: str) -> None:
    suffix = new_user("/:%") if len(user_id.encode()) < 200 else ""
    user = user_id + suffix
    answer = rest.post("/v1/events:ingest", {"events": [view(user)]})
    assert answer.body == {"acceptedCount": 1, "rejected": []}
    for path in (escaped(user), quote(user, safe="")):
        profile = rest.get(f"/v1/profiles/{path}")
        assert profile.code == 200, profile
        assert profile.body["userId"] == user
    assert rest.get(f"/v1/profiles:batchGet?user_ids={escaped(user)}").body["profiles"][0]["userId"] == user
    assert rpc.profile(user).user_id == user


@pytest.mark.parametrize("user_id", [".", "..", ":", "/", "%", " ", "u:watch"], ids=ascii)
def test_a_user_id_that_a_path_might_swallow_is_taken_as_it_is(rest: HttpCaller, user_id: str) -> None:
    before = rest.get(f"/v1/profiles/{escaped(user_id)}")
    count = int(before.body["eventCount"]) if before.code == 200 else 0
    assert rest.post("/v1/events:ingest", {"events": [view(user_id)]}).code == 200
    profile = rest.get(f"/v1/profiles/{escaped(user_id)}")
    assert profile.code == 200, profile
    assert (profile.body["userId"], profile.body["eventCount"]) == (user_id, str(count + 1))
