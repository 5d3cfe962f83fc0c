"""What becomes of profiles when the schema changes: features are carried over by name.

    a feature of the same name and
      an equal shape                        kept: its slots are copied as they are
      a shape that differs in keys which
      its kind can convert                  converted: `Feature.convert`
      a shape that differs otherwise        refused, unless it is told to start anew
    a feature that was not there before     starts empty
    a feature that is no longer there       goes, with all that it holds

A shape (`FeatureSpec.shape`) is what the numbers of a row mean. What only reads look at is no part of it, nor which
events count and how much: that holds for events from now on.

A migration depends on the two schemas and the rows alone. So it can happen at its place in a log, in a replay as on the
day itself. Logs hold changes that were accepted: what this accepts it must go on accepting, with the same result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from profile_service.domain.duration import format_duration
from profile_service.domain.features.base import Feature, RowViews
from profile_service.domain.layout import HEADER_SLOTS, Layout
from profile_service.domain.memory import release
from profile_service.domain.population import PopulationRow
from profile_service.domain.schema import FeatureSpec, Schema
from profile_service.domain.schema_options import nearest
from profile_service.domain.table import ProfileTable, reserve_rows
from profile_service.errors import SchemaChangeRefused

_BLOCK_BYTES = 1 << 20
"""Of rows at a time: what a processor keeps near, old and new."""

_DURATIONS = ("half_life", "window", "bucket")


@dataclass(frozen=True)
class Changes:
    """What a change of the schema does to each feature, by name, with what is different about it.

    >>> from profile_service.domain.schema import parse_schema
    >>> old = parse_schema("{name: s, events: {e: {weight: 1}}, features: {t: {kind: top_k, attribute: a, k: 3}}}")
    >>> new = parse_schema("{name: s, events: {e: {weight: 1}}, features: {t: {kind: top_k, attribute: a, k: 5}}}")
    >>> compare(old, new).converted
    {'t': 'k was 3, is 5'}
    """

    kept: Mapping[str, str]
    """What they hold means the same; what differs, where anything does, is how they are read, or what they count from
    now on."""
    converted: Mapping[str, str]
    """What they hold is brought into the new form."""
    added: tuple[str, ...]
    """New: they start empty."""
    reset: Mapping[str, str]
    """Told to start anew: they start empty."""
    dropped: tuple[str, ...]
    """No longer there: what they hold goes."""
    refused: Mapping[str, str]
    """What they hold would mean something else, and nobody told them to start anew."""
    faults: tuple[str, ...]
    """Every reason for which the change as a whole is refused, and what to do."""

    def raise_faults(self) -> None:
        """Raises SchemaChangeRefused where the change is refused."""
        if self.faults:
            raise SchemaChangeRefused(self.faults)

    def __str__(self) -> str:
        """One line, for a log."""
        groups = (
            ("converted", tuple(f"{name} ({what})" for name, what in self.converted.items())),
            ("new", self.added),
            ("started anew", tuple(f"{name} ({what})" for name, what in self.reset.items())),
            ("dropped", self.dropped),
        )
        said = [f"{len(self.kept)} kept", *(f"{title}: {', '.join(names)}" for title, names in groups if names)]
        return "features " + "; ".join(said)


def compare(old: Schema, new: Schema, reset: Collection[str] = ()) -> Changes:
    """What the change from `old` to `new` does to the profiles.

    `reset` names features that are to start anew where anything about them changes; one of which nothing changes is
    kept, so that to start again with the same flags empties nothing twice.
    """
    before = {spec.name: spec for spec in old.features}
    kept, converted, started, refused = {}, {}, {}, {}
    added, faults = [], []
    weights_before = {event.name: event.weight for event in old.event_types}
    weights = {event.name: event.weight for event in new.event_types}
    for spec in new.features:
        was = before.pop(spec.name, None)
        if was is None:
            added.append(spec.name)
            continue
        differences = _differences(was, spec)
        events = _events_difference(was, spec, weights_before, weights)
        remark = "; ".join([*differences.values(), *events])
        if spec.name in reset and remark:
            started[spec.name] = remark
        elif not differences:
            kept[spec.name] = "; ".join([*_only_read_differences(was, spec), *events])
        elif was.kind == spec.kind and differences.keys() <= spec.options.convertible:
            converted[spec.name] = remark
        else:
            refused[spec.name] = remark
            faults.append(
                f"feature {spec.name}: {'; '.join(differences.values())}: let it start empty with --reset-feature "
                f"{spec.name}, or give it another name"
            )
    names = [spec.name for spec in new.features]
    for name in sorted(set(reset).difference(names)):
        hint = ": it goes without being told to" if name in before else nearest(name, names)
        faults.append(f"--reset-feature {name}: the schema has no such feature{hint}")
    return Changes(kept, converted, tuple(added), started, tuple(before), refused, tuple(faults))


def migrate(table: ProfileTable, schema: Schema, reset: Collection[str] = ()) -> ProfileTable:
    """The table's profiles as those of `schema`; see `compare` for `reset`.

    The new table takes the old one's place: it has the same users, texts and numbers of both. The old one must not be
    used any more, as its memory is given back while the rows are rewritten. Where no slot changes its place, nothing is
    rewritten at all.

    Raises:
        SchemaChangeRefused: with every fault; nothing has happened then.
        OSError: the machine does not grant the address space for the new rows; nothing has happened then.
    """
    changes = compare(table.schema, schema, reset)
    changes.raise_faults()
    population = PopulationRow(schema)
    _Plan.make(table.population.layout, population.layout, changes).carry(table.population.views, population.views)
    layout = Layout.compile(schema)
    plan = _Plan.make(table.layout, layout, changes)
    if plan.is_identity:
        return table.rebound(schema, layout, table.rows, population)
    rows = reserve_rows(len(table.rows), layout)
    step = max(1, _BLOCK_BYTES // max(layout.row_bytes, table.layout.row_bytes))
    for start in range(0, table.users.high_water, step):
        stop = min(start + step, table.users.high_water)
        rows[start:stop] = layout.template
        plan.carry(table.layout.views_of(table.rows[start:stop]), layout.views_of(rows[start:stop]))
        # With the block before, so that the page goes, too, on which both have a share.
        release(table.rows[max(0, start - step) : stop])
    return table.rebound(schema, layout, rows, population)


class _Move(NamedTuple):
    """Neighbouring slots of a view, from one place to another."""

    view: str
    source: int
    target: int
    slots: int


@dataclass(frozen=True)
class _Plan:
    """How a row of one layout becomes a row of another."""

    moves: tuple[_Move, ...]
    conversions: tuple[tuple[Feature, Feature], ...]
    """(old, new)"""
    is_identity: bool
    """Whether a row stays as it is."""

    @classmethod
    def make(cls, old: Layout, new: Layout, changes: Changes) -> _Plan:
        numbers = {feature.name: number for number, feature in enumerate(old.features)}
        moves = [_Move("i8", 0, 0, HEADER_SLOTS)]
        conversions = []
        for feature, slots in zip(new.features, new.slots, strict=True):
            if feature.name in changes.converted:
                conversions.append((old.features[numbers[feature.name]], feature))
            elif feature.name in changes.kept:
                held = old.slots[numbers[feature.name]]
                moves.extend(_Move(view, held[view][0], first, count) for view, (first, count) in slots.items())
        stays = not conversions and old.counts == new.counts and all(move.source == move.target for move in moves)
        covered = sum(move.slots for move in moves) == sum(new.counts.values())
        return cls(_joined(moves), tuple(conversions), stays and covered)

    def carry(self, source: RowViews, target: RowViews) -> None:
        """Fills fresh rows in `target` with what the rows of `source` hold."""
        for view, at, to, count in self.moves:
            getattr(target, view)[:, to : to + count] = getattr(source, view)[:, at : at + count]
        for old, new in self.conversions:
            new.convert(target, old, source)


def _joined(moves: list[_Move]) -> tuple[_Move, ...]:
    """The same moves, neighbours in one."""
    answer: list[_Move] = []
    for move in sorted(moves):
        last = answer[-1] if answer else None
        if (
            last is not None
            and last.view == move.view
            and last.source + last.slots == move.source
            and last.target + last.slots == move.target
        ):
            answer[-1] = last._replace(slots=last.slots + move.slots)
        else:
            answer.append(move)
    return tuple(answer)


def _differences(was: FeatureSpec, spec: FeatureSpec) -> dict[str, str]:
    """What the shapes differ in, by key; of another kind nothing else is worth saying."""
    if was.kind != spec.kind:
        return {"kind": f"kind was {was.kind}, is {spec.kind}"}
    old, new = was.shape(), spec.shape()
    return {key: _difference(key, old[key], new[key]) for key in new if old[key] != new[key]}


def _only_read_differences(was: FeatureSpec, spec: FeatureSpec) -> list[str]:
    keys = sorted(spec.options.only_read)
    old, new = was.options.model_dump(include=set(keys)), spec.options.model_dump(include=set(keys))
    return [_difference(key, old[key], new[key]) for key in keys if old[key] != new[key]]


def _events_difference(
    was: FeatureSpec, spec: FeatureSpec, old_weights: Mapping[str, float], weights: Mapping[str, float]
) -> list[str]:
    """What the feature counts from now on, where that is not what it counted before."""
    old = {name: old_weights[name] for name in was.events}
    new = {name: weights[name] for name in spec.events}
    said = []
    for name in sorted({**old, **new}):
        if name not in new:
            said.append(f"{name} no longer counts")
        elif name not in old:
            said.append(f"{name} counts from now on")
        elif old[name] != new[name]:
            said.append(f"{name} weighs {new[name]:g} from now on, {old[name]:g} before")
    return said


def _difference(key: str, old: Any, new: Any) -> str:
    if isinstance(old, list) and isinstance(new, list) and all(isinstance(item, str) for item in [*old, *new]):
        said = [f"{item} is new" for item in new if item not in old]
        said += [f"{item} is gone" for item in old if item not in new]
        return f"{key}: {_some(said) if said else 'in another order'}"
    was, now = ("were", "are") if key == "bins" else ("was", "is")
    return f"{key} {was} {_show(key, old)}, {now} {_show(key, new)}"


def _show(key: str, value: Any) -> str:
    if key in _DURATIONS:
        return format_duration(value)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{inner}: {_show(inner, item)}' for inner, item in value.items() if item is not None)}}}"
    if isinstance(value, list):
        return f"[{_some([_show('', item) for item in value])}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or "empty"


def _some(items: list[str]) -> str:
    most = 12
    return ", ".join(items if len(items) <= most else [*items[:most], f"… ({len(items)} in all)"])
