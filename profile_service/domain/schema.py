"""What a profile is: the schema, parsed from YAML and checked whole.

`parse_schema` finds every fault of a file and says the line of each. What it returns is frozen and valid: nothing
downstream checks again. `schema_yaml` turns text into values that know their lines, `schema_options` reads what belongs
to a feature's kind, and this module says what all else must be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import xxhash

from profile_service.domain.duration import parse_duration
from profile_service.domain.features import KINDS
from profile_service.domain.features.base import FeatureKind, KindOptions
from profile_service.domain.schema_options import nearest, read_options
from profile_service.domain.schema_yaml import Node, join, parse_yaml, show
from profile_service.errors import SchemaError, SchemaFault, StartupError

SHIPPED = ("marketplace", "retail")
"""Schemas that come with the service, by name."""

MOST_FEATURES = 256
MOST_EVENT_TYPES = 256
LEAST_WEIGHT = 1e-6
MOST_WEIGHT = 1e6
"""Of an event: further apart, 32 bits could not hold sums of both."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_NAME_RULE = "a name starts with a letter or _, goes on with letters, digits, _ . - and has at most 64 characters"
_TOP_KEYS = ("name", "events", "half_life", "ttl", "features")


@dataclass(frozen=True)
class EventType:
    """A kind of event, and how strongly it speaks for a preference."""

    name: str
    weight: float


@dataclass(frozen=True)
class FeatureSpec:
    """A feature as declared."""

    name: str
    kind: str
    options: KindOptions
    events: tuple[str, ...]
    """The event types that it takes, in the order in which the schema declares them."""
    half_life_s: float | None
    """None where it does not decay."""

    def shape(self) -> dict[str, Any]:
        """What this feature's part of a row means: values as in JSON, by key of the schema file.

        Features of one name and equal shapes read each other's rows. `events` are no part of it: they say what is
        counted from now on, and nothing about what is there.
        """
        return {"kind": self.kind, "half_life": self.half_life_s, **self.options.shape()}


