"""Bad input against the running service: the field is named, the rest of the batch counted, the service stays up."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from tests.e2e.calls import Failure, GrpcCaller, HttpCaller, delimited, new_user
from tests.e2e.serving import ServeProcess
from tests.e2e.stores import IN_BOTH_STORES
from userprofile.v1 import event_pb2, event_service_pb2, profile_service_pb2

DECLARED_TYPES = ("view", "favorite", "contact")


@pytest.fixture
def rpc(service: ServeProcess) -> Iterator[GrpcCaller]:
    with GrpcCaller(service.grpc_address) as caller:
        yield caller


@pytest.fixture
def rest(service: ServeProcess) -> HttpCaller:
    return HttpCaller(service.http_address)


@pytest.fixture(autouse=True)
def _still_serving(service: ServeProcess) -> Iterator[None]:
    """Whatever a test sent, the service is there afterwards."""
    yield
    assert HttpCaller(service.http_address).get("/readyz").code == 200


def at(ahead_s: float) -> str:
    """A time so far from now, as JSON has it."""
    seconds = math.floor(time.time() + ahead_s)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# --- one bad event in a good batch ---


@dataclass(frozen=True)
class BadEvent:
    """What is wrong with an event, in JSON, and how it must be refused."""

    name: str
    event: dict[str, Any]
    field: str
    words: tuple[str, ...]
    """What the reason has to say."""


def bad(name: str, field: str, *words: str, **event: Any) -> BadEvent:
    return BadEvent(name, event, field, words)


BAD_EVENTS = [
    bad("no user", "user_id", "1 to 256 bytes", "is 0", userId=""),
    bad("user of 257 bytes", "user_id", "1 to 256 bytes", "is 257", userId="u" * 257),
    bad("user of 258 bytes in 129 letters", "user_id", "1 to 256 bytes", "is 258", userId="ж" * 129),
    bad("undeclared type", "type", "sold", *DECLARED_TYPES, type="sold"),
    bad("type in other letters", "type", "View", *DECLARED_TYPES, type="View"),
    bad("no type", "type", "empty", *DECLARED_TYPES, type=""),
    bad("six minutes ahead", "time", "300 s in the future", time="+360"),
    bad("year 9999", "time", "9999", time="9999-12-31T23:59:59Z"),
    bad("before nanoseconds begin", "time", "1678", time="1500-01-01T00:00:00Z"),
    bad("event id of 257 bytes", "event_id", "at most 256 bytes", "257", eventId="e" * 257),
    bad("price is text", "attributes.price", "number", "text", attributes={"price": "12900"}),
    bad("price is a bool", "attributes.price", "number", "bool", attributes={"price": True}),
    bad("mileage is a list", "attributes.mileage", "number", "list", attributes={"mileage": [1, 2]}),
    bad("color is a number", "attributes.color", "text", "number", attributes={"color": 7}),
    bad("color is an object", "attributes.color", "text", "struct", attributes={"color": {"name": "red"}}),
    bad("make is a list", "attributes.make", "text", "list", attributes={"make": ["audi"]}),
    bad("65 attributes", "attributes", "64", "65", attributes={f"a{i}": i for i in range(65)}),
    bad("value of 1 KiB + 1", "attributes.query", "1024 bytes", "1025", attributes={"query": "q" * 1025}),
    bad("undeclared value of 1 KiB + 1", "attributes.note", "1024 bytes", "1025", attributes={"note": "n" * 1025}),
    bad("name of 1 KiB + 1", "attributes.nnn", "1024 bytes", "1025", attributes={"n" * 1025: 1}),
]


def good_event(user_id: str) -> dict[str, Any]:
    return {"userId": user_id, "type": "view", "time": at(-60), "attributes": {"color": "red", "price": 1000}}


def batch_with(case: BadEvent, user_id: str) -> list[dict[str, Any]]:
    """Good, bad, good, all of one user."""
    wrong = {**good_event(user_id), **case.event}
    if wrong["time"].startswith("+"):
        wrong["time"] = at(float(wrong["time"]))
    return [good_event(user_id), wrong, good_event(user_id)]


def encoded_batch(events: list[dict[str, Any]]) -> bytes:
    request = event_service_pb2.IngestEventsRequest()
    json_format.ParseDict({"events": events}, request)
    return request.SerializeToString()


def assert_refused(refused: event_pb2.RejectedEvent, case: BadEvent) -> None:
    assert refused.index == 1
    assert refused.field.startswith(case.field), refused
    for word in case.words:
        assert word in refused.reason, refused


@pytest.mark.parametrize("case", BAD_EVENTS, ids=lambda case: case.name)
def test_a_bad_event_over_grpc_names_its_field_and_the_rest_counts(rpc: GrpcCaller, case: BadEvent) -> None:
    user = new_user()
    answer = rpc.ingest(encoded_batch(batch_with(case, user)))
    assert isinstance(answer, event_service_pb2.IngestEventsResponse), answer
    assert answer.accepted_count == 2
    assert len(answer.rejected) == 1
    assert_refused(answer.rejected[0], case)
    assert rpc.profile(user).event_count == 2


@pytest.mark.parametrize("case", BAD_EVENTS, ids=lambda case: case.name)
def test_a_bad_event_over_rest_names_its_field_and_the_rest_counts(rest: HttpCaller, case: BadEvent) -> None:
    user = new_user()
    answer = rest.post("/v1/events:ingest", {"events": batch_with(case, user)})
    assert answer.code == 200, answer
    response = json_format.ParseDict(answer.body, event_service_pb2.IngestEventsResponse())
    assert response.accepted_count == 2
    assert len(response.rejected) == 1
    assert_refused(response.rejected[0], case)
    assert rest.get(f"/v1/profiles/{user}").body["eventCount"] == "2"


# --- bytes that no library writes ---

VIEW, RED = delimited(2, b"view"), delimited(2, delimited(3, b"red"))


def attribute(name: bytes, value: bytes) -> bytes:
    """Field 5 with one entry; the value is an encoded google.protobuf.Value."""
    return delimited(5, delimited(1, delimited(1, name) + delimited(2, value)))


def price(value: float) -> bytes:
    message = event_pb2.Event()
    message.attributes.fields["price"].number_value = value
    return message.SerializeToString()


RAW_EVENTS = [
    ("price is NaN", VIEW + price(math.nan), "attributes.price", "finite"),
    ("price is infinite", VIEW + price(math.inf), "attributes.price", "finite"),
    ("price is minus infinity", VIEW + price(-math.inf), "attributes.price", "finite"),
    ("broken UTF-8 in the user", VIEW + delimited(1, b"a\xff"), "user_id", "UTF-8"),
    ("broken UTF-8 in the type", delimited(2, b"vi\xc3"), "type", "UTF-8"),
    ("broken UTF-8 in the event id", VIEW + delimited(4, b"\xed\xa0\x80"), "event_id", "UTF-8"),
    ("broken UTF-8 in a name", VIEW + attribute(b"\xc0\x80", delimited(3, b"red")), "attributes", "UTF-8"),
    ("broken UTF-8 in a value", VIEW + attribute(b"color", delimited(3, b"r\xf5d")), "attributes", "UTF-8"),
    ("broken UTF-8 in what is ignored", VIEW + attribute(b"note", delimited(3, b"\xfe")), "attributes", "UTF-8"),
    ("a length past the event's end", VIEW + b"\x2a\x7f\x00", "attributes", "protobuf"),
    ("an unfinished varint", VIEW + b"\x38\xff\xff", "", "protobuf"),
    ("a varint of eleven bytes", VIEW + b"\x38" + b"\xff" * 11, "", "protobuf"),
    ("field number zero", VIEW + b"\x00\x01", "", "protobuf"),
    ("an end without a beginning", VIEW + b"\x3c", "", "protobuf"),
    ("a wire type that is none", VIEW + b"\x3f\x00", "", "protobuf"),
    ("a damaged time", VIEW + delimited(3, b"\x08"), "time", "protobuf"),
    ("a time with too many nanoseconds", VIEW + delimited(3, b"\x08\x01\x10\x80\x94\xeb\xdc\x03"), "time", "nanos"),
]


@pytest.mark.parametrize(("event", "field", "word"), [case[1:] for case in RAW_EVENTS], ids=[c[0] for c in RAW_EVENTS])
def test_damage_inside_an_event_refuses_that_event_alone(rpc: GrpcCaller, event: bytes, field: str, word: str) -> None:
    user = new_user()
    good = encoded_batch([good_event(user)])
    answer = rpc.ingest(good + delimited(1, delimited(1, user.encode()) + event) + good)
    assert isinstance(answer, event_service_pb2.IngestEventsResponse), answer
    assert answer.accepted_count == 2
    ((index, name, reason),) = [(r.index, r.field, r.reason) for r in answer.rejected]
    assert index == 1
    assert name == field or (field and name.startswith(field + ".")), (name, reason)
    assert word in reason
    assert rpc.profile(user).event_count == 2


@pytest.mark.parametrize(
    "damage",
    [b"\x0a\x05ab", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a", b"\xff", b"\x00\x00", b"\x12\x02\xff\xfe", b"\x0c"],
    ids=[
        "short event",
        "length of 4 GiB",
        "no length",
        "half a tag",
        "field zero",
        "request id not UTF-8",
        "stray end",
    ],
)
def test_damage_outside_of_events_refuses_the_batch_and_counts_none_of_it(rpc: GrpcCaller, damage: bytes) -> None:
    user = new_user()
    failure = rpc.ingest(encoded_batch([good_event(user)]) + damage)
    assert isinstance(failure, Failure)
    assert failure.code == "INVALID_ARGUMENT"
    assert failure.violations, failure
    answer = rpc.call("ProfileService/GetProfile", delimited(1, user.encode()))
    assert isinstance(answer, Failure)
    assert answer.code == "NOT_FOUND"


# --- what is just within the limits ---


@IN_BOTH_STORES
def test_what_reaches_a_limit_and_does_not_exceed_it_is_taken(rpc: GrpcCaller) -> None:
    edge = new_user("u").ljust(256, "u")
    events = [
        {**good_event(edge), "eventId": "e" * 256},
        {**good_event(edge), "time": at(290)},
        {**good_event(edge), "time": "1678-01-01T00:00:00Z"},
        {**good_event(edge), "attributes": {f"a{i}": None for i in range(64)}},
        {**good_event(edge), "attributes": {"query": "q" * 1024, "n" * 1024: "not declared"}},
        {**good_event(edge), "attributes": {"color": None, "price": None}},
        {**good_event(edge), "attributes": {"note": {"deep": [1, {"er": None}]}}},
    ]
    answer = rpc.ingest(encoded_batch(events))
    assert isinstance(answer, event_service_pb2.IngestEventsResponse), answer
    assert (answer.accepted_count, list(answer.rejected)) == (len(events), [])
    profile = rpc.profile(edge)
    assert profile.event_count == len(events)
    assert profile.features["last_search"].latest.value == "q" * 1024


@IN_BOTH_STORES
def test_ten_thousand_events_are_a_batch(rpc: GrpcCaller) -> None:
    user = new_user()
    one = delimited(1, delimited(1, user.encode()) + VIEW)
    answer = rpc.ingest(one * 10_000)
    assert isinstance(answer, event_service_pb2.IngestEventsResponse), answer
    assert answer.accepted_count == 10_000
    assert rpc.profile(user).event_count == 10_000


# --- requests that are refused whole ---


@dataclass(frozen=True)
class BadRequest:
    """A call that must fail, in both protocols where it can be said in both."""

    name: str
    method: str
    request: bytes
    code: str
    field: str | None = None
    """The field at fault; None where it is the message as a whole."""
    words: tuple[str, ...] = ()
    path: str = ""
    """The same over REST: GET, or POST where there is a body."""
    body: bytes | None = None


def users(count: int) -> bytes:
    return b"".join(delimited(1, b"u%d" % i) for i in range(count))


def json_of(message: object) -> bytes:
    return json.dumps(message).encode()


GET, BATCH_GET, INGEST = "ProfileService/GetProfile", "ProfileService/BatchGetProfiles", "EventService/IngestEvents"
INVALID = "INVALID_ARGUMENT"
EVENTS_10_001 = delimited(1, delimited(1, b"u") + VIEW) * 10_001
BAD_REQUESTS = [
    BadRequest("empty batch", INGEST, b"", INVALID, "events", (), "/v1/events:ingest", b'{"events": []}'),
    BadRequest("nothing at all", INGEST, b"", INVALID, "events", (), "/v1/events:ingest", b"{}"),
    BadRequest(
        "10,001 events", INGEST, EVENTS_10_001, INVALID, "events", ("10000",), "/v1/events:ingest",
        json_of({"events": [{"userId": "u", "type": "view"}] * 10_001}),
    ),
    BadRequest(
        "request id of 257 bytes", INGEST, delimited(1, delimited(1, b"u") + VIEW) + delimited(2, b"r" * 257),
        INVALID, "request_id", ("256",), "/v1/events:ingest",
        json_of({"events": [{"userId": "u", "type": "view"}], "requestId": "r" * 257}),
    ),
    BadRequest("user never seen", GET, delimited(1, b"nobody at all"), "NOT_FOUND", None, ("nobody at all",),
               "/v1/profiles/nobody%20at%20all"),
    BadRequest("no user", GET, b"", INVALID, "user_id", ("1 to 256",)),
    BadRequest("user of 257 bytes", GET, delimited(1, b"u" * 257), INVALID, "user_id", ("256", "257"),
               "/v1/profiles/" + "u" * 257),
    BadRequest("broken UTF-8", GET, delimited(1, b"\xff"), INVALID),
    BadRequest("unknown feature", GET, delimited(1, b"u") + delimited(2, b"colour"), INVALID, "features[0]",
               ("colour", "mileage"), "/v1/profiles/u?features=colour"),
    BadRequest("second feature unknown", GET, delimited(1, b"u") + delimited(2, b"color") + delimited(2, b""),
               INVALID, "features[1]", (), "/v1/profiles/u?features=color&features="),
    BadRequest("1,001 users", BATCH_GET, users(1001), INVALID, "user_ids", ("1000", "1001"),
               "/v1/profiles:batchGet", json_of({"userIds": [f"u{i}" for i in range(1001)]})),
    BadRequest("no users", BATCH_GET, b"", INVALID, "user_ids", (), "/v1/profiles:batchGet"),
    BadRequest("an empty user among others", BATCH_GET, delimited(1, b"u") + delimited(1, b""), INVALID,
               "user_ids[1]", ("1 to 256",), "/v1/profiles:batchGet?user_ids=u&user_ids="),
    BadRequest("unknown feature of many users", BATCH_GET, delimited(1, b"u") + delimited(2, b"x"), INVALID,
               "features[0]", ("'x'",), "/v1/profiles:batchGet?user_ids=u&features=x"),
    BadRequest("unknown feature of all users", "ProfileService/GetPopulation", delimited(1, b"x"), INVALID,
               "features[0]", ("'x'",), "/v1/population?features=x"),
    BadRequest("bytes that are no message", BATCH_GET, b"\x0a\x05ab", INVALID),
    BadRequest("a move of nothing", "AdminService/MovePartitions", b"", INVALID, "partitions", (),
               "/v1/partitions:move", b"{}"),
    BadRequest("a move of what there is not", "AdminService/MovePartitions", b"\x0a\x02\x07\x80", INVALID),
    BadRequest("a move to nobody", "AdminService/MovePartitions", b"\x08\x01\x10\x63", INVALID, "target_shard_id",
               ("no shard 99",), "/v1/partitions:move", b'{"partitions":[1],"targetShardId":99}'),
    BadRequest("a partition too many", "AdminService/MovePartitions", b"\x08\x80\x02", INVALID, "partitions[0]",
               ("255",), "/v1/partitions:move", b'{"partitions":[256]}'),
    BadRequest("no shards", "AdminService/ScaleShards", b"", INVALID, "shard_count", ("1 to 256",),
               "/v1/shards:scale", b"{}"),
    BadRequest("a node that there is not", "AdminService/DrainNode", delimited(1, b"mars"), INVALID, "node",
               ("mars",), "/v1/nodes/mars:drain", b"{}"),
]  # fmt: skip
UNIMPLEMENTED = [
    BadRequest("watch", "ProfileService/WatchProfile", delimited(1, b"u"), "UNIMPLEMENTED", None, (),
               "/v1/profiles/u:watch"),
    BadRequest("rank", "ProfileService/RankItems", delimited(1, b"u"), "UNIMPLEMENTED", None, (),
               "/v1/profiles/u:rankItems", b"{}"),
    BadRequest("merge", "ProfileService/MergeProfiles", b"", "UNIMPLEMENTED", None, (), "/v1/profiles/u:merge", b"{}"),
    BadRequest("delete", "ProfileService/DeleteProfile", delimited(1, b"u"), "UNIMPLEMENTED"),
]  # fmt: skip


def assert_fails(failure: Failure, case: BadRequest) -> None:
    assert failure.code == case.code, failure
    assert failure.domain == "profile-service"
    assert failure.message
    if case.field is not None:
        assert list(failure.violations) == [case.field], failure
        assert case.field in failure.message
    for word in case.words:
        assert word in failure.message


@pytest.mark.parametrize("case", BAD_REQUESTS + UNIMPLEMENTED, ids=lambda case: case.name)
def test_a_bad_request_over_grpc_says_which_field_and_why(rpc: GrpcCaller, case: BadRequest) -> None:
    failure = rpc.call(case.method, case.request)
    assert isinstance(failure, Failure), failure
    assert_fails(failure, case)


HTTP_CODES = {INVALID: 400, "NOT_FOUND": 404, "UNIMPLEMENTED": 501}


@pytest.mark.parametrize("case", [c for c in BAD_REQUESTS + UNIMPLEMENTED if c.path], ids=lambda case: case.name)
def test_a_bad_request_over_rest_says_the_same(rest: HttpCaller, case: BadRequest) -> None:
    answer = rest.request("GET" if case.body is None else "POST", case.path, case.body)
    assert answer.code == HTTP_CODES[case.code], answer
    assert_fails(answer.failure, case)


def test_a_message_over_16_mib_is_refused_and_says_the_limit(rpc: GrpcCaller, rest: HttpCaller) -> None:
    user = new_user()
    # An unknown field is as good as any to make a message large.
    failure = rpc.ingest(encoded_batch([good_event(user)]) + delimited(15, bytes(16 * 1024 * 1024)))
    assert isinstance(failure, Failure)
    assert failure.code == INVALID
    assert "16777216" in failure.message
    body = json_of({"events": [{**good_event(user), "attributes": {"note": "n" * (17 * 1024 * 1024)}}]})
    answer = rest.request("POST", "/v1/events:ingest", body)
    # HTTP has a code of its own for it, as Envoy answers.
    assert (answer.code, answer.failure.code) == (413, INVALID)
    assert "16777216" in answer.failure.message
    assert rest.get(f"/v1/profiles/{user}").code == 404


def test_a_message_far_over_the_limit_is_refused_before_it_is_read(rpc: GrpcCaller) -> None:
    failure = rpc.ingest(bytes(40 * 1024 * 1024))
    assert isinstance(failure, Failure)
    assert failure.code == "RESOURCE_EXHAUSTED"


# --- JSON ---


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b'{"events": [{"userId": "u", "type": "view"}], "evnets": []}', "evnets"),
        (b'{"events": {"userId": "u"}}', "events"),
        (b'{"events": "all of them"}', "events"),
        (b'{"events": [{"userId": "u"', "JSON"),
        (b"events", "JSON"),
        (b"[]", ""),
        (b'"text"', ""),
        (b"", ""),
        (b'{"events": [{"userId": "\xff", "type": "view"}]}', ""),
        (b'{"events": ' + b"[" * 100_000, ""),
    ],
    ids=["unknown field", "events are an object", "events are text", "cut off", "no JSON", "a list", "a text",
         "nothing", "not UTF-8", "deep"],
)  # fmt: skip
def test_json_that_is_no_request_is_refused_with_400(rest: HttpCaller, body: bytes, word: str) -> None:
    answer = rest.request("POST", "/v1/events:ingest", body)
    assert answer.code == 400, answer
    assert answer.failure.code == INVALID
    assert word in answer.failure.message or word in str(answer.failure.violations)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"userId": "u", "type": "view", "colour": "red"}, "colour"),
        ({"userId": 7, "type": "view"}, "user_id"),
        ({"userId": "u", "type": "view", "time": "yesterday"}, "time"),
        ({"userId": "u", "type": "view", "time": 1_795_338_000}, "time"),
        ({"userId": "u", "type": "view", "attributes": []}, "attributes"),
        ({"userId": "u", "type": ["view"]}, "type"),
        ("view", ""),
        (None, ""),
    ],
    ids=["unknown field", "user is a number", "time is none", "time is a number", "attributes are a list",
         "type is a list", "text", "null"],
)  # fmt: skip
def test_json_that_is_no_event_is_refused_alone(rest: HttpCaller, wrong: object, field: str) -> None:
    user = new_user()
    answer = rest.post("/v1/events:ingest", {"events": [good_event(user), wrong, good_event(user)]})
    assert answer.code == 200, answer
    assert answer.body["acceptedCount"] == 2
    ((index, name),) = [(refused["index"], refused["field"]) for refused in answer.body["rejected"]]
    assert (index, name) == (1, field)
    assert rest.get(f"/v1/profiles/{user}").body["eventCount"] == "2"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/nothing"), ("GET", "/v2/population"), ("POST", "/v1/events:swallow"), ("GET", "/v1/profiles/u:fly")],
)
def test_a_path_that_is_none_is_not_found(rest: HttpCaller, method: str, path: str) -> None:
    answer = rest.request(method, path, b"{}" if method == "POST" else None)
    # "u:fly" may as well be a user; nobody has seen them either.
    assert answer.code == 404, answer
    assert answer.body["code"] == grpc.StatusCode.NOT_FOUND.value[0]


def test_an_unknown_query_parameter_is_refused_by_name(rest: HttpCaller) -> None:
    answer = rest.get("/v1/profiles/u?feature=color")
    assert answer.code == 400
    assert "feature" in answer.body["message"]


@IN_BOTH_STORES
def test_missing_users_of_a_batch_read_are_named_and_no_error(rpc: GrpcCaller, rest: HttpCaller) -> None:
    known, unknown = new_user(), new_user("stranger")
    rpc.ingest(encoded_batch([good_event(known)]))
    asked = profile_service_pb2.BatchGetProfilesRequest(user_ids=[unknown, known, unknown, known])
    answer = rpc.call(BATCH_GET, asked.SerializeToString())
    assert isinstance(answer, bytes), answer
    response = profile_service_pb2.BatchGetProfilesResponse.FromString(answer)
    assert [profile.user_id for profile in response.profiles] == [known, known]
    assert set(response.missing_user_ids) == {unknown}
    body = rest.get(f"/v1/profiles:batchGet?user_ids={unknown}&user_ids={known}").body
    assert body["missingUserIds"] == [unknown]


def test_a_broken_utf8_escape_in_a_path_is_refused(rest: HttpCaller) -> None:
    assert rest.get("/v1/profiles/%FF").code == 400


def test_refused_events_are_counted_by_field(rpc: GrpcCaller, rest: HttpCaller) -> None:
    def refused() -> dict[str, float]:
        lines = rest.get("/metrics").body.decode().splitlines()
        counted = [line for line in lines if line.startswith("profile_service_events_rejected_total{")]
        return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in counted}

    before = refused()
    for name in ("price is text", "color is a number", "undeclared type"):
        case = next(case for case in BAD_EVENTS if case.name == name)
        rpc.ingest(encoded_batch(batch_with(case, new_user())))
    now = refused()
    assert now["attributes"] == before["attributes"] + 2
    assert now["type"] == before["type"] + 1
    assert now["user_id"] == before["user_id"]
