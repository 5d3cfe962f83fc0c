"""The coordinator follows its shards to where they are, and tells everyone in an order that loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from profile_service.cluster import coordinator as coordinator_module
from profile_service.cluster.coordinator import Coordinator, Standing
from profile_service.cluster.leases import Holder, Leases
from profile_service.cluster.ownership import Ownership
from profile_service.cluster.places import PlaceRegister, Places
from profile_service.cluster.replicas import Replicas
from profile_service.cluster.shard_control import ShardDead
from profile_service.shard.lease import Grant, Lease
from profile_service.shard.reports import Shipping
from tests.cluster.local_cluster import until

LEASE_S = 10.0


class MadeUpClock:
    """One clock for the coordinator and the shards."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> int:
        return int(self.now_s * 1e9)


CLOCK = MadeUpClock()


@pytest.fixture(autouse=True)
def _begin_at_zero() -> None:
    CLOCK.now_s = 0.0


@dataclass
class Description:
    address: str
    node: str
    epoch: int
    state: str
    progress: float
    message: str
    incarnation: str
    lock: str
    asked_ns: int
    shipping: Shipping = Shipping()  # noqa: RUF009  # frozen
    promoted: bool = False


class Control:
    """A shard as the coordinator sees it."""

    def __init__(self, shard_id: int) -> None:
        self.address = f"host:{shard_id}"
        self.epoch = 1
        self.owned: list[int] = []
        self.away = False
        self.hanging = False
        self.population: list[bytes] = []
        self.sums = str(shard_id).encode()
        self.dead = False
        self.state, self.progress, self.message = "serving", 1.0, ""
        self.lease = Lease(CLOCK)
        self.lock = f"lock of {shard_id}"

    async def _answer(self) -> None:
        if self.dead:
            raise ShardDead("its constructor raised")
        if self.away:
            raise ConnectionError("away")
        if self.hanging:
            await asyncio.Event().wait()

    async def describe(self, grant: Grant | None) -> Description:
        await self._answer()
        if grant is not None:
            self.lease.take(grant)
        return Description(
            self.address,
            "node",
            self.epoch,
            self.state,
            self.progress,
            self.message,
            self.lease.incarnation,
            self.lock,
            self.lease.ask(),
        )

    async def update_topology(self, epoch: int, owned: Sequence[int]) -> None:
        await self._answer()
        self.epoch, self.owned = epoch, list(owned)

    async def population_state(self) -> bytes:
        await self._answer()
        return self.sums

    async def set_population(self, states: Sequence[bytes]) -> None:
        await self._answer()
        self.population = list(states)

    def restart(self, address: str) -> None:
        self.address, self.epoch, self.owned, self.away = address, 0, [], False
        self.lease = Lease(CLOCK)


class Ledger:
    """Where epochs are made durable, and what the shards went by then."""

    def __init__(self, controls: dict[int, Control]) -> None:
        self.controls = controls
        self.epochs: list[int] = []
        self.known_before: list[int] = []
        self.held: dict[int, Holder] = {}
        self.error: OSError | None = None

    async def holders(self, holders: Mapping[int, Holder]) -> None:
        if self.error is not None:
            raise self.error
        self.held = dict(holders)

    async def ownership(self, ownership: Ownership) -> None:
        raise AssertionError("nothing moves")

    async def epoch(self, epoch: int) -> None:
        if self.error is not None:
            raise self.error
        self.known_before.append(max(control.epoch for control in self.controls.values()))
        self.epochs.append(epoch)


def make(shards: int = 3) -> tuple[Coordinator, dict[int, Control]]:
    controls = {number: Control(number) for number in range(shards)}
    return make_for(controls)[0], controls


