"""Every annotated path leads to its method, and any user id fits into a path."""

from __future__ import annotations

import contextlib
from urllib.parse import quote

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from hypothesis import example, given
from hypothesis import strategies as st

from profile_service.errors import InvalidArgument, NotFound
from profile_service.frontends.rest.bindings import bindings_of, service_bindings
from profile_service.frontends.rest.routing import Match, Router, WrongMethod

ROUTER = Router(service_bindings())

ROUTES = [
    ("POST", "/v1/events:ingest", "EventService/IngestEvents", {}),
    ("GET", "/v1/profiles/u1", "ProfileService/GetProfile", {"user_id": "u1"}),
    ("HEAD", "/v1/profiles/u1", "ProfileService/GetProfile", {"user_id": "u1"}),
    ("DELETE", "/v1/profiles/u1", "ProfileService/DeleteProfile", {"user_id": "u1"}),
    ("GET", "/v1/profiles:batchGet", "ProfileService/BatchGetProfiles", {}),
    ("POST", "/v1/profiles:batchGet", "ProfileService/BatchGetProfiles", {}),
    ("GET", "/v1/profiles/u1:watch", "ProfileService/WatchProfile", {"user_id": "u1"}),
    ("POST", "/v1/profiles/u1:rankItems", "ProfileService/RankItems", {"user_id": "u1"}),
    ("POST", "/v1/profiles/u1:merge", "ProfileService/MergeProfiles", {"user_id": "u1"}),
    ("GET", "/v1/population", "ProfileService/GetPopulation", {}),
    ("GET", "/v1/schema", "AdminService/GetSchema", {}),
    ("GET", "/v1/topology", "AdminService/GetTopology", {}),
    ("GET", "/v1/status", "AdminService/GetStatus", {}),
    ("POST", "/v1/snapshots", "AdminService/CreateSnapshot", {}),
    ("POST", "/v1/partitions:move", "AdminService/MovePartitions", {}),
    ("POST", "/v1/shards:scale", "AdminService/ScaleShards", {}),
    ("POST", "/v1/nodes/n1:drain", "AdminService/DrainNode", {"node": "n1"}),
]

IDS = [
    ("a%2Fb", "a/b"),
    ("%2F", "/"),
    ("a%3Ab", "a:b"),
    ("a:b", "a:b"),
    ("a%3Amerge", "a:merge"),
    ("a:ingest", "a:ingest"),
    ("a:merge:b", "a:merge:b"),
    ("a%20b", "a b"),
    ("a+b", "a+b"),
    ("100%25", "100%"),
    ("a%252Fb", "a%2Fb"),
    ("%F0%9F%9A%97", "🚗"),
    ("M%c3%BCller", "Müller"),
    ("..", ".."),
    ("%00", "\0"),
    ("a;b=c,d", "a;b=c,d"),
    ("a%3Fb%23c", "a?b#c"),
]


@pytest.mark.parametrize(("http_method", "path", "method", "values"), ROUTES)
def test_every_path_of_the_contract_leads_to_its_method(
    http_method: str, path: str, method: str, values: dict[str, str]
) -> None:
    match = ROUTER.match(http_method, path.encode())
    assert isinstance(match, Match)
    assert match.binding.method == f"userprofile.v1.{method}"
    assert match.values == values


def test_the_table_above_holds_every_binding() -> None:
    tried = {(http_method, method) for http_method, _, method, _ in ROUTES if http_method != "HEAD"}
    assert tried == {(binding.http_method, binding.method[15:]) for binding in service_bindings()}


@pytest.mark.parametrize(("encoded", "user_id"), IDS)
@pytest.mark.parametrize(("http_method", "verb"), [("GET", ""), ("GET", ":watch"), ("POST", ":rankItems")])
def test_a_user_id_is_decoded_after_the_path_is_split(http_method: str, verb: str, encoded: str, user_id: str) -> None:
    match = ROUTER.match(http_method, f"/v1/profiles/{encoded}{verb}".encode())
    assert isinstance(match, Match)
    assert match.values == {"user_id": user_id}
    assert match.binding.verb == verb[1:]


@given(st.text(min_size=1), st.sampled_from([("GET", ""), ("GET", ":watch"), ("POST", ":merge"), ("DELETE", "")]))
@example("x:merge", ("GET", ""))
@example("/", ("POST", ":merge"))
def test_any_user_id_comes_back_out_of_a_path(user_id: str, way: tuple[str, str]) -> None:
    http_method, verb = way
    match = ROUTER.match(http_method, f"/v1/profiles/{quote(user_id, safe='')}{verb}".encode())
    assert isinstance(match, Match)
    assert match.values == {"user_id": user_id}


