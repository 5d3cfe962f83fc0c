"""Profiles follow a changed schema: what is kept answers as before and goes on, what is new begins there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from profile_service.domain import migrate as migration
from profile_service.domain.features import KINDS
from profile_service.domain.memory import release, reserve
from profile_service.domain.migrate import Changes, compare, migrate
from profile_service.domain.population import Population
from profile_service.domain.schema import FeatureSpec, Schema, load_schema, parse_schema
from profile_service.domain.table import ProfileTable
from profile_service.errors import SchemaChangeRefused, StartupError
from profile_service.wire.plan import WirePlan
from tests.domain.oracles.kinds import KIND_ORACLES, Oracle, Seen, close
from tests.domain.oracles.profile import Event
from tests.domain.strategies import DAY_NS, changed, declaration, dump, events_of, schemas
from tests.domain.test_profile_table import apply as apply_planned
from tests.domain.test_profile_table import fresh_table
from userprofile.v1 import profile_pb2

NOW_NS = 1_790_000_000 * 10**9
EVERYONE = ""


def apply(table: ProfileTable, events: Sequence[Event]) -> None:
    schema = table.schema
    plan = WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)
    for start in range(0, len(events), 7):
        apply_planned(table, events[start : start + 7], plan)


def population_of(table: ProfileTable) -> Population:
    return Population.merge(table.schema, [table.population.to_state(table.texts)])


def read(table: ProfileTable, user: str, read_ns: int = NOW_NS) -> profile_pb2.Profile:
    """A user's profile as of then; everyone's for no user."""
    population = population_of(table)
    encoded = population.profile(read_ns) if user == EVERYONE else table.profile(user, read_ns, population=population)
    return profile_pb2.Profile.FromString(encoded)


def answers(table: ProfileTable, names: Iterable[str], read_ns: int = NOW_NS) -> dict[tuple[str, str], bytes]:
    """What every user's features say, and everyone's, byte for byte."""
    users = [EVERYONE, *(table.users.bytes_of(number).decode() for number in table.users.numbers().tolist())]
    said: dict[tuple[str, str], bytes] = {}
    for user in users:
        profile = read(table, user, read_ns)
        said |= {(user, name): profile.features[name].SerializeToString(deterministic=True) for name in names}
    return said


def forever(schema: Schema) -> Schema:
    """The same without an end: no profile is forgotten, however long after its events it is read."""
    return replace(schema, ttl_s=None)


@st.composite
def histories(draw: st.DrawFn, kinds: Sequence[str] = tuple(KINDS)) -> tuple[Schema, Schema, list[str], Any, Any]:
    """A schema, one that was made of it, what it resets, and events before and after; no two events at one time."""
    old = forever(draw(schemas(kinds)))
    new, reset = draw(changed(old))
    before, after = draw(events_of(old, NOW_NS, min_size=20)), draw(events_of(new, NOW_NS))
    events = [replace(event, time_ns=event.time_ns // 1000 * 1000 + n) for n, event in enumerate([*before, *after])]
    return old, forever(new), reset, events[: len(before)], events[len(before) :]


# --- against the oracles ---


class MigratedOracle:
    """One profile's events, before and after; each feature's oracle is made of those that it should have."""

    def __init__(self, old: Schema, new: Schema, changes: Changes) -> None:
        self._old = {spec.name: spec for spec in old.features}
        self._new = {spec.name: spec for spec in new.features}
        self._weights = [{e.name: e.weight for e in schema.event_types} for schema in (old, new)]
        self._changes = changes
        self.before: list[Event] = []
        self.after: list[Event] = []

    def of(self, name: str) -> Oracle:
        spec = self._new[name]
        oracle = KIND_ORACLES[spec.kind](spec.options, spec.half_life_s)
        if name in self._changes.kept or name in self._changes.converted:
            was = self._old[name]
            oracle.seen = [_converted(seen, was, spec) for seen in self._seen(was, self.before, 0)]
            if spec.kind == "recent":
                once = {seen.value: seen for seen in sorted(oracle.seen, key=lambda seen: seen.time_ns)}
                listed = sorted(once.values(), key=lambda seen: seen.time_ns)[-was.options.size :]  # type: ignore[attr-defined]
                oracle.seen = listed[-spec.options.size :]  # type: ignore[attr-defined]
        oracle.seen += self._seen(spec, self.after, 1)
        return oracle

    def _seen(self, spec: FeatureSpec, events: list[Event], era: int) -> list[Seen]:
        attribute = getattr(spec.options, "attribute", None)
        return [
            Seen(event.time_ns, self._weights[era][event.type], event.attributes.get(attribute or ""))
            for event in events
            if event.type in spec.events and (attribute is None or attribute in event.attributes)
        ]

    def check(self, message: profile_pb2.Profile, everyone: MigratedOracle) -> None:
        events = [*self.before, *self.after]
        assert message.event_count == len(events)
        assert message.first_seen_time.ToNanoseconds() == min(event.time_ns for event in events)
        assert message.last_seen_time.ToNanoseconds() == max(event.time_ns for event in events)
        assert set(message.features) == set(self._new)
        read_ns = message.read_time.ToNanoseconds()
        for name, spec in self._new.items():
            oracle, feature = self.of(name), message.features[name]
            assert feature.WhichOneof("kind") == spec.kind, name
            if name in self._changes.converted and spec.kind == "top_k":
                check_bounds(name, oracle, feature.top_k, read_ns)
            else:
                oracle.check(name, feature, read_ns, [everyone.of(name)])


def _converted(seen: Seen, was: FeatureSpec, spec: FeatureSpec) -> Seen:
    """A value that was counted as `other` stays there, whatever is listed now."""
    values = getattr(was.options, "values", None)
    return seen if values is None or seen.value in values else replace(seen, value="other")


def check_bounds(name: str, oracle: Oracle, answer: profile_pb2.TopK, read_ns: int) -> None:
    """Of counters that were fewer once, or more: each true weight within its bounds, and the heaviest not missing."""
    newest = max((seen.time_ns for seen in oracle.seen), default=read_ns)
    true: dict[str, float] = {}
    for weight, value in oracle.decayed(newest):
        true[value] = true.get(value, 0.0) + weight
    total, scale = sum(true.values()), oracle.decay(newest, read_ns)
    close(f"{name}.weight", answer.weight, total * scale)
    assert len(answer.entries) <= oracle.options.k
    if scale < 1e-200:
        return
    slack = 2e-4 * total
    for entry in answer.entries:
        assert entry.weight / scale + slack >= true[entry.value], (name, entry, true)
        assert (entry.weight - entry.error) / scale - slack <= true[entry.value], (name, entry, true)
    lightest = min((entry.weight / scale for entry in answer.entries), default=0.0)
    listed = {entry.value for entry in answer.entries}
    if len(answer.entries) == oracle.options.k:
        missing = {value: weight for value, weight in true.items() if value not in listed}
        assert all(weight <= lightest + slack for weight in missing.values()), (name, answer, true)


@pytest.mark.parametrize("kinds", [["categorical"], ["top_k"], ["recent"], list(KINDS)], ids="+".join)
@settings(max_examples=25)
@given(data=st.data(), read_after_ns=st.integers(0, 40 * DAY_NS))
def test_profiles_follow_any_change_of_the_schema(kinds: list[str], data: st.DataObject, read_after_ns: int) -> None:
    old, new, reset, before, after = data.draw(histories(kinds))
    table = fresh_table(old)
    apply(table, before)
    changes = compare(old, new, reset)
    assert not changes.faults
    oracles: dict[str, MigratedOracle] = {}

    def oracle_of(user: str) -> MigratedOracle:
        return oracles.setdefault(user, MigratedOracle(old, new, changes))

    def check() -> None:
        for user, oracle in oracles.items():
            oracle.check(read(table, user, NOW_NS + read_after_ns), oracles[EVERYONE])

    for event in before:
        oracle_of(event.user).before.append(event)
        oracle_of(EVERYONE).before.append(event)
    table = migrate(table, new, reset)
    check()
    apply(table, after)
    for event in after:
        oracle_of(event.user).after.append(event)
        oracle_of(EVERYONE).after.append(event)
    check()


@settings(max_examples=50)
@given(histories())
def test_users_merge_after_a_change_as_if_there_had_been_none(
    history: tuple[Schema, Schema, list[str], list[Event], list[Event]],
) -> None:
    old, new, reset, before, after = history
    users = list(dict.fromkeys(event.user for event in [*before, *after]))
    assume(len(users) > 1)
    table = fresh_table(old)
    apply(table, before)
    table = migrate(table, new, reset)
    apply(table, after)
    changes = compare(old, new, reset)
    one, everyone = MigratedOracle(old, new, changes), MigratedOracle(old, new, changes)
    everyone.before, everyone.after = before, after
    one.before = [event for event in before if event.user in users[:2]]
    one.after = [event for event in after if event.user in users[:2]]
    # What a shorter list had dropped of either, the oracle of both together does not know.
    shortened = {spec.name for spec in new.features if spec.kind == "recent" and spec.name in changes.converted}
    table.merge(users[0], users[1])
    message = read(table, users[0])
    for name in set(message.features) - shortened:
        spec = next(spec for spec in new.features if spec.name == name)
        if spec.kind == "top_k":
            check_bounds(name, one.of(name), message.features[name].top_k, NOW_NS)
        else:
            one.of(name).check(name, message.features[name], NOW_NS, [everyone.of(name)])


# --- bit by bit ---


@settings(max_examples=60)
@given(histories())
def test_what_is_kept_has_the_same_bits_and_the_rest_is_fresh(
    history: tuple[Schema, Schema, list[str], list[Event], list[Event]],
) -> None:
    old, new, reset, before, _ = history
    table, twin = fresh_table(old), fresh_table(old)
    for each in (table, twin):
        apply(each, before)
    changes = compare(old, new, reset)
    assert {*changes.kept, *changes.converted, *changes.added, *changes.reset} == {spec.name for spec in new.features}
    assert {*changes.kept, *changes.converted, *changes.reset, *changes.dropped} == {spec.name for spec in old.features}
    users, texts = table.users, table.texts
    migrated = migrate(table, new, reset)
    assert (migrated.users, migrated.texts, migrated.schema) == (users, texts, new)
    rows = migrated.users.high_water
    layouts = [(twin.layout, twin.layout.views_of(twin.rows[:rows]), migrated.layout.views_of(migrated.rows[:rows]))]
    layouts += [(twin.population.layout, twin.population.views, migrated.population.views)]
    for layout, (was, (old_layout, old_views, new_views)) in zip(
        (migrated.layout, migrated.population.layout), zip(("rows", "population"), layouts, strict=True), strict=True
    ):
        assert (old_views.i8[:, :4] == new_views.i8[:, :4]).all(), was
        old_slots = dict(zip((f.name for f in old_layout.features), old_layout.slots, strict=True))
        fresh = layout.wide_row()
        for feature, slots in zip(layout.features, layout.slots, strict=True):
            for view, (first, count) in slots.items():
                held = getattr(new_views, view)[:, first : first + count]
                if feature.name in changes.kept:
                    at, size = old_slots[feature.name][view]
                    assert size == count
                    assert np.array_equal(held, getattr(old_views, view)[:, at : at + size]), (was, feature.name)
                elif feature.name not in changes.converted:
                    assert (held == getattr(fresh, view)[:, first : first + count]).all(), (was, feature.name)


@settings(max_examples=60)
@given(histories())
def test_events_after_a_change_count_as_if_the_schema_had_always_been_this_one(
    history: tuple[Schema, Schema, list[str], list[Event], list[Event]],
) -> None:
    """Byte for byte: what is kept as in a table that never knew another schema, what is new as in one that begins."""
    old, new, reset, before, after = history
    changes = compare(old, new, reset)
    same = [name for name, remark in changes.kept.items() if not remark]
    table = fresh_table(old)
    apply(table, before)
    unchanged = answers(table, same)
    table = migrate(table, new, reset)
    assert answers(table, same) == unchanged
    apply(table, after)
    # Event types that the new schema does not have any more count in nothing that it has.
    declared = [event for event in before if event.type in new.event_type_names]
    always, later = fresh_table(new), fresh_table(new)
    apply(always, [*declared, *after])
    apply(later, after)
    said = answers(table, [spec.name for spec in new.features])
    for reference, names in ((always, same), (later, [*changes.added, *changes.reset])):
        expected = answers(reference, names)
        assert expected.items() <= said.items()


@given(histories())
def test_there_and_back_again(history: tuple[Schema, Schema, list[str], list[Event], list[Event]]) -> None:
    """What both changes keep is what it was; the rest may be gone, but is never somebody else's."""
    old, new, reset, before, _ = history
    table = fresh_table(old)
    apply(table, before)
    there, back = compare(old, new, reset), compare(new, old, reset_of(new, old))
    kept = sorted(there.kept.keys() & back.kept.keys())
    said = answers(table, kept)
    table = migrate(table, new, reset)
    table = migrate(table, old, reset_of(new, old))
    assert answers(table, kept) == said
    assert table.layout.row_bytes == fresh_table(old).layout.row_bytes


