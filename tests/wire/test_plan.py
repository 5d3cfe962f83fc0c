"""Names are found by their bytes alone, however alike they are and however many."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from profile_service.wire.plan import WirePlan, find_name


def find(plan: WirePlan, name: bytes, before: bytes = b"", after: bytes = b"") -> int:
    buffer = np.frombuffer(before + name + after, np.uint8)
    return int(find_name(plan.attributes_table, plan.names, buffer, len(before), len(name)))


def test_a_declared_name_is_found_and_its_neighbours_are_not(seed: int) -> None:
    random = Random(seed)
    names = {"".join(random.choices("abü", k=random.randrange(1, 40))) for _ in range(400)}
    declared, others = sorted(names)[::2], sorted(names)[1::2]
    plan = WirePlan.compile([], declared[:50], declared[50:])
    for index, name in enumerate(declared):
        encoded = name.encode()
        for after in (b"", b"a", b"abcdefghij"):
            assert find(plan, encoded, b"xyz", after) == index
        assert plan.attribute(index) == name
    for name in others:
        assert find(plan, name.encode(), b"", b"a" * random.randrange(9)) == -1


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 40])
def test_names_that_differ_in_one_byte_are_different(length: int) -> None:
    name = bytes(97 + i % 26 for i in range(length))
    plan = WirePlan.compile([], [name.decode()], [])
    assert find(plan, name) == 0
    for place in range(length):
        changed = bytearray(name)
        changed[place] ^= 1
        assert find(plan, bytes(changed)) == -1
    assert find(plan, name[:-1]) == -1
    assert find(plan, name + b"\0") == -1
    assert find(plan, b"") == -1


def test_a_plan_of_no_names_finds_none() -> None:
    assert find(WirePlan.compile([], [], []), b"color") == -1


@pytest.mark.parametrize(
    ("types", "texts", "numbers", "complaint"),
    [
        (["a", "b", "a"], [], [], "event type 'a' is given twice"),
        ([], ["a"], ["a"], "attribute 'a' is given twice"),
        ([""], [], [], "event type has an empty name"),
        ([], ["a", ""], [], "attribute has an empty name"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(
    types: list[str], texts: list[str], numbers: list[str], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        WirePlan.compile(types, texts, numbers)