@given(st.text(st.characters(codec="utf-8", exclude_characters="%/:?#"), min_size=1))
def test_what_a_client_leaves_unencoded_is_taken_as_it_is(user_id: str) -> None:
    match = ROUTER.match("GET", f"/v1/profiles/{user_id}".encode())
    assert isinstance(match, Match)
    assert match.values == {"user_id": user_id}


@given(st.binary(max_size=40), st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD", "BREW"]))
def test_any_bytes_of_a_path_are_answered_or_refused(path: bytes, http_method: str) -> None:
    for raw in (path, b"/v1/profiles/" + path, b"/v1/" + path):
        with contextlib.suppress(NotFound, InvalidArgument):
            assert isinstance(ROUTER.match(http_method, raw), Match | WrongMethod)


@pytest.mark.parametrize("encoded", ["%", "%2", "%zz", "a%GGb", "%ff", "%C3", "%ED%A0%80", "%C0%AF"])
def test_what_is_no_percent_encoded_utf8_is_refused_by_the_fields_name(encoded: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        ROUTER.match("GET", f"/v1/profiles/{encoded}".encode())
    assert raised.value.violations[0].field == "user_id"


@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/", "/v1/profiles", "/v1/profiles/", "/v1/profiles/:watch", "/v1/profiles/a/b", "/v1/profile/a", "*",
     "//v1/status", "/v1/status/", "/v1/profiles%3AbatchGet", "/v1/events", "/v1/events:Ingest", ""],
)  # fmt: skip
def test_other_paths_are_not_found(path: str) -> None:
    with pytest.raises(NotFound):
        ROUTER.match("PATCH", path.encode())


@pytest.mark.parametrize(
    ("http_method", "path", "allowed"),
    [
        ("PUT", "/v1/profiles/a", ("DELETE", "GET", "HEAD")),
        ("POST", "/v1/profiles/a", ("DELETE", "GET", "HEAD")),
        ("GET", "/v1/profiles/a:merge", ("POST",)),
        ("DELETE", "/v1/profiles/a:watch", ("GET",)),
        ("HEAD", "/v1/profiles/a:watch", ("GET",)),
        ("DELETE", "/v1/profiles:batchGet", ("GET", "HEAD", "POST")),
        ("GET", "/v1/events:ingest", ("POST",)),
        ("POST", "/v1/status", ("GET", "HEAD")),
    ],
)
def test_a_wrong_method_is_told_which_are_right(http_method: str, path: str, allowed: tuple[str, ...]) -> None:
    assert ROUTER.match(http_method, path.encode()) == WrongMethod(allowed)


def test_a_literal_may_be_percent_encoded() -> None:
    match = ROUTER.match("GET", b"/v%31/%73tatus")
    assert isinstance(match, Match)
    assert match.binding.method.endswith("GetStatus")


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        ({"get": "/v1/{name=items/*}"}, "path"),
        ({"get": "/v1/**"}, "path"),
        ({"get": "v1/items"}, "path"),
        ({"get": "/v1/{missing}"}, "missing"),
        ({"post": "/v1/items", "body": "name"}, "body"),
        ({"get": "/v1/items", "response_body": "name"}, "response_body"),
        ({"custom": {"kind": "LIST", "path": "/v1/items"}}, "needs get"),
    ],
)
def test_a_rule_that_is_not_served_stops_the_start(rule: dict[str, str], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        list(bindings_of([service_with(rule)]))


def test_a_path_declared_twice_stops_the_start() -> None:
    binding = service_bindings()[0]
    with pytest.raises(ValueError, match="declared twice"):
        Router([binding, binding])


def service_with(rule: dict[str, str]):  # type: ignore[no-untyped-def]
    """A service of one method with this google.api.http rule."""
    from google.api import annotations_pb2, http_pb2

    file = descriptor_pb2.FileDescriptorProto(name=f"{abs(hash(str(rule)))}.proto", package="made", syntax="proto3")
    message = file.message_type.add(name="Item")
    message.field.add(name="name", number=1, type="TYPE_STRING", label="LABEL_OPTIONAL")
    method = file.service.add(name="Items").method.add(name="Get", input_type=".made.Item", output_type=".made.Item")
    method.options.Extensions[annotations_pb2.http].CopyFrom(http_pb2.HttpRule(**rule))
    pool = DescriptorPool()
    pool.Add(file)
    return pool.FindServiceByName("made.Items")
