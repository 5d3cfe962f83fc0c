"""Schemas of every kind with every option, and events for them: what property tests draw from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from hypothesis import strategies as st

from profile_service.domain.duration import format_duration
from profile_service.domain.features import KINDS
from profile_service.domain.schema import Schema, parse_schema
from tests.domain.oracles.profile import Event

DAY_NS = 86_400 * 10**9
TEXTS = ("make", "item", "ключ")
NUMBERS = ("price", "mileage")
WORDS = ("red", "blue", "no", "other", "007", "", "škoda", "日産", "w" * 300)
USERS = ("u1", "u2", "ü/3")

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", fullmatch=True)
WEIGHTS = st.sampled_from([1, 0.25, 7.5, 1e-3, 1000]) | st.floats(0.01, 100)
HALF_LIVES = st.sampled_from(["none", "10m", "12h", "30d", "1000d", "250ms"])
VALUES = st.sampled_from([word for word in WORDS if word not in ("other", "")])
EDGES = st.lists(st.floats(-1000, 1e6), min_size=2, max_size=12, unique=True).map(sorted)


def schemas(kinds: Sequence[str] = tuple(KINDS)) -> st.SearchStrategy[Schema]:
    """Any schema of 1 to 6 features of these kinds."""
    return declarations(kinds).map(lambda declared: parse_schema(dump(declared)))


@st.composite
def declarations(draw: st.DrawFn, kinds: Sequence[str] = tuple(KINDS)) -> dict[str, Any]:
    """Any schema of 1 to 6 features of these kinds, as the mapping that its file holds."""
    types = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    declared: dict[str, Any] = {"name": draw(NAMES), "events": {name: {"weight": draw(WEIGHTS)} for name in types}}
    for key in ("half_life", "ttl"):
        if draw(st.booleans()):
            declared[key] = draw(HALF_LIVES)
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    declared["features"] = {name: draw(_feature(draw(st.sampled_from(kinds)), types)) for name in names}
    return declared


@st.composite
def changed(draw: st.DrawFn, schema: Schema) -> tuple[Schema, list[str]]:
    """A schema that somebody made of this one, and the features that they must let start anew for it."""
    declared, reset = declaration(schema), []
    features = declared["features"]
    for name in draw(st.sets(st.sampled_from(sorted(declared["events"])))):
        declared["events"][name]["weight"] = draw(WEIGHTS)
    for name in draw(st.lists(NAMES, max_size=2)):
        declared["events"].setdefault(name, {"weight": draw(WEIGHTS)})
    types = list(declared["events"])
    for name in list(features):
        feature, what = features[name], draw(st.sampled_from(["keep", "keep", "convert", "convert", "else", "drop"]))
        if draw(st.integers(0, 3)) == 0:
            feature["events"] = draw(st.lists(st.sampled_from(types), min_size=1, unique=True))
        if what == "drop":
            del features[name]
        elif what == "convert":
            feature |= draw(_converted(feature))
        elif what == "else":
            kind = draw(st.sampled_from([feature["kind"], *KINDS]))
            features[name] = draw(_feature(kind, types))
            reset.append(name)
    for name in draw(st.lists(NAMES, min_size=0 if features else 1, max_size=2)):
        if name not in features:
            features[name] = draw(_feature(draw(st.sampled_from(list(KINDS))), types))
            # One that was dropped comes back as another.
            reset += [spec.name for spec in schema.features if spec.name == name]
    declared["features"] = {name: features[name] for name in draw(st.permutations(sorted(features)))}
    declared["ttl"] = draw(HALF_LIVES)
    unused = set(types).difference(*(feature.get("events", types) for feature in features.values()))
    for name in unused if draw(st.booleans()) and len(unused) < len(types) else ():
        del declared["events"][name]
    return parse_schema(dump(declared)), reset


@st.composite
def _converted(draw: st.DrawFn, feature: Mapping[str, Any]) -> dict[str, Any]:
    """What of a feature may change without a reset."""
    if feature["kind"] == "categorical":
        return draw(_OPTIONS["categorical"])
    if feature["kind"] == "top_k":
        return {"k": draw(st.integers(1, 12) | st.just(70))}
    if feature["kind"] == "recent":
        return {"size": draw(st.integers(1, 8))}
    return {"unit": "apples"} if feature["kind"] == "distribution" else {}


@st.composite
def _feature(draw: st.DrawFn, kind: str, types: Sequence[str]) -> dict[str, Any]:
    feature: dict[str, Any] = {"kind": kind}
    if KINDS[kind].reads is not None:
        feature["attribute"] = draw(st.sampled_from(TEXTS if KINDS[kind].reads == "text" else NUMBERS))
    if draw(st.integers(0, 3)) == 0:
        feature["events"] = draw(st.lists(st.sampled_from(types), min_size=1, unique=True))
    if KINDS[kind].decays and draw(st.booleans()):
        feature["half_life"] = draw(HALF_LIVES)
    return feature | draw(_OPTIONS[kind])


@st.composite
def _bins(draw: st.DrawFn) -> dict[str, Any]:
    scale = draw(st.sampled_from(["log", "linear", "explicit"]))
    if scale == "explicit":
        return {"scale": scale, "edges": draw(EDGES)}
    least = draw(st.sampled_from([0.1, 1, 500]) if scale == "log" else st.sampled_from([-5, 0, 0.1, 500]))
    return {"scale": scale, "min": least, "max": least + draw(st.floats(1, 1e6)), "count": draw(st.integers(1, 40))}


_OPTIONS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "counter": st.just({}),
    "categorical": st.fixed_dictionaries(
        {"values": st.lists(VALUES, min_size=1, max_size=6, unique=True)},
        optional={"prior": st.sampled_from(["uniform", "population"]), "prior_strength": st.floats(0.01, 100)},
    ),
    "distribution": st.fixed_dictionaries({"bins": _bins()}, optional={"unit": st.sampled_from(["", "EUR", "km²"])}),
    "top_k": st.fixed_dictionaries({}, optional={"k": st.integers(1, 12)}),
    "window_count": st.sampled_from(
        [{"window": "24h", "bucket": "1h"}, {"window": "5m", "bucket": "7s"}, {"window": "1s", "bucket": "250ms"}]
    ),
    "latest": st.just({}),
    "recent": st.fixed_dictionaries({}, optional={"size": st.integers(1, 8)}),
    "distinct": st.fixed_dictionaries({}, optional={"precision": st.integers(4, 12)}),
}


@st.composite
def events_of(draw: st.DrawFn, schema: Schema, now_ns: int, max_size: int = 40, min_size: int = 1) -> list[Event]:
    """Events of a few users in the order of arrival: repeated, at equal times, seconds or decades old, without some of
    their attributes, with prices that nobody asks.
    """
    ages = st.one_of(
        st.integers(-200 * 10**9, 3600 * 10**9),
        st.sampled_from([0, 1, 3600 * 10**9, DAY_NS]),
        st.integers(0, 60 * DAY_NS),
        st.integers(0, 20 * 365 * DAY_NS),
    )
    times = draw(st.lists(ages.map(lambda age: now_ns - age), min_size=1, max_size=8))
    texts = st.sampled_from(WORDS) | st.integers(0, 40).map(lambda n: f"m{n}")
    numbers = st.sampled_from([0.0, -3.5, 0.1, 1.0, 500.0, 11_111_111.0, 1e12]) | st.floats(-100, 1e7, allow_nan=False)
    attributes = st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(schema.text_attributes, texts) | dict.fromkeys(schema.number_attributes, numbers),
    )
    event = st.builds(
        Event,
        user=st.sampled_from(USERS),
        type=st.sampled_from(schema.event_type_names),
        time_ns=st.sampled_from(times),
        attributes=attributes,
    )
    drawn = draw(st.lists(event, min_size=min_size, max_size=max_size))
    again = draw(st.lists(st.sampled_from(drawn), max_size=max_size // 4))
    return [*drawn, *again]


def dump(declared: Mapping[str, Any], **style: Any) -> str:
    """The schema file that declares this."""
    return str(yaml.safe_dump(dict(declared), sort_keys=False, allow_unicode=True, **style))


def declaration(schema: Schema) -> dict[str, Any]:
    """A schema as the mapping that its file could hold, every option written out."""
    features = {}
    for spec in schema.features:
        features[spec.name] = {
            "kind": spec.kind,
            "events": list(spec.events),
            **spec.options.model_dump(exclude_none=True),
        }
        if KINDS[spec.kind].decays:
            features[spec.name]["half_life"] = format_duration(spec.half_life_s)
    return {
        "name": schema.name,
        "events": {event.name: {"weight": event.weight} for event in schema.event_types},
        "ttl": format_duration(schema.ttl_s),
        "features": features,
    }
