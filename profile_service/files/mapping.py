"""Which column of a file is the user, the type, the time and each attribute.

By default the columns have the usual names, and every column named like an attribute of the schema is that attribute.
Flags or a mapping file say otherwise:

    user: customer_id
    type: action            # or, where every row is of one type:   type: {value: purchase}
    time: created_at
    event_id: order_line
    attributes:
      price: price_eur      # attribute: column
      color:                # nothing: this attribute is not sent
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from profile_service.files.errors import FileError

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "user": ("user_id", "userId", "user"),
    "type": ("event_type", "eventType", "type", "event"),
    "time": ("event_time", "eventTime", "time", "timestamp"),
    "event_id": ("event_id", "eventId"),
}
"""Where no column is named for a role, the first of these that the file has."""

_FLAGS = {"user": "--user-column", "type": "--type-column", "time": "--time-column", "event_id": "--event-id-column"}


@dataclass(frozen=True)
class Attributes:
    """The attributes that the schema's features read."""

    texts: tuple[str, ...]
    numbers: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """What the caller says of the columns; None leaves a role to the usual names."""

    user: str | None = None
    type: str | None = None
    time: str | None = None
    event_id: str | None = None
    type_value: str | None = None
    """The type of every row."""
    attributes: dict[str, str | None] = field(default_factory=dict)
    """Column by attribute; None where the attribute is not to be sent."""
    untimed: bool = False
    """Whether an event without a time counts as of its arrival; else its row is refused."""

    @property
    def says_columns(self) -> bool:
        """Whether any column was named."""
        return any((self.user, self.type, self.time, self.event_id, self.type_value, self.attributes))

    def describe(self) -> str:
        """Text that is equal for equal wishes."""
        return repr(replace(self, attributes=dict(sorted(self.attributes.items()))))

    def over(self, base: Wanted) -> Wanted:
        """These wishes, and those of `base` where these say nothing."""
        own_type = self.type is not None or self.type_value is not None
        return Wanted(
            self.user or base.user,
            self.type if own_type else base.type,
            self.time or base.time,
            self.event_id or base.event_id,
            self.type_value if own_type else base.type_value,
            {**base.attributes, **self.attributes},
            self.untimed or base.untimed,
        )


@dataclass(frozen=True)
class Mapping:
    """The column of each role in one file."""

    user: str
    type: str | None
    """None where `type_value` holds for all rows."""
    time: str | None
    event_id: str | None
    type_value: str | None
    texts: dict[str, str]
    """Column by attribute."""
    numbers: dict[str, str]
    untimed: bool

    @property
    def columns(self) -> list[str]:
        """Every column that is read, each once."""
        roles = [self.user, self.type, self.time, self.event_id]
        named = [column for column in roles if column is not None]
        return list(dict.fromkeys([*named, *self.texts.values(), *self.numbers.values()]))


def read_mapping(path: Path) -> Wanted:
    """Reads a mapping file."""
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise FileError(f"{path}: is not YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise FileError(f"{path}: must hold `user: column` and the like, holds a {type(loaded).__name__}")
    known = {*_FLAGS, "attributes", "untimed"}
    unknown = [str(key) for key in loaded if key not in known]
    if unknown:
        raise FileError(f"{path}: {', '.join(unknown)}: not known; known are {', '.join(sorted(known))}")
    attributes = loaded.get("attributes") or {}
    kind = loaded.get("type")
    type_value = kind.get("value") if isinstance(kind, dict) else None
    if isinstance(kind, dict) and (type_value is None or len(kind) != 1):
        raise FileError(f"{path}: type: must be a column, or {{value: TYPE}}")
    if not isinstance(attributes, dict):
        raise FileError(f"{path}: attributes: must be `attribute: column`, is a {type(attributes).__name__}")
    return Wanted(
        _name(loaded.get("user")),
        None if isinstance(kind, dict) else _name(kind),
        _name(loaded.get("time")),
        _name(loaded.get("event_id")),
        _name(type_value),
        {str(attribute): _name(column) for attribute, column in attributes.items()},
        bool(loaded.get("untimed", False)),
    )


def resolve(source: str, available: Sequence[str], wanted: Wanted, attributes: Attributes) -> Mapping:
    """The mapping of a file that has the columns `available`; raises `FileError` with everything that is missing."""
    missing: list[str] = []

    def role(name: str, *, needed: bool) -> str | None:
        asked = getattr(wanted, name)
        if asked is not None:
            if asked not in available:
                missing.append(f"{_FLAGS[name]} {asked}: no such column")
            return str(asked)
        found = next((usual for usual in USUAL_NAMES[name] if usual in available), None)
        if found is None and needed:
            usual_names = " or ".join(USUAL_NAMES[name])
            missing.append(f"no column for the event's {name} ({usual_names}): name it with {_HINTS[name]}")
        return found

    user = role("user", needed=True)
    kind = None if wanted.type_value is not None else role("type", needed=True)
    time = role("time", needed=not wanted.untimed)
    event_id = role("event_id", needed=False)
    declared = {*attributes.texts, *attributes.numbers}
    taken: dict[str, str] = {}
    for name in [*attributes.texts, *attributes.numbers]:
        column = wanted.attributes.get(name, name if name in available else None)
        if column is not None:
            taken[name] = column
            if column not in available:
                missing.append(f"--attribute {name}={column}: no such column")
    for name in wanted.attributes:
        if name not in declared:
            known = ", ".join(sorted(declared)) or "none"
            missing.append(f"--attribute {name}: the schema has no such attribute (it has {known})")
    if missing:
        raise FileError(f"{source}: {'; '.join(missing)}. The file has the columns {', '.join(available) or '(none)'}.")
    assert user is not None
    return Mapping(
        user,
        kind,
        time,
        event_id,
        wanted.type_value,
        {name: column for name, column in taken.items() if name in attributes.texts},
        {name: column for name, column in taken.items() if name in attributes.numbers},
        wanted.untimed,
    )


_HINTS = {
    "user": "--user-column",
    "type": "--type-column, or give every row one with --type-value",
    "time": "--time-column, or count events as of their arrival with --untimed",
}


def _name(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)
