"""The typed views over a profile's message."""

from __future__ import annotations

import datetime as dt

import pytest

from profile_client import CategoricalFeature, CounterFeature, Profile
from userprofile.v1 import profile_pb2


@pytest.fixture
def profile() -> Profile:
    message = profile_pb2.Profile(user_id="u1", event_count=7)
    message.first_seen_time.FromSeconds(10)
    message.read_time.FromSeconds(20)
    color = message.features["color"].categorical
    color.weight, color.confidence = 4.0, 0.5
    color.values.add(value="red", weight=3, likelihood=0.6, lift=2.0)
    color.values.add(value="other", weight=1, likelihood=0.4, lift=0.5)
    price = message.features["price"].distribution
    price.weight, price.mean, price.stddev, price.min, price.max = 4, 10, 2, 7, 13
    price.histogram.edges.extend([5, 10, 15])
    price.histogram.weights.extend([0, 2, 2, 0])
    for probability, value in ((0.25, 9), (0.5, 10), (0.75, 11)):
        price.quantiles.add(probability=probability, value=value)
    message.features["unseen"].distribution.histogram.edges.extend([1, 2])
    message.features["make"].top_k.entries.add(value="vw", weight=3, error=1, share=0.75)
    message.features["count"].counter.value = 2.5
    message.features["day"].window_count.value = 3
    message.features["last"].latest.value = "q"
    message.features["last"].latest.time.FromSeconds(15)
    message.features["never"].latest.SetInParent()
    message.features["items"].recent.entries.add(value="i1").time.FromSeconds(12)
    message.features["many"].distinct.estimate = 41.7
    return Profile(message)


def test_a_profile_says_at_a_glance_what_it_holds(profile: Profile) -> None:
    assert [repr(feature) for feature in profile.values()] == [
        "<categorical color: red 0.60, other 0.40>",
        "<counter count: 2.5>",
        "<window_count day: 3>",
        "<recent items: i1>",
        "<latest last: 'q'>",
        "<top_k make: vw>",
        "<distinct many: about 42>",
        "<latest never: nothing seen>",
        "<distribution price: median 10, mean 10>",
        "<distribution unseen: nothing seen>",
    ]
    assert repr(profile).startswith("<Profile 'u1': 7 events, <categorical color")
    assert repr(Profile(profile_pb2.Profile(event_count=9))) == "<Profile of the population: 9 events>"


def test_profiles_are_equal_when_their_messages_are(profile: Profile) -> None:
    other = Profile(profile_pb2.Profile.FromString(profile.message.SerializeToString()))
    assert profile == other
    assert profile["color"] == other["color"]
    assert profile["color"] != other["count"]
    other.message.features["count"].counter.value = 0
    assert profile != other
    assert profile["count"] != other["count"]


def test_features_can_be_walked_through(profile: Profile) -> None:
    assert {name: feature.kind for name, feature in profile.items()} == {
        "color": "categorical",
        "count": "counter",
        "day": "window_count",
        "items": "recent",
        "last": "latest",
        "make": "top_k",
        "many": "distinct",
        "never": "latest",
        "price": "distribution",
        "unseen": "distribution",
    }


def test_a_quantile_that_the_service_does_not_give_is_refused(profile: Profile) -> None:
    with pytest.raises(KeyError, match=r"0\.3 is not among the quantiles \[0\.25, 0\.5, 0\.75\]"):
        profile["price"].quantile(0.3)
    assert profile["unseen"].quantile(0.25) is None


def test_a_feature_of_a_kind_that_this_client_does_not_know_is_still_there() -> None:
    message = profile_pb2.Profile()
    message.features["new"].SetInParent()
    assert Profile(message)["new"].kind == "unknown"
    assert repr(Profile(message)["new"]) == "<unknown new>"


def test_every_kind_has_its_accessors(profile: Profile) -> None:
    assert profile["color"].likelihood("red") == pytest.approx(0.6)
    assert profile["color"].lift("other") == pytest.approx(0.5)
    assert profile["color"].confidence == 0.5
    assert profile["price"].median == 10
    assert profile["price"].quantile(0.25) == 9
    assert (profile["price"].mean, profile["price"].stddev, profile["price"].weight) == (10, 2, 4)
    assert (profile["price"].min, profile["price"].max) == (7, 13)
    assert profile["price"].histogram.edges == (5, 10, 15)
    assert profile["price"].histogram.weights == (0, 2, 2, 0)
    assert profile["unseen"].median is None
    assert profile["unseen"].mean is None
    assert profile["make"].values == ["vw"]
    assert profile["make"].entries[0].error == 1
    assert profile["count"].value == 2.5
    assert profile["day"].value == 3
    assert profile["last"].value == "q"
    assert profile["last"].time == dt.datetime(1970, 1, 1, 0, 0, 15, tzinfo=dt.UTC)
    assert profile["never"].value is None
    assert profile["never"].time is None
    assert profile["items"].values == ["i1"]
    assert profile["items"].entries[0].time == dt.datetime(1970, 1, 1, 0, 0, 12, tzinfo=dt.UTC)
    assert profile["many"].estimate == pytest.approx(41.7)


def test_a_profile_is_a_mapping_that_says_what_it_has(profile: Profile) -> None:
    assert (profile.user_id, profile.event_count) == ("u1", 7)
    assert profile.last_seen_time is None
    assert profile.first_seen_time == dt.datetime(1970, 1, 1, 0, 0, 10, tzinfo=dt.UTC)
    assert "color" in profile
    assert len(profile) == len(list(profile)) == 10
    assert profile.feature("count", CounterFeature).value == 2.5
    assert profile.to_dict()["eventCount"] == "7"
    assert "'u1'" in repr(profile)
    with pytest.raises(KeyError, match="colour"):
        profile["colour"]
    with pytest.raises(KeyError, match="red, other"):
        profile["color"].likelihood("blue")
    with pytest.raises(TypeError):
        profile.feature("count", CategoricalFeature)
