"""Every fault of a file is said, all of them at once, each on its line and in words that say what is right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profile_service.domain.features import KINDS
from profile_service.domain.schema import Schema, parse_schema
from profile_service.errors import SchemaError, SchemaFault
from tests.domain.strategies import declarations, dump

HEAD = "name: s\nevents: {view: {weight: 1}}\nfeatures:\n"
NAME_RULE = "a name starts with a letter or _, goes on with letters, digits, _ . - and has at most 64 characters"
DURATIONS = "write a duration as 30d, 12h, 15m, 10s or 500ms"


def faults_of(text: str) -> list[SchemaFault]:
    """By line; none where the text is a schema."""
    try:
        parse_schema(text, "s.yaml")
    except SchemaError as caught:
        error = caught
    else:
        return []
    assert [fault.line for fault in error.faults] == sorted(fault.line for fault in error.faults)
    assert str(error) == "\n".join(f"s.yaml: {fault}" for fault in error.faults)
    return list(error.faults)


def only_fault(text: str) -> tuple[int, str, str]:
    faults = faults_of(text)
    assert len(faults) == 1, faults
    return faults[0].line, faults[0].path, faults[0].description


def of_feature(options: str) -> tuple[str, str]:
    """The one fault of a feature `c` on line 4: its path below the feature, and what it says."""
    line, path, description = only_fault(f"{HEAD}  c: {{{options}}}\n")
    assert line == 4
    return path.removeprefix("features.c").removeprefix("."), description


TEN_FAULTS = """\
name: two words
colour: red
events:
  view: {weight: 0}
  buy: {weight: 2}
half_life: 30 weeks
features:
  a: {kind: topk, attribute: make}
  b: {kind: latest}
  c:
    kind: categorical
    attribute: color
    prior: popular
    values:
      - red
      - blue
  d:
    kind: counter
    events: [buy, sell]
  e: {kind: distribution, attribute: color, bins: {scale: linear, min: 0, max: 1, count: 2}}
  f: {kind: recent, attribute: color, half_life: 2d}
