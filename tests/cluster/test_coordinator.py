"""The coordinator follows its shards to where they are, and tells everyone in an order that loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from profile_service.cluster import coordinator as coordinator_module
from profile_service.cluster.coordinator import Coordinator
from profile_service.cluster.topology import ShardLocation, Topology


@dataclass
class Description:
    address: str
    node: str
    epoch: int


class Control:
    """A shard as the coordinator sees it."""

    def __init__(self, shard_id: int) -> None:
        self.address = f"host:{shard_id}"
        self.epoch = 1
        self.owned: list[int] = []
        self.away = False
        self.hanging = False
        self.population: list[bytes] = []
        self.state = str(shard_id).encode()

    async def _answer(self) -> None:
        if self.away:
            raise ConnectionError("away")
        if self.hanging:
            await asyncio.Event().wait()

    async def describe(self) -> Description:
        await self._answer()
        return Description(self.address, "node", self.epoch)

    async def update_topology(self, epoch: int, owned: Sequence[int]) -> None:
        await self._answer()
        self.epoch, self.owned = epoch, list(owned)

    async def population_state(self) -> bytes:
        await self._answer()
        return self.state

    async def set_population(self, states: Sequence[bytes]) -> None:
        await self._answer()
        self.population = list(states)

    def restart(self, address: str) -> None:
        self.address, self.epoch, self.owned, self.away = address, 1, [], False


def make(shards: int = 3) -> tuple[Coordinator, dict[int, Control]]:
    controls = {number: Control(number) for number in range(shards)}
    topology = Topology.even(4, [ShardLocation(number, "") for number in controls])
    return Coordinator(topology, controls, population_interval_s=0.01), controls


async def test_it_finds_the_shards_and_tells_them_first() -> None:
    coordinator, controls = make()
    await coordinator.start()
    try:
        topology = coordinator.topology
        assert [shard.address for shard in topology.shards] == ["host:0", "host:1", "host:2"]
        for number, control in controls.items():
            assert (control.epoch, control.owned) == (topology.epoch, topology.owned_by(number))
    finally:
        await coordinator.close()


async def test_a_restarted_shard_gets_a_new_epoch_that_all_shards_know() -> None:
    coordinator, controls = make()
    await coordinator.start()
    await coordinator.close()
    before = coordinator.topology.epoch
    await coordinator.look()
    assert coordinator.topology.epoch == before
    controls[1].restart("host:9")
    await coordinator.look()
    assert coordinator.topology.epoch == before + 1
    assert coordinator.topology.shards[1].address == "host:9"
    assert {control.epoch for control in controls.values()} == {before + 1}


async def test_a_shard_that_missed_an_epoch_is_told_in_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_module, "CONTROL_TIMEOUT_S", 0.02)
    coordinator, controls = make()
    await coordinator.start()
    await coordinator.close()
    controls[0].away = controls[2].hanging = True
    controls[1].restart("host:9")
    await coordinator.look()
    epoch = coordinator.topology.epoch
    assert controls[1].epoch == epoch
    assert controls[0].epoch == epoch - 1
    controls[0].away = controls[2].hanging = False
    await coordinator.look()
    assert coordinator.topology.epoch == epoch
    assert [control.epoch for control in controls.values()] == [epoch] * 3


async def test_a_port_that_another_shard_has_now_is_taken_from_the_one_that_is_away() -> None:
    coordinator, controls = make()
    await coordinator.start()
    await coordinator.close()
    controls[0].away = True
    controls[1].restart("host:0")
    await coordinator.look()
    assert [shard.address for shard in coordinator.topology.shards] == ["", "host:0", "host:2"]
    controls[0].restart("host:7")
    await coordinator.look()
    assert coordinator.topology.shards[0].address == "host:7"


async def test_a_new_coordinator_goes_on_after_the_epochs_of_the_one_before() -> None:
    first, controls = make()
    await first.start()
    await first.close()
    for control in controls.values():
        control.epoch = 41
    topology = Topology.even(4, [ShardLocation(number, "") for number in controls])
    second = Coordinator(topology, controls, population_interval_s=0.01)
    await second.start()
    await second.close()
    assert second.topology.epoch == 42
    assert {control.epoch for control in controls.values()} == {42}


async def test_every_shard_gets_the_sums_of_all_that_answer() -> None:
    coordinator, controls = make()
    await coordinator.share_population()
    assert controls[2].population == [b"0", b"1", b"2"]
    controls[1].away = True
    await coordinator.share_population()
    assert controls[2].population == [b"0", b"2"]
