"""Questions and their answers, as both protocols get them."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message

from profile_service.cluster.changes import Changed
from profile_service.cluster.plan import Layout, NodeStanding
from profile_service.config import Limits
from profile_service.errors import InvalidArgument, NotFound, Unimplemented
from profile_service.frontends.api import Api
from tests.cluster.local_cluster import SCHEMA, encode
from tests.frontends.api_harness import GRPC, api_over_shards
from userprofile.v1 import admin_service_pb2, profile_pb2, profile_service_pb2

PROFILES = "userprofile.v1.ProfileService/"
ADMIN = "userprofile.v1.AdminService/"
INGEST = "userprofile.v1.EventService/IngestEvents"


async def get(api: Api, **fields: object) -> profile_pb2.Profile:
    request = profile_service_pb2.GetProfileRequest(**fields)  # type: ignore[arg-type]
    return profile_pb2.Profile.FromString(await api.call(PROFILES + "GetProfile", request.SerializeToString(), GRPC))


async def batch_get(api: Api, **fields: object) -> profile_service_pb2.BatchGetProfilesResponse:
    request = profile_service_pb2.BatchGetProfilesRequest(**fields)  # type: ignore[arg-type]
    encoded = await api.call(PROFILES + "BatchGetProfiles", request.SerializeToString(), GRPC)
    return profile_service_pb2.BatchGetProfilesResponse.FromString(encoded)


async def test_a_profile_has_the_features_asked_for() -> None:
    async with api_over_shards() as (api, _, metrics):
        await api.call(INGEST, encode(["u1", "u1"]), GRPC)
        profile = await get(api, user_id="u1", features=["views", "contacts"])
        assert set(profile.features) == {"views", "contacts"}
        assert profile.features["views"].counter.value == 2
        assert set((await get(api, user_id="u1")).features) == {"views", "contacts", "color"}
        with pytest.raises(NotFound, match="'u2'"):
            await get(api, user_id="u2")
        text = metrics.render()
        assert b'method="userprofile.v1.ProfileService/GetProfile",protocol="grpc"' in text
        assert b'code="NOT_FOUND"' in text


async def test_a_batch_of_profiles_keeps_order_and_repetitions_and_names_who_is_missing() -> None:
    users = [f"u{number}" for number in range(50)]
    async with api_over_shards(3) as (api, _, _):
        await api.call(INGEST, encode(users), GRPC)
        asked = ["ghost", *reversed(users), "u3", "gone", "u3", "ghost"]
        response = await batch_get(api, user_ids=asked)
        assert [profile.user_id for profile in response.profiles] == [user for user in asked if user in users]
        assert list(response.missing_user_ids) == ["ghost", "gone", "ghost"]


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("GetProfile", profile_service_pb2.GetProfileRequest(), "user_id"),
        ("GetProfile", profile_service_pb2.GetProfileRequest(user_id="é" * 129), "user_id"),
        ("GetProfile", profile_service_pb2.GetProfileRequest(user_id="u", features=["views", "x"]), "features[1]"),
        ("BatchGetProfiles", profile_service_pb2.BatchGetProfilesRequest(), "user_ids"),
        ("BatchGetProfiles", profile_service_pb2.BatchGetProfilesRequest(user_ids=["a"] * 6), "user_ids"),
        ("BatchGetProfiles", profile_service_pb2.BatchGetProfilesRequest(user_ids=["a", ""]), "user_ids[1]"),
        ("GetPopulation", profile_service_pb2.GetPopulationRequest(features=["x"]), "features[0]"),
    ],
)
async def test_a_wrong_question_names_its_field(method: str, request_: Message, field: str) -> None:
    async with api_over_shards(limits=Limits(users_per_read=5)) as (api, _, _):
        with pytest.raises(InvalidArgument) as raised:
            await api.call(PROFILES + method, request_.SerializeToString(), GRPC)
        assert raised.value.violations[0].field == field
        if field.startswith("features"):
            assert "color, contacts, views" in raised.value.message


async def test_damaged_and_oversized_requests_are_refused() -> None:
    async with api_over_shards(limits=Limits(message_bytes=100)) as (api, _, _):
        with pytest.raises(InvalidArgument, match="GetProfileRequest"):
            await api.call(PROFILES + "GetProfile", b"\xff\xff", GRPC)
        with pytest.raises(InvalidArgument, match="at most 100 bytes"):
            await api.call(PROFILES + "GetProfile", bytes(101), GRPC)


async def test_the_population_is_all_users_as_one() -> None:
    async with api_over_shards() as (api, cluster, _):
        await api.call(INGEST, encode([f"u{number}" for number in range(20)]), GRPC)
        states = [shard.population_state() for shard in cluster.shards.values()]
        for shard in cluster.shards.values():
            shard.set_population(states)
        population = profile_pb2.Profile.FromString(await api.call(PROFILES + "GetPopulation", b"", GRPC))
        assert population.features["views"].counter.value == 20


async def test_the_schema_says_what_a_profile_is() -> None:
    async with api_over_shards() as (api, _, _):
        answer = admin_service_pb2.GetSchemaResponse.FromString(await api.call(ADMIN + "GetSchema", b"", GRPC))
        assert answer.name == SCHEMA.name
        assert [event.name for event in answer.events] == ["view", "contact"]
        assert [(f.name, f.kind, f.attribute) for f in answer.features] == [
            ("color", "categorical", "color"),
            ("views", "counter", ""),
            ("contacts", "counter", ""),
        ]
        assert answer.row_bytes > 0
        assert all(feature.row_bytes > 0 for feature in answer.features)
        assert answer.yaml == SCHEMA.text


async def test_topology_and_status_show_every_shard_also_one_that_is_away() -> None:
    async with api_over_shards() as (api, cluster, metrics):
        await api.call(INGEST, encode([f"u{number}" for number in range(20)]), GRPC)
        answer = admin_service_pb2.GetTopologyResponse.FromString(await api.call(ADMIN + "GetTopology", b"", GRPC))
        assert (answer.epoch, answer.partition_count) == (cluster.topology.epoch, 16)
        assert [(r.first_partition, r.last_partition, r.shard_id) for r in answer.ranges] == [(0, 7, 0), (8, 15, 1)]
        status = admin_service_pb2.GetStatusResponse.FromString(await api.call(ADMIN + "GetStatus", b"", GRPC))
        assert [shard.state for shard in status.shards] == ["serving", "serving"]
        assert (status.user_count, status.event_count, status.sync_mode) == (20, 20, "always")
        assert all(s.pid and s.cpu_seconds and s.resident_bytes and s.address for s in status.shards)
        assert status.bytes_per_user > 0
        assert all(s.log_bytes and s.log_position and not s.HasField("snapshot_time") for s in status.shards)
        await cluster.cut(1)
        status = admin_service_pb2.GetStatusResponse.FromString(await api.call(ADMIN + "GetStatus", b"", GRPC))
        assert [shard.state for shard in status.shards] == ["serving", "unreachable"]
        assert b'profile_service_shard_users{shard="0"}' in metrics.render()


async def test_a_snapshot_is_written_when_it_is_asked_for_and_shows_in_the_status() -> None:
    async with api_over_shards() as (api, _, metrics):
        await api.call(INGEST, encode([f"u{number}" for number in range(20)]), GRPC)
        encoded = await api.call(ADMIN + "CreateSnapshot", b"", GRPC)
        positions = dict(admin_service_pb2.CreateSnapshotResponse.FromString(encoded).log_positions)
        assert sorted(positions) == [0, 1]
        status = admin_service_pb2.GetStatusResponse.FromString(await api.call(ADMIN + "GetStatus", b"", GRPC))
        assert {shard.shard_id: shard.snapshot_position for shard in status.shards} == positions
        assert all(shard.snapshot_time.seconds > 1_700_000_000 for shard in status.shards)
        assert b'profile_service_shard_replay_bytes{shard="1"}' in metrics.render()


async def test_what_a_shard_says_of_itself_is_passed_on() -> None:
    async with api_over_shards() as (api, cluster, _):
        cluster.healths[1].recovering(0.43, "replaying the log")
        cluster.healths[1].state = "recovering"
        status = admin_service_pb2.GetStatusResponse.FromString(await api.call(ADMIN + "GetStatus", b"", GRPC))
        shard = status.shards[1]
        assert (shard.state, shard.recovery_progress, shard.message) == ("recovering", 0.43, "replaying the log")


@pytest.mark.parametrize("method", ["RankItems", "DeleteProfile", "MergeProfiles"])
async def test_what_is_not_served_yet_says_so(method: str) -> None:
    async with api_over_shards(1) as (api, _, _):
        with pytest.raises(Unimplemented, match=f"{method} is not served by this version yet"):
            await api.call(PROFILES + method, b"", GRPC)
        with pytest.raises(Unimplemented, match="WatchProfile"):
            await anext(api.stream(PROFILES + "WatchProfile", b"", GRPC))


async def test_a_node_is_drained_by_its_id_its_name_or_an_address_of_its_own() -> None:
    async with api_over_shards() as (api, cluster, _):
        drained: list[str] = []

        async def drain_node(node: str) -> Changed:
            drained.append(node)
            return Changed(7)

        async def layout() -> Layout:
            places = (("n1", "id1", "10.0.0.1"), ("n2", "id2", "10.0.0.2"), ("n3", "id3", "10.0.0.2"))
            return Layout(tuple(NodeStanding(name, node, address, "serving", ()) for name, node, address in places))

        cluster.drain_node, cluster.layout = drain_node, layout  # type: ignore[method-assign]
        for called in ("id1", "n1", "10.0.0.1", "n3", "nowhere"):
            request = admin_service_pb2.DrainNodeRequest(node=called).SerializeToString()
            await api.call("userprofile.v1.AdminService/DrainNode", request, GRPC)
        assert drained == ["id1", "id1", "id1", "id3", "nowhere"]
        request = admin_service_pb2.DrainNodeRequest(node="10.0.0.2").SerializeToString()
        with pytest.raises(InvalidArgument, match="n2, n3"):
            await api.call("userprofile.v1.AdminService/DrainNode", request, GRPC)
