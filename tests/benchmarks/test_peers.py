"""The peers of the benchmarks do the same work: what they know of a user is what the service's own rows say."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.load import PREFERENCES, SCHEMAS, build_load
from benchmarks.peers.dicts import Dicts
from benchmarks.peers.redis_rows import RedisRows
from benchmarks.peers.work import Peer
from profile_service.domain.schema import load_schema
from profile_service.domain.table import ProfileTable
from profile_service.sample.shoppers import shopper_id
from profile_service.wire.decode import decode_events
from profile_service.wire.plan import WirePlan
from userprofile.v1 import profile_pb2

USERS = 40


@pytest.fixture(params=["dicts", "redis"])
def peer(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    monkeypatch.chdir(tmp_path)
    kind: Peer = RedisRows() if request.param == "redis" else Dicts()
    yield kind
    kind.close()
    assert list(tmp_path.iterdir()) == []


def test_a_peer_knows_what_a_profile_says(peer: Peer) -> None:
    load = build_load(PREFERENCES, 3_000, USERS, 700, 7)
    schema = load_schema(SCHEMAS[PREFERENCES])
    plan = WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)
    table, now_ns = ProfileTable(schema), time.time_ns()
    for batch in load.batches:
        peer.consume(batch)
        columns = decode_events(batch, plan, now_ns)
        assert table.has_room(columns.count, len(batch))
        table.apply(columns, 0, columns.count, now_ns)
    for number in range(USERS):
        user_id = shopper_id(number)
        profile = profile_pb2.Profile.FromString(table.profile(user_id, now_ns))
        theirs = peer.profile(user_id)
        assert theirs.differs_from(profile) is None
        profile.event_count += 1
        assert "event_count" in (theirs.differs_from(profile) or "")
        profile.event_count -= 1
        profile.features["mileage"].distribution.histogram.weights[9] += 1.0
        assert "mileage bin 9" in (theirs.differs_from(profile) or "")
