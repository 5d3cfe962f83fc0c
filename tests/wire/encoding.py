"""Protobuf by hand: the shapes that a library never writes but has to read, and strategies for them."""

from __future__ import annotations

import struct
from random import Random
from typing import TypeVar

from hypothesis import strategies as st

T = TypeVar("T")

VARINT, FIXED64, LENGTH, START, END, FIXED32 = range(6)


def varint(value: int, padding: int = 0) -> bytes:
    """A varint, with `padding` bytes more than it needs."""
    value &= (1 << 64) - 1
    digits = []
    while True:
        digits.append(value & 0x7F)
        value >>= 7
        if not value:
            break
    digits += [0] * padding
    return bytes([digit | 0x80 for digit in digits[:-1]] + digits[-1:])


def tag(number: int, wire: int, padding: int = 0) -> bytes:
    return varint(number << 3 | wire, padding)


def delimited(number: int, payload: bytes, padding: int = 0) -> bytes:
    return tag(number, LENGTH, min(padding, 3)) + varint(len(payload), padding) + payload


def integer(number: int, value: int, padding: int = 0) -> bytes:
    return tag(number, VARINT) + varint(value, padding)


def double(number: int, value: float) -> bytes:
    return tag(number, FIXED64) + struct.pack("<d", value)


def group(number: int, payload: bytes, end: int | None = None) -> bytes:
    return tag(number, START) + payload + tag(number if end is None else end, END)


def entry(key: bytes, value: bytes) -> bytes:
    """An attribute: an entry of the map, whose Value message is given encoded."""
    return delimited(1, delimited(1, key) + delimited(2, value))


def text_value(value: bytes) -> bytes:
    return delimited(3, value)


def list_value(values: list[bytes]) -> bytes:
    return delimited(6, b"".join(delimited(1, value) for value in values))


def struct_value(fields: list[tuple[bytes, bytes]]) -> bytes:
    return delimited(5, b"".join(entry(key, value) for key, value in fields))


def fields(message: bytes) -> list[tuple[int, int, bytes]]:
    """(number, wire type, payload) of each field of a well-formed message; of a group its begin alone."""
    found = []
    pos = 0
    inside: list[int] = []
    while pos < len(message):
        key, pos = _read_varint(message, pos)
        wire = key & 7
        start = pos
        if wire == VARINT:
            _, pos = _read_varint(message, pos)
        elif wire == FIXED64:
            pos += 8
        elif wire == FIXED32:
            pos += 4
        elif wire == LENGTH:
            length, start = _read_varint(message, pos)
            pos = start + length
        elif wire == START:
            if not inside:
                found.append((key >> 3, START, b""))
            inside.append(key >> 3)
            continue
        else:
            inside.pop()
            continue
        if not inside:
            found.append((key >> 3, wire, message[start:pos]))
    return found


