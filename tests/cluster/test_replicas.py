"""What the coordinator counts on is durable before anyone acts by it, in whichever order things go wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from profile_service.cluster import replicas as replicas_module
from profile_service.cluster.places import PlaceRegister, Places, Replica
from profile_service.cluster.replicas import Replicas
from profile_service.shard.lease import Grant
from profile_service.shard.reports import BUILDING, IN_SYNC, LOST, Shipping


@dataclass
class Described:
    address: str
    state: str
    incarnation: str
    shipping: Shipping


class Control:
    """A process of a shard, which writes down what it is told."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.described = Described(f"{name}:1", "serving", name, Shipping())
        self._name = name
        self._told = told

    async def describe(self, grant: Grant | None) -> Described:
        return self.described

    async def follow(self, replication: str, incarnation: str) -> None:
        assert incarnation == self.described.incarnation
        self._told.append(f"{self._name}: follow")
        self.replication = replication

    async def promote(self, incarnation: str) -> None:
        assert incarnation == self.described.incarnation
        self._told.append(f"{self._name}: promote")

    async def replicate(self, replication: str, address: str) -> None:
        self._told.append(f"{self._name}: replicate to {address}")
        self.described.shipping = Shipping(replication, BUILDING)

    async def release(self, replication: str) -> None:
        assert replication == self.described.shipping.replication
        self._told.append(f"{self._name}: release")
        self.described.shipping = Shipping()


class World:
    """A shard whose home is on node a, with its standby on node b."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replicas_module, "RETRY_S", 0.0)
        self.happened: list[str] = []
        self.stored = Places({0: "a"}).with_standby(0, "b")
        self.error: OSError | None = None
        self.owner, self.standby = Control("owner", self.happened), Control("standby", self.happened)
        self.register = PlaceRegister(self.stored, self._write)
        self.find: Callable[[int], Control] = lambda _: self.standby
        self.replicas = Replicas(self.register, lambda shard_id: self.find(shard_id))  # noqa: PLW0108  # It changes.

    async def _write(self, places: Places) -> None:
        self.happened.append(f"stored: home {places.homes[0]}, {places.standbys[0]}")
        if self.error is not None:
            raise self.error
        self.stored = places

    async def hear(self) -> None:
        await self.replicas.heard(0, self.owner, self.owner.described)

    async def get_in_sync(self) -> None:
        await self.hear()
        self.owner.described.shipping = Shipping(self.owner.described.shipping.replication, IN_SYNC)
        await self.hear()
        assert self.stored.standbys[0].in_sync
        self.happened.clear()

    def lose(self) -> None:
        self.owner.described.shipping = Shipping(self.owner.described.shipping.replication, LOST, "it is gone")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


async def test_a_standby_is_built_and_counted_on_when_it_has_everything(world: World) -> None:
    await world.hear()
    assert world.happened == ["standby: follow", "owner: replicate to standby:1"]
    assert world.standby.replication.startswith("b/")
    await world.hear()
    assert world.replicas.standing(0).state == BUILDING
    assert not world.stored.standbys[0].in_sync
    world.owner.described.shipping = Shipping(world.standby.replication, IN_SYNC)
    await world.hear()
    assert world.stored.standbys[0] == Replica("b", in_sync=True)
    assert world.replicas.standing(0).state == IN_SYNC


async def test_an_owner_is_released_when_it_is_durable_that_its_standby_is_out_of_sync(world: World) -> None:
    await world.get_in_sync()
    world.lose()
    world.error = OSError("the disk fails")
    await world.hear()
    assert "owner: release" not in world.happened
    assert world.stored.standbys[0].in_sync
    world.error = None
    await world.hear()
    assert world.happened[-2:] == [f"stored: home a, {Replica('b', in_sync=False)}", "owner: release"]


async def test_what_may_have_been_stored_is_made_up_for(world: World) -> None:
    await world.hear()
    world.owner.described.shipping = Shipping(world.standby.replication, IN_SYNC)
    world.error = OSError("nobody knows whether it is there")
    await world.hear()
    world.error = None
    world.lose()
    world.happened.clear()
    await world.hear()
    # It is what was known before; but something else may be stored.
    assert world.happened == [f"stored: home a, {Replica('b', in_sync=False)}", "owner: release"]


async def test_a_promoted_standby_takes_nothing_more_before_it_is_home(world: World) -> None:
    await world.get_in_sync()
    assert await world.replicas.promote(0)
    assert world.happened == ["standby: promote", f"stored: home b, {Replica('a', in_sync=False)}"]
    assert not await world.replicas.promote(0), "the one before has nothing"


async def test_one_that_is_not_in_sync_or_not_there_is_not_promoted(world: World) -> None:
    await world.hear()
    world.happened.clear()
    assert not await world.replicas.promote(0)
    await world.get_in_sync()
    world.standby.described.state = "recovering"
    assert not await world.replicas.promote(0)

    def away(_: int) -> Control:
        raise ConnectionError("it is away")

    world.find = away
    assert not await world.replicas.promote(0)
    assert world.happened == []
    assert world.stored.homes[0] == "a"


async def test_a_new_process_of_the_owner_is_not_counted_with_the_standby_of_the_one_before(world: World) -> None:
    await world.get_in_sync()
    world.error = OSError("the disk fails")
    with pytest.raises(OSError, match="fails"):
        await world.replicas.new_owner(0)
    world.error = None
    await world.replicas.new_owner(0)
    assert not world.stored.standbys[0].in_sync
    assert not await world.replicas.promote(0)


async def test_a_replication_to_another_node_than_is_meant_is_ended(world: World) -> None:
    await world.get_in_sync()
    await world.register.change(lambda places: places.with_standby(0, "c"))
    world.happened.clear()
    await world.hear()
    assert world.happened == ["owner: release"]
    assert not world.stored.standbys[0].in_sync


def test_places_are_read_as_they_were_written() -> None:
    places = Places({0: "a", 1: "b"}).with_standby(0, "b").with_sync(0, "b", in_sync=True)
    assert Places.decode(places.encode()) == places
    assert Places.decode({"homes": {"3": "a"}}) == Places({3: "a"})
    assert places.with_sync(0, "another", in_sync=False) == places
