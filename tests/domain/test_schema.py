from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profile_service.domain.features import KINDS
from profile_service.domain.layout import Layout
from profile_service.domain.schema import SHIPPED, Schema, load_schema, parse_schema
from profile_service.errors import StartupError
from profile_service.wire.plan import WirePlan
from tests.domain.strategies import declaration, declarations, dump

MINIMAL = "name: s\nevents: {view: {weight: 1}}\nfeatures: {n: {kind: counter}}"


# --- the shipped schemas ---


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_schema_can_be_laid_out_and_read(name: str) -> None:
    schema = load_schema(name)
    assert schema.name == name
    assert Layout.compile(schema).row_bytes > 0
    WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)


def test_the_marketplace_is_as_promised() -> None:
    schema = load_schema("marketplace")
    assert [(event.name, event.weight) for event in schema.event_types] == [
        ("view", 1),
        ("favorite", 4),
        ("contact", 8),
    ]
    assert schema.ttl_s == 180 * 86_400
    assert {spec.name: (spec.kind, spec.half_life_s) for spec in schema.features} == {
        "color": ("categorical", 30 * 86_400),
        "make": ("top_k", 30 * 86_400),
        "price": ("distribution", 30 * 86_400),
        "mileage": ("distribution", 30 * 86_400),
        "contacts": ("counter", None),
        "views_24h": ("window_count", None),
        "last_search": ("latest", None),
        "recent_items": ("recent", None),
        "distinct_items": ("distinct", None),
    }
    assert schema.text_attributes == ("color", "make", "query", "item_id")
    assert schema.number_attributes == ("price", "mileage")
    color = schema.features[0].options.model_dump()
    assert (len(color["values"]), color["prior"], color["prior_strength"]) == (13, "population", 5)


def test_the_retail_schema_takes_a_shops_events() -> None:
    schema = load_schema("retail")
    assert schema.event_type_names == ("view", "cart", "purchase", "return")
    assert schema.text_attributes == ("brand", "category", "country", "item_id")
    assert schema.number_attributes == ("price",)


@pytest.mark.parametrize(("name", "fingerprint"), [("marketplace", "6297c76959085fd8"), ("retail", "97d95f9ac23bf75b")])
def test_the_fingerprint_of_a_shipped_schema_stays(name: str, fingerprint: str) -> None:
    """Snapshots carry it: where this fails, every row on disk is taken for another schema's and migrated."""
    assert load_schema(name).fingerprint == fingerprint


def test_a_schema_is_loaded_by_name_or_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    assert load_schema(path).name == load_schema(str(path)).name == "s"