def make_for(
    controls: dict[int, Control], epoch: int = 1, holders: Mapping[int, Holder] | None = None
) -> tuple[Coordinator, Ledger]:
    ledger = Ledger(controls)
    leases = Leases(LEASE_S, CLOCK, holders or {})
    shards: dict[int, Any] = dict(controls)
    return Coordinator(Ownership.even(4, len(controls)), 4, epoch, shards, 0.01, ledger, leases), ledger


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
    monkeypatch.setattr(coordinator_module, "DESCRIBE_TIMEOUT_S", 0.02)
    monkeypatch.setattr(coordinator_module, "TELL_TIMEOUT_S", 0.02)
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
    second, _ = make_for(controls)
    await second.start()
    await second.close()
    assert second.topology.epoch == 42
    assert {control.epoch for control in controls.values()} == {42}


async def test_every_shard_gets_the_sums_of_all_that_answer() -> None:
    coordinator, controls = make()
    await coordinator.look()
    await coordinator.share_population()
    assert controls[2].population == [b"0", b"1", b"2"]
    # What a shard that is away has counted does not leave the population, and comes to whoever is back.
    controls[1].away = True
    controls[0].sums = b"more"
    await coordinator.look()
    await coordinator.share_population()
    assert controls[2].population == [b"more", b"1", b"2"]
    assert controls[1].population == [b"0", b"1", b"2"]
    controls[1].away = False
    await coordinator.look()
    await coordinator.share_population()
    assert controls[1].population == [b"more", b"1", b"2"]


async def test_a_shard_that_recovers_has_a_place_and_is_not_asked_for_its_sums() -> None:
    coordinator, controls = make()
    controls[1].state, controls[1].progress = "recovering", 0.43
    await coordinator.start()
    await coordinator.close()
    assert coordinator.topology.shards[1].address == "host:1"
    assert coordinator.standings[1] == Standing("recovering", 0.43)
    await coordinator.share_population()
    assert controls[0].population == [b"0", b"2"]
    controls[1].state, controls[1].progress = "serving", 1.0
    await coordinator.look()
    await coordinator.share_population()
    assert controls[0].population == [b"0", b"1", b"2"]


async def test_a_shard_that_does_not_answer_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_module, "FIRST_LOOK_S", 0.02)
    monkeypatch.setattr(coordinator_module, "TELL_TIMEOUT_S", 0.02)
    monkeypatch.setattr(coordinator_module, "WATCH_INTERVAL_S", 0.002)
    coordinator, controls = make()
    controls[0].hanging = True
    await coordinator.start()
    try:
        assert [shard.address for shard in coordinator.topology.shards] == ["", "host:1", "host:2"]
        assert coordinator.standings[0].state == "starting"
        controls[1].restart("host:9")
        # The shard that hangs is being looked at meanwhile, for DESCRIBE_TIMEOUT_S.
        await until(lambda: coordinator.topology.shards[1].address == "host:9" and bool(controls[1].owned))
        assert controls[1].epoch == coordinator.topology.epoch
    finally:
        await coordinator.close()


async def test_a_shard_that_failed_stands_so_and_its_message_with_it() -> None:
    coordinator, controls = make()
    controls[0].state, controls[0].message = "failed", "its log is damaged"
    controls[1].dead = True
    await coordinator.look()
    assert coordinator.standings == {
        0: Standing("failed", 1.0, "its log is damaged"),
        1: Standing("failed", message="its constructor raised"),
        2: Standing("serving", 1.0),
    }


async def test_an_epoch_is_durable_before_a_shard_hears_of_it() -> None:
    controls = {number: Control(number) for number in range(3)}
    coordinator, ledger = make_for(controls, epoch=7)
    await coordinator.start()
    await coordinator.close()
    for address in ("host:7", "host:8"):
        controls[1].restart(address)
        await coordinator.look()
    assert ledger.epochs == [8, 9, 10]
    assert all(known < epoch for known, epoch in zip(ledger.known_before, ledger.epochs, strict=True))


async def test_a_service_that_is_started_again_goes_on_after_the_last_durable_epoch() -> None:
    controls = {number: Control(number) for number in range(3)}
    for control in controls.values():
        control.epoch = 0
    coordinator, _ = make_for(controls, epoch=41)
    await coordinator.start()
    await coordinator.close()
    assert coordinator.topology.epoch == 42
    assert {control.epoch for control in controls.values()} == {42}


