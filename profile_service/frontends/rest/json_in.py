"""JSON to messages. protobuf's own `json_format` decides what is right; what it refuses is explained here, by field.

Both spellings of a field's name are taken (`user_id`, `userId`). Refused besides what proto3's JSON mapping refuses:
bytes that are not UTF-8, keys given twice, NaN and Infinity written as bare words, which are not JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NoReturn, cast

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from profile_service.errors import InvalidArgument

_SHOWN_CHARACTERS = 64
_SHOWN_NAMES = 12
_REFUSALS = (json_format.Error, ValueError, TypeError, AttributeError, OverflowError, RecursionError)
"""What `json_format` ends with on values that it does not take."""
_EXPECTED = {
    FieldDescriptor.CPPTYPE_STRING: "a string",
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_INT32: "a whole number of 32 bits",
    FieldDescriptor.CPPTYPE_INT64: "a whole number of 64 bits",
    FieldDescriptor.CPPTYPE_UINT32: "a whole number of 32 bits, not negative",
    FieldDescriptor.CPPTYPE_UINT64: "a whole number of 64 bits, not negative",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
}
_EXPECTED_MESSAGES = {
    "google.protobuf.Timestamp": "a time such as 2026-11-22T10:00:00Z",
    "google.protobuf.Duration": "a duration such as 1.5s",
    "google.protobuf.Struct": "an object",
}


def load(body: bytes) -> dict[str, Any]:
    """The JSON object of a body, {} of an empty one; raises InvalidArgument for anything else."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument("", f"the body must be UTF-8, byte {error.start} is not") from None
    if not text.strip():
        return {}
    try:
        tree = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_json)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise InvalidArgument("", f"the body must be JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise InvalidArgument("", "the body must be JSON of fewer levels, is nested too deeply") from None
    except ValueError:
        # What json.loads is left to raise: Python turns only integers of at most 4,300 digits into numbers.
        raise InvalidArgument("", "the body must be JSON with numbers of fewer digits") from None
    if not isinstance(tree, dict):
        raise InvalidArgument("", f"the body must be an object, is {shown(tree)}")
    return tree


def fill(message: Message, tree: dict[str, Any]) -> None:
    """Sets the message's fields. Raises InvalidArgument with the path of the field at fault."""
    descriptor = descriptor_of(message)
    if _is_sound(tree, descriptor):
        try:
            json_format.ParseDict(tree, message)
            return
        except _REFUSALS:
            pass
    field, reason = explain(tree, descriptor)
    raise InvalidArgument(field, reason)


def explain(tree: object, descriptor: Descriptor) -> tuple[str, str]:
    """(field, reason) why a tree is no message of this type."""
    return _message_fault(tree, descriptor) or ("", f"cannot be read as {descriptor.full_name}")


def descriptor_of(message: Message | type[Message]) -> Descriptor:
    """The descriptor of a message, for type checkers: stubs name the C implementation's class as another one."""
    return cast(Descriptor, message.DESCRIPTOR)


@cache
def fields_of(descriptor: Descriptor) -> Mapping[str, FieldDescriptor]:
    """A message's fields by both spellings of their names."""
    return {name: field for field in descriptor.fields for name in (field.name, field.json_name)}


def shown(value: object) -> str:
    """A value of a caller's JSON as an error message shows it."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case dict():
            return "an object"
        case list():
            return "an array"
        case str():
            return json.dumps(clipped(value), ensure_ascii=False)
        case _:
            return clipped(repr(value))


def clipped(text: str) -> str:
    """A caller's text as an error message shows it: well-formed, and not longer than a line."""
    text = text.encode(errors="replace").decode()
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def unknown_name(name: str, descriptor: Descriptor, what: str) -> str:
    """The reason for a name that is no field: says which there are."""
    names = [field.json_name for field in descriptor.fields]
    there_are = ", ".join(names[:_SHOWN_NAMES]) + (", …" if len(names) > _SHOWN_NAMES else "") if names else "none"
    return f"is not a {what} of {descriptor.name}; there are: {there_are}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for position, name in enumerate(names) if name in names[:position])
        raise InvalidArgument(clipped(twice), "must be given once in its JSON object, is given again")
    return tree


def _not_json(word: str) -> NoReturn:
    raise InvalidArgument("", f"the body must be JSON, which has no {word}; leave the value out instead")


def _message_fault(tree: object, descriptor: Descriptor) -> tuple[str, str] | None:
    if not isinstance(tree, dict):
        return "", f"must be an object, is {shown(tree)}"
    given: dict[str, str] = {}
    for name, value in tree.items():
        field = fields_of(descriptor).get(name)
        if field is None:
            return clipped(name), unknown_name(name, descriptor, "field")
        if field.name in given:
            return field.name, f"must be given once, is given as {given[field.name]} and as {name}"
        given[field.name] = name
        if value is not None and (fault := _field_fault(field, value)):
            below, reason = fault
            separator = "." if below and not below.startswith("[") else ""
            return f"{field.name}{separator}{below}", reason
    return None


def _field_fault(field: FieldDescriptor, value: object) -> tuple[str, str] | None:
    if _takes(field, value):
        return None
    if _is_map(field):
        return _map_fault(field, value)
    if field.is_repeated:
        if not isinstance(value, list):
            return "", f"must be an array, is {shown(value)}"
        for index, item in enumerate(value):
            if not _takes(field, [item]):
                below, reason = _value_fault(field, item)
                return f"[{index}]{'.' if below else ''}{below}", reason
        return None
    return _value_fault(field, value)


def _map_fault(field: FieldDescriptor, value: object) -> tuple[str, str]:
    if not isinstance(value, dict):
        return "", f"must be an object, is {shown(value)}"
    entry = cast(Descriptor, field.message_type)
    for key, item in value.items():
        if not _takes(field, {key: item}):
            return clipped(key), f"must be {_expected(fields_of(entry)['value'])}, is {shown(item)}"
    return "", "cannot be read"


def _value_fault(field: FieldDescriptor, value: object) -> tuple[str, str]:
    """Why one value is not taken, and where below it."""
    if field.message_type is not None and field.message_type.full_name == "google.protobuf.Struct":
        if isinstance(value, dict):
            for key, item in value.items():
                if not _takes(field, {key: item}):
                    return clipped(key), "must be well-formed text, numbers and lists, not nested too deeply"
    elif field.message_type is not None and not field.message_type.full_name.startswith("google.protobuf."):
        return _message_fault(value, field.message_type) or ("", "cannot be read")
    elif isinstance(value, str) and field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        what = "base64" if field.type == FieldDescriptor.TYPE_BYTES else "well-formed Unicode"
        return "", f"must be {what}, is {shown(value)}"
    return "", f"must be {_expected(field)}, is {shown(value)}"


def _expected(field: FieldDescriptor) -> str:
    if field.message_type is not None:
        return _EXPECTED_MESSAGES.get(field.message_type.full_name, "an object")
    if field.enum_type is not None:
        return "one of " + ", ".join(value.name for value in field.enum_type.values)
    return _EXPECTED[field.cpp_type]


def _is_sound(tree: object, descriptor: Descriptor) -> bool:
    """Whether each message is an object that gives no field twice; `json_format` takes [] for {}, and two spellings."""
    if not isinstance(tree, dict):
        return False
    fields = [(field, value) for name, value in tree.items() if (field := fields_of(descriptor).get(name)) is not None]
    if len({field.number for field, _ in fields}) < len(fields):
        return False
    return all(_is_sound(item, below) for field, value in fields for item, below in _held(field, value))


def _held(field: FieldDescriptor, value: object) -> Iterator[tuple[object, Descriptor]]:
    """The messages of our own types that a field's value holds; nothing of one that should be a list and is none."""
    below = field.message_type
    if below is None or value is None or below.full_name.startswith("google.protobuf."):
        return
    if _is_map(field):
        kind = below.fields_by_name["value"].message_type
        if kind is not None and isinstance(value, dict):
            yield from ((item, kind) for item in value.values())
    elif not field.is_repeated:
        yield value, below
    elif isinstance(value, list):
        yield from ((item, below) for item in value)


def _takes(field: FieldDescriptor, value: object) -> bool:
    if not all(_is_sound(item, below) for item, below in _held(field, value)):
        return False
    try:
        json_format.ParseDict({field.name: value}, GetMessageClass(cast(Descriptor, field.containing_type))())
    except _REFUSALS:
        return False
    return True


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry
