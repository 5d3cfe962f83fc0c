"""Which owner is called, and which is avoided."""

from __future__ import annotations

from random import Random

import pytest

from profile_client.owners import ASK_AGAIN_S, FIRST_AVOIDANCE_S, FIRST_TRY_S, LONGEST_AVOIDANCE_S, TRY_S, Owners
from profile_service.cluster.partitioning import partition_of, user_hash
from userprofile.v1 import admin_service_pb2

HOME = "127.0.0.1:50051"


def topology(partitions: int, addresses: list[str]) -> admin_service_pb2.GetTopologyResponse:
    """Partitions in runs, one for each address."""
    answer = admin_service_pb2.GetTopologyResponse(epoch=1, partition_count=partitions)
    run = partitions // len(addresses)
    for number, address in enumerate(addresses):
        answer.shards.add(shard_id=number, address=address)
        last = partitions - 1 if number == len(addresses) - 1 else (number + 1) * run - 1
        answer.ranges.add(first_partition=number * run, last_partition=last, shard_id=number)
    return answer


def known(owners: Owners, user_id: str) -> str | None:
    owner = owners.of(user_id, 0.0)
    return None if owner is None else owner.address


@pytest.mark.parametrize("bits", [0, 1, 4, 8, 12])
def test_users_are_found_where_the_service_puts_them(bits: int, seed: int) -> None:
    random = Random(seed)
    count = 1 << bits
    addresses = [f"127.0.0.1:{7000 + number}" for number in range(min(3, count))]
    told = topology(count, addresses)
    owners = Owners(HOME)
    owners.install(told)
    for _ in range(200):
        user_id = "".join(random.choices("abc-é0", k=random.randrange(1, 40)))
        partition = partition_of(user_hash(user_id), bits)
        (expected,) = (
            each.shard_id for each in told.ranges if each.first_partition <= partition <= each.last_partition
        )
        assert known(owners, user_id) == addresses[expected]


def test_a_shard_without_an_address_is_asked_through_a_frontend() -> None:
    owners = Owners(HOME)
    owners.install(topology(2, ["", "127.0.0.1:7001"]))
    assert {known(owners, f"u{number}") for number in range(50)} == {None, "127.0.0.1:7001"}


@pytest.mark.parametrize("address", ["127.0.0.1:7000", "localhost:7000", "[::1]:7000"])
def test_a_server_of_another_machine_s_own_is_not_looked_for_here(address: str) -> None:
    for frontend, expected in (
        ("profiles.example:50051", None),
        ("10.0.0.1:50051", None),
        ("localhost:50051", address),
        ("[::1]:50051", address),
    ):
        owners = Owners(frontend)
        owners.install(topology(2, [address]))
        assert known(owners, "u") == expected, frontend


def test_who_does_not_answer_is_avoided_ever_longer_and_taken_back_when_it_answers() -> None:
    owners = Owners(HOME)
    owners.install(topology(2, ["127.0.0.1:7000"]))
    now, waits = 0.0, []
    for _ in range(12):
        owner = owners.of("u", now)
        assert owner is not None
        owners.failed(owner, now)
        assert owners.of("u", now) is None
        waits.append(owner.avoided_until_s - now)
        now = owner.avoided_until_s
    assert waits[:3] == [FIRST_AVOIDANCE_S, 2 * FIRST_AVOIDANCE_S, 4 * FIRST_AVOIDANCE_S]
    assert waits[-1] == LONGEST_AVOIDANCE_S
    owner = owners.of("u", now)
    assert owner is not None
    owners.answered(owner)
    owners.failed(owner, now)
    assert owner.avoided_until_s - now == FIRST_AVOIDANCE_S


def test_an_owner_keeps_its_record_through_a_new_topology_and_gone_addresses_are_named() -> None:
    owners = Owners(HOME)
    assert owners.install(topology(2, ["127.0.0.1:7000", "127.0.0.1:7001"])) == set()
    users = {known(owners, f"u{number}"): f"u{number}" for number in range(50)}
    avoided = owners.of(users["127.0.0.1:7000"], 0.0)
    assert avoided is not None
    owners.failed(avoided, 0.0)
    assert owners.install(topology(2, ["127.0.0.1:7000", "127.0.0.1:7002"])) == {"127.0.0.1:7001"}
    assert known(owners, users["127.0.0.1:7000"]) is None
    assert known(owners, users["127.0.0.1:7001"]) == "127.0.0.1:7002"


def test_the_topology_is_asked_for_when_it_may_be_another_and_by_one_caller_at_a_time() -> None:
    owners = Owners(HOME)
    assert owners.wants_topology(0.0)
    assert not owners.wants_topology(0.0)
    assert owners.wants_topology(ASK_AGAIN_S)
    owners.install(topology(2, ["127.0.0.1:7000"]))
    assert not owners.wants_topology(1e9)
    owners.not_mine()
    assert owners.wants_topology(1e9)
    owners.topology_failed(1e9, for_good=True)
    assert not owners.wants_topology(1e9 + 2 * ASK_AGAIN_S)
    assert owners.wants_topology(1e9 + LONGEST_AVOIDANCE_S)


def test_a_frontend_has_time_left_when_an_owner_does_not_answer() -> None:
    owners = Owners(HOME)
    owners.install(topology(2, ["127.0.0.1:7000"]))
    owner = owners.of("u", 0.0)
    assert owner is not None
    assert owner.try_s(60.0) == FIRST_TRY_S
    assert owner.try_s(0.1) == 0.05
    owners.answered(owner)
    assert owner.try_s(60.0) == TRY_S
    assert owner.try_s(1.0) == 0.5
