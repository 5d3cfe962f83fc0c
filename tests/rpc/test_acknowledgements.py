from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from profile_service.rpc import acknowledgements
from profile_service.rpc.acknowledgements import Acknowledgements


@given(
    st.integers(0, 5),
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
    st.integers(1, 6),
)
@settings(max_examples=150, deadline=None)
def test_whatever_order_batches_end_in_acknowledgements_ascend_and_never_run_ahead(
    acknowledged: int, refused: list[int], order: object, per_response: int
) -> None:
    first = acknowledged + 1
    sequences = list(range(first, first + len(refused)))
    shuffled = list(sequences)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    ledger = Acknowledgements(acknowledged)
    before, acknowledgements.REJECTED_PER_RESPONSE = acknowledgements.REJECTED_PER_RESPONSE, per_response
    try:
        for sequence, count in zip(sequences, refused, strict=True):
            ledger.begin(sequence, [(index, "type", "undeclared") for index in range(count)])
        ended: set[int] = set()
        told: list[tuple[int, int]] = []
        last = acknowledged
        for sequence in shuffled:
            ledger.end(sequence)
            ended.add(sequence)
            while (response := ledger.take()) is not None:
                assert response.sequence >= last
                last = response.sequence
                assert ended.issuperset(range(first, last + 1))
                assert all(event.sequence <= last for event in response.rejected)
                told += [(event.sequence, event.index) for event in response.rejected]
                ledger.check_invariants()
        assert last == sequences[-1]
        assert told == [(s, i) for s, count in zip(sequences, refused, strict=True) for i in range(count)]
    finally:
        acknowledgements.REJECTED_PER_RESPONSE = before


def test_a_batch_that_was_acknowledged_before_is_told_again() -> None:
    ledger = Acknowledgements(7)
    assert ledger.take() is None
    ledger.repeat(3, [(0, "type", "undeclared")])
    response = ledger.take()
    assert response is not None
    # Not 7: what was refused of the batches from 4 to 7 has not been told on this stream.
    assert response.sequence == 3
    assert [(event.sequence, event.index) for event in response.rejected] == [(3, 0)]
    assert ledger.take() is None
    assert ledger.acknowledged == 7
    for sequence in range(4, 8):
        ledger.repeat(sequence, [])
    ledger.begin(8, [])
    response = ledger.take()
    assert response is not None
    assert response.sequence == ledger.acknowledged == 7
    ledger.end(8)
    assert ledger.acknowledged == 8
    ledger.check_invariants()


def test_a_stream_that_skips_ahead_acknowledges_nothing_that_it_has_not_sent() -> None:
    ledger = Acknowledgements(2)
    ledger.begin(10, [])
    ledger.begin(11, [])
    ledger.end(11)
    assert ledger.take() is None
    assert ledger.acknowledged == 2
    ledger.check_invariants()
    ledger.end(10)
    response = ledger.take()
    assert response is not None
    assert response.sequence == ledger.acknowledged == 11
