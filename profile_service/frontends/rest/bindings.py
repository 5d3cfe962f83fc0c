"""The REST interface as the protos declare it: each `google.api.http` rule of a service becomes one `Binding`.

    rpc RankItems(RankItemsRequest) returns (RankItemsResponse) {
      option (google.api.http) = {post: "/v1/profiles/{user_id}:rankItems"  body: "*"};
    }

is Binding("userprofile.v1.ProfileService/RankItems", "POST", segments=("v1", "profiles", Variable("user_id")),
verb="rankItems", has_body=True). Of the rules' language this takes what this API uses; anything else stops the start.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from google.api import annotations_pb2
from google.api.http_pb2 import HttpRule
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from userprofile.v1 import admin_service_pb2, event_service_pb2, profile_service_pb2

_TEMPLATE = re.compile(r"(?P<path>(?:/(?:[^/{}:*]+|\{\w+(?:=\*)?\}))+)(?::(?P<verb>[^/{}:*]+))?")
_VARIABLE = re.compile(r"\{(\w+)(?:=\*)?\}")


@dataclass(frozen=True)
class Variable:
    """A path segment that gives a field of the request its value."""

    field: str


@dataclass(frozen=True)
class Binding:
    """One HTTP method and path that answers with one gRPC method."""

    method: str
    """As in "userprofile.v1.ProfileService/GetProfile"."""
    http_method: str
    segments: tuple[str | Variable, ...]
    verb: str
    """The custom verb after the colon; empty where there is none."""
    has_body: bool
    """Whether the body is the request (`body: "*"`); if not, the query gives the fields that the path does not."""
    descriptor: MethodDescriptor
    request_type: type[Message]
    response_type: type[Message]

    @property
    def template(self) -> str:
        """The path as OpenAPI writes it: "/v1/profiles/{user_id}:rankItems"."""
        names = (f"{{{segment.field}}}" if isinstance(segment, Variable) else segment for segment in self.segments)
        return "/" + "/".join(names) + (f":{self.verb}" if self.verb else "")

    @cached_property
    def path_fields(self) -> tuple[str, ...]:
        """Fields of the request that the path gives."""
        return tuple(segment.field for segment in self.segments if isinstance(segment, Variable))

    @property
    def is_streaming(self) -> bool:
        """Whether the answer is a stream of messages."""
        return bool(self.descriptor.server_streaming)


def service_bindings() -> tuple[Binding, ...]:
    """Every REST path of the public services, in the order of the protos."""
    files = (event_service_pb2, profile_service_pb2, admin_service_pb2)
    services = (service for file in files for service in file.DESCRIPTOR.services_by_name.values())
    return tuple(bindings_of(services))


def bindings_of(services: Iterable[ServiceDescriptor]) -> Iterator[Binding]:
    """The bindings of some services; raises ValueError at a rule that is outside of what is served here."""
    for service in services:
        for method in service.methods:
            options = method.GetOptions()
            if not options.HasExtension(annotations_pb2.http):
                continue
            rule = options.Extensions[annotations_pb2.http]
            for each in (rule, *rule.additional_bindings):
                yield _binding(service, method, each)


def _binding(service: ServiceDescriptor, method: MethodDescriptor, rule: HttpRule) -> Binding:
    http_method = rule.WhichOneof("pattern")
    if http_method not in ("get", "put", "post", "delete", "patch"):
        raise ValueError(f"{method.full_name}: a google.api.http rule needs get, put, post, delete or patch")
    template = getattr(rule, http_method)
    found = _TEMPLATE.fullmatch(template)
    if found is None:
        raise ValueError(f"{method.full_name}: path {template!r} is none of segments, {{field}} and a verb")
    if rule.body not in ("", "*") or rule.response_body:
        raise ValueError(f'{method.full_name}: body must be "*" or absent, response_body absent')
    segments = tuple(_segment(text) for text in found["path"][1:].split("/"))
    for segment in segments:
        if isinstance(segment, Variable):
            _check_variable(method.input_type, segment.field)
    return Binding(
        method=f"{service.full_name}/{method.name}",
        http_method=http_method.upper(),
        segments=segments,
        verb=found["verb"] or "",
        has_body=rule.body == "*",
        descriptor=method,
        request_type=GetMessageClass(method.input_type),
        response_type=GetMessageClass(method.output_type),
    )


def _segment(text: str) -> str | Variable:
    found = _VARIABLE.fullmatch(text)
    return Variable(found[1]) if found else text


def _check_variable(request: Descriptor, name: str) -> None:
    field = request.fields_by_name.get(name)
    if field is None or field.type != FieldDescriptor.TYPE_STRING or field.is_repeated:
        raise ValueError(f"{request.full_name}: path variable {name!r} must be a string field")