def reset_of(old: Schema, new: Schema) -> list[str]:
    """The features that a change refuses."""
    return [spec.name for spec in new.features if any(f"feature {spec.name}:" in f for f in compare(old, new).faults)]


def test_the_same_rows_become_the_same_rows() -> None:
    """A replay migrates again, at the same place of the log."""
    old = load_schema("marketplace")
    new = parse_schema(old.text.replace("k: 10", "k: 4").replace("silver, ", "").replace("size: 20", "size: 22"))
    rng = np.random.default_rng(3)
    colors = rng.choice(["silver", "red", "blue"], 2000)
    makes = rng.integers(0, 30, 2000).tolist()
    events = [
        Event(f"u{n % 41}", "view", NOW_NS - n, {"color": str(color), "make": f"m{make}", "price": 3.0 * make + 1})
        for n, (color, make) in enumerate(zip(colors, makes, strict=True))
    ]
    results = []
    for _ in range(2):
        table = fresh_table(old)
        apply(table, events)
        table = migrate(table, new)
        results.append((table.rows[: table.users.high_water].tobytes(), table.population.copy()))
    assert results[0] == results[1]


# --- where rows lie ---


@pytest.mark.parametrize("block_bytes", [1, 10_000, 1 << 20])
def test_rows_are_rewritten_block_by_block(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(migration, "_BLOCK_BYTES", block_bytes)
    old = load_schema("marketplace")
    table = fresh_table(old)
    apply(table, [Event(f"u{n}", "contact", NOW_NS - n, {"make": f"m{n % 9}", "price": n + 1.0}) for n in range(100)])
    for n in (0, 17, 99):
        assert table.remove(f"u{n}")
    new = parse_schema(old.text.replace("  price:", "  clicks: {kind: counter}\n  price:").replace("k: 10", "k: 11"))
    table = migrate(table, new)
    for n in range(100):
        profile = read(table, f"u{n}")
        if n in (0, 17, 99):
            assert not profile.event_count
        else:
            assert profile.features["price"].distribution.mean == n + 1.0
            assert profile.features["make"].top_k.entries[0].value == f"m{n % 9}"
            assert profile.features["contacts"].counter.value == 1
    # A row that nobody has is fresh, so that whoever comes next begins in it.
    assert (table.rows[[0, 17, 99]] == table.layout.template).all()
    apply(table, [Event(f"new{n}", "view", NOW_NS, {"make": "vw"}) for n in range(30)])
    assert {table.users.get(b"new%d" % n) for n in range(3)} == {0, 17, 99}
    for n in range(30):
        profile = read(table, f"new{n}")
        assert profile.event_count == 1
        assert profile.features["clicks"].counter.value == pytest.approx(1)
        assert [entry.value for entry in profile.features["make"].top_k.entries] == ["vw"]
    table.users.check_invariants()


@pytest.mark.parametrize(
    "change",
    [
        ("name: marketplace", "name: cars"),
        ("ttl: 180d", "ttl: none"),
        ("prior_strength: 5", "prior_strength: 50"),
        ("unit: EUR, ", ""),
        ("contact:  {weight: 8}", "contact:  {weight: 9}"),
        ("events: [contact]", "events: [contact, view]"),
        ("black, grey", "black, grey"),
    ],
)
def test_where_no_slot_moves_the_rows_stay_where_they_are(change: tuple[str, str]) -> None:
    old = load_schema("marketplace")
    table = fresh_table(old)
    apply(table, [Event("u", "contact", NOW_NS, {"color": "red"})])
    before, weight = table.rows, read(table, "u").features["color"].categorical.weight
    new = parse_schema(old.text.replace(*change))
    table = migrate(table, new)
    assert table.rows is before
    assert table.schema is new
    assert read(table, "u").features["color"].categorical.weight == weight


def test_what_is_only_read_takes_effect_at_once() -> None:
    old = load_schema("marketplace")
    table = fresh_table(old)
    apply(table, [Event("u", "contact", NOW_NS - 200 * DAY_NS, {"color": "red"})])
    before = read(table, "u").features["color"].categorical.confidence
    table = migrate(table, parse_schema(old.text.replace("prior_strength: 5", "prior_strength: 500")))
    assert read(table, "u").features["color"].categorical.confidence < before / 50
    assert read(table, "u", NOW_NS + 181 * DAY_NS).event_count == 0
    table = migrate(table, parse_schema(old.text.replace("ttl: 180d", "ttl: none")))
    assert read(table, "u", NOW_NS + 181 * DAY_NS).event_count == 1


def test_pages_are_given_back_but_never_a_neighbours() -> None:
    rows = reserve(10 * 4096, np.uint8).reshape(-1, 1024)
    rows[:] = 7
    release(rows[3:9])
    assert (rows[:4] == 7).all(), "the page of row 3 holds rows 0 to 2, too"
    assert (rows[4:8] == 0).all()
    assert (rows[8:] == 7).all()
    release(rows[9:9])
    assert (rows[8:] == 7).all()


# --- one kind at a time ---

BASE: dict[str, Any] = {
    "name": "s",
    "events": {"view": {"weight": 1}, "buy": {"weight": 2}},
    "features": {
        "clicks": {"kind": "counter", "half_life": "2d"},
        "color": {"kind": "categorical", "attribute": "color", "values": ["red", "blue", "green"]},
        "make": {"kind": "top_k", "attribute": "make", "k": 3},
        "items": {"kind": "recent", "attribute": "make", "size": 3},
        "last": {"kind": "latest", "attribute": "make"},
        "makes": {"kind": "distinct", "attribute": "make"},
        "day": {"kind": "window_count", "window": "24h", "bucket": "1h"},
        "price": {
            "kind": "distribution",
            "attribute": "price",
            "bins": {"scale": "log", "min": 1, "max": 100, "count": 4},
        },
    },
}


def with_change(**features: Mapping[str, Any] | None) -> Schema:
    """The base with other keys in these features, or without the feature."""
    declared = {**BASE, "features": dict(BASE["features"])}
    for name, keys in features.items():
        if keys is None:
            del declared["features"][name]
        else:
            declared["features"][name] = {**declared["features"].get(name, {}), **keys}
    return parse_schema(dump(declared))


BASE_SCHEMA = with_change()


def migrated_base(schema: Schema, events: Sequence[Event]) -> ProfileTable:
    table = fresh_table(BASE_SCHEMA)
    apply(table, events)
    return migrate(table, schema)


def of_color(color: str, count: int) -> list[Event]:
    return [Event("u", "view", NOW_NS, {"color": color})] * count


def test_values_are_carried_over_with_their_age() -> None:
    table = fresh_table(with_change(color={"half_life": "1d"}))
    apply(table, [replace(event, time_ns=NOW_NS - 3 * DAY_NS) for event in of_color("blue", 8)])
    table = migrate(table, with_change(color={"half_life": "1d", "values": ["blue"]}))
    assert read(table, "u").features["color"].categorical.weight == pytest.approx(1)
    apply(table, of_color("blue", 8))
    assert read(table, "u", NOW_NS + DAY_NS).features["color"].categorical.weight == pytest.approx(4.5)


def test_values_are_carried_over_by_name() -> None:
    colors = [*of_color("red", 1), *of_color("blue", 2), *of_color("green", 4), *of_color("pink", 8)]
    table = migrated_base(with_change(color={"values": ["pink", "green", "red"]}), colors)

    def weights(user: str) -> dict[str, float]:
        return {value.value: value.weight for value in read(table, user).features["color"].categorical.values}

    assert weights("u") == weights(EVERYONE) == {"pink": 0, "green": 4, "red": 1, "other": 2 + 8}
    apply(table, of_color("pink", 16))
    assert weights("u") == weights(EVERYONE) == {"pink": 16, "green": 4, "red": 1, "other": 2 + 8}


def of_makes(counts: Mapping[str, int]) -> list[Event]:
    return [Event("u", "view", NOW_NS, {"make": make}) for make, count in counts.items() for _ in range(count)]


def listed(table: ProfileTable, user: str = "u") -> dict[str, tuple[float, float]]:
    entries = read(table, user).features["make"].top_k.entries
    return {entry.value: (entry.weight, entry.error) for entry in entries}


def test_fewer_counters_keep_the_heaviest() -> None:
    table = migrated_base(with_change(make={"k": 2}), of_makes({"a": 3, "b": 5, "c": 4}))
    assert listed(table) == listed(table, EVERYONE) == {"b": (5, 0), "c": (4, 0)}
    assert read(table, "u").features["make"].top_k.weight == 12
    apply(table, of_makes({"a": 1}))
    assert listed(table) == {"b": (5, 0), "a": (5, 4)}, "4 at least of its true weight, as much as the lightest had"


def test_more_counters_are_exact_for_who_never_had_too_few() -> None:
    table = migrated_base(with_change(make={"k": 5}), of_makes({"a": 3, "b": 5, "c": 4}))
    apply(table, of_makes({"d": 1, "e": 2}))
    assert listed(table) == {"b": (5, 0), "c": (4, 0), "a": (3, 0), "e": (2, 0), "d": (1, 0)}


def test_more_counters_know_what_may_have_been_driven_out() -> None:
    """`a` was driven out with a weight of 1: whoever comes into a new counter may have had as much as the lightest."""
    table = migrated_base(with_change(make={"k": 6}), of_makes({"a": 1, "b": 5, "c": 4, "d": 1}))
    assert listed(table) == {"b": (5, 0), "c": (4, 0), "d": (2, 1)}
    apply(table, of_makes({"a": 1}))
    assert listed(table) == {"b": (5, 0), "c": (4, 0), "a": (3, 2), "d": (2, 1)}
    # Then on with what that left in the free counters: another user's beside, fewer, more.
    apply(table, [Event("v", "view", NOW_NS, {"make": make}) for make in ("b", "x")])
    table.merge("u", "v")
    assert listed(table) == {"b": (6, 0), "c": (4, 0), "x": (3, 2), "a": (3, 2), "d": (2, 1)}
    apply(table, of_makes({"y": 1}))
    assert listed(table) == {"b": (6, 0), "c": (4, 0), "x": (3, 2), "a": (3, 2), "y": (3, 2), "d": (2, 1)}
    table = migrate(table, with_change(make={"k": 4}))
    table = migrate(table, with_change(make={"k": 7}))
    apply(table, of_makes({"z": 1}))
    assert listed(table)["z"] == (4, 3)


@pytest.mark.parametrize("half_life", ["none", "30d"])
@pytest.mark.parametrize("seed", range(10))
def test_errors_stay_true_bounds_however_often_the_counters_change(seed: int, half_life: str) -> None:
    rng = np.random.default_rng(seed)
    values = int(rng.integers(3, 30))
    sizes = rng.integers(1, 20, 6).tolist()

    def with_k(k: int) -> Schema:
        return with_change(make={"k": k, "half_life": half_life})

    oracles = {user: KIND_ORACLES["top_k"](None, with_k(1).features[2].half_life_s) for user in ("u", "v", EVERYONE)}
    table = fresh_table(with_k(sizes[0]))
    for k in sizes:
        table = migrate(table, with_k(k))
        events = [
            Event(str(user), str(kind), NOW_NS - int(age), {"make": f"m{int(value) % values}"})
            for user, kind, age, value in zip(
                rng.choice(["u", "v"], 60, p=[0.8, 0.2]),
                rng.choice(["view", "buy"], 60),
                rng.integers(0, 300 * DAY_NS, 60),
                rng.zipf(1.3, 60),
                strict=True,
            )
        ]
        apply(table, events)
        for event in events:
            seen = Seen(event.time_ns, {"view": 1.0, "buy": 2.0}[event.type], event.attributes["make"])
            oracles[event.user].seen.append(seen)
            oracles[EVERYONE].seen.append(seen)
        if k == sizes[3]:
            table.merge("u", "v")
            oracles["u"].seen += oracles["v"].seen
            oracles["v"].seen.clear()
        for user, oracle in oracles.items():
            oracle.options = table.schema.features[2].options
            if oracle.seen:
                check_bounds(f"{sizes} {user}", oracle, read(table, user).features["make"].top_k, NOW_NS)


def test_fewer_counters_then_more_do_not_forget_that_something_was_dropped() -> None:
    table = migrated_base(with_change(make={"k": 2}), of_makes({"a": 3, "b": 5, "c": 4}))
    table = migrate(table, with_change(make={"k": 9}))
    apply(table, of_makes({"a": 1}))
    assert listed(table) == {"b": (5, 0), "a": (5, 4), "c": (4, 0)}


@pytest.mark.parametrize(("size", "kept"), [(1, ["c"]), (2, ["c", "b"]), (5, ["c", "b", "a"])])
def test_a_list_of_another_size_keeps_the_newest(size: int, kept: list[str]) -> None:
    events = [Event("u", "view", NOW_NS - 9 + n, {"make": make}) for n, make in enumerate("xabc")]
    table = migrated_base(with_change(items={"size": size}), events)
    assert [entry.value for entry in read(table, "u").features["items"].recent.entries] == kept
    apply(table, [Event("u", "view", NOW_NS, {"make": "d"})])
    assert [entry.value for entry in read(table, "u").features["items"].recent.entries] == ["d", *kept][:size]


def test_a_fresh_row_stays_fresh() -> None:
    """Whatever is converted: nothing makes nothing."""
    table = fresh_table(BASE_SCHEMA)
    apply(table, [Event("u", "view", NOW_NS, {"make": "a", "color": "red"})])
    table.remove("u")
    for k, size, values in ((9, 9, ["red"]), (1, 1, ["mauve", "blue"]), (3, 3, ["red"])):
        table = migrate(table, with_change(make={"k": k}, items={"size": size}, color={"values": values}))
        assert (table.rows[:1] == table.layout.template).all()


# --- what is refused ---

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"clicks": {"half_life": "1d"}}, "feature clicks: half_life was 2d, is 1d"),
    ({"clicks": {"half_life": "none"}}, "feature clicks: half_life was 2d, is none"),
    ({"color": {"half_life": "1d"}}, "feature color: half_life was none, is 1d"),
    ({"color": {"attribute": "colour"}}, "feature color: attribute was color, is colour"),
    ({"make": {"attribute": "item"}}, "feature make: attribute was make, is item"),
    ({"last": {"attribute": "item"}}, "feature last: attribute was make, is item"),
    ({"makes": {"precision": 9}}, "feature makes: precision was 8, is 9"),
    ({"day": {"window": "7d"}}, "feature day: window was 1d, is 7d"),
    ({"day": {"bucket": "30m"}}, "feature day: bucket was 1h, is 30m"),
    (
        {"price": {"bins": {"scale": "log", "min": 1, "max": 9, "count": 4}}},
        "feature price: bins were {scale: log, min: 1, max: 100, count: 4}, are {scale: log, min: 1, max: 9, count: 4}",
    ),
    (
        {"price": {"bins": {"scale": "explicit", "edges": [0.5, 1, 2]}}},
        "feature price: bins were {scale: log, min: 1, max: 100, count: 4}, are {scale: explicit, edges: [0.5, 1, 2]}",
    ),
    ({"last": {"kind": "top_k"}}, "feature last: kind was latest, is top_k"),
    ({"items": {"kind": "distinct", "size": None}}, "feature items: kind was recent, is distinct"),
    # A conversion beside what is refused does not save it.
    ({"make": {"k": 9, "half_life": "1d"}}, "feature make: half_life was none, is 1d; k was 3, is 9"),
]


