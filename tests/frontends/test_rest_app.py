"""What callers of the REST edge see: answers, errors, refusals, streams, and what is beside the API."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from profile_service import errors
from profile_service.config import Limits
from profile_service.frontends.rest import watch
from tests.frontends.rest_harness import BINDINGS, Edge, detail, rest_edge, violation
from userprofile.v1.admin_service_pb2 import MovePartitionsRequest
from userprofile.v1.event_pb2 import RejectedEvent
from userprofile.v1.event_service_pb2 import IngestEventsRequest, IngestEventsResponse
from userprofile.v1.profile_pb2 import Profile
from userprofile.v1.profile_service_pb2 import (
    BatchGetProfilesRequest,
    DeleteProfileRequest,
    GetProfileRequest,
    MergeProfilesRequest,
    RankItemsRequest,
    WatchProfileRequest,
)

CALLS = [
    ("GET", "/v1/profiles/u1?features=a&features=b", None, "GetProfile",
     GetProfileRequest(user_id="u1", features=["a", "b"])),
    ("GET", "/v1/profiles/a%2Fb%3Ac", None, "GetProfile", GetProfileRequest(user_id="a/b:c")),
    ("DELETE", "/v1/profiles/a:b", None, "DeleteProfile", DeleteProfileRequest(user_id="a:b")),
    ("GET", "/v1/profiles:batchGet?user_ids=a&userIds=b", None, "BatchGetProfiles",
     BatchGetProfilesRequest(user_ids=["a", "b"])),
    ("POST", "/v1/profiles:batchGet", {"userIds": ["a"]}, "BatchGetProfiles", BatchGetProfilesRequest(user_ids=["a"])),
    ("POST", "/v1/profiles/u1:merge", {"source_user_id": "u2"}, "MergeProfiles",
     MergeProfilesRequest(user_id="u1", source_user_id="u2")),
    ("POST", "/v1/profiles/u1:rankItems", {"items": [{"itemId": "i"}]}, "RankItems",
     RankItemsRequest(user_id="u1", items=[RankItemsRequest.Item(item_id="i")])),
    ("POST", "/v1/profiles/u1:rankItems", {"userId": "u1"}, "RankItems", RankItemsRequest(user_id="u1")),
    ("POST", "/v1/partitions:move", {"partitions": [1], "targetShardId": 2}, "MovePartitions",
     MovePartitionsRequest(partitions=[1], target_shard_id=2)),
    ("POST", "/v1/snapshots", None, "CreateSnapshot", None),
    ("GET", "/v1/status", None, "GetStatus", None),
    ("GET", "/v1/schema", None, "GetSchema", None),
    ("GET", "/v1/topology", None, "GetTopology", None),
    ("GET", "/v1/population?features=price", None, "GetPopulation", None),
]  # fmt: skip

REFUSED: list[tuple[str, str, Any, str]] = [
    ("GET", "/v1/profiles/u1?colour=red", None, "colour"),
    ("GET", "/v1/profiles/u1?user_id=u2", None, "user_id"),
    ("GET", "/v1/profiles/%FF", None, "user_id"),
    ("POST", "/v1/profiles:batchGet?user_ids=a", None, "user_ids"),
    ("POST", "/v1/profiles:batchGet", {"ids": ["a"]}, "ids"),
    ("POST", "/v1/profiles:batchGet", {"userIds": "a"}, "user_ids"),
    ("POST", "/v1/profiles/u1:merge", {"userId": "u2"}, "user_id"),
    ("POST", "/v1/profiles/u1:rankItems", {"items": [{"attributes": {}}, {"attributes": 5}]}, "items[1].attributes"),
    ("POST", "/v1/events:ingest", {"batch": []}, "batch"),
    ("POST", "/v1/events:ingest", {"events": {}}, "events"),
    ("POST", "/v1/events:ingest", {"events": [{}], "requestId": 5}, "request_id"),
]

FAILURES = [
    (errors.InvalidArgument("features", "there is no such feature"), 400, 3),
    (errors.NotFound("no such user"), 404, 5),
    (errors.Superseded("a newer stream"), 409, 10),
    (errors.ResourceExhausted("queue full", 0.25), 429, 8),
    (errors.Unimplemented("not yet"), 501, 12),
    (errors.Unavailable("shard 1 recovers", 2.0), 503, 14),
    (errors.DeadlineExceeded("too late"), 504, 4),
    (errors.DataLoss("record 5"), 500, 15),
    (RuntimeError("secret"), 500, 13),
]


@pytest.mark.parametrize(("http_method", "path", "body", "method", "request_"), CALLS)
async def test_a_request_becomes_the_call_of_its_method(
    http_method: str, path: str, body: Any, method: str, request_: Any
) -> None:
    async with rest_edge() as edge:
        response = await edge.http.request(http_method, path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert edge.api.method == BINDINGS[method].method
    assert request_ is None or edge.api.request == request_


@pytest.mark.parametrize(("http_method", "path", "body", "field"), REFUSED)
async def test_a_wrong_request_is_refused_by_its_field_and_counted(
    http_method: str, path: str, body: Any, field: str
) -> None:
    async with rest_edge() as edge:
        response = await edge.http.request(http_method, path, json=body)
        assert response.status_code == 400
        assert response.json()["code"] == 3
        assert violation(response)[0] == field
        assert not edge.api.calls
        counted = sum(
            value for (name, _), value in (await samples(edge)).items() if name == "profile_service_calls_total"
        )
    # A path that is no UTF-8 is refused before its method is known.
    assert counted == (0 if "%FF" in path else 1)


@pytest.mark.parametrize(("site", "http_code"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200)])
async def test_pages_of_other_sites_cannot_write(site: str, http_code: int) -> None:
    async with rest_edge() as edge:
        response = await edge.post(
            "/v1/profiles/u1:merge",
            {"sourceUserId": "u2"},
            headers={"Sec-Fetch-Site": site, "Content-Type": "text/plain"},
        )
        assert response.status_code == http_code
        assert len(edge.api.calls) == (http_code == 200)


@pytest.mark.parametrize(("error", "http_code", "code"), FAILURES, ids=[type(case[0]).__name__ for case in FAILURES])
async def test_an_error_of_the_api_is_a_google_rpc_status_as_json(
    error: BaseException, http_code: int, code: int
) -> None:
    async with rest_edge(error) as edge:
        response = await edge.get("/v1/profiles/u1")
    assert response.status_code == http_code
    assert response.headers["content-type"] == "application/json"
    status = response.json()
    assert set(status) == {"code", "message", "details"}
    assert status["code"] == code
    assert "secret" not in response.text
    assert detail(response, "ErrorInfo")["domain"] == "profile-service"


async def test_what_helps_to_try_again_is_in_the_header_too() -> None:
    async with rest_edge(errors.Unavailable("shard 1 recovers", 1.2)) as edge:
        response = await edge.get("/v1/profiles/u1")
    assert detail(response, "RetryInfo")["retryDelay"] == "1.200s"
    assert response.headers["retry-after"] == "2"


async def test_defaults_are_written_out_in_lower_camel_case() -> None:
    profile = Profile(user_id="u1")
    profile.features["contacts"].counter.SetInParent()
    profile.read_time.FromNanoseconds(1_795_000_000_500_000_000)
    async with rest_edge(profile) as edge:
        response = await edge.get("/v1/profiles/u1")
    assert response.json() == {
        "userId": "u1",
        "eventCount": "0",
        "readTime": "2026-11-18T11:06:40.500Z",
        "features": {"contacts": {"counter": {"value": 0.0}}},
    }


@given(st.text(min_size=1), st.booleans())
async def test_any_user_id_comes_through_the_whole_edge(user_id: str, ranks: bool) -> None:
    path = f"/v1/profiles/{quote(user_id, safe='')}"
    if set(user_id) <= {"."}:
        # httpx itself takes these for steps of the path.
        return
    async with rest_edge() as edge:
        response = await (edge.post(f"{path}:rankItems", {}) if ranks else edge.get(path))
    assert response.status_code == 200
    assert edge.api.request.user_id == user_id


async def test_unknown_paths_and_wrong_methods_are_statuses_too() -> None:
    async with rest_edge() as edge:
        for path in ("/v1/nothing", "/nothing", "/v1", "/v1/profiles/", "/docs/"):
            response = await edge.get(path)
            assert (response.status_code, response.json()["code"]) == (404, 5), path
        for http_method, path, allowed in (
            ("PUT", "/v1/profiles/a", "DELETE, GET, HEAD"),
            ("GET", "/v1/events:ingest", "POST"),
            ("POST", "/healthz", "GET, HEAD"),
            ("OPTIONS", "/v1/status", "GET, HEAD"),
        ):
            response = await edge.http.request(http_method, path)
            assert (response.status_code, response.json()["code"]) == (405, 12), path
            assert response.headers["allow"] == allowed


async def test_head_has_the_headers_of_get_and_no_body() -> None:
    async with rest_edge(Profile(user_id="u1")) as edge:
        get = await edge.get("/v1/profiles/u1")
        head = await edge.http.head("/v1/profiles/u1")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


async def test_a_deadline_comes_along_in_a_header() -> None:
    async with rest_edge() as edge:
        await edge.get("/v1/status", headers={"grpc-timeout": "250m"})
        await edge.get("/v1/status")
        refused = await edge.get("/v1/status", headers={"grpc-timeout": "soon"})
    assert [context.deadline_s for _, _, context in edge.api.calls] == [0.25, None]
    assert {context.protocol for _, _, context in edge.api.calls} == {"rest"}
    assert violation(refused)[0] == "Grpc-Timeout"


# --- bodies ---


@pytest.mark.parametrize("body", [b"", b" ", b"{}"])
async def test_an_empty_body_is_an_empty_request(body: bytes) -> None:
    async with rest_edge() as edge:
        response = await edge.http.post("/v1/profiles:batchGet", content=body)
    assert response.status_code == 200
    assert edge.api.request == BatchGetProfilesRequest()


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[]", b'{"events":[{"price":NaN}]}', b'{"events":[],"events":[]}'])
async def test_a_body_that_is_no_json_object_is_refused_whole(body: bytes) -> None:
    async with rest_edge() as edge:
        response = await edge.http.post("/v1/events:ingest", content=body)
    assert (response.status_code, response.json()["code"]) == (400, 3)
    assert not edge.api.calls


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_is_refused_and_the_next_request_served(declared: bool) -> None:
    async def chunks() -> Any:
        for _ in range(30):
            yield b" " * 100

    async with rest_edge(limits=Limits(message_bytes=1_000)) as edge:
        response = await edge.http.post("/v1/events:ingest", content=b" " * 3_000 if declared else chunks())
        assert (response.status_code, response.json()["code"]) == (413, 3)
        assert "at most 1000 bytes" in response.json()["message"]
        assert (await edge.http.post("/v1/snapshots", content=b" " * 1_000)).status_code == 200


async def test_a_large_body_is_read_while_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    aside = asyncio.to_thread

    async def noted(read: Any) -> Any:
        threads.append(read)
        return await aside(read)

    monkeypatch.setattr(asyncio, "to_thread", noted)
    event = {"userId": "u1", "type": "view", "attributes": {"color": "red"}}
    async with rest_edge(lambda request: IngestEventsResponse(accepted_count=len(request.events))) as edge:
        small = await edge.post("/v1/events:ingest", {"events": [event]})
        assert not threads
        edge.api.calls.clear()
        large = await edge.post("/v1/events:ingest", {"events": [event] * 2_000})
    assert small.json()["acceptedCount"] == 1
    assert large.json()["acceptedCount"] == 2_000
    assert threads


# --- batches of events ---


async def test_one_bad_event_never_spoils_its_batch() -> None:
    def answer(request: IngestEventsRequest) -> IngestEventsResponse:
        refused = RejectedEvent(index=1, field="type", reason="must be declared")
        return IngestEventsResponse(accepted_count=len(request.events) - 1, rejected=[refused])

    events = [
        {"userId": 5},
        {"userId": "a", "type": "view", "time": "2026-11-22T10:00:00Z"},
        {"userId": "b", "time": "yesterday"},
        {"userId": "c", "type": "undeclared"},
        {"userId": "d", "attributes": [1]},
        None,
        {"userId": "e", "colour": "red"},
        {"user_id": "f", "type": "view", "attributes": {"price": 12900, "tags": ["x", None]}},
    ]
    async with rest_edge(answer) as edge:
        response = await edge.post("/v1/events:ingest", {"events": events, "requestId": "r1"})
        counted = await samples(edge)
    assert response.status_code == 200
    assert edge.api.request.request_id == "r1"
    assert [event.user_id for event in edge.api.request.events] == ["a", "c", "f"]
    answered = response.json()
    assert answered["acceptedCount"] == 2
    assert [(each["index"], each["field"]) for each in answered["rejected"]] == [
        (0, "user_id"),
        (2, "time"),
        (3, "type"),
        (4, "attributes"),
        (5, ""),
        (6, "colour"),
    ]
    assert all(each["reason"] for each in answered["rejected"])
    # Those that the service refuses it counts itself.
    assert counted["profile_service_events_rejected_total", ("user_id",)] == 1
    assert counted["profile_service_events_rejected_total", ("event",)] == 2


async def test_a_batch_of_bad_events_alone_is_answered_without_a_call() -> None:
    async with rest_edge() as edge:
        response = await edge.post("/v1/events:ingest", {"events": [{"userId": 5}, 7]})
        counted = await samples(edge)
    assert not edge.api.calls
    assert response.json()["acceptedCount"] == 0
    assert [each["index"] for each in response.json()["rejected"]] == [0, 1]
    assert counted["profile_service_calls_total", ("OK", BINDINGS["IngestEvents"].method, "rest")] == 1


@pytest.mark.parametrize("body", [{}, {"events": []}, {"events": None}])
async def test_an_empty_batch_is_for_the_service_to_refuse(body: dict[str, Any]) -> None:
    async with rest_edge(errors.InvalidArgument("events", "must hold at least one event")) as edge:
        response = await edge.post("/v1/events:ingest", body)
    assert violation(response) == ("events", "must hold at least one event")


async def test_too_many_events_are_refused_before_they_are_read() -> None:
    async with rest_edge(limits=Limits(events_per_batch=3)) as edge:
        response = await edge.post("/v1/events:ingest", {"events": [{}] * 4})
    assert violation(response) == ("events", "must be at most 3 events, are 4")


@given(st.lists(st.sampled_from(["good", "unread", "refused"]), min_size=1, max_size=12))
async def test_positions_are_always_the_callers(fates: list[str]) -> None:
    def answer(request: IngestEventsRequest) -> IngestEventsResponse:
        at = [index for index, event in enumerate(request.events) if event.type == "refused"]
        refused = [RejectedEvent(index=index, field="type", reason="refused") for index in at]
        return IngestEventsResponse(accepted_count=len(request.events) - len(at), rejected=refused)

    events = [{"type": 5 if fate == "unread" else fate} for fate in fates]
    async with rest_edge(answer) as edge:
        answered = (await edge.post("/v1/events:ingest", {"events": events})).json()
    assert answered["acceptedCount"] == fates.count("good")
    assert [each["index"] for each in answered["rejected"]] == [i for i, fate in enumerate(fates) if fate != "good"]


# --- streams ---


async def test_a_stream_is_lines_of_json() -> None:
    profiles = [Profile(user_id="u1", event_count=count) for count in (1, 2)]
    async with rest_edge(profiles) as edge:
        response = await edge.get("/v1/profiles/u1:watch?features=a")
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert [line["result"]["eventCount"] for line in lines] == ["1", "2"]
    assert edge.api.request == WatchProfileRequest(user_id="u1", features=["a"])
    assert edge.api.closed_streams == 1


async def test_a_stream_is_server_sent_events_where_they_are_asked_for() -> None:
    async with rest_edge([Profile(user_id="u1"), errors.Unavailable("draining", 1.0)]) as edge:
        response = await edge.get("/v1/profiles/u1:watch", headers={"accept": "text/event-stream"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    first, second, rest = response.text.split("\n\n")
    assert json.loads(first.removeprefix("data: "))["userId"] == "u1"
    name, data = second.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["code"] == 14
    assert rest == ""


async def test_an_error_in_the_middle_of_lines_is_the_last_of_them() -> None:
    async with rest_edge([Profile(user_id="u1"), RuntimeError("secret")]) as edge:
        response = await edge.get("/v1/profiles/u1:watch")
    assert json.loads(response.text.splitlines()[-1])["error"]["code"] == 13
    assert "secret" not in response.text


async def test_an_error_before_the_first_message_has_its_http_code() -> None:
    async with rest_edge([errors.Unimplemented("WatchProfile is not served yet")]) as edge:
        response = await edge.get("/v1/profiles/u1:watch")
    assert (response.status_code, response.json()["code"]) == (501, 12)


async def test_a_stream_of_nothing_is_empty() -> None:
    async with rest_edge([]) as edge:
        response = await edge.get("/v1/profiles/u1:watch")
    assert (response.status_code, response.text) == (200, "")


async def test_a_silent_stream_says_that_it_lives_and_ends_with_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "KEEP_ALIVE_S", 0.01)
    closed = asyncio.Event()

    async def silent() -> Any:
        try:
            yield Profile(user_id="u1").SerializeToString()
            await asyncio.Event().wait()
        finally:
            closed.set()

    request = Request({"type": "http", "headers": [(b"accept", b"text/event-stream")]})
    response = await watch.stream_response(request, silent(), Profile)
    frames: Any = response.body_iterator  # type: ignore[attr-defined]
    assert (await anext(frames)).startswith(b"data: ")
    assert await anext(frames) == b": alive\n\n"
    assert await anext(frames) == b": alive\n\n"
    await frames.aclose()
    assert closed.is_set()


# --- beside the API ---


async def test_readiness_follows_the_service_and_liveness_does_not() -> None:
    async with rest_edge() as edge:
        assert (await edge.get("/readyz")).status_code == 200
        edge.ready = False
        response = await edge.get("/readyz")
        assert (response.status_code, response.json()["code"]) == (503, 14)
        assert (await edge.get("/healthz")).status_code == 200


async def test_metrics_are_prometheus_text() -> None:
    async with rest_edge() as edge:
        await edge.get("/v1/profiles/u1?colour=red")
        response = await edge.get("/metrics")
        counted = await samples(edge)
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert counted["profile_service_calls_total", ("INVALID_ARGUMENT", BINDINGS["GetProfile"].method, "rest")] == 1


async def test_docs_need_nothing_from_elsewhere() -> None:
    async with rest_edge() as edge:
        root = await edge.get("/")
        assert (root.status_code, root.headers["location"]) == (307, "/docs")
        page = await edge.get("/docs")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert "http" not in page.text
        for path in page.text.replace("=", '"').split('"'):
            if path.startswith("/docs/"):
                assert (await edge.get(path)).status_code == 200, path
        assert (await edge.get("/docs/page/../app.py")).status_code == 404
        assert (await edge.get("/docs/page/%2e%2e/app.py")).status_code == 404


async def samples(edge: Edge) -> dict[tuple[str, tuple[str, ...]], float]:
    response: httpx.Response = await edge.get("/metrics")
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
