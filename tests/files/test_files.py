"""Files of every kind become events; what cannot refuses its row, or the file, by name."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profile_service.files.errors import FileError
from profile_service.files.mapping import Attributes, Wanted, read_mapping
from profile_service.files.source import identity, open_events
from userprofile.v1 import event_pb2, event_service_pb2

ATTRIBUTES = Attributes(("item_id", "brand"), ("price",))
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
NOON_S = int(NOON.timestamp())


def read(
    path: Path, wanted: Wanted | None = None, **how: Any
) -> tuple[dict[int, event_pb2.Event], dict[int, tuple[str, str]]]:
    """Events by row, and (field, reason) by refused row."""
    file = open_events(path, **how)
    events: dict[int, event_pb2.Event] = {}
    refused: dict[int, tuple[str, str]] = {}
    rows_read = 0
    for chunk in file.chunks(file.mapping(wanted or Wanted(), ATTRIBUTES)):
        batch = event_service_pb2.IngestEventsRequest.FromString(chunk.events.run(0, len(chunk.events)))
        events.update(zip(chunk.rows.tolist(), batch.events, strict=True))
        refused.update({row.row: (row.field, row.reason) for row in chunk.refused})
        rows_read += chunk.read
    assert rows_read == len(events) + len(refused)
    return events, refused


def parquet(path: Path, **columns: Any) -> Path:
    count = max(len(column) for column in columns.values())
    usual = {"user_id": ["u1"] * count, "event_type": ["view"] * count, "event_time": [NOON] * count}
    pq.write_table(pa.table({**usual, **columns}), path)
    return path


def attributes(event: event_pb2.Event) -> dict[str, Any]:
    return {
        name: value.string_value if value.WhichOneof("kind") == "string_value" else value.number_value
        for name, value in event.attributes.fields.items()
    }


def test_parquet_columns_of_the_usual_names_need_no_mapping(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "e.parquet", item_id=["007", None], price=[1.5, None], brand=[None, "é"], other=["x", "y"]
    )
    events, refused = read(path)
    assert not refused
    assert events[1].user_id == "u1"
    assert events[1].type == "view"
    assert events[1].time.ToDatetime(UTC) == NOON
    assert [attributes(events[row]) for row in (1, 2)] == [{"item_id": "007", "price": 1.5}, {"brand": "é"}]


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pa.array([17200506, 0]), ["17200506", "0"]),
        (pa.array([17200506.0, 12.5]), ["17200506", "12.5"]),
        (pa.array([123456789012.0, 1e300]), ["123456789012", "1e+300"]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.array([Decimal("1.50"), Decimal("2.00")]), ["1.50", "2.00"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
        (pa.array([date(2020, 1, 2), date(2021, 3, 4)]), ["2020-01-02", "2021-03-04"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_any_column_can_be_a_text(tmp_path: Path, column: pa.Array, texts: list[str]) -> None:
    events, _ = read(parquet(tmp_path / "e.parquet", item_id=column))
    assert [attributes(events[row])["item_id"] for row in (1, 2)] == texts


def test_texts_are_parsed_where_a_number_is_wanted_and_refuse_their_row_where_they_are_none(tmp_path: Path) -> None:
    path = parquet(tmp_path / "e.parquet", price=[" 12.5", "1e3", "twelve", None, "1_000", "", "nan"])
    events, refused = read(path)
    assert {row: attributes(event).get("price") for row, event in events.items() if row != 7} == {
        1: 12.5,
        2: 1000.0,
        4: None,
    }
    assert np.isnan(attributes(events[7])["price"]), "whether a NaN is right is for the service to say"
    assert refused.keys() == {3, 5, 6}
    assert {field for field, _ in refused.values()} == {"attributes.price"}


@pytest.mark.parametrize(
    "column",
    [
        *(pa.array([NOON], pa.timestamp(unit, tz="UTC")) for unit in ("s", "ms", "us", "ns")),
        pa.array([NOON], pa.timestamp("us", tz="America/New_York")),
        pa.array([NOON.replace(tzinfo=None)], pa.timestamp("ms")),
        *(pa.array([NOON_S * scale]) for scale in (1, 1_000, 1_000_000, 1_000_000_000)),
        pa.array([float(NOON_S)]),
        pa.array([str(NOON_S * 1000)]),
        *(
            pa.array([text])
            for text in (
                "2026-11-22T12:00:00Z",
                "2026-11-22 12:00:00",
                "2026-11-22 12:00:00 UTC",
                "2026-11-22T13:00:00+01:00",
                "2026-11-22T07:00:00.000000-05:00",
                "2026-11-22T12:00",
            )
        ),
    ],
    ids=lambda column: f"{column.type} {column[0]}",
)
def test_a_time_may_have_any_unit_zone_and_form(tmp_path: Path, column: pa.Array) -> None:
    events, refused = read(parquet(tmp_path / "e.parquet", event_time=column))
    assert not refused
    assert events[1].time.ToDatetime(UTC) == NOON


def test_times_before_1970_and_fractions_are_exact(tmp_path: Path) -> None:
    long_ago = datetime(1931, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
    for column in (pa.array([long_ago]), pa.array([long_ago.isoformat()]), pa.array([long_ago.isoformat(), "1.5"])):
        events, _ = read(parquet(tmp_path / "e.parquet", event_time=column))
        assert events[1].time.ToDatetime(UTC) == long_ago
    assert events[2].time.ToDatetime(UTC) == datetime(1970, 1, 1, 0, 0, 1, 500000, tzinfo=UTC)


def test_a_row_without_a_time_is_refused_unless_it_may_count_as_of_its_arrival(tmp_path: Path) -> None:
    path = parquet(tmp_path / "e.parquet", event_time=[NOON, None, NOON])
    events, refused = read(path)
    assert events.keys() == {1, 3}
    assert refused[2][0] == "time"
    events, refused = read(path, Wanted(untimed=True))
    assert not refused
    assert not events[2].HasField("time")


def test_a_null_user_is_left_for_the_service_to_refuse(tmp_path: Path) -> None:
    events, refused = read(parquet(tmp_path / "e.parquet", user_id=["u1", None]))
    assert not refused
    assert events[2].user_id == ""


def test_a_file_without_the_columns_says_which_it_has_and_which_flags_name_them(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    pq.write_table(pa.table({"customer": ["u1"], "amount": [1.0]}), path)
    with pytest.raises(FileError) as caught:
        read(path, Wanted(attributes={"price": "cost", "size": "amount"}))
    message = caught.value.message
    for part in (str(path), "--user-column", "--type-column", "--time-column", "customer, amount", "cost", "size"):
        assert part in message


def test_a_mapping_names_the_columns_and_flags_go_before_it(tmp_path: Path) -> None:
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text("user: customer\ntype: {value: view}\ntime: at\nattributes: {price: cost, item_id: }\n")
    path = tmp_path / "e.parquet"
    pq.write_table(pa.table({"customer": ["u9"], "cost": [2.0], "amount": [3.0], "at": [NOON], "item_id": ["x"]}), path)
    events, _ = read(path, read_mapping(mapping))
    assert (events[1].user_id, events[1].type, attributes(events[1])) == ("u9", "view", {"price": 2.0})
    events, _ = read(path, Wanted(type_value="cart", attributes={"price": "amount"}).over(read_mapping(mapping)))
    assert (events[1].type, attributes(events[1])) == ("cart", {"price": 3.0})


@pytest.mark.parametrize("text", ["- a", "user: [", "usr: customer", "type: {values: x}", "attributes: [price]"])
def test_a_wrong_mapping_file_is_named(tmp_path: Path, text: str) -> None:
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(text)
    with pytest.raises(FileError, match=r"mapping\.yaml"):
        read_mapping(mapping)


def test_csv_texts_stay_as_written_and_an_empty_field_is_null(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_text(
        "user_id,event_type,event_time,item_id,price,brand\n"
        'u1,view,2026-11-22 12:00,007,5,"a, ""b""\nc"\n,view,2026-11-22,1e3,,\n'
    )
    events, refused = read(path)
    assert not refused
    assert attributes(events[1]) == {"item_id": "007", "price": 5.0, "brand": 'a, "b"\nc'}
    assert attributes(events[2]) == {"item_id": "1e3"}


def test_a_csv_row_of_another_width_refuses_itself_and_the_others_keep_their_numbers(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bad = set(rng.choice(np.arange(1, 20_001), 300, replace=False).tolist()) | {1, 2, 20_000}
    path = tmp_path / "e.csv"
    with path.open("w") as file:
        file.write("user_id,type,time,item_id\n")
        for row in range(1, 20_001):
            file.write("u1,view\n" if row in bad else f"u1,view,{NOON_S},{row}\n")
    events, refused = read(path)
    assert refused.keys() == bad
    assert events.keys() == set(range(1, 20_001)) - bad
    assert all(attributes(event)["item_id"] == str(row) for row, event in events.items())


def test_csv_may_be_compressed_and_have_another_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "e.tsv.gz"
    path.write_bytes(gzip.compress(f"user_id\ttype\ttime\nu1\tview\t{NOON_S}\n".encode()))
    assert read(path)[0][1].user_id == "u1"
    path = tmp_path / "e.csv"
    path.write_text(f"user_id;type;time\nu1;view;{NOON_S}\n")
    assert read(path, delimiter=";")[0][1].user_id == "u1"


def test_broken_utf8_in_csv_reaches_the_service_which_refuses_that_event(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_bytes(b"user_id,type,time,item_id\nu1,view,0,\xff\xfe\nu2,view,0,x\n")
    file = open_events(path)
    (chunk,) = file.chunks(file.mapping(Wanted(), ATTRIBUTES))
    assert b"\xff\xfe" in chunk.events.run(0, 1)
    assert b"\xff" not in chunk.events.run(1, 2)


def test_ndjson_takes_the_apis_own_form_and_flat_rows(tmp_path: Path) -> None:
    path = tmp_path / "e.ndjson"
    own = {
        "userId": "u1",
        "type": "view",
        "time": NOON.isoformat(),
        "eventId": "e1",
        "attributes": {"price": 1, "x": [1]},
    }
    flat = {
        "user_id": "u2",
        "event_type": "cart",
        "event_time": NOON_S * 1000,
        "item_id": 7,
        "price": "2.5",
        "note": {},
    }
    path.write_text("\ufeff" + json.dumps(own) + "\n\n" + json.dumps(flat) + "\r\n")
    events, refused = read(path)
    assert not refused
    assert (events[1].user_id, events[1].event_id) == ("u1", "e1")
    assert events[1].attributes.fields["x"].list_value.values[0].number_value == 1
    assert (events[3].user_id, events[3].type, attributes(events[3])) == ("u2", "cart", {"item_id": "7", "price": 2.5})
    assert {event.time.ToDatetime(UTC) for event in events.values()} == {NOON}


def test_an_invalid_ndjson_line_refuses_itself(tmp_path: Path) -> None:
    good = json.dumps({"userId": "u1", "type": "view"}).encode()
    bad = [
        b"{", b"[1]", b"7", b"\xff", b'{"userId": 7}', b'{"userId": "\\ud800"}', b'{"userId": "u", "time": "soon"}',
        b'{"userId": "u", "attributes": []}', b'{"userId": "u", "attributes": {"price": 1' + b"0" * 400 + b"}}",
        b"[" * 100_000, b'{"userId": "' + b"x" * 5_000_000 + b'"}',
        b'{"user_id": "u", "event_type": "view", "price": 1}',
    ]  # fmt: skip
    path = tmp_path / "e.ndjson"
    path.write_bytes(b"\n".join([good, *bad, good]))
    events, refused = read(path)
    assert events.keys() == {1, len(bad) + 2}
    assert refused.keys() == set(range(2, len(bad) + 2))
    for line, (_, reason) in sorted(refused.items()):
        assert reason.startswith(("must ", "cannot ")), (line, reason)


def test_a_json_array_is_told_how_to_become_lines(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text('[\n{"userId": "u1", "type": "view"}]')
    with pytest.raises(FileError, match="jq"):
        read(path)


def test_an_empty_ndjson_file_has_no_events(tmp_path: Path) -> None:
    path = tmp_path / "e.ndjson"
    path.write_bytes(b"")
    assert read(path) == ({}, {})


@pytest.mark.parametrize("name", ["e.parquet", "e.csv", "e.xlsx"])
def test_a_missing_or_empty_or_unknown_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(FileError, match=name):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(FileError, match=name):
        read(path)


def test_a_damaged_parquet_file_gives_the_rows_before_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    rows = 100_000
    table = pa.table({"user_id": [f"u{i}" for i in range(rows)], "type": ["view"] * rows, "time": list(range(rows))})
    pq.write_table(table, path, row_group_size=40_000, use_dictionary=False)
    content = bytearray(path.read_bytes())
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileError, match="whole Parquet"):
        read(cut)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[start : start + 4096] = b"\xff" * 4096
    path.write_bytes(content)
    file = open_events(path)
    good: list[int] = []
    chunks = file.chunks(file.mapping(Wanted(), ATTRIBUTES))
    with pytest.raises(FileError, match=r"damaged after row \d+"):
        good.extend(row for chunk in chunks for row in chunk.rows.tolist())
    assert good == list(range(1, len(good) + 1))
    assert len(good) >= 32_768


def test_a_huge_value_refuses_its_row_alone(tmp_path: Path) -> None:
    events, refused = read(parquet(tmp_path / "e.parquet", brand=["a", "b" * 3_000_000, "c"]))
    assert events.keys() == {1, 3}
    assert refused.keys() == {2}


def test_the_identity_of_a_file_goes_by_content_and_circumstances(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"a" * 3_000_000)
    two.write_bytes(b"a" * 3_000_000)
    assert identity(one, 1) == identity(two, 1)
    assert identity(one, 1) != identity(one, 2)
    for place in (0, 1_500_000, 2_999_999):
        two.write_bytes(b"a" * place + b"b" + b"a" * (2_999_999 - place))
        assert identity(one, 1) != identity(two, 1)
    two.write_bytes(b"a" * 3_000_001)
    assert identity(one, 1) != identity(two, 1)
    assert Wanted(attributes={"a": "1", "b": "2"}).describe() == Wanted(attributes={"b": "2", "a": "1"}).describe()
    assert Wanted(user="a").describe() != Wanted(type="a").describe()


def test_chunks_are_the_same_each_time(tmp_path: Path) -> None:
    """What lets an interrupted run go on."""
    zone = timezone(timedelta(hours=2))
    path = parquet(tmp_path / "e.parquet", event_time=[NOON.astimezone(zone)] * 100_000)
    file = open_events(path)
    mapping = file.mapping(Wanted(), ATTRIBUTES)
    first = [(len(chunk.events), chunk.events.run(0, 5)) for chunk in file.chunks(mapping)]
    assert first == [(len(chunk.events), chunk.events.run(0, 5)) for chunk in file.chunks(mapping)]