def _read_varint(message: bytes, pos: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value & ((1 << 64) - 1), pos


def mutate(message: bytes, random: Random) -> bytes:
    """The message with one to three faults: a bit, a byte, bytes gone, doubled, inserted, or the end cut off."""
    mutated = bytearray(message)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        place = random.randrange(len(mutated) + 1)
        kind = random.randrange(7)
        if kind == 0 and place < len(mutated):
            mutated[place] ^= 1 << random.randrange(8)
        elif kind == 1 and place < len(mutated):
            mutated[place] = random.choice([0, 1, 2, 0x0A, 0x0B, 0x0C, 0x12, 0x2A, 0x7F, 0x80, 0xC0, 0xED, 0xF4, 0xFF])
        elif kind == 2:
            del mutated[place : place + random.randrange(1, 5)]
        elif kind == 3:
            mutated[place:place] = mutated[place : place + random.randrange(1, 40)]
        elif kind == 4:
            mutated[place:place] = random.randbytes(random.randrange(1, 4))
        elif kind == 5:
            del mutated[place:]
        elif place < len(mutated):
            mutated[place] = (mutated[place] + random.choice([-1, 1])) & 0xFF
    return bytes(mutated)


def mostly(common: st.SearchStrategy[T], rare: st.SearchStrategy[T], times: int = 8) -> st.SearchStrategy[T]:
    """`common` that many times as often as `rare`; `one_of` takes a strategy named twice for one."""
    return st.sampled_from([common] * times + [rare]).flatmap(lambda chosen: chosen)


randoms = st.integers(0, 2**32 - 1).map(Random)
"""Python's own generators: hypothesis would draw each of their numbers, which takes seconds for a long message."""

texts = st.text(max_size=12).map(str.encode)
"""UTF-8 of all lengths of characters."""

raw_texts = mostly(texts, st.binary(max_size=6), 30)
"""Mostly UTF-8."""

paddings = st.sampled_from([0, 0, 0, 0, 1, 4])

scalars = st.one_of(
    st.builds(integer, st.just(1), st.integers(0, 3), paddings),
    st.builds(double, st.just(2), st.floats()),
    st.builds(text_value, raw_texts),
    st.builds(integer, st.just(4), st.integers(0, 3)),
)

unknown_fields = st.recursive(
    st.one_of(
        st.builds(integer, st.integers(1, 40), st.integers(0, 2**64 - 1), paddings),
        st.builds(double, st.integers(1, 40), st.floats()),
        st.builds(delimited, st.integers(6, 2**29 - 1), st.binary(max_size=8), paddings),
        st.builds(lambda number: tag(number, FIXED32) + b"abcd", st.integers(1, 40)),
    ),
    lambda inner: st.builds(
        lambda number, payload, shift: group(number, b"".join(payload), number + shift),
        st.integers(1, 40),
        st.lists(inner, max_size=2),
        st.sampled_from([0] * 29 + [1]),
    ),
    max_leaves=3,
)

values = st.recursive(
    mostly(scalars, st.one_of(st.just(b""), unknown_fields), 5),
    lambda inner: st.one_of(
        st.builds(list_value, st.lists(inner, max_size=3)),
        st.builds(struct_value, st.lists(st.tuples(raw_texts, inner), max_size=3)),
        st.builds(lambda a, b: a + b, inner, inner),
    ),
    max_leaves=6,
)
"""Encoded Value messages, some with more than one member set."""


def attributes(names: list[bytes]) -> st.SearchStrategy[bytes]:
    """An encoded Struct whose entries are named by `names`, and are not all as a library writes them."""
    name = mostly(st.sampled_from(names), raw_texts)
    pieces = st.lists(
        st.one_of(
            st.builds(lambda key: delimited(1, key), name),
            st.builds(lambda value: delimited(2, value), values),
            st.builds(lambda value: delimited(2, value), scalars),
            unknown_fields,
        ),
        max_size=4,
    )
    entries = st.one_of(
        st.builds(entry, name, values),
        st.builds(entry, name, scalars),
        st.builds(lambda parts: delimited(1, b"".join(parts)), pieces),
        unknown_fields,
    )
    return st.lists(entries, max_size=6).map(b"".join)


def times(now_s: int) -> st.SearchStrategy[bytes]:
    """An encoded Timestamp, mostly near `now_s`, sometimes sent in odd pieces or beyond what it may hold."""
    edges = [-62_135_596_801, -62_135_596_800, -9_223_372_037, -9_223_372_036, 9_223_372_035, 9_223_372_036]
    seconds = mostly(
        st.integers(now_s - 1000, now_s + 300),
        st.one_of(st.integers(now_s, now_s + 400), st.sampled_from(edges), st.integers()),
    )
    nanos = mostly(st.integers(0, 999_999_999), st.integers(-2, 2**32 + 1))
    piece = st.one_of(
        st.builds(integer, st.just(1), seconds, paddings), st.builds(integer, st.just(2), nanos), unknown_fields
    )
    return st.lists(piece, max_size=3).map(b"".join)


def events(types: list[bytes], names: list[bytes], now_s: int) -> st.SearchStrategy[bytes]:
    """Encoded Events: most have the fields they need, in any order and any number."""
    user = st.builds(delimited, st.just(1), mostly(texts.map(lambda text: b"v" + text), raw_texts), paddings)
    kind = st.builds(
        delimited, st.just(2), st.one_of(st.sampled_from(types), st.sampled_from(types), raw_texts), paddings
    )
    extra = st.one_of(
        user,
        kind,
        st.builds(delimited, st.just(3), times(now_s), paddings),
        st.builds(delimited, st.just(4), raw_texts),
        st.builds(delimited, st.just(5), attributes(names), paddings),
        st.builds(delimited, st.just(5), attributes(names)),
        unknown_fields,
    )
    needed = st.tuples(
        st.builds(lambda text: delimited(1, b"u" + text), texts),
        st.sampled_from(types).map(lambda name: delimited(2, name)),
    ).map(list)
    return st.builds(
        lambda first, rest, order: b"".join(order.sample(first + rest, len(first) + len(rest))),
        mostly(needed, st.just([]), 15),
        st.lists(extra, max_size=5),
        randoms,
    )