async def test_a_disk_that_fails_keeps_no_shard_from_being_found() -> None:
    controls = {number: Control(number) for number in range(3)}
    coordinator, ledger = make_for(controls)
    ledger.error = OSError("no room")
    await coordinator.start()
    await coordinator.close()
    assert coordinator.topology.shards[2].address == "host:2"


async def test_a_shard_has_its_lease_as_soon_as_it_is_found_and_keeps_it_as_long_as_it_is_looked_at() -> None:
    coordinator, controls = make()
    await coordinator.start()
    await coordinator.close()
    for _ in range(5):
        assert all(control.lease.is_held for control in controls.values())
        CLOCK.now_s += LEASE_S / 2
        await coordinator.look()
    CLOCK.now_s += LEASE_S
    assert not any(control.lease.is_held for control in controls.values())


async def test_a_process_on_the_same_directory_gets_the_lease_at_once() -> None:
    coordinator, controls = make()
    await coordinator.start()
    await coordinator.close()
    before = controls[1].lease
    controls[1].restart("host:9")
    await coordinator.look()
    assert controls[1].lease.is_held
    assert controls[1].lease is not before


async def test_a_process_elsewhere_waits_until_the_lease_of_the_one_before_has_run_out() -> None:
    coordinator, controls = make()
    await coordinator.start()
    await coordinator.close()
    before = controls[1].lease
    controls[1].restart("host:9")
    controls[1].lock = "of a copy of the directory"
    while before.is_held:
        await coordinator.look()
        assert coordinator.topology.shards[1].address == "host:9"
        assert not controls[1].lease.is_held
        CLOCK.now_s += LEASE_S / 10
    CLOCK.now_s += LEASE_S / 10
    await coordinator.look()
    assert controls[1].lease.is_held
    # Whatever still comes from the one before changes nothing.
    before.take(Grant(before.incarnation, before.ask() - int(LEASE_S * 1e9), int(LEASE_S * 1e9)))
    assert not before.is_held


async def test_a_new_coordinator_waits_for_the_leases_that_the_one_before_gave() -> None:
    first, controls = make()
    await first.start()
    await first.close()
    before = controls[1].lease
    holders = {number: Holder(control.lease.incarnation, control.lock) for number, control in controls.items()}
    controls[1].restart("host:9")
    controls[1].lock = "of a copy of the directory"
    second, ledger = make_for(controls, epoch=2, holders=holders)
    await second.start()
    await second.close()
    assert controls[0].lease.is_held
    assert not controls[1].lease.is_held
    assert before.is_held
    CLOCK.now_s += LEASE_S * 1.02
    await second.look()
    assert not before.is_held
    assert controls[1].lease.is_held
    assert ledger.held[1] == Holder(controls[1].lease.incarnation, controls[1].lock)


async def test_a_holder_that_cannot_be_made_durable_gets_no_lease_until_it_can() -> None:
    controls = {number: Control(number) for number in range(3)}
    coordinator, ledger = make_for(controls)
    ledger.error = OSError("no room")
    await coordinator.start()
    await coordinator.close()
    assert not any(control.lease.is_held for control in controls.values())
    ledger.error = None
    await coordinator.look()
    assert all(control.lease.is_held for control in controls.values())


