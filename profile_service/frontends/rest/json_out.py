"""Encoded messages to JSON: proto3's JSON mapping with lowerCamelCase names and default values written out.

A kernel writes it from the bytes (`wire.json_text`), for every REST read is one of these. What it leaves, protobuf's
own `json_format` writes, which takes a hundred times as long.
"""

from __future__ import annotations

from functools import cache

import orjson
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from profile_service.frontends.rest.json_in import descriptor_of
from profile_service.wire.json_text import JsonPlan


def encode(kind: type[Message], encoded: bytes) -> bytes:
    """An encoded message of a type as JSON."""
    plan = _plan(descriptor_of(kind))
    text = None if plan is None else plan.write(encoded)
    if text is not None:
        return text
    return orjson.dumps(json_format.MessageToDict(kind.FromString(encoded), always_print_fields_with_no_presence=True))


@cache
def _plan(descriptor: Descriptor) -> JsonPlan | None:
    return JsonPlan.compile(descriptor)
