"""Whatever schema: its rows give the oracle's profile."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profile_service.domain.features import KINDS
from profile_service.wire.plan import WirePlan
from tests.domain.oracles import ProfileOracle
from tests.domain.strategies import DAY_NS, events_of, schemas
from tests.domain.test_profile_table import apply, check, fresh_table

NOW_NS = 1_790_000_000 * 10**9


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(data=st.data(), read_after_ns=st.sampled_from([0, 1, DAY_NS]) | st.integers(0, 400 * DAY_NS))
def test_any_options_of_a_kind_give_the_oracles_profile(kind: str, data: st.DataObject, read_after_ns: int) -> None:
    hold_against_the_oracle(data, [kind], read_after_ns)


@settings(max_examples=50)
@given(data=st.data(), read_after_ns=st.integers(0, 400 * DAY_NS))
def test_any_kinds_side_by_side_give_the_oracles_profile(data: st.DataObject, read_after_ns: int) -> None:
    """Slots of one feature that reached into its neighbour's would show here."""
    hold_against_the_oracle(data, list(KINDS), read_after_ns)


def hold_against_the_oracle(data: st.DataObject, kinds: list[str], read_after_ns: int) -> None:
    # No profile is forgotten here, however long after its events it is read.
    schema = replace(data.draw(schemas(kinds)), ttl_s=None)
    events = data.draw(events_of(schema, NOW_NS))
    cut = data.draw(st.integers(0, len(events)))
    table, oracle = fresh_table(schema), ProfileOracle(schema)
    plan = WirePlan.compile(schema.event_type_names, schema.text_attributes, schema.number_attributes)
    for batch in (events[:cut], events[cut:]):
        apply(table, batch, plan)
    for event in events:
        oracle.add(event)
    check(table, oracle, NOW_NS + read_after_ns)