async def test_a_shard_at_whose_address_nobody_listens_is_away_before_the_call_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordinator_module, "PROBE_INTERVAL_S", 0.01)
    controls = {number: Control(number) for number in range(3)}
    asked: list[str] = []

    async def listens(address: str) -> bool:
        asked.append(address)
        return address == "host:0"

    shards: dict[int, Any] = dict(controls)
    leases = Leases(LEASE_S, CLOCK, {})

    async def nothing(_: Places) -> None:
        pass

    places = Places({0: "a", 1: "a", 2: "a"}).with_standby(0, "b").with_standby(1, "b").with_standby(2, "b")
    register = PlaceRegister(places.with_sync(1, "b", in_sync=True).with_sync(0, "b", in_sync=True), nothing)

    def away(_: int) -> Any:
        raise ConnectionError("it is away")

    ledger = Ledger(controls)
    coordinator = Coordinator(
        *(Ownership.even(4, 3), 4, 1, shards, 0.01, ledger, leases), replicas=Replicas(register, away), listens=listens
    )
    await coordinator.start()
    await coordinator.close()
    for number in (0, 1):
        # The first look has found that its process ships to nobody.
        await register.change(lambda places, number=number: places.with_sync(number, "b", in_sync=True))  # type: ignore[misc]
    for control in controls.values():
        control.hanging = True
    looking = asyncio.ensure_future(coordinator.look())
    await until(lambda: coordinator.standings[1].state == "away")
    assert coordinator.standings[1].message == "nobody listens at host:1"
    assert coordinator.standings[0].state == "serving"
    # Without a standby that could take over it is waited for.
    assert coordinator.standings[2].state == "serving"
    assert {"host:0", "host:2"} <= set(asked)
    looking.cancel()
    await asyncio.wait([looking])


async def test_a_process_that_is_back_is_found_before_the_call_to_the_one_before_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordinator_module, "PROBE_INTERVAL_S", 0.01)
    controls = {number: Control(number) for number in range(3)}
    asked: list[str] = []

    async def listens(address: str) -> bool:
        asked.append(address)
        return address != "host:1"

    shards: dict[int, Any] = dict(controls)
    leases = Leases(LEASE_S, CLOCK, {})
    coordinator = Coordinator(*(Ownership.even(4, 3), 4, 1, shards, 0.01, Ledger(controls), leases), listens=listens)
    await coordinator.start()
    await coordinator.close()
    controls[1].hanging = True
    looking = asyncio.ensure_future(coordinator.look())
    await until(lambda: asked.count("host:1") >= 3)
    controls[1].restart("host:9")
    controls[1].hanging = False
    # Of the calls that were made before none is ever answered.
    await looking
    assert coordinator.topology.shards[1].address == "host:9"
    assert coordinator.standings[1].state == "serving"


async def test_one_that_is_away_holds_up_no_epoch() -> None:
    coordinator, controls = make()
    await coordinator.start()
    await coordinator.close()
    controls[0].away = True
    await coordinator.look()
    controls[0].away, controls[0].hanging = False, True
    controls[1].restart("host:9")
    async with asyncio.timeout(coordinator_module.TELL_TIMEOUT_S / 2):
        await coordinator._look_at(1)
    assert coordinator.topology.shards[1].address == "host:9"


async def test_a_new_coordinator_renews_the_leases_of_those_that_answer_though_another_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controls = {number: Control(number) for number in range(3)}
    first, ledger = make_for(controls)
    await first.start()
    await first.close()
    monkeypatch.setattr(coordinator_module, "FIRST_LOOK_S", 0.2)
    controls[2].hanging = True
    CLOCK.now_s = LEASE_S - 0.1
    following, _ = make_for(controls, holders=ledger.held)
    await following.start()
    CLOCK.now_s = LEASE_S + 1
    assert [control.lease.is_held for control in controls.values()] == [True, True, False]
    await following.close()


async def test_a_shard_is_looked_at_again_after_a_look_has_failed_in_a_way_that_nobody_foresaw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coordinator, controls = make(1)
    await coordinator.start()

    stand, failures = coordinator._stand, 0

    async def fails_once(shard_id: int, standing: Standing) -> None:
        nonlocal failures
        failures += 1
        if failures == 1:
            raise KeyError("unforeseen")
        await stand(shard_id, standing)

    monkeypatch.setattr(coordinator, "_stand", fails_once)
    await until(lambda: failures >= 1)
    controls[0].restart("elsewhere")
    await until(lambda: coordinator.topology.shards[0].address == "elsewhere")
    await coordinator.close()