def declared_change(change: Mapping[str, Mapping[str, Any]]) -> Schema:
    features = {
        name: {key: value for key, value in {**keys, **change.get(name, {})}.items() if value is not None}
        for name, keys in BASE["features"].items()
    }
    return parse_schema(dump({**BASE, "features": features}))


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_would_mean_something_else_is_refused_unless_it_starts_anew(change: dict[str, Any], said: str) -> None:
    (name,) = change
    new = declared_change(change)
    table = fresh_table(BASE_SCHEMA)
    events = [Event("u", "buy", NOW_NS, {"make": "a", "color": "red", "price": 7.0})]
    apply(table, events)
    before = answers(table, [spec.name for spec in BASE_SCHEMA.features])
    with pytest.raises(SchemaChangeRefused) as refused:
        migrate(table, new)
    (fault,) = refused.value.faults
    assert fault.startswith(f"{said}: ")
    assert f"--reset-feature {name}" in fault
    assert fault in str(refused.value)
    assert isinstance(refused.value, StartupError)
    assert answers(table, [spec.name for spec in BASE_SCHEMA.features]) == before, "nothing has happened"

    assert new.fingerprint != BASE_SCHEMA.fingerprint
    others = [spec.name for spec in new.features if spec.name != name]
    table = migrate(table, new, [name])
    assert answers(table, others) == {key: value for key, value in before.items() if key[1] != name}
    without, added = with_change(**{name: None}), fresh_table(BASE_SCHEMA)
    apply(added, events)
    assert answers(table, [name]) == answers(migrate(migrate(added, without), new), [name]), "as if it were new"
    apply(table, events)
    begun = fresh_table(new)
    apply(begun, events)
    assert answers(table, [name]) == answers(begun, [name])


