"""What the protos' comments say of services, methods, messages and fields.

Generated code has no comments, so that `descriptors.binpb` beside this file carries them: the descriptors of protos/
with their source info, written together with the generated code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import TypeVar

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

Item = TypeVar("Item")

_PACKAGE = "userprofile.v1"
_Path = tuple[int, ...]


def load_comments() -> Mapping[str, str]:
    """Full name ("userprofile.v1.Event.user_id") -> its comment, as one paragraph of plain text."""
    encoded = files("profile_service.frontends.rest").joinpath("descriptors.binpb").read_bytes()
    ours = (file for file in FileDescriptorSet.FromString(encoded).file if file.package == _PACKAGE)
    return {name: comment for file in ours for name, comment in _file_comments(file)}


def _file_comments(file: FileDescriptorProto) -> Iterator[tuple[str, str]]:
    names = dict(_names(file))
    for location in file.source_code_info.location:
        name = names.get(tuple(location.path))
        comment = " ".join(location.leading_comments.split())
        if name and comment:
            yield name, comment


def _names(file: FileDescriptorProto) -> Iterator[tuple[_Path, str]]:
    """Path in the file's descriptor (field number, index, field number, index …) -> full name of what is there."""
    for at, service in _each(FileDescriptorProto.SERVICE_FIELD_NUMBER, file.service):
        yield at, f"{file.package}.{service.name}"
        for below, method in _each(ServiceDescriptorProto.METHOD_FIELD_NUMBER, service.method):
            yield at + below, f"{file.package}.{service.name}.{method.name}"
    for at, message in _each(FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER, file.message_type):
        yield from _message_names(at, file.package, message)
    for at, enum in _each(FileDescriptorProto.ENUM_TYPE_FIELD_NUMBER, file.enum_type):
        yield from _enum_names(at, file.package, enum)


def _message_names(at: _Path, scope: str, message: DescriptorProto) -> Iterator[tuple[_Path, str]]:
    name = f"{scope}.{message.name}"
    yield at, name
    for below, field in _each(DescriptorProto.FIELD_FIELD_NUMBER, message.field):
        yield at + below, f"{name}.{field.name}"
    for below, nested in _each(DescriptorProto.NESTED_TYPE_FIELD_NUMBER, message.nested_type):
        yield from _message_names(at + below, name, nested)
    for below, enum in _each(DescriptorProto.ENUM_TYPE_FIELD_NUMBER, message.enum_type):
        yield from _enum_names(at + below, name, enum)


def _enum_names(at: _Path, scope: str, enum: EnumDescriptorProto) -> Iterator[tuple[_Path, str]]:
    yield at, f"{scope}.{enum.name}"
    for below, value in _each(EnumDescriptorProto.VALUE_FIELD_NUMBER, enum.value):
        yield at + below, f"{scope}.{enum.name}.{value.name}"


def _each(number: int, items: Sequence[Item]) -> Iterator[tuple[_Path, Item]]:
    return (((number, index), item) for index, item in enumerate(items))