"""


def test_ten_faults_are_ten_lines() -> None:
    assert [(fault.line, fault.path) for fault in faults_of(TEN_FAULTS)] == [
        (1, "name"),
        (2, "colour"),
        (4, "events.view.weight"),
        (6, "half_life"),
        (8, "features.a.kind"),
        (9, "features.b.attribute"),
        (13, "features.c.prior"),
        (19, "features.d.events[1]"),
        (20, "features.e.attribute"),
        (21, "features.f.half_life"),
    ]


# --- the file as YAML ---


ALIASES_OF_ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "is empty"),
        ("# nothing\n", 1, "is empty"),
        ("name: [a\nevents: b\n", 2,
         "is not YAML: expected ',' or ']', but got ':' (while parsing a flow sequence begun on line 1)"),
        ("name: s\n\tevents: x\n", 2, "is not YAML: found character '\\t' that cannot start any token"),
        ("name: s\nevents: \x07\n", 2, "has a character that YAML does not allow: U+0007"),
        ("name: s\n\x00", 2, "has a character that YAML does not allow: U+0000"),
        ("name: *a\n", 1, "is not YAML: found undefined alias 'a'"),
        ("name: &a [*a]\n", 1, "has an alias inside of what it stands for"),
        ("name: s\nevents: " + "[" * 5000, 2, "nests too deeply"),
        (ALIASES_OF_ALIASES, 1, "has more than 200000 values, counting what aliases stand for"),
        ("#" * 1_000_001, 1, "has 1000001 characters, at most 1000000 are possible"),
        ("- name\n", 1, "must be a mapping with name, events and features"),
        ("hello", 1, "must be a mapping with name, events and features"),
    ],
)  # fmt: skip
def test_what_is_no_schema_at_all_is_refused_at_its_line(text: str, line: int, words: str) -> None:
    assert only_fault(text) == (line, "schema", words)


def test_two_documents_are_refused() -> None:
    line, _, words = only_fault(HEAD + "  c: {kind: counter}\n---\nname: t\n")
    assert line == 5
    assert "another document" in words


def test_a_repeated_key_is_refused_on_every_level() -> None:
    text = "name: s\nname: t\nevents:\n  view: {weight: 1}\n  view: {weight: 2}\n"
    text += "features:\n  c:\n    kind: counter\n    kind: latest\n  c: {kind: counter}\n"
    assert [str(fault) for fault in faults_of(text)] == [
        "line 2: name: stands there twice, first on line 1",
        "line 5: events.view: stands there twice, first on line 4",
        "line 9: features.c.kind: stands there twice, first on line 8",
        "line 10: features.c: stands there twice, first on line 7",
    ]


def test_tags_keys_and_texts_that_mean_nothing_are_refused() -> None:
    assert of_feature("kind: latest, attribute: !!python/name:os.system a") == (
        "attribute",
        "a tag (!!python/name:os.system) has no meaning here: leave it out",
    )
    assert of_feature('kind: latest, attribute: "\\ud800"') == (
        "attribute",
        "has half of a surrogate pair, which is no character",
    )
    assert of_feature("kind: counter, ? [a, b] : c") == ("", "a key must be a single word")
    assert of_feature("<<: 3, kind: counter") == ("<<", "takes the alias of a mapping, or a list of such")


# --- the top ---


def test_missing_and_misspelt_keys_are_named_with_the_nearest() -> None:
    assert [str(fault) for fault in faults_of("nmae: s\nevent: {}\nfeatuers: {}\nwhatever: 3\n")] == [
        "line 1: nmae: is not known here (did you mean name?)",
        "line 1: name: is missing: every schema has name",
        "line 1: events: is missing: every schema has events",
        "line 1: features: is missing: every schema has features",
        "line 2: event: is not known here (did you mean events?)",
        "line 3: featuers: is not known here (did you mean features?)",
        "line 4: whatever: is not known here",
    ]


def test_a_schema_declares_events_and_features() -> None:
    assert [str(fault) for fault in faults_of("name: s\nevents: {}\nfeatures: {}\n")] == [
        "line 2: events: declares no event type",
        "line 3: features: declares no feature",
    ]
    assert [str(fault) for fault in faults_of("name: s\nevents: [view]\nfeatures:\n")] == [
        "line 2: events: must be a mapping of event types, as view: {weight: 1}",
        "line 3: features: must be a mapping of features, as color: {kind: …}",
    ]


def test_there_are_at_most_256_of_each() -> None:
    types = "".join(f"  e{i}: {{weight: 1}}\n" for i in range(257))
    features = "".join(f"  f{i}: {{kind: counter}}\n" for i in range(257))
    assert [str(fault) for fault in faults_of(f"name: s\nevents:\n{types}features:\n{features}")] == [
        "line 2: events: declares 257 event types, at most 256 are possible",
        "line 260: features: declares 257 features, at most 256 are possible",
    ]
    assert not faults_of(
        f"name: s\nevents:\n{types.replace('  e256: {weight: 1}', '')}features:\n  c: {{kind: counter}}\n"
    )


@pytest.mark.parametrize("name", ["two words", "3d", "-a", "é", "''", "a/b", "a" * 65, "[a]", "", '"a\\n"'])
def test_names_are_plain(name: str) -> None:
    assert only_fault(f"name: {name}\nevents: {{view: {{weight: 1}}}}\nfeatures: {{c: {{kind: counter}}}}")[1:] == (
        "name",
        NAME_RULE,
    )
    if name not in ("", "[a]"):
        line, path, words = only_fault(
            f"name: s\nevents:\n  {name}:\n    weight: 1\nfeatures: {{c: {{kind: counter}}}}"
        )
        assert (line, words) == (3, NAME_RULE)
        assert path.startswith("events.")
        line, path, words = only_fault(f"{HEAD}\n  {name}:\n    kind: counter\n")
        assert (line, words) == (5, NAME_RULE)
        assert path.startswith("features.")
        assert "\n" not in path


@pytest.mark.parametrize("key", ["half_life", "ttl"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("3x", f"'3x' is not a duration: {DURATIONS}"),
        ("None", f"'None' is not a duration: {DURATIONS}"),
        ("-3d", f"'-3d' is not a duration: {DURATIONS}"),
        ("0s", "must be at least 1ms, is '0s'"),
        ("200000d", "must be at most 100 years, is '200000d'"),
        ("", "is empty: write none for never, or a duration such as 30d"),
        ("~", "is empty: write none for never, or a duration such as 30d"),
        ("null", "is empty: write none for never, or a duration such as 30d"),
        ("[1d]", "must be a duration such as 30d, or none"),
    ],
)
def test_durations_say_how_they_are_written(key: str, value: str, words: str) -> None:
    assert only_fault(f"{key}: {value}\n{HEAD}  c: {{kind: counter}}\n") == (1, key, words)


# --- event types ---


@pytest.mark.parametrize(
    ("options", "path", "words"),
    [
        ("{weight: 0}", ".weight", "must be from 0.000001 to 1000000, is 0"),
        ("{weight: -1.5}", ".weight", "must be from 0.000001 to 1000000, is -1.5"),
        ("{weight: .nan}", ".weight", "must be from 0.000001 to 1000000, is nan"),
        ("{weight: .inf}", ".weight", "must be from 0.000001 to 1000000, is inf"),
        ("{weight: 1e300}", ".weight", "must be from 0.000001 to 1000000, is 1e+300"),
        ("{weight: heavy}", ".weight", "must be a number"),
        ("{weight: true}", ".weight", "must be a number"),
        ("{weight: '3'}", ".weight", "must be a number"),
        ("{weight: 1:30}", ".weight", "must be a number"),
        ("{weight: }", ".weight", "must be a number"),
        ("{weight: [1]}", ".weight", "must be a number"),
        ("{}", ".weight", "is missing: write {weight: 1}"),
        ("{weight: 1, wieght: 2}", ".wieght", "is not known here (did you mean weight?)"),
        ("3", "", "must be a mapping, as {weight: 1}"),
        ("", "", "must be a mapping, as {weight: 1}"),
    ],
)
def test_an_event_type_has_a_weight(options: str, path: str, words: str) -> None:
    text = f"name: s\nevents:\n  view: {options}\nfeatures: {{c: {{kind: counter, events: [view]}}}}\n"
    assert only_fault(text) == (3, f"events.view{path}", words)


def test_events_that_cannot_be_read_do_not_make_every_mention_a_fault() -> None:
    assert only_fault("name: s\nevents: [view]\nfeatures: {c: {kind: counter, events: [view]}}\n")[1] == "events"


# --- features ---

KIND_NAMES = ", ".join(KINDS)
VALUES = "kind: categorical, attribute: a, values: [x], "
BINS = "kind: distribution, attribute: p, bins: "


@pytest.mark.parametrize(
    ("options", "path", "words"),
    [
        ("attribute: a", "kind", f"is missing: one of {KIND_NAMES}"),
        ("kind: topk", "kind", f"'topk' is not a kind (did you mean top_k?); one of {KIND_NAMES}"),
        ("kind: [top_k]", "kind", f"must be one of {KIND_NAMES}"),
        ("kind: latest", "attribute", "is missing"),
        ("kind: latest, attribute: ''", "attribute", "must not be empty"),
        ("kind: latest, attribute: ", "attribute", "is empty: give a value, or leave the key out"),
        ("kind: latest, attribute: [a]", "attribute", "must be text"),
        ("kind: latest, attribute: a, halflife: 3d", "halflife", "is not known here (did you mean half_life?)"),
        ("kind: top_k, attribute: a, kk: 3", "kk", "is not known here (did you mean k?)"),
        ("kind: counter, attribute: a", "attribute", "is not known here"),
        ("kind: latest, attribute: a, half_life: 3d", "half_life", "a latest does not decay: leave it out"),
        ("kind: distinct, attribute: a, half_life: none", "half_life", "a distinct does not decay: leave it out"),
        ("kind: counter, half_life: soon", "half_life", f"'soon' is not a duration: {DURATIONS}"),
        ("kind: counter, events: view", "events", "must be a list of event types, as [view]"),
        ("kind: counter, events: []", "events", "must be a list of event types, as [view]"),
        ("kind: counter, events: [viewx]", "events[0]", "'viewx' is not a declared event type (did you mean view?)"),
        ("kind: counter, events: [view, view]", "events[1]", "'view' stands there twice"),
        ("kind: counter, events: [{a: b}]", "events[0]", "must be the name of an event type"),
        ("kind: top_k, attribute: a, k: 0", "k", "must be at least 1, is 0"),
        ("kind: top_k, attribute: a, k: 1001", "k", "must be at most 1000, is 1001"),
        ("kind: top_k, attribute: a, k: " + "9" * 40, "k", "must be at most 1000, is " + "9" * 40),
        ("kind: top_k, attribute: a, k: 10.5", "k", "must be a whole number, is 10.5"),
        ("kind: top_k, attribute: a, k: '10'", "k", "must be a whole number, is '10'"),
        ("kind: top_k, attribute: a, k: true", "k", "must be a whole number, is true"),
        ("kind: top_k, attribute: a, k: 0x1f", "k", "must be a whole number, is 0x1f"),
        ("kind: recent, attribute: a, size: 0", "size", "must be at least 1, is 0"),
        ("kind: distinct, attribute: a, precision: 3", "precision", "must be at least 4, is 3"),
        ("kind: distinct, attribute: a, precision: 17", "precision", "must be at most 16, is 17"),
        ("kind: categorical, attribute: a", "values", "is missing"),
        ("kind: categorical, attribute: a, values: red", "values", "must be a list, as [a, b], is red"),
        ("kind: categorical, attribute: a, values: []", "values", "must not be empty"),
        ("kind: categorical, attribute: a, values: [[x]]", "values[0]", "must be text"),
        ("kind: categorical, attribute: a, values: [x, y, x]", "values", "each value once; repeated: x"),
        ("kind: categorical, attribute: a, values: [other]", "values", "'other' is always there: leave it out"),
        (VALUES + "prior: popular", "prior", "must be uniform or population, is popular (did you mean population?)"),
        (VALUES + "prior: [uniform]", "prior", "must be uniform or population"),
        (VALUES + "prior_strength: 0", "prior_strength", "must be above 0, is 0"),
        (VALUES + "prior_strength: .inf", "prior_strength", "must be a finite number, is .inf"),
        ("kind: window_count, window: 1h", "bucket", "is missing"),
        ("kind: window_count, window: 1h, bucket: none", "bucket", f"`none` is not possible here: {DURATIONS}"),
        ("kind: window_count, window: 1h, bucket: 0s", "bucket", "must be at least 1ms, is '0s'"),
        ("kind: window_count, window: 1h, bucket: ", "bucket", "is empty: give a value, or leave the key out"),
        ("kind: window_count, window: 1h, bucket: 2h", "", "bucket must not be longer than window"),
        ("kind: distribution, attribute: p", "bins", "is missing"),
        (BINS + "log", "bins", "must be a mapping, as {key: value}, is log"),
        (BINS + "{}", "bins.scale", "is missing"),
        (BINS + "{scale: logg}", "bins.scale", "must be log or linear or explicit, is logg (did you mean log?)"),
        (BINS + "{scale: log, min: 1, max: 2, cuont: 3}", "bins.cuont", "is not known here (did you mean count?)"),
        (BINS + "{scale: log}", "bins", "scale log needs min, max, count"),
        (BINS + "{scale: log, min: 0, max: 3, count: 4}", "bins", "scale log needs min above 0"),
        (BINS + "{scale: linear, min: 3, max: 3, count: 4}", "bins", "min must be below max"),
        (BINS + "{scale: linear, min: 1, max: 3, count: 0}", "bins.count", "must be at least 1, is 0"),
        (BINS + "{scale: linear, min: .nan, max: 3, count: 1}", "bins.min", "must be a finite number, is .nan"),
        (BINS + "{scale: linear, min: '1', max: 3, count: 1}", "bins.min", "must be a number, is '1'"),
        (BINS + "{scale: explicit}", "bins", "scale explicit needs edges"),
        (BINS + "{scale: explicit, edges: [1]}", "bins.edges", "must have at least 2 items"),
        (BINS + "{scale: explicit, edges: [1, 1]}", "bins", "edges must rise"),
        (BINS + "{scale: explicit, edges: [1, two]}", "bins.edges[1]", "must be a number, is two"),
    ],
)  # fmt: skip
def test_a_feature_has_its_kinds_options(options: str, path: str, words: str) -> None:
    assert of_feature(options) == (path, words)


def test_a_feature_is_a_mapping() -> None:
    assert only_fault(HEAD + "  c: counter\n") == (
        4,
        "features.c",
        "must be a mapping with kind and the kind's options",
    )


def test_faults_in_blocks_are_on_their_own_lines() -> None:
    text = HEAD + (
        "  c:\n"  # line 4
        "    kind: distribution\n"
        "    attribute:\n"
        "      []\n"
        "    bins:\n"  # 8
        "      scale: explicit\n"
        "      edges:\n"
        "        - 1\n"
        "        - x\n"  # 12
        "      cuont: 3\n"
        "  d:\n"  # 14
        "    kind: latest\n"
    )
    assert [(fault.line, fault.path) for fault in faults_of(text)] == [
        (6, "features.c.attribute"),
        (12, "features.c.bins.edges[1]"),
        (13, "features.c.bins.cuont"),
        (14, "features.d.attribute"),
    ]


def test_an_attribute_is_a_text_or_a_number_for_all() -> None:
    text = HEAD + "  a: {kind: latest, attribute: p}\n  b:\n    kind: distribution\n    attribute: p\n"
    text += "    bins: {scale: linear, min: 0, max: 1, count: 3}\n"
    assert only_fault(text) == (7, "features.b.attribute", "'p' is a text for feature a and a number here")


# --- whatever is written ---


@given(st.text() | st.text(alphabet="ab:{}[]&*<>|-?!\"'#%@,~ \n\t\\0", max_size=80))
def test_any_text_is_a_schema_or_has_faults(text: str) -> None:
    assert faults_of(text)


@given(declarations(), st.data())
def test_any_damage_is_a_schema_or_has_faults(declared: dict[str, object], data: st.DataObject) -> None:
    """Every fault is on a line that the file has, and nothing else is ever raised."""
    text = dump(declared)
    start = data.draw(st.integers(0, len(text) - 1))
    end = min(len(text), start + data.draw(st.integers(0, 12)))
    text = text[:start] + data.draw(st.text(alphabet="{}[]:,&*#-' \n0a~!", max_size=4)) + text[end:]
    for fault in faults_of(text):
        assert 1 <= fault.line <= text.count("\n") + 1
        assert fault.path
        assert fault.description


def test_a_valid_schema_has_no_faults() -> None:
    assert isinstance(parse_schema(HEAD + "  c: {kind: counter}\n"), Schema)