def test_every_fault_is_said_at_once() -> None:
    new = declared_change({"clicks": {"half_life": "1d"}, "last": {"attribute": "item"}, "day": {"window": "2d"}})
    changes = compare(BASE_SCHEMA, new, ["day", "makers", "gone"])
    assert [fault.split(":")[0] for fault in changes.faults] == [
        "feature clicks",
        "feature last",
        "--reset-feature gone",
        "--reset-feature makers",
    ]
    assert "did you mean makes?" in changes.faults[-1]
    assert changes.refused == {"clicks": "half_life was 2d, is 1d", "last": "attribute was make, is item"}
    assert changes.reset == {"day": "window was 1d, is 2d"}
    with pytest.raises(SchemaChangeRefused) as refused:
        changes.raise_faults()
    assert str(refused.value).startswith("the stored profiles cannot follow the changed schema: feature clicks: ")
    assert all(fault in refused.value.message for fault in changes.faults)


def test_a_reset_of_what_goes_anyway_is_refused() -> None:
    (fault,) = compare(BASE_SCHEMA, with_change(last=None), ["last"]).faults
    assert fault == "--reset-feature last: the schema has no such feature: it goes without being told to"


def test_a_reset_empties_what_changes_and_nothing_else() -> None:
    """To start again with the flags of last time must not empty a feature a second time."""
    assert compare(BASE_SCHEMA, BASE_SCHEMA, ["make"]).kept["make"] == ""
    changes = compare(BASE_SCHEMA, with_change(make={"k": 9}), ["make", "color"])
    assert changes.reset == {"make": "k was 3, is 9"}
    assert "color" in changes.kept
    fewer_events = compare(BASE_SCHEMA, with_change(clicks={"events": ["buy"]}), ["clicks"])
    assert fewer_events.reset == {"clicks": "view no longer counts"}
    assert compare(BASE_SCHEMA, with_change(fresh={"kind": "counter"}), ["fresh"]).added == ("fresh",)


