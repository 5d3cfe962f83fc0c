"""A kind's options: from YAML to the kind's own model, and the model's faults back to lines and plain sentences."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from profile_service.domain.features.base import KindOptions
from profile_service.domain.schema_yaml import Node, join, show
from profile_service.errors import SchemaFault

COMMON_KEYS = ("kind", "events", "half_life")
"""Keys that every feature may have, whatever its kind."""


def read_options(model: type[KindOptions], feature: Node, path: str, faults: list[SchemaFault]) -> KindOptions | None:
    """The options among the feature's keys; None where they have faults, which are then noted."""
    assert isinstance(feature.value, dict)
    own = {key: node for key, node in feature.value.items() if key not in COMMON_KEYS}
    given = {key: _plain(node, _field_type(model, key)) for key, node in own.items()}
    try:
        # Strictly: no text becomes a number, no number a text. Whoever reads the file next should not have to guess.
        return model.model_validate(given, strict=True)
    except ValidationError as error:
        faults.extend(
            _fault(model, detail, Node(own, feature.line, feature.key_line), path) for detail in error.errors()
        )
    return None


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that was probably meant, or nothing."""
    near = difflib.get_close_matches(word[:64], list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _plain(node: Node, wanted: Any) -> object:
    """The value as plain Python. Where a text is wanted it is what was written (`no`, `007`), else a number where it
    is one; null is None, but in a list, where it is a word like any other.
    """
    if isinstance(node.value, dict):
        return {key: _plain(inner, _field_type(wanted, key)) for key, inner in node.value.items()}
    if isinstance(node.value, list):
        item_type = next(iter(get_args(wanted)), None) if get_origin(wanted) is list else None
        return [
            item.scalar.text if item.scalar and item_type is str else _plain(item, item_type) for item in node.value
        ]
    if node.value.is_null:
        return None
    number = node.value.number
    return node.value.text if wanted is str or number is None else number


def _field_type(model: Any, key: str) -> Any:
    """What the model's field is to hold, without `| None`; None for what is no field."""
    if not (isinstance(model, type) and issubclass(model, BaseModel)) or key not in model.model_fields:
        return None
    wanted = model.model_fields[key].annotation
    if get_origin(wanted) in (Union, types.UnionType):
        return next(choice for choice in get_args(wanted) if choice is not type(None))
    return wanted


def _fault(model: type[KindOptions], detail: ErrorDetails, feature: Node, path: str) -> SchemaFault:
    """The fault at its place: as deep along its location as the file goes."""
    node, key, known = feature, "", [*model.model_fields, *COMMON_KEYS]
    within: Any = model
    for step in detail["loc"]:
        if isinstance(step, int):
            path = f"{path}[{step}]"
            node = node.value[step] if isinstance(node.value, list) else node
            continue
        if isinstance(within, type) and issubclass(within, BaseModel) and within is not model:
            known = list(within.model_fields)
        path, key = join(path, step), step
        within = _field_type(within, step)
        if isinstance(node.value, Mapping):
            node = node.value.get(step, node)
    if detail["type"] == "extra_forbidden":
        return SchemaFault(node.key_line, path, f"is not known here{nearest(key, known)}")
    return SchemaFault(node.line, path, _sentence(detail, node, within))


def _sentence(detail: ErrorDetails, node: Node, wanted: Any) -> str:
    """What is wrong and what would be right, in the words of a schema file and not of pydantic."""
    fault, limits = detail["type"], detail.get("ctx", {})
    if fault == "missing":
        return "is missing"
    if detail["input"] is None:
        return "is empty: give a value, or leave the key out"
    if fault == "value_error":
        return str(limits["error"])
    found = ""
    if node.scalar:
        found = f", is {show(node.scalar.text) if node.scalar.quoted else node.scalar.text[:64]}"
    if fault == "literal_error":
        choices = get_args(wanted)
        hint = nearest(node.scalar.text, choices) if node.scalar else ""
        return f"must be {' or '.join(choices)}{found}{hint}"
    if fault in _LIMITS:
        word, key = _LIMITS[fault]
        return f"must be {word} {limits[key]:g}{found}"
    if fault == "string_too_short":
        return "must not be empty"
    if fault == "too_short":
        return "must not be empty" if limits["min_length"] == 1 else f"must have at least {limits['min_length']} items"
    if fault == "too_long":
        return f"must have at most {limits['max_length']} items, has {limits['actual_length']}"
    for types_of_fault, description in _WANTED:
        if fault in types_of_fault:
            return f"must be {description}{found}"
    return f"{detail['msg'][0].lower()}{detail['msg'][1:]}{found}"


_LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
_WANTED = (
    (("int_type", "int_parsing", "int_from_float"), "a whole number"),
    (("float_type", "float_parsing"), "a number"),
    (("finite_number",), "a finite number"),
    (("string_type",), "text"),
    (("list_type",), "a list, as [a, b]"),
    (("model_type", "model_attributes_type", "dict_type"), "a mapping, as {key: value}"),
)
