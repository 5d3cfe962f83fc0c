"""What a profile is: the schema, parsed from YAML and checked whole.

`parse_schema` finds every fault of a file and says the line of each. What it returns is frozen and valid: nothing
downstream checks again. `schema_yaml` turns text into values that know their lines; this module says what the values
must be.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import xxhash
from pydantic import ValidationError

from profile_service.domain.duration import parse_duration
from profile_service.domain.features import KINDS
from profile_service.domain.features.base import KindOptions
from profile_service.domain.schema_yaml import Node, Scalar, parse_yaml
from profile_service.errors import SchemaError, SchemaFault, StartupError

SHIPPED = ("marketplace", "retail")
"""Schemas that come with the service, by name."""

MOST_FEATURES = 256
MOST_EVENT_TYPES = 256
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
        """Changes when the meaning of a row changes, and with nothing else: 16 hexadecimal digits."""
        meaning = [
            [[event.name, event.weight] for event in self.event_types],
            [[f.name, f.kind, f.options.model_dump(mode="json"), f.events, f.half_life_s] for f in self.features],
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

    def parse(self, root: Node) -> Schema | None:
        top = self._mapping(root, "", "a mapping with name, events and features")
        if top is None:
            return None
        self._check_keys(top, _TOP_KEYS, "")
        for key in ("name", "events", "features"):
            if key not in top:
                self._fault(root, key, f"is missing: every schema has {key}")
        name = self._name(top["name"]) if "name" in top else None
        half_life_s = self._duration(top.get("half_life"), "half_life")
        ttl_s = self._duration(top.get("ttl"), "ttl")
        event_types = self._event_types(top.get("events"))
        features = self._features(top.get("features"), event_types, half_life_s)
        self._check_attribute_types(features, top.get("features"))
        if self._faults or name is None:
            return None
        return Schema(name, tuple(event_types), tuple(features), ttl_s, self._text)

    def _fault(self, node: Node, path: str, description: str) -> None:
        self._faults.append(SchemaFault(node.line, path or "schema", description))

    def _mapping(self, node: Node, path: str, what: str) -> Mapping[str, Node] | None:
        if isinstance(node.value, dict):
            return node.value
        self._fault(node, path, f"must be {what}")
        return None

    def _check_keys(self, given: Mapping[str, Node], known: Iterable[str], path: str) -> None:
        known = tuple(known)
        for key, node in given.items():
            if key not in known:
                self._fault(node.key or node, _join(path, key), f"is not known here{_nearest(key, known)}")

    def _name(self, node: Node) -> str | None:
        value = node.value
        if not isinstance(value, Scalar) or not _NAME.fullmatch(value.text):
            self._fault(node, "name", _NAME_RULE)
            return None
        return value.text

    def _duration(self, node: Node | None, path: str) -> float | None:
        if node is None:
            return None
        try:
            if not isinstance(node.value, Scalar):
                raise ValueError("must be a duration such as 30d, or none")
            return parse_duration(node.value.text)
        except ValueError as error:
            self._fault(node, path, str(error))
            return None

    def _event_types(self, node: Node | None) -> list[EventType]:
        given = self._mapping(node, "events", "a mapping of event types, as view: {weight: 1}") if node else None
        if node is None or given is None:
            return []
        if not given:
            self._fault(node, "events", "declares no event type")
        if len(given) > MOST_EVENT_TYPES:
            self._fault(node, "events", f"declares {len(given)} event types, at most {MOST_EVENT_TYPES} are possible")
        answer = []
        for name, options in given.items():
            path = f"events.{name}"
            if not _NAME.fullmatch(name):
                self._fault(options.key or options, path, _NAME_RULE)
            keys = self._mapping(options, path, "a mapping, as {weight: 1}")
            weight = 1.0
            if keys is not None:
                self._check_keys(keys, ("weight",), path)
                if "weight" not in keys:
                    self._fault(options, f"{path}.weight", "is missing: write {weight: 1}")
                else:
                    weight = self._weight(keys["weight"], f"{path}.weight")
            answer.append(EventType(name, weight))
        return answer

    def _weight(self, node: Node, path: str) -> float:
        value = node.value.value if isinstance(node.value, Scalar) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._fault(node, path, "must be a number")
        elif not math.isfinite(value) or not 0 < value <= 1e6:
            self._fault(node, path, f"must be above 0 and at most 1000000, is {value}")
        else:
            return float(value)
        return 1.0

    def _features(
        self, node: Node | None, event_types: list[EventType], half_life_s: float | None
    ) -> list[FeatureSpec]:
        given = self._mapping(node, "features", "a mapping of features, as color: {kind: …}") if node else None
        if node is None or given is None:
            return []
        if not given:
            self._fault(node, "features", "declares no feature")
        if len(given) > MOST_FEATURES:
            self._fault(node, "features", f"declares {len(given)} features, at most {MOST_FEATURES} are possible")
        answer = []
        for name, options in given.items():
            if not _NAME.fullmatch(name):
                self._fault(options.key or options, f"features.{name}", _NAME_RULE)
            spec = self._feature(name, options, event_types, half_life_s)
            if spec is not None:
                answer.append(spec)
        return answer

    def _feature(
        self, name: str, node: Node, event_types: list[EventType], default_half_life_s: float | None
    ) -> FeatureSpec | None:
        path = f"features.{name}"
        keys = self._mapping(node, path, "a mapping with kind and the kind's options")
        if keys is None:
            return None
        events = self._feature_events(keys.get("events"), f"{path}.events", event_types)
        own_half_life_s = self._duration(keys.get("half_life"), f"{path}.half_life")
        kinds = ", ".join(KINDS)
        if "kind" not in keys:
            self._fault(node, f"{path}.kind", f"is missing: one of {kinds}")
            return None
        kind_value = keys["kind"].value
        kind_name = kind_value.text if isinstance(kind_value, Scalar) else ""
        kind = KINDS.get(kind_name)
        if kind is None:
            self._fault(
                keys["kind"], f"{path}.kind", f"{kind_name!r} is not a kind{_nearest(kind_name, KINDS)}; one of {kinds}"
            )
            return None
        if "half_life" in keys and not kind.decays:
            self._fault(keys["half_life"], f"{path}.half_life", f"a {kind_name} does not decay: leave it out")
        own = {key: value for key, value in keys.items() if key not in ("kind", "events", "half_life")}
        try:
            options = kind.Options.model_validate({key: _plain(value, kind.Options, key) for key, value in own.items()})
        except ValidationError as error:
            self._option_faults(error, node, own, path, kind.Options.model_fields)
            return None
        half_life_s = own_half_life_s if "half_life" in keys else default_half_life_s
        return FeatureSpec(name, kind_name, options, events, half_life_s if kind.decays else None)

    def _feature_events(self, node: Node | None, path: str, event_types: list[EventType]) -> tuple[str, ...]:
        names = [event.name for event in event_types]
        if node is None:
            return tuple(names)
        if not isinstance(node.value, list) or not node.value:
            self._fault(node, path, "must be a list of event types")
            return ()
        chosen = set()
        for item in node.value:
            text = item.value.text if isinstance(item.value, Scalar) else None
            if text not in names:
                self._fault(item, path, f"{text!r} is not a declared event type{_nearest(text or '', names)}")
            elif text in chosen:
                self._fault(item, path, f"{text!r} stands there twice")
            else:
                chosen.add(text)
        return tuple(name for name in names if name in chosen)

    def _option_faults(
        self, error: ValidationError, node: Node, own: Mapping[str, Node], path: str, known: Iterable[str]
    ) -> None:
        for detail in error.errors():
            at, where, field = node, path, ""
            for step in detail["loc"]:
                field = str(step)
                where = _join(where, field) if isinstance(step, str) else f"{where}[{step}]"
                at = _descend(at, step, own if at is node else None)
            if detail["type"] == "missing":
                description = "is missing"
            elif detail["type"] == "extra_forbidden":
                description = f"is not known here{_nearest(field, tuple(known))}"
                at = at.key or at
            else:
                description = str(detail["msg"]).removeprefix("Value error, ")
            self._fault(at, where, description)

    def _check_attribute_types(self, features: list[FeatureSpec], node: Node | None) -> None:
        first: dict[str, FeatureSpec] = {}
        for spec in features:
            attribute, reads = attribute_of(spec), KINDS[spec.kind].reads
            if reads is None:
                continue
            before = first.setdefault(attribute, spec)
            if KINDS[before.kind].reads != reads:
                assert node is not None
                assert isinstance(node.value, dict)
                at = node.value[spec.name]
                keys = at.value
                self._fault(
                    keys["attribute"] if isinstance(keys, dict) else at,
                    f"features.{spec.name}.attribute",
                    f"{attribute!r} is a {KINDS[before.kind].reads} for feature {before.name} and a {reads} here",
                )


def _plain(node: Node, options: type[KindOptions], key: str) -> object:
    """The node's value as plain Python; what stands in a list of texts is taken as it is written (`no`, `007`)."""
    field = options.model_fields.get(key)
    as_written = field is not None and (field.annotation is str or field.annotation == list[str])

    def convert(value: Node) -> object:
        if isinstance(value.value, dict):
            return {name: convert(inner) for name, inner in value.value.items()}
        if isinstance(value.value, list):
            return [convert(inner) for inner in value.value]
        return value.value.text if as_written else value.value.value

    return convert(node)


def _descend(node: Node, step: object, own: Mapping[str, Node] | None) -> Node:
    value = own if own is not None else node.value
    if isinstance(value, Mapping) and isinstance(step, str):
        return value.get(step, node)
    if isinstance(value, list) and isinstance(step, int) and step < len(value):
        return value[step]
    return node


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