@pytest.mark.parametrize("content", [None, b"name: \xff\xfe"])
def test_a_file_that_cannot_be_read_says_what_to_give(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "gone.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StartupError, match=r"gone\.yaml: .*give a schema file, or marketplace or retail"):
        load_schema(path)


# --- what a file means ---


def test_what_is_left_out_has_its_default() -> None:
    schema = parse_schema(
        "name: s\nevents: {view: {weight: 1}, buy: {weight: 2}}\n"
        "features: {n: {kind: counter}, c: {kind: categorical, attribute: a, values: [x]},"
        " t: {kind: top_k, attribute: a}, r: {kind: recent, attribute: a}, d: {kind: distinct, attribute: a}}"
    )
    assert schema.ttl_s is None
    assert {spec.events for spec in schema.features} == {("view", "buy")}
    assert {spec.half_life_s for spec in schema.features} == {None}
    options = {spec.name: spec.options.model_dump() for spec in schema.features}
    assert (options["c"]["prior"], options["c"]["prior_strength"]) == ("uniform", 5.0)
    assert (options["t"]["k"], options["r"]["size"], options["d"]["precision"]) == (10, 20, 8)


def test_a_feature_takes_its_own_half_life_before_the_schemas() -> None:
    schema = parse_schema(
        "name: s\nhalf_life: 1d\nevents: {view: {weight: 1}}\nfeatures:\n"
        "  inherits: {kind: counter}\n"
        "  own:      {kind: counter, half_life: 2h}\n"
        "  never:    {kind: counter, half_life: none}\n"
        "  cannot:   {kind: latest, attribute: a}\n"
    )
    assert {spec.name: spec.half_life_s for spec in schema.features} == {
        "inherits": 86_400,
        "own": 7_200,
        "never": None,
        "cannot": None,
    }


def test_a_features_events_stand_in_the_schemas_order() -> None:
    schema = parse_schema(
        "name: s\nevents: {a: {weight: 1}, b: {weight: 1}, c: {weight: 1}}\n"
        "features: {n: {kind: counter, events: [c, a]}}"
    )
    assert schema.features[0].events == ("a", "c")


def test_texts_are_taken_as_written_whatever_yaml_takes_them_for() -> None:
    schema = parse_schema(
        "name: on\nevents: {yes: {weight: 1}}\nfeatures:\n"
        "  off: {kind: categorical, attribute: no,"
        '        values: [on, off, yes, no, 007, 1.50, null, ~, 1e3, 12:30, 2020-13-45, " x"]}\n'
        "  y:   {kind: counter, events: [yes]}\n"
    )
    assert (schema.name, schema.event_type_names, schema.features[0].name) == ("on", ("yes",), "off")
    options = schema.features[0].options.model_dump()
    assert options["attribute"] == "no"
    assert options["values"] == [
        "on", "off", "yes", "no", "007", "1.50", "null", "~", "1e3", "12:30", "2020-13-45", " x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "weight"), [("1", 1.0), ("010", 10.0), ("1e3", 1000.0), ("+2.5E-1", 0.25), (".5", 0.5), ("3.", 3.0)]
)
def test_numbers_are_decimal_however_they_are_written(written: str, weight: float) -> None:
    schema = parse_schema(f"name: s\nevents: {{view: {{weight: {written}}}}}\nfeatures: {{n: {{kind: counter}}}}")
    assert schema.event_types[0].weight == weight


def test_aliases_and_merge_keys_repeat_what_they_name() -> None:
    schema = parse_schema(
        "name: s\nevents:\n  view: &one {weight: 1}\n  open: *one\nfeatures:\n"
        "  a: &base {kind: top_k, attribute: make, k: 3}\n"
        "  b: {<<: *base, k: 5}\n"
        "  c: {k: 7, <<: [{attribute: item}, *base]}\n"
    )
    assert [event.weight for event in schema.event_types] == [1, 1]
    read = [(spec.options.model_dump()["attribute"], spec.options.model_dump()["k"]) for spec in schema.features]
    assert read == [("make", 3), ("make", 5), ("item", 7)]


@pytest.mark.parametrize(
    "written", ["\ufeff" + MINIMAL, MINIMAL.replace("\n", "\r\n"), "%YAML 1.1\n---\n" + MINIMAL, "# é\n" + MINIMAL]
)
def test_a_file_may_come_from_any_editor(written: str) -> None:
    assert parse_schema(written).fingerprint == parse_schema(MINIMAL).fingerprint


@given(declarations(), st.sampled_from([{"default_flow_style": True}, {"default_flow_style": False}, {"width": 20}]))
def test_a_schema_written_out_parses_back_to_the_same(declared: dict[str, Any], style: dict[str, Any]) -> None:
    first = parse_schema(dump(declared))
    assert [event.name for event in first.event_types] == list(declared["events"])
    assert [(spec.name, spec.kind) for spec in first.features] == [
        (name, feature["kind"]) for name, feature in declared["features"].items()
    ]
    for text in (dump(declaration(first), **style), json.dumps(declaration(first), indent=1, ensure_ascii=False)):
        again = parse_schema(text)
        assert replace(again, text=first.text) == first
        assert again.fingerprint == first.fingerprint


def test_a_schema_travels_between_processes() -> None:
    schema = load_schema("marketplace")
    there: Schema = pickle.loads(pickle.dumps(schema))  # noqa: S301 our own bytes
    assert there == schema
    assert there.fingerprint == schema.fingerprint


# --- the fingerprint ---


def fingerprint(declared: dict[str, Any]) -> str:
    return parse_schema(dump(declared)).fingerprint


DECLARED: dict[str, Any] = {
    "name": "s",
    "half_life": "1d",
    "ttl": "9d",
    "events": {"view": {"weight": 1}, "buy": {"weight": 2}},
    "features": {
        "n": {"kind": "counter"},
        "c": {"kind": "categorical", "attribute": "color", "values": ["red", "blue"]},
        "p": {"kind": "distribution", "attribute": "price", "bins": {"scale": "log", "min": 1, "max": 9, "count": 3}},
        "t": {"kind": "top_k", "attribute": "make"},
        "r": {"kind": "recent", "attribute": "make"},
    },
}


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("a feature's name", lambda s: s["features"].update(m=s["features"].pop("n"))),
        ("a kind", lambda s: s["features"]["r"].update(kind="latest")),
        ("an attribute", lambda s: s["features"]["t"].update(attribute="model")),
        ("an option", lambda s: s["features"]["t"].update(k=11)),
        ("a value", lambda s: s["features"]["c"].update(values=["red", "green"])),
        ("the order of values", lambda s: s["features"]["c"].update(values=["blue", "red"])),
        ("a bin", lambda s: s["features"]["p"]["bins"].update(max=10)),
        ("a feature's events", lambda s: s["features"]["n"].update(events=["buy"])),
        ("a half-life", lambda s: s["features"]["n"].update(half_life="2d")),
        ("the default half-life", lambda s: s.update(half_life="none")),
        ("a weight", lambda s: s["events"]["buy"].update(weight=3)),
        ("an event type's name", lambda s: s["events"].update(sell=s["events"].pop("buy"))),
        ("the order of the features", lambda s: s["features"].update(n=s["features"].pop("n"))),
        ("an event type more", lambda s: s["events"].update(sell={"weight": 1})),
        ("a feature less", lambda s: s["features"].pop("r")),
        ("a feature more", lambda s: s["features"].update(d={"kind": "distinct", "attribute": "make"})),
    ],
)
def test_what_changes_the_meaning_of_a_row_changes_the_fingerprint(
    what: str, change: Callable[[dict[str, Any]], object]
) -> None:
    changed = copy.deepcopy(DECLARED)
    change(changed)
    assert fingerprint(changed) != fingerprint(DECLARED), what


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("the schema's name", lambda s: s.update(name="other")),
        ("the time to live", lambda s: s.pop("ttl")),
        ("a default written out", lambda s: s["features"]["t"].update(k=10)),
        ("all events named", lambda s: s["features"]["n"].update(events=["buy", "view"])),
        ("the half-life written out", lambda s: s["features"]["n"].update(half_life="24h")),
        ("an integer as a decimal", lambda s: s["events"]["view"].update(weight=1.0)),
        ("the order of event types", lambda s: s["events"].update(view=s["events"].pop("view"))),
        ("a prior", lambda s: s["features"]["c"].update(prior="population")),
        ("a prior's strength", lambda s: s["features"]["c"].update(prior_strength=1)),
        ("a unit", lambda s: s["features"]["p"].update(unit="EUR")),
        ("the order of keys", lambda s: s.update(events=s.pop("events"))),
    ],
)
def test_what_a_row_does_not_know_leaves_the_fingerprint(what: str, change: Callable[[dict[str, Any]], object]) -> None:
    changed = copy.deepcopy(DECLARED)
    change(changed)
    assert fingerprint(changed) == fingerprint(DECLARED), what


def test_comments_and_layout_leave_the_fingerprint() -> None:
    text = dump(DECLARED)
    commented = "# a shop\n\n" + text.replace("\n", "  # why\n")
    assert parse_schema(commented).fingerprint == parse_schema(text).fingerprint
    assert parse_schema(dump(DECLARED, default_flow_style=True)).fingerprint == parse_schema(text).fingerprint


def test_every_kind_says_what_it_reads_and_whether_it_decays() -> None:
    assert {(kind.name, kind.reads, kind.decays) for kind in KINDS.values()} == {
        ("counter", None, True),
        ("categorical", "text", True),
        ("distribution", "number", True),
        ("top_k", "text", True),
        ("window_count", None, False),
        ("latest", "text", False),
        ("recent", "text", False),
        ("distinct", "text", False),
    }
