"""The OpenAPI 3.1 document of the REST interface, made at start from the same bindings that the routes are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from profile_service import __version__
from profile_service.frontends.rest.bindings import Binding
from profile_service.frontends.rest.comments import load_comments
from profile_service.frontends.rest.http import JSON
from profile_service.frontends.rest.schemas import Schemas, reachable

_DESCRIPTION = """\
Events stream in, profiles come out: how likely each value is, how numbers are distributed, what was seen last.

Field names are taken in both spellings (`user_id`, `userId`) and written in lowerCamelCase; default values are written
out. A 64-bit integer is a string in JSON, a time is RFC 3339. Any user id works in a path, percent-encoded: `%2F` for a
slash, `%3A` for a colon, which else begins a verb. An error is a `google.rpc.Status`, whose `details` name the field at
fault (`BadRequest`) and say when to try again (`RetryInfo`).
"""

_ERRORS = {
    "400": "INVALID_ARGUMENT: `details` name the field and say what is wrong with it.",
    "404": "NOT_FOUND: nobody has seen such a user.",
    "413": "INVALID_ARGUMENT: the body is larger than a message may be.",
    "429": "RESOURCE_EXHAUSTED: a bounded queue is full; `RetryInfo` and `Retry-After` say when to try again.",
    "501": "UNIMPLEMENTED: this version does not serve it yet.",
    "503": "UNAVAILABLE: an owner moves, recovers or shuts down; try again as `RetryInfo` says.",
    "504": "DEADLINE_EXCEEDED: the caller's deadline passed.",
}
_STATUS = {
    "type": "object",
    "description": "google.rpc.Status: what went wrong.",
    "required": ["code", "message", "details"],
    "properties": {
        "code": {"type": "integer", "format": "int32", "description": "gRPC's number of the status code."},
        "message": {"type": "string", "description": "What was wrong, and what would be right."},
        "details": {
            "type": "array",
            "description": "google.rpc's ErrorInfo, BadRequest and RetryInfo, told apart by `@type`.",
            "items": {
                "type": "object",
                "required": ["@type"],
                "properties": {"@type": {"type": "string"}},
                "additionalProperties": True,
            },
        },
    },
    "examples": [
        {
            "code": 3,
            "message": "features: must be features of the schema, colour is none",
            "details": [
                {
                    "@type": "type.googleapis.com/google.rpc.BadRequest",
                    "fieldViolations": [
                        {
                            "field": "features",
                            "description": "must be features of the schema, colour is none",
                        }
                    ],
                }
            ],
        }
    ],
}
_EVENT = {
    "userId": "u1",
    "type": "view",
    "time": "2026-11-22T10:00:00Z",
    "attributes": {"color": "red", "make": "Toyota", "price": 12900, "mileage": 84000},
}
_EXAMPLES: Mapping[str, Any] = {
    "userprofile.v1.IngestEventsRequest": {"events": [_EVENT]},
    "userprofile.v1.BatchGetProfilesRequest": {"userIds": ["u1", "u2"], "features": ["color", "price"]},
    "userprofile.v1.RankItemsRequest": {
        "items": [
            {"itemId": "red-toyota", "attributes": {"color": "red", "make": "Toyota", "price": 11500}},
            {"itemId": "blue-volvo", "attributes": {"color": "blue", "make": "Volvo", "price": 31000}},
        ]
    },
    "userprofile.v1.MergeProfilesRequest": {"sourceUserId": "u2"},
    "userprofile.v1.MovePartitionsRequest": {"partitions": [0, 1], "targetShardId": 1},
}


def build_document(bindings: Sequence[Binding]) -> dict[str, Any]:
    """The document, as JSON's types."""
    return _Document(bindings).build()


