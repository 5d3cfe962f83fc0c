"""What is told of a store's URL, and how its keys are named."""

from __future__ import annotations

import pytest

from profile_service.errors import StartupError
from profile_service.storage.redis_keys import GROUPS, Keys
from profile_service.storage.redis_store import StoreUrl


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://cache", "redis://cache"),
        ("rediss://me:secret@cache:6380/1?prefix=shop", "rediss://cache:6380/1?prefix=shop"),
        ("redis://:secr%2Fet@[::1]:6379?password=secret&cluster=true", "redis://[::1]:6379?cluster=true"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    parsed = StoreUrl.parse(url)
    assert parsed.shown == shown
    assert "prefix" not in parsed.url
    assert "cluster=" not in parsed.url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("mongodb://cache", "must be local, or begin with"),
        ("redis:///0", "names no host"),
        ("redis://cache?prefix=", "prefix must not be empty"),
        ("redis://cache?prefix={a}", "no braces"),
        ("redis://cache?cluster=maybe", "cluster must be"),
        ("redis://cache:seven", "Port"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(StartupError, match=reason):
        StoreUrl.parse(url)


@pytest.mark.parametrize("bits", [1, 3, 4, 8, 16])
def test_every_partition_has_one_group_and_neighbours_share_it(bits: int) -> None:
    keys = Keys("p", bits)
    groups = [keys.group_of(partition) for partition in range(1 << bits)]
    assert groups == sorted(groups)
    assert set(groups) == set(range(keys.groups))
    assert keys.groups == min(GROUPS, 1 << bits)


def test_all_keys_of_a_group_have_one_hash_tag_whatever_the_user_is_called() -> None:
    keys = Keys("p", 8)
    names = [
        keys.row(3, "f", b"{g04}"),
        keys.row(3, "f", "ü{}".encode()),
        keys.producer(3, "{x}"),
        keys.population(3, "f"),
        keys.of_group(3, "owners"),
    ]
    assert {name[name.index(b"{") : name.index(b"}") + 1] for name in names} == {b"{g03}"}
