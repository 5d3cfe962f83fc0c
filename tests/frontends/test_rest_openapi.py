"""The OpenAPI document is valid, complete, and true of what is answered."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from profile_service.frontends.rest.bindings import service_bindings
from profile_service.frontends.rest.comments import load_comments
from profile_service.frontends.rest.openapi import build_document
from profile_service.frontends.rest.schemas import reachable
from tests.frontends.rest_harness import rest_edge
from userprofile.v1.event_pb2 import RejectedEvent
from userprofile.v1.event_service_pb2 import IngestEventsResponse
from userprofile.v1.profile_pb2 import Profile

DOCUMENT = build_document(service_bindings())


def test_the_document_is_valid_openapi_3_1() -> None:
    OpenAPIV31SpecValidator(json.loads(json.dumps(DOCUMENT))).validate()


async def test_it_is_served() -> None:
    async with rest_edge() as edge:
        response = await edge.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == DOCUMENT


def test_every_binding_and_what_is_beside_the_api_are_in_it() -> None:
    for binding in service_bindings():
        assert binding.http_method.lower() in DOCUMENT["paths"][binding.template]
    assert {"/healthz", "/readyz", "/metrics"} < set(DOCUMENT["paths"])
    ids = [operation["operationId"] for path in DOCUMENT["paths"].values() for operation in path.values()]
    assert len(set(ids)) == len(ids)


def test_parameters_are_the_fields_that_neither_path_nor_body_gives() -> None:
    get = DOCUMENT["paths"]["/v1/profiles/{user_id}"]["get"]
    user_id, features = get["parameters"]
    assert (user_id["name"], user_id["in"], user_id["required"]) == ("user_id", "path", True)
    assert (features["name"], features["in"], features["schema"]["type"]) == ("features", "query", "array")
    assert features["description"] == "Names of the features wanted; none means all."
    assert [each["name"] for each in DOCUMENT["paths"]["/v1/profiles:batchGet"]["get"]["parameters"]] == [
        "user_ids",
        "features",
    ]
    assert DOCUMENT["paths"]["/v1/profiles:batchGet"]["post"]["parameters"] == []
    assert "userId" not in DOCUMENT["components"]["schemas"]["RankItemsRequest"]["properties"]


def test_every_operation_message_and_field_has_the_protos_comment() -> None:
    comments = load_comments()
    for binding in service_bindings():
        operation = DOCUMENT["paths"][binding.template][binding.http_method.lower()]
        assert operation["description"] == comments[binding.descriptor.full_name]
        assert operation["summary"]
    for name, schema in DOCUMENT["components"]["schemas"].items():
        assert schema["description"], name
        for field, described in schema["properties"].items():
            assert name == "Status" or described["description"], f"{name}.{field}"


def test_the_committed_descriptors_are_those_of_the_generated_code() -> None:
    comments = load_comments()
    for binding in service_bindings():
        types = (binding.descriptor.input_type, binding.descriptor.output_type)
        ours = {name for each in types for name in reachable(each) if name.startswith("userprofile.")}
        entries = {name for name in ours if name.endswith("Entry") and name not in comments}
        assert ours - entries <= set(comments)


EXAMPLES = [
    (path, operation["requestBody"]["content"]["application/json"])
    for path, methods in DOCUMENT["paths"].items()
    for operation in methods.values()
    if "requestBody" in operation
]


@pytest.mark.parametrize(("path", "content"), EXAMPLES, ids=[path for path, _ in EXAMPLES])
async def test_every_example_is_valid_and_taken(path: str, content: dict[str, Any]) -> None:
    check(content["example"], content["schema"])
    async with rest_edge() as edge:
        response = await edge.post(path.replace("{user_id}", "u1"), content["example"])
    assert response.status_code == 200, response.text


async def test_answers_are_as_the_document_says() -> None:
    profile = Profile(user_id="u1")
    profile.features["color"].categorical.values.add(value="red", weight=1.5)
    profile.features["price"].distribution.histogram.edges.extend([1.0, 2.0])
    profile.last_seen_time.FromSeconds(1_795_000_000)
    async with rest_edge(profile) as edge:
        check((await edge.get("/v1/profiles/u1")).json(), {"$ref": "#/components/schemas/Profile"})
        check((await edge.get("/v1/profiles/%FF")).json(), {"$ref": "#/components/schemas/Status"})
    answer = IngestEventsResponse(accepted_count=1, rejected=[RejectedEvent(index=2, field="time", reason="is late")])
    async with rest_edge(answer) as edge:
        tree = (await edge.post("/v1/events:ingest", {"events": [{}, {}, {"userId": 5}, {}]})).json()
        check(tree, {"$ref": "#/components/schemas/IngestEventsResponse"})


def check(tree: Any, schema: dict[str, Any]) -> None:
    """Raises where the tree is not what the schema says, references and all."""
    OAS31Validator({**schema, "components": DOCUMENT["components"]}).validate(tree)
