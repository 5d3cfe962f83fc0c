"""Columns serialized give what protobuf reads back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from profile_service.files.encode import Columns, Times, encode_events
from profile_service.wire.framing import varint
from userprofile.v1 import event_service_pb2

BYTES = pa.large_binary()

texts = st.one_of(st.none(), st.text(max_size=300))
events = st.lists(
    st.fixed_dictionaries(
        {
            "user_id": texts,
            "type": texts,
            "event_id": texts,
            "time": st.one_of(st.none(), st.tuples(st.integers(-(2**40), 2**40), st.integers(0, 999_999_999))),
            "color": texts,
            "price": st.one_of(st.none(), st.floats()),
        }
    ),
    max_size=20,
)


def columns_of(rows: list[dict[str, Any]]) -> Columns:
    def text(name: str) -> pa.Array:
        return pa.array([None if row[name] is None else row[name].encode() for row in rows], BYTES)

    times = [row["time"] for row in rows]
    return Columns(
        text("user_id"),
        text("type"),
        Times(
            np.array([0 if time is None else time[0] for time in times], dtype=np.int64),
            np.array([0 if time is None else time[1] for time in times], dtype=np.int64),
            np.array([time is not None for time in times], dtype=np.bool_),
        ),
        text("event_id"),
        {"color": text("color")},
        {"price": pa.array([row["price"] for row in rows], pa.float64(), from_pandas=False)},
    )


@given(events)
@settings(max_examples=60, deadline=None)
def test_protobuf_reads_back_what_was_in_the_columns(rows: list[dict[str, Any]]) -> None:
    encoded = encode_events(columns_of(rows))
    assert len(encoded) == len(rows)
    message = event_service_pb2.IngestEventsRequest.FromString(encoded.run(0, len(encoded)))
    for row, event in zip(rows, message.events, strict=True):
        assert event.user_id == (row["user_id"] or "")
        assert event.type == (row["type"] or "")
        assert event.event_id == (row["event_id"] or "")
        assert event.HasField("time") == (row["time"] is not None)
        if row["time"] is not None:
            assert (event.time.seconds, event.time.nanos) == row["time"]
        fields = event.attributes.fields
        assert set(fields) == {name for name in ("color", "price") if row[name] is not None}
        if row["color"] is not None:
            assert fields["color"].string_value == row["color"]
        if row["price"] is not None:
            np.testing.assert_equal(fields["price"].number_value, row["price"])


@given(events)
@settings(max_examples=20, deadline=None)
def test_a_single_event_is_the_same_bytes_as_in_its_batch(rows: list[dict[str, Any]]) -> None:
    encoded = encode_events(columns_of(rows))
    for place, row in enumerate(rows):
        assert encode_events(columns_of([row])).run(0, 1) == encoded.run(place, place + 1)


def test_batches_are_bounded_in_events_and_bytes_and_leave_nothing_out() -> None:
    rows = [
        {"user_id": "u" * (1 + i % 50), "type": "view", "event_id": None, "time": None, "color": None, "price": None}
        for i in range(1000)
    ]
    encoded = encode_events(columns_of(rows))
    for most, size in ((1, 10_000), (7, 200), (5000, 5), (64, 10**9)):
        runs = encoded.batches(most, size)
        assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])]
        assert runs[-1][1] == len(encoded)
        for start, stop in runs:
            assert 1 <= stop - start <= most
            assert stop - start == 1 or len(encoded.run(start, stop)) <= size


def test_a_varint_is_protobufs() -> None:
    for value in (0, 1, 127, 128, 300, 2**32, 2**63):
        message = event_service_pb2.StreamEventsRequest(sequence=value if value < 2**63 else -(2**63))
        assert message.SerializeToString()[1:] == (varint(value) if value else b"")
