"""The demo, and whether the profiles find what the sample's shoppers were made to like."""

from __future__ import annotations

import sys
import time

import grpc
import numpy as np
import pytest
from rich.console import Console

from profile_service.commands.demo import SHOWN_SHOPPER
from profile_service.commands.send import replay
from profile_service.sample import Sample, load_sample
from profile_service.sample.listings import COLORS
from profile_service.sample.shoppers import shopper_id
from tests.e2e.serving import ServeProcess, run
from tests.e2e.stores import IN_BOTH_STORES
from userprofile.v1 import profile_pb2, profile_service_pb2, profile_service_pb2_grpc

ENOUGH_EVENTS = 40
BIN_RATIO = (500_000 / 500) ** (1 / 32)
"""Of the price's bins: nothing finer can be told about a quantile."""


class _NoStop:
    asked = False


@pytest.fixture(scope="module")
def sample() -> Sample:
    return load_sample()


@pytest.fixture(scope="module")
def found(service: ServeProcess, sample: Sample) -> dict[int, profile_pb2.Profile]:
    """Profiles of the shoppers with enough events, by shopper, after a replay into the service."""
    replay(sample.serialized(time.time_ns()), len(sample.events), service.grpc_address, Console(stderr=True), _NoStop())
    counts = np.bincount(sample.events.shopper, minlength=len(sample.tastes))
    enough = np.flatnonzero(counts >= ENOUGH_EVENTS).tolist()
    profiles: dict[int, profile_pb2.Profile] = {}
    with grpc.insecure_channel(service.grpc_address) as channel:
        stub = profile_service_pb2_grpc.ProfileServiceStub(channel)
        for start in range(0, len(enough), 500):
            some = enough[start : start + 500]
            request = profile_service_pb2.BatchGetProfilesRequest(user_ids=[shopper_id(shopper) for shopper in some])
            profiles.update(zip(some, stub.BatchGetProfiles(request, timeout=60).profiles, strict=True))
    assert [profiles[shopper].event_count for shopper in enough] == counts[enough].tolist()
    return profiles


def quartiles(profile: profile_pb2.Profile, feature: str) -> tuple[float, float]:
    at = {round(point.probability, 2): point.value for point in profile.features[feature].distribution.quantiles}
    return at[0.25], at[0.75]


def share(hits: list[bool], what: str) -> float:
    sys.stdout.write(f"{what}: {np.mean(hits):.2%} of {len(hits)} shoppers with at least {ENOUGH_EVENTS} events\n")
    return float(np.mean(hits))


@IN_BOTH_STORES
def test_the_likeliest_colors_are_the_hidden_ones(found: dict[int, profile_pb2.Profile], sample: Sample) -> None:
    hits = []
    for shopper, profile in found.items():
        liked = {COLORS[color] for color in sample.tastes.colors[shopper]}
        values = profile.features["color"].categorical.values
        hits.append({value.value for value in values[: len(liked)]} == liked)
    assert share(hits, "the likeliest colours are exactly the hidden ones") >= 0.98


@IN_BOTH_STORES
def test_the_heaviest_makes_are_the_hidden_ones(found: dict[int, profile_pb2.Profile], sample: Sample) -> None:
    hits = []
    for shopper, profile in found.items():
        liked = set(sample.tastes.makes[shopper])
        hits.append({entry.value for entry in profile.features["make"].top_k.entries[: len(liked)]} == liked)
    assert share(hits, "the heaviest makes are exactly the hidden ones") >= 0.98


@IN_BOTH_STORES
@pytest.mark.parametrize("feature", ["price", "mileage"])
def test_the_middle_half_lies_in_the_hidden_band(
    found: dict[int, profile_pb2.Profile], sample: Sample, feature: str
) -> None:
    bands = sample.tastes.price_eur if feature == "price" else sample.tastes.mileage_km
    within, nearly = [], []
    for shopper, profile in found.items():
        low, high = bands[shopper]
        lower, upper = quartiles(profile, feature)
        within.append(bool(low <= lower and upper <= high))
        nearly.append(bool(low / BIN_RATIO <= lower and upper <= high * BIN_RATIO))
    assert share(within, f"both quartiles of {feature} lie in the hidden band") >= 0.93
    assert share(nearly, f"both quartiles of {feature} lie in it, give or take a bin") >= 0.995


def test_the_demo_replays_shows_a_profile_and_stops_when_told(sample: Sample) -> None:
    done = run("demo", "--exit-after-replay", "--grpc-port", "0", "--http-port", "0")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{len(sample.events):,} events" in done.stderr, "the progress bar's last state"
    user_id = shopper_id(SHOWN_SHOPPER)
    for part in (
        "ready: gRPC 127.0.0.1:",
        "hidden tastes",
        user_id,
        "curl",
        "grpcurl",
        f"/v1/profiles/{user_id}",
        "/docs",
    ):
        assert part in done.stdout, part
    for color in sample.tastes.colors[SHOWN_SHOPPER]:
        assert done.stdout.count(COLORS[color]) >= 2, "once as a taste, once as found"
