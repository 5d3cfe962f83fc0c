"""Query parameters to a request's fields: `?features=color&features=price`.

A parameter is a field's name in either spelling, a field of a nested message after a dot; a repeated field takes the
parameter as often as it is given. What is not such a field is refused by name, rather than ignored as a typo would be.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from profile_service.errors import InvalidArgument
from profile_service.frontends.rest import percent
from profile_service.frontends.rest.json_in import descriptor_of, fields_of, fill, unknown_name

_FLAGS = {"true": True, "false": False}


def fill_from_query(message: Message, query: bytes, path_fields: Collection[str]) -> None:
    """Sets the fields that the query names; raises InvalidArgument naming the parameter at fault."""
    if not query:
        return
    tree: dict[str, Any] = {}
    for pair in query.split(b"&"):
        if pair:
            raw_name, _, raw_value = pair.partition(b"=")
            name = percent.decode_query(raw_name, "query")
            _set(tree, descriptor_of(message), name, percent.decode_query(raw_value, name), path_fields)
    fill(message, tree)


def refuse_query(query: bytes, request: Descriptor) -> None:
    """For a method whose body is the request: raises InvalidArgument where there is a query too."""
    if query:
        name = percent.decode_query(query.partition(b"&")[0].partition(b"=")[0], "query")
        raise InvalidArgument(name, f"must be in the body, as a field of {request.name}, is in the query")


def _set(tree: dict[str, Any], descriptor: Descriptor, name: str, value: str, path_fields: Collection[str]) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        field = fields_of(descriptor).get(parent)
        if field is None or field.message_type is None or field.is_repeated:
            raise InvalidArgument(name, unknown_name(name, descriptor, "query parameter"))
        descriptor = field.message_type
        tree = tree.setdefault(field.name, {})
        if not isinstance(tree, dict):
            raise InvalidArgument(name, f"must not be given beside {parent}")
    field = fields_of(descriptor).get(last)
    if field is None:
        raise InvalidArgument(name, unknown_name(name, descriptor, "query parameter"))
    if not parents and field.name in path_fields:
        raise InvalidArgument(name, "must be given by the path alone, is in the query too")
    converted = _FLAGS.get(value, value) if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL else value
    if field.is_repeated:
        tree.setdefault(field.name, []).append(converted)
    elif field.name in tree:
        raise InvalidArgument(name, "must be given once, is given again")
    else:
        tree[field.name] = converted