class _Document:
    def __init__(self, bindings: Sequence[Binding]) -> None:
        self._bindings = bindings
        self._comments = load_comments()
        received = set().union(*(reachable(binding.descriptor.output_type) for binding in bindings))
        self._schemas = Schemas(self._comments, received)
        self._schemas.components["Status"] = _STATUS
        self._operation_ids: Counter[str] = Counter()

    def build(self) -> dict[str, Any]:
        paths: dict[str, dict[str, Any]] = {}
        for binding in self._bindings:
            paths.setdefault(binding.template, {})[binding.http_method.lower()] = self._operation(binding)
        services = dict.fromkeys(binding.descriptor.containing_service for binding in self._bindings)
        return {
            "openapi": "3.1.0",
            "info": {"title": "Profile Service", "version": __version__, "description": _DESCRIPTION},
            "servers": [{"url": "/"}],
            "tags": [
                {"name": service.name, "description": self._comments.get(service.full_name, "")} for service in services
            ]
            + [{"name": "Operations", "description": "What machines look at."}],
            "paths": {**paths, **_OPERATIONS},
            "components": {
                "schemas": self._schemas.components,
                "responses": {_response_name(code): _error(text) for code, text in {**_ERRORS, **_OTHER}.items()},
            },
        }

    def _operation(self, binding: Binding) -> dict[str, Any]:
        method = binding.descriptor
        comment = self._comments.get(method.full_name, "")
        operation_id = f"{method.containing_service.name}_{method.name}"
        self._operation_ids[operation_id] += 1
        count = self._operation_ids[operation_id]
        operation: dict[str, Any] = {
            "operationId": operation_id if count == 1 else f"{operation_id}{count}",
            "tags": [method.containing_service.name],
            "summary": _first_sentence(comment),
            "description": comment,
            "parameters": self._parameters(binding),
            "responses": self._responses(binding),
        }
        if binding.has_body:
            schema = self._schemas.reference(method.input_type, binding.path_fields)
            content = {"schema": schema, "example": _EXAMPLES.get(method.input_type.full_name, {})}
            operation["requestBody"] = {"content": {JSON: content}}
        return operation

    def _parameters(self, binding: Binding) -> list[dict[str, Any]]:
        parameters = []
        for field in binding.descriptor.input_type.fields:
            in_path = field.name in binding.path_fields
            if not in_path and binding.has_body:
                continue
            schema = self._schemas.of_field(field)
            parameter = {
                "name": field.name,
                "in": "path" if in_path else "query",
                "description": schema.pop("description", ""),
                "schema": {**schema, "minLength": 1} if in_path else schema,
            }
            parameters.append({**parameter, "required": True} if in_path else parameter)
        return parameters

    def _responses(self, binding: Binding) -> dict[str, Any]:
        schema = self._schemas.reference(binding.descriptor.output_type)
        content: dict[str, Any] = {JSON: {"schema": schema}}
        if binding.is_streaming:
            line = {
                "type": "object",
                "properties": {"result": schema, "error": {"$ref": "#/components/schemas/Status"}},
            }
            content = {
                "application/x-ndjson": {"schema": line},
                "text/event-stream": {"schema": {"type": "string", "description": "`data` is the result."}},
            }
        answer = self._comments.get(binding.descriptor.output_type.full_name, "The answer.")
        codes = ["400", *(["404"] if binding.path_fields else []), *(["413"] if binding.has_body else [])]
        names = [*codes, "429", "501", "503", "504", "default"]
        references = {name: {"$ref": f"#/components/responses/{_response_name(name)}"} for name in names}
        return {"200": {"description": answer, "content": content}, **references}


_OTHER = {"default": "Any other error."}
_TEXT = {"text/plain": {"schema": {"type": "string"}}}
_OPERATIONS: Mapping[str, Any] = {
    "/healthz": {
        "get": {
            "operationId": "healthz",
            "tags": ["Operations"],
            "summary": "Whether the process lives.",
            "responses": {"200": {"description": "It does.", "content": _TEXT}},
        }
    },
    "/readyz": {
        "get": {
            "operationId": "readyz",
            "tags": ["Operations"],
            "summary": "Whether the service takes calls.",
            "responses": {
                "200": {"description": "It does.", "content": _TEXT},
                "503": {"$ref": "#/components/responses/Error503"},
            },
        }
    },
    "/metrics": {
        "get": {
            "operationId": "metrics",
            "tags": ["Operations"],
            "summary": "What the frontend counts, in Prometheus' text format.",
            "responses": {"200": {"description": "The metrics.", "content": _TEXT}},
        }
    },
}


def _response_name(code: str) -> str:
    return "Error" if code == "default" else f"Error{code}"


def _error(description: str) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": {"$ref": "#/components/schemas/Status"}}}}


def _first_sentence(comment: str) -> str:
    """A comment's first sentence, without its full stop: what a list of operations shows."""
    return comment.partition(". ")[0].partition("; ")[0].removesuffix(".")