@dataclass(frozen=True)
class Schema:
    """What a profile is."""

    name: str
    event_types: tuple[EventType, ...]
    features: tuple[FeatureSpec, ...]
    ttl_s: float | None
    text: str
    """The file that it was parsed from."""

    @cached_property
    def event_type_names(self) -> tuple[str, ...]:
        """Names of the event types, in order."""
        return tuple(event.name for event in self.event_types)

    @cached_property
    def text_attributes(self) -> tuple[str, ...]:
        """Attributes that hold text, in the order of their first use."""
        return self._attributes("text")

    @cached_property
    def number_attributes(self) -> tuple[str, ...]:
        """Attributes that hold numbers, in the order of their first use."""
        return self._attributes("number")

    def _attributes(self, reads: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(attribute_of(f) for f in self.features if KINDS[f.kind].reads == reads))

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a row, or a replay of events into one, would mean something else; and with nothing else. 16
        hexadecimal digits.

        So the order of the features is part of it, which is that of a row's slots, and the order of event types is not.
        What only reads look at is not: name, `prior`, `prior_strength`, `unit`. Nor is `ttl`: when a profile is
        forgotten stands in the log, and a replay does not decide it again.
        """
        meaning = [
            {event.name: event.weight for event in self.event_types},
            [[f.name, f.shape(), sorted(f.events)] for f in self.features],
        ]
        canonical = json.dumps(meaning, sort_keys=True, separators=(",", ":"))
        return xxhash.xxh64_hexdigest(canonical.encode())


def attribute_of(spec: FeatureSpec) -> str:
    """The attribute that a feature reads; empty for kinds that read none."""
    return str(getattr(spec.options, "attribute", ""))


def load_schema(name_or_path: str | Path) -> Schema:
    """The shipped schema of that name, or else the file.

    Raises:
        SchemaError: the file has faults.
        StartupError: there is no such file, or it cannot be read.
    """
    if str(name_or_path) in SHIPPED:
        shipped = resources.files("profile_service.schemas") / f"{name_or_path}.yaml"
        return parse_schema(shipped.read_text(encoding="utf-8"), f"{name_or_path}.yaml")
    path = Path(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        shipped_names = " or ".join(SHIPPED)
        raise StartupError(f"schema {path}: {reason}; give a schema file, or {shipped_names}") from error
    return parse_schema(text, str(path))


def parse_schema(text: str, source: str = "schema") -> Schema:
    """The schema that `text` declares.

    Raises:
        SchemaError: with every fault, by line.
    """
    faults: list[SchemaFault] = []
    root = parse_yaml(text, faults)
    schema = _Parser(faults, text).parse(root) if root is not None else None
    if faults or schema is None:
        raise SchemaError(source, tuple(sorted(faults, key=lambda fault: fault.line)))
    return schema


class _Parser:
    """Reads the values and gathers what is wrong with them."""

    def __init__(self, faults: list[SchemaFault], text: str) -> None:
        self._faults = faults
        self._text = text
        self._readers: dict[str, tuple[str, str]] = {}
        """By attribute: the first feature that reads it, and as what."""

    def parse(self, root: Node) -> Schema | None:
        top = self._mapping(root, "", "a mapping with name, events and features")
        if top is None:
            return None
        self._check_keys(top, _TOP_KEYS, "")
        for key in ("name", "events", "features"):
            if key not in top:
                self._fault(root.line, key, f"is missing: every schema has {key}")
        name = self._name(top["name"]) if "name" in top else None
        half_life_s = self._duration(top.get("half_life"), "half_life")
        ttl_s = self._duration(top.get("ttl"), "ttl")
        event_types = self._event_types(top["events"]) if "events" in top else None
        features = self._features(top["features"], event_types, half_life_s) if "features" in top else []
        if self._faults or name is None or event_types is None:
            return None
        return Schema(name, tuple(event_types), tuple(features), ttl_s, self._text)

    def _fault(self, line: int, path: str, description: str) -> None:
        self._faults.append(SchemaFault(line, path or "schema", description))

    def _mapping(self, node: Node, path: str, what: str) -> Mapping[str, Node] | None:
        if isinstance(node.value, dict):
            return node.value
        self._fault(node.line, path, f"must be {what}")
        return None

    def _check_keys(self, given: Mapping[str, Node], known: Iterable[str], path: str) -> None:
        for key, node in given.items():
            if key not in known:
                self._fault(node.key_line, join(path, key), f"is not known here{nearest(key, known)}")

    def _name(self, node: Node) -> str | None:
        if node.scalar is not None and _NAME.fullmatch(node.scalar.text):
            return node.scalar.text
        self._fault(node.line, "name", _NAME_RULE)
        return None

    def _duration(self, node: Node | None, path: str) -> float | None:
        if node is None:
            return None
        try:
            if node.scalar is None:
                raise ValueError("must be a duration such as 30d, or none")
            if node.scalar.is_null:
                raise ValueError("is empty: write none for never, or a duration such as 30d")
            return parse_duration(node.scalar.text)
        except ValueError as error:
            self._fault(node.line, path, str(error))
            return None

    def _event_types(self, node: Node) -> list[EventType] | None:
        given = self._mapping(node, "events", "a mapping of event types, as view: {weight: 1}")
        if given is None:
            return None
        if not given:
            self._fault(node.line, "events", "declares no event type")
        if len(given) > MOST_EVENT_TYPES:
            self._fault(
                node.line, "events", f"declares {len(given)} event types, at most {MOST_EVENT_TYPES} are possible"
            )
        return [EventType(name, self._event_weight(name, options)) for name, options in given.items()]

    def _event_weight(self, name: str, node: Node) -> float:
        path = join("events", name)
        if not _NAME.fullmatch(name):
            self._fault(node.key_line, path, _NAME_RULE)
        keys = self._mapping(node, path, "a mapping, as {weight: 1}")
        if keys is None:
            return 1.0
        self._check_keys(keys, ("weight",), path)
        if "weight" not in keys:
            self._fault(node.key_line, f"{path}.weight", "is missing: write {weight: 1}")
            return 1.0
        weight = keys["weight"]
        number = weight.scalar.number if weight.scalar is not None else None
        if number is None:
            self._fault(weight.line, f"{path}.weight", "must be a number")
        elif not LEAST_WEIGHT <= number <= MOST_WEIGHT:  # nor NaN
            possible = f"from {LEAST_WEIGHT:f} to {MOST_WEIGHT:.0f}"
            self._fault(weight.line, f"{path}.weight", f"must be {possible}, is {number:g}")
        else:
            return float(number)
        return 1.0

    def _features(
        self, node: Node, event_types: list[EventType] | None, half_life_s: float | None
    ) -> list[FeatureSpec]:
        given = self._mapping(node, "features", "a mapping of features, as color: {kind: …}")
        if given is None:
            return []
        if not given:
            self._fault(node.line, "features", "declares no feature")
        if len(given) > MOST_FEATURES:
            self._fault(node.line, "features", f"declares {len(given)} features, at most {MOST_FEATURES} are possible")
        answer = []
        for name, keys in given.items():
            if not _NAME.fullmatch(name):
                self._fault(keys.key_line, join("features", name), _NAME_RULE)
            spec = self._feature(name, keys, event_types, half_life_s)
            if spec is not None:
                answer.append(spec)
        return answer

    def _feature(
        self, name: str, node: Node, event_types: list[EventType] | None, default_half_life_s: float | None
    ) -> FeatureSpec | None:
        path = join("features", name)
        keys = self._mapping(node, path, "a mapping with kind and the kind's options")
        if keys is None:
            return None
        events = self._feature_events(keys.get("events"), f"{path}.events", event_types)
        half_life_s = self._duration(keys.get("half_life"), f"{path}.half_life")
        kind = self._kind(node, keys, path)
        if kind is None:
            return None
        if "half_life" in keys and not kind.decays:
            self._fault(keys["half_life"].key_line, f"{path}.half_life", f"a {kind.name} does not decay: leave it out")
        self._check_attribute_type(name, kind, keys, path)
        options = read_options(kind.Options, node, path, self._faults)
        if options is None:
            return None
        if "half_life" not in keys:
            half_life_s = default_half_life_s
        return FeatureSpec(name, kind.name, options, events, half_life_s if kind.decays else None)

    def _kind(self, node: Node, keys: Mapping[str, Node], path: str) -> FeatureKind | None:
        kinds = ", ".join(KINDS)
        if "kind" not in keys:
            self._fault(node.key_line, f"{path}.kind", f"is missing: one of {kinds}")
            return None
        scalar = keys["kind"].scalar
        name = scalar.text if scalar is not None else ""
        if name not in KINDS:
            hint = (
                f"{show(name)} is not a kind{nearest(name, KINDS)}; one of {kinds}"
                if name
                else f"must be one of {kinds}"
            )
            self._fault(keys["kind"].line, f"{path}.kind", hint)
        return KINDS.get(name)

    def _feature_events(self, node: Node | None, path: str, event_types: list[EventType] | None) -> tuple[str, ...]:
        names = [event.name for event in event_types or ()]
        if node is None:
            return tuple(names)
        if not isinstance(node.value, list) or not node.value:
            self._fault(node.line, path, "must be a list of event types, as [view]")
            return ()
        chosen = set()
        for index, item in enumerate(node.value):
            at = f"{path}[{index}]"
            if item.scalar is None:
                self._fault(item.line, at, "must be the name of an event type")
            elif item.scalar.text in chosen:
                self._fault(item.line, at, f"{show(item.scalar.text)} stands there twice")
            else:
                chosen.add(item.scalar.text)
                # Where no type could be read, that is the fault, and not each mention of one.
                if event_types is not None and item.scalar.text not in names:
                    hint = nearest(item.scalar.text, names)
                    self._fault(item.line, at, f"{show(item.scalar.text)} is not a declared event type{hint}")
        return tuple(name for name in names if name in chosen)

    def _check_attribute_type(self, name: str, kind: FeatureKind, keys: Mapping[str, Node], path: str) -> None:
        """What is a text for one feature is a number for none, whatever else is wrong with either."""
        node = keys.get("attribute")
        if kind.reads is None or node is None or node.scalar is None or node.scalar.is_null:
            return
        attribute = node.scalar.text
        first, reads = self._readers.setdefault(attribute, (name, kind.reads))
        if reads != kind.reads:
            what = f"{show(attribute)} is a {reads} for feature {first} and a {kind.reads} here"
            self._fault(node.line, f"{path}.attribute", what)