def test_a_change_says_what_it_does() -> None:
    new = with_change(
        color={"values": ["blue", "red", "teal"], "prior": "population"},
        make={"k": 4},
        price={"unit": "EUR"},
        clicks={"events": ["buy"]},
        day={"window": "2d"},
        last=None,
        more={"kind": "counter"},
    )
    changes = compare(BASE_SCHEMA, new, ["day"])
    assert changes == Changes(
        kept={"clicks": "view no longer counts", "items": "", "makes": "", "price": "unit was empty, is EUR"},
        converted={"color": "values: teal is new, green is gone", "make": "k was 3, is 4"},
        added=("more",),
        reset={"day": "window was 1d, is 2d"},
        dropped=("last",),
        refused={},
        faults=(),
    )
    assert str(changes) == (
        "features 4 kept; converted: color (values: teal is new, green is gone), make (k was 3, is 4); new: more; "
        "started anew: day (window was 1d, is 2d); dropped: last"
    )


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ({"view": {"weight": 3}, "buy": {"weight": 2}}, "view weighs 3 from now on, 1 before"),
        ({"buy": {"weight": 2}}, "view no longer counts"),
        ({"buy": {"weight": 2}, "view": {"weight": 1}}, ""),
        ({**BASE["events"], "sell": {"weight": 1}}, "sell counts from now on"),
    ],
)
def test_what_counts_from_now_on_leaves_what_was_counted(events: dict[str, Any], said: str) -> None:
    changes = compare(BASE_SCHEMA, parse_schema(dump({**BASE, "events": events})))
    assert set(changes.kept.values()) == {said}
    assert (changes.converted, changes.faults) == ({}, ())


