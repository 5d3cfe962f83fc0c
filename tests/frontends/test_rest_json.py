"""JSON in: what is wrong is named by its path. JSON out: as protobuf's own mapping has it, only faster."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson
import pytest
from google.protobuf import descriptor_pb2, json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from profile_service.errors import InvalidArgument
from profile_service.frontends.rest import json_in, json_out
from profile_service.frontends.rest.bindings import service_bindings
from profile_service.wire.json_text import JsonPlan
from userprofile.v1.admin_service_pb2 import (
    CreateSnapshotResponse,
    GetSchemaResponse,
    GetStatusResponse,
    MovePartitionsRequest,
)
from userprofile.v1.event_pb2 import Event
from userprofile.v1.profile_pb2 import Profile
from userprofile.v1.profile_service_pb2 import RankItemsRequest, RankItemsResponse

WRONG_EVENTS = [
    ({"userId": 5}, "user_id", "must be a string, is 5"),
    ({"user_id": ["a"]}, "user_id", "must be a string, is an array"),
    ({"userId": "\ud800"}, "user_id", 'must be well-formed Unicode, is "?"'),
    ({"userId": "a", "user_id": "b"}, "user_id", "must be given once, is given as userId and as user_id"),
    ({"user": "a"}, "user", "is not a field of Event; there are: userId, type, time, eventId, attributes"),
    ({"time": "yesterday"}, "time", 'must be a time such as 2026-11-22T10:00:00Z, is "yesterday"'),
    ({"time": 5}, "time", "must be a time such as 2026-11-22T10:00:00Z, is 5"),
    ({"time": {"seconds": 5}}, "time", "must be a time such as 2026-11-22T10:00:00Z, is an object"),
    (
        {"time": "2026-13-01T00:00:00Z"},
        "time",
        'must be a time such as 2026-11-22T10:00:00Z, is "2026-13-01T00:00:00Z"',
    ),
    ({"attributes": "red"}, "attributes", 'must be an object, is "red"'),
    ({"attributes": [1]}, "attributes", "must be an object, is an array"),
    ({"attributes": {"ok": 1, "color": "\udc00"}}, "attributes.color", "must be well-formed text"),
    ({"type": True}, "type", "must be a string, is true"),
    (None, "", "must be an object, is null"),
    ("u1", "", 'must be an object, is "u1"'),
    ([], "", "must be an object, is an array"),
]

WRONG_BODIES = [
    (b"\xff{}", "the body must be UTF-8, byte 0 is not"),
    (b'{"a": "\xc3"}', "the body must be UTF-8, byte 7 is not"),
    (b"{", "line 1 column 2"),
    (b'{"a": 1,}', "the body must be JSON"),
    (b"[]", "the body must be an object, is an array"),
    (b"null", "the body must be an object, is null"),
    (b"5", "the body must be an object, is 5"),
    (b'{"price": NaN}', "has no NaN"),
    (b'{"price": Infinity}', "has no Infinity"),
    (b'{"price": -Infinity}', "has no -Infinity"),
    (b'{"a": 1, "a": 2}', "must be given once in its JSON object"),
    (b'{"x": {"a": 1, "b": 2, "a": 1}}', "a: must be given once"),
    (b'{"a": "\x01"}', "the body must be JSON"),
    (b"\xef\xbb\xbf{}", "the body must be JSON"),
    (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    (b'{"a": ' + b"9" * 5_000 + b"}", "fewer digits"),
    (b'{"a": 1} {"b": 2}', "Extra data"),
]


@pytest.mark.parametrize(("tree", "field", "reason"), WRONG_EVENTS, ids=[json.dumps(case[0]) for case in WRONG_EVENTS])
def test_a_wrong_event_is_explained_by_field_and_reason(tree: Any, field: str, reason: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        json_in.fill(Event(), tree)
    (violation,) = raised.value.violations
    assert violation.field == field
    assert violation.description.startswith(reason)


def test_a_fault_deep_inside_is_named_by_its_whole_path() -> None:
    tree = {"items": [{"itemId": "a"}, {"item_id": "b", "attributes": 3}]}
    with pytest.raises(InvalidArgument, match=r"items\[1\]\.attributes: must be an object, is 3"):
        json_in.fill(RankItemsRequest(), tree)
    with pytest.raises(InvalidArgument, match=r"items\[0\]\.colour: is not a field of Item"):
        json_in.fill(RankItemsRequest(), {"items": [{"colour": "a"}]})
    with pytest.raises(InvalidArgument, match="items: must be an array, is an object"):
        json_in.fill(RankItemsRequest(), {"items": {}})
    with pytest.raises(InvalidArgument, match=r"partitions\[1\]: must be a whole number of 32 bits, is 1\.5"):
        json_in.fill(MovePartitionsRequest(), {"partitions": [1, 1.5]})
    with pytest.raises(InvalidArgument, match=r"log_positions\.0: must be a whole number of 64 bits, is true"):
        json_in.fill(CreateSnapshotResponse(), {"logPositions": {"1": "5", "0": True}})


@pytest.mark.parametrize(("body", "reason"), WRONG_BODIES, ids=[repr(case[0][:20]) for case in WRONG_BODIES])
def test_a_body_that_is_no_json_object_is_refused_with_what_is_wrong(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        json_in.load(body)
    assert reason in raised.value.message


@pytest.mark.parametrize("body", [b"", b" \n", b"{}"])
def test_an_empty_body_is_an_empty_request(body: bytes) -> None:
    assert json_in.load(body) == {}


def test_both_spellings_and_null_are_taken() -> None:
    event = Event()
    json_in.fill(
        event, {"user_id": "u", "eventId": None, "time": "2026-11-22T10:00:00.5+01:00", "attributes": {"a": None}}
    )
    assert (event.user_id, event.time.seconds, event.time.nanos) == ("u", 1795338000, 500_000_000)
    assert event.attributes.fields["a"].HasField("null_value")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted({name for binding in service_bindings() for name in json_in.fields_of(binding.descriptor.input_type)})


@given(st.dictionaries(st.sampled_from([*NAMES, "itemId", "type", "attributes"]), JSON, max_size=3), st.data())
def test_any_json_is_either_taken_or_explained(tree: dict[str, Any], data: st.DataObject) -> None:
    kind: type[Message] = data.draw(
        st.sampled_from([Event, GetStatusResponse, *(binding.request_type for binding in service_bindings())])
    )
    message = kind()
    try:
        json_in.fill(message, tree)
    except InvalidArgument as error:
        explained = error.message.encode()
    else:
        explained = b"taken: " + message.SerializeToString()
    assert explained


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> Message:
    """A message of this type with some of its fields set."""
    return kind.FromString(bytes(draw(encoded(kind))))


@st.composite
def encoded(draw: st.DrawFn, kind: type[Message], depth: int = 0) -> bytes:
    message: Any = kind()
    for field in json_in.descriptor_of(kind).fields:
        if draw(st.booleans()) or depth > 3:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value_field = field.message_type.fields_by_name["value"]
            key = "k" if field.message_type.fields_by_name["key"].cpp_type == field.CPPTYPE_STRING else 7
            if value_field.message_type is not None:
                below = GetMessageClass(value_field.message_type)
                getattr(message, field.name)[key].MergeFromString(draw(encoded(below, depth + 1)))
            else:
                getattr(message, field.name)[key] = draw(values(value_field))
        elif field.message_type is not None:
            below = GetMessageClass(field.message_type)
            if field.message_type.full_name == "google.protobuf.Timestamp":
                getattr(message, field.name).FromNanoseconds(draw(st.integers(0, 2**62)))
            elif field.is_repeated:
                for each in draw(st.lists(encoded(below, depth + 1), max_size=2)):
                    getattr(message, field.name).add().MergeFromString(each)
            else:
                getattr(message, field.name).MergeFromString(draw(encoded(below, depth + 1)))
                getattr(message, field.name).SetInParent()
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(values(field), max_size=3)))
        else:
            setattr(message, field.name, draw(values(field)))
    return bytes(message.SerializeToString())


def values(field: Any) -> st.SearchStrategy[Any]:
    return {
        field.CPPTYPE_STRING: st.text(max_size=5),
        field.CPPTYPE_BOOL: st.booleans(),
        field.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
        field.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
        # JSON has one NaN, a float has many.
        field.CPPTYPE_DOUBLE: st.floats(allow_nan=False) | st.just(math.nan),
    }[field.cpp_type]


@given(
    st.data(),
    st.sampled_from([Profile, RankItemsResponse, GetStatusResponse, GetSchemaResponse, CreateSnapshotResponse]),
)
def test_json_out_is_what_protobuf_itself_writes(data: st.DataObject, kind: type[Message]) -> None:
    message = data.draw(messages(kind))
    text = json_out.encode(kind, message.SerializeToString())
    plan = JsonPlan.compile(json_in.descriptor_of(kind))
    assert plan is not None
    assert plan.write(message.SerializeToString()) == text
    expected = json_format.MessageToJson(message, always_print_fields_with_no_presence=True)
    assert orjson.loads(text) == json.loads(expected)
    again = json_format.Parse(text, kind())
    assert again.SerializeToString(deterministic=True) == message.SerializeToString(deterministic=True)


def test_kinds_of_fields_that_the_api_has_not_yet_are_written_too() -> None:
    kind = made_message()
    message: Any = kind(
        single=0.1,
        flag=True,
        raw=b"\xff\x00",
        mode=1,
        modes=[1, 0, 9],
        big=2**64 - 1,
        singles=[1.5, math.inf, 3.4e38],
    )
    message.flags[True] = "yes"
    message.flags[False] = "no"
    message.struct.update({"a": [1, None, {"b": "c"}]})
    message.duration.FromMilliseconds(1500)
    message.nested.nested.single = -math.inf
    expected = json_format.MessageToDict(message, always_print_fields_with_no_presence=True)
    text = json_out.encode(kind, message.SerializeToString())
    assert orjson.loads(text) == expected
    assert json_format.Parse(text, kind()) == message


def test_fields_in_another_order_are_written_too() -> None:
    expected = Profile(user_id="u", event_count=3)
    encoded = Profile(event_count=3).SerializeToString() + Profile(user_id="u").SerializeToString()
    assert json_format.Parse(json_out.encode(Profile, encoded), Profile()) == expected


def test_no_value_is_ever_written_as_nan_or_null() -> None:
    profile = Profile()
    distribution = profile.features["price"].distribution
    distribution.mean = math.nan
    distribution.histogram.weights.extend([1.0, math.inf, -math.inf])
    distribution.histogram.edges.extend([1.7e308, 1.7e308])
    text = json_out.encode(Profile, profile.SerializeToString())
    tree = json.loads(text)["features"]["price"]["distribution"]
    assert tree["mean"] == "NaN"
    assert tree["histogram"] == {"edges": [1.7e308, 1.7e308], "weights": [1.0, "Infinity", "-Infinity"]}
    assert b"null" not in text


def made_message() -> type[Message]:
    """A message type with every kind of field that no message of the API has."""
    pool = DescriptorPool()
    for name in ("struct", "duration"):
        module = __import__(f"google.protobuf.{name}_pb2", fromlist=["DESCRIPTOR"])
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(name="made_message.proto", package="made", syntax="proto3")
    file.dependency.extend(["google/protobuf/struct.proto", "google/protobuf/duration.proto"])
    mode = file.enum_type.add(name="Mode")
    mode.value.add(name="OFF", number=0)
    mode.value.add(name="ON", number=1)
    message = file.message_type.add(name="Message")
    entry = message.nested_type.add(name="FlagsEntry", options={"map_entry": True})
    entry.field.add(name="key", number=1, type="TYPE_BOOL", label="LABEL_OPTIONAL")
    entry.field.add(name="value", number=2, type="TYPE_STRING", label="LABEL_OPTIONAL")
    fields = {
        "single": "FLOAT", "singles": "FLOAT", "flag": "BOOL", "raw": "BYTES", "big": "UINT64",
        "mode": ".made.Mode", "modes": ".made.Mode", "flags": ".made.Message.FlagsEntry",
        "struct": ".google.protobuf.Struct", "duration": ".google.protobuf.Duration", "nested": ".made.Message",
    }  # fmt: skip
    for number, (name, kind) in enumerate(fields.items(), 1):
        field = message.field.add(name=name, number=number, label="LABEL_OPTIONAL")
        field.label = field.LABEL_REPEATED if name in ("singles", "modes", "flags") else field.LABEL_OPTIONAL
        if kind.startswith("."):
            field.type_name = kind
            field.type = field.TYPE_ENUM if kind == ".made.Mode" else field.TYPE_MESSAGE
        else:
            field.type = getattr(field, f"TYPE_{kind}")
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName("made.Message"))
