"""A frontend as clients meet it: gRPC and HTTP on real ports, over shards in the test's own loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import grpc
import httpx
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from profile_service.clock import system_clock
from profile_service.config import Limits, Settings
from profile_service.errors import StartupError
from profile_service.frontends.api import SERVICES
from profile_service.frontends.server import Frontend
from profile_service.wire.apply_request import ApplyPart
from tests.cluster.local_cluster import SCHEMA, FakeShard, LocalCluster, encode, running, until
from userprofile.v1 import (
    event_service_pb2,
    event_service_pb2_grpc,
    profile_service_pb2,
    profile_service_pb2_grpc,
)

SETTINGS = Settings(grpc_port=0, http_port=0, drain_timeout_s=10.0)


@asynccontextmanager
async def serving(cluster: LocalCluster, settings: Settings = SETTINGS) -> AsyncIterator[tuple[Frontend, aio.Channel]]:
    frontend = Frontend(SCHEMA, replace(settings, capacity=cluster.capacity), cluster.source, system_clock, cluster)
    await frontend.start()
    await frontend.wait_until_ready()
    try:
        async with aio.insecure_channel(frontend.grpc_address) as channel:
            yield frontend, channel
    finally:
        await frontend.drain()


def request(*user_ids: str, **fields: Any) -> event_service_pb2.StreamEventsRequest:
    return event_service_pb2.StreamEventsRequest.FromString(encode(user_ids, **fields))


def batch(*user_ids: str) -> event_service_pb2.IngestEventsRequest:
    return event_service_pb2.IngestEventsRequest.FromString(encode(user_ids))


async def test_both_protocols_answer_from_the_same_state() -> None:
    async with running() as (cluster, _), serving(cluster) as (frontend, channel):
        events: Any = event_service_pb2_grpc.EventServiceStub(channel)
        profiles: Any = profile_service_pb2_grpc.ProfileServiceStub(channel)
        answer = await events.IngestEvents(batch("u1", "u1"))
        assert answer.accepted_count == 2

        async def requests() -> AsyncIterator[event_service_pb2.StreamEventsRequest]:
            yield request(producer_id="p")
            for sequence in range(1, 6):
                yield request("u1", sequence=sequence)

        told = [response.sequence async for response in events.StreamEvents(requests())]
        assert told[-1] == 5
        profile = await profiles.GetProfile(profile_service_pb2.GetProfileRequest(user_id="u1"))
        assert profile.event_count == 7
        async with httpx.AsyncClient(base_url=f"http://{frontend.http_address}") as client:
            assert (await client.get("/v1/profiles/u1")).json()["eventCount"] == "7"
            assert (await client.get("/readyz")).status_code == 200
            assert "profile_service_events_accepted_total 7.0" in (await client.get("/metrics")).text


async def test_an_error_carries_its_details() -> None:
    async with running(1) as (cluster, _), serving(cluster) as (_, channel):
        profiles: Any = profile_service_pb2_grpc.ProfileServiceStub(channel)
        with pytest.raises(aio.AioRpcError) as raised:
            await profiles.GetProfile(profile_service_pb2.GetProfileRequest())
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        status = rpc_status.from_call(cast(grpc.Call, raised.value))
        assert status is not None
        details = {detail.TypeName(): detail for detail in status.details}
        bad_request = error_details_pb2.BadRequest()
        packed: any_pb2.Any = details["google.rpc.BadRequest"]
        assert packed.Unpack(bad_request)
        assert bad_request.field_violations[0].field == "user_id"
        watching = profiles.WatchProfile(profile_service_pb2.WatchProfileRequest(user_id="u"))
        with pytest.raises(aio.AioRpcError, match="not served by this version yet") as raised:
            await watching.read()
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_over_the_limit_is_told_the_limit() -> None:
    settings = replace(SETTINGS, limits=Limits(message_bytes=10_000))
    async with running(1) as (cluster, _), serving(cluster, settings) as (_, channel):
        events: Any = event_service_pb2_grpc.EventServiceStub(channel)
        with pytest.raises(aio.AioRpcError, match="at most 10000 bytes") as raised:
            await events.IngestEvents(batch("u" * 200, *(f"{n:0190}" for n in range(60))))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(aio.AioRpcError, match="larger than max"):
            await events.IngestEvents(batch(*(f"{n:0200}" for n in range(100))))


async def test_health_and_reflection_know_every_service() -> None:
    async with running() as (cluster, _), serving(cluster) as (frontend, channel):
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", *SERVICES):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watching = health.Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        await cluster.cut(0)
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        async with httpx.AsyncClient(base_url=f"http://{frontend.http_address}") as client:
            assert (await client.get("/readyz")).status_code == 503
        await cluster.serve(0)
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING

        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(cast(grpc.Channel, channel))
        call = reflection.ServerReflectionInfo(iter([asked]))
        listed = {service.name for service in (await call.read()).list_services_response.service}
        assert listed >= set(SERVICES)


async def test_a_frontend_is_not_ready_while_a_shard_recovers() -> None:
    async with running() as (cluster, _), serving(cluster) as (frontend, _):
        cluster.healths[1].state = "recovering"
        await cluster.cut(1)
        await until(lambda: not frontend.ready)
        await cluster.serve(1)
        await until(lambda: "recovering" in {shard.state for shard in frontend.api.admin.last_shards})
        assert not frontend.ready
        for state in ("serving", "full"):
            cluster.healths[1].state = state
            await until(lambda: frontend.ready)


async def test_draining_answers_everything_accepted_and_is_quick_about_it() -> None:
    class Slow(FakeShard):
        release = asyncio.Event()

        async def submit(self, parts: Sequence[ApplyPart], size_bytes: int, epoch: int, *rest: object) -> None:
            await super().submit(parts, size_bytes, epoch)
            await self.release.wait()

    async with running(1, make_shard=Slow) as (cluster, _), serving(cluster) as (frontend, channel):
        events: Any = event_service_pb2_grpc.EventServiceStub(channel)
        health: Any = health_pb2_grpc.HealthStub(channel)
        watching = health.Watch(health_pb2.HealthCheckRequest())
        await watching.read()
        unary = asyncio.ensure_future(events.IngestEvents(batch("u1")))
        stream = events.StreamEvents()
        await stream.write(request(producer_id="p"))
        await stream.read()
        await stream.write(request("u1", sequence=1))
        async with httpx.AsyncClient(base_url=f"http://{frontend.http_address}") as client:
            posted = asyncio.create_task(
                client.post("/v1/events:ingest", json={"events": [{"userId": "u2", "type": "view"}]})
            )
            await until(lambda: sum(len(request) for request in cluster.shards[0].requests) == 3)
            draining = asyncio.create_task(frontend.drain())
            await until(lambda: not frontend.ready)
            Slow.release.set()
            async with asyncio.timeout(SETTINGS.drain_timeout_s / 2):
                assert (await unary).accepted_count == 1
                assert (await stream.read()).sequence == 1
                with pytest.raises(aio.AioRpcError, match="connect again"):
                    await stream.read()
                assert (await posted).json()["acceptedCount"] == 1
                await draining


async def test_a_port_that_is_taken_after_all_is_said_plainly() -> None:
    async with running(1) as (cluster, _), serving(cluster) as (frontend, _):
        host, _, grpc_port = frontend.grpc_address.rpartition(":")
        http_port = frontend.http_address.rpartition(":")[2]
        for settings, flag in (
            (replace(SETTINGS, grpc_port=int(grpc_port)), "--grpc-port"),
            (replace(SETTINGS, http_port=int(http_port)), "--http-port"),
        ):
            with pytest.raises(StartupError, match=rf"{host}:.*{flag}"):
                await Frontend(SCHEMA, settings, cluster.source, system_clock, cluster).start()


async def test_a_deadline_ends_a_call_that_finds_no_owner() -> None:
    async with running(1, make_shard=FakeShard) as (cluster, _), serving(cluster) as (frontend, channel):
        await cluster.cut(0)
        await until(lambda: not frontend.ready)
        profiles: Any = profile_service_pb2_grpc.ProfileServiceStub(channel)
        with pytest.raises(aio.AioRpcError) as raised:
            await profiles.GetProfile(profile_service_pb2.GetProfileRequest(user_id="u"), timeout=0.2)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