@given(schemas())
def test_a_schema_is_no_change_of_itself(schema: Schema) -> None:
    again = parse_schema(dump(declaration(schema)))
    changes = compare(schema, again)
    assert changes == Changes({spec.name: "" for spec in schema.features}, {}, (), {}, (), {}, ())


@given(st.data())
def test_equal_fingerprints_need_no_migration(data: st.DataObject) -> None:
    """Shards compare fingerprints alone: where they are equal, no row may change, nor what is counted into it."""
    old = data.draw(schemas())
    new, _ = data.draw(changed(old))
    changes = compare(old, new)
    same = [f.name for f in old.features] == [f.name for f in new.features] == list(changes.kept)
    same_events = {e.name: e.weight for e in old.event_types} == {e.name: e.weight for e in new.event_types} and all(
        set(a.events) == set(b.events) for a, b in zip(old.features, new.features, strict=False)
    )
    assert (old.fingerprint == new.fingerprint) == (same and same_events)


def test_a_long_list_is_not_spelled_out() -> None:
    values = [f"v{n}" for n in range(900)]
    change: Callable[[list[str]], Schema] = lambda values: with_change(color={"values": values})  # noqa: E731
    said = compare(change(values), change(values[:100])).converted["color"]
    assert "… (800 in all)" in said
    assert len(said) < 400
    assert compare(change(values), change(values[::-1])).converted["color"] == "values: in another order"
