"""JSON Schemas of messages, as proto3's JSON mapping writes them, with the protos' comments as descriptions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

Schema = dict[str, Any]

_SCALARS: Mapping[int, Schema] = {
    FieldDescriptor.CPPTYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.CPPTYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.CPPTYPE_UINT32: {"type": "integer", "format": "int64", "minimum": 0},
    FieldDescriptor.CPPTYPE_INT64: {"type": "string", "format": "int64"},
    FieldDescriptor.CPPTYPE_UINT64: {"type": "string", "format": "uint64"},
    FieldDescriptor.CPPTYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.CPPTYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.CPPTYPE_STRING: {"type": "string"},
}
_WELL_KNOWN: Mapping[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Struct": {"type": "object", "additionalProperties": True},
}


class Schemas:
    """Schemas by component name, made as they are referred to.

    What callers send must have no other fields and may leave any out; what they receive has every field that has no
    presence of its own (scalars, lists, maps).
    """

    def __init__(self, comments: Mapping[str, str], received: Collection[str]) -> None:
        """`received`: full names of the messages that callers receive."""
        self.components: dict[str, Schema] = {}
        self._comments = comments
        self._received = received

    def reference(self, message: Descriptor, left_out: Collection[str] = ()) -> Schema:
        """{"$ref": …} to the message's schema, which has no fields of the names `left_out`."""
        name = component_name(message)
        if name not in self.components:
            self.components[name] = {}  # for a message that holds its own type
            self.components[name] = self._message(message, left_out)
        return {"$ref": f"#/components/schemas/{name}"}

    def of_field(self, field: FieldDescriptor) -> Schema:
        """The schema of a field's value, with its comment."""
        schema = self._of_values(field)
        comment = self._comments.get(field.full_name)
        return {**schema, "description": comment} if comment else schema

    def _message(self, message: Descriptor, left_out: Collection[str]) -> Schema:
        fields = [field for field in message.fields if field.name not in left_out]
        schema: Schema = {"type": "object", "properties": {field.json_name: self.of_field(field) for field in fields}}
        if comment := self._comments.get(message.full_name):
            schema["description"] = comment
        if message.full_name not in self._received:
            return {**schema, "additionalProperties": False}
        if required := [field.json_name for field in fields if not field.has_presence]:
            schema["required"] = required
        for choice in message.oneofs:
            schema["oneOf"] = [{"required": [field.json_name]} for field in choice.fields]
        return schema

    def _of_values(self, field: FieldDescriptor) -> Schema:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            return {
                "type": "object",
                "additionalProperties": self._of_value(field.message_type.fields_by_name["value"]),
            }
        value = self._of_value(field)
        return {"type": "array", "items": value} if field.is_repeated else value

    def _of_value(self, field: FieldDescriptor) -> Schema:
        if field.message_type is not None:
            well_known = _WELL_KNOWN.get(field.message_type.full_name)
            return dict(well_known) if well_known else self.reference(field.message_type)
        if field.enum_type is not None:
            return {"type": "string", "enum": [value.name for value in field.enum_type.values]}
        if field.type == FieldDescriptor.TYPE_BYTES:
            return {"type": "string", "contentEncoding": "base64"}
        return dict(_SCALARS[field.cpp_type])


def component_name(message: Descriptor) -> str:
    """Name of a message's schema: "RankItemsRequest.Item"."""
    return str(message.full_name).removeprefix(message.file.package + ".")


def reachable(message: Descriptor) -> set[str]:
    """Full names of a message and of all that it holds."""
    found: dict[str, Descriptor] = {}
    waiting = [message]
    while waiting:
        each = waiting.pop()
        if each.full_name not in found:
            found[each.full_name] = each
            waiting.extend(_held(each))
    return set(found)


def _held(message: Descriptor) -> Iterator[Descriptor]:
    return (field.message_type for field in message.fields if field.message_type is not None)
