"""Who owns what changes by as little as can be, and is remembered as it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from profile_service.cluster.ownership import MOVED_AT_ONCE, Ownership, Retirement, next_moves

SHARDS = st.sets(st.integers(0, 9), min_size=1, max_size=6)


@given(owners=st.lists(st.integers(0, 9), min_size=6, max_size=64), kept=SHARDS)
def test_moves_end_with_even_shares_and_move_as_little_as_can_be(owners: list[int], kept: set[int]) -> None:
    moves = next_moves(owners, sorted(kept))
    after = list(owners)
    for move in moves:
        assert 0 < len(move.partitions) <= MOVED_AT_ONCE
        for partition in move.partitions:
            assert after[partition] == owners[partition] == move.source_id
            after[partition] = move.target_id
    shares = [Counter(after)[shard_id] for shard_id in kept]
    assert sum(shares) == len(owners)
    assert max(shares) - min(shares) <= 1
    # Whoever has more than a share gives away what is too much, whoever goes gives everything.
    share, rest = divmod(len(owners), len(kept))
    held = Counter(owners)
    too_much = sorted((max(0, held[shard_id] - share) for shard_id in kept), reverse=True)
    least = sum(too_much) - sum(1 for much in too_much[:rest] if much) + sum(held[s] for s in held if s not in kept)
    assert sum(len(move.partitions) for move in moves) == least


def test_what_is_remembered_is_what_was_there() -> None:
    ownership = Ownership.even(4, 3)
    ownership.check_invariants()
    assert [len(ownership.owned_by(shard_id)) for shard_id in range(3)] == [5, 5, 6]
    moving = ownership.expecting(2, [0, 1])
    assert moving.leftovers == {2: {0, 1}}
    moved = moving.moved([0, 1], 0, 2)
    moved.check_invariants()
    assert moved.leftovers == {0: {0, 1}}
    assert moved.cleaned(0, [0, 1]).leftovers == {}
    emptied = moved.moved(moved.owned_by(1), 1, 0).joined(2)
    assert emptied.shard_ids == (0, 1, 2, 3, 4)
    retiring = replace(emptied, retiring=Retirement(1, 0))
    for held in (ownership, moving, moved, emptied, retiring):
        assert Ownership.decode(held.encode()) == held
    retired = retiring.retired()
    retired.check_invariants()
    assert (retired.shard_ids, retired.next_shard_id, retired.retiring) == ((0, 2, 3, 4), 5, None)
    # No number is given twice.
    assert retired.joined(1).shard_ids == (0, 2, 3, 4, 5)
