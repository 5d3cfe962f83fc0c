"""What became of a file's rows: how many were counted, and what was refused, grouped by (field, reason)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

MOST_GROUPS = 200
MOST_ROWS = 5
"""Row numbers that a group remembers."""

_VALUE_MARKS = (", is ", ", are ", ", has ")
"""Before the part of a reason that tells the value: reasons that differ only in it are one group."""
_REST = ("", "refused for yet other reasons")


@dataclass
class Group:
    """Rows refused for one reason."""

    field: str
    reason: str
    """That of the first row."""
    count: int = 0
    rows: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    """The first few, as (file, row)."""
    varies: bool = False
    """Whether the value that the reason tells was not always the same."""


@dataclass
class Tally:
    """Counts over all files."""

    read: int = 0
    """Rows that were read."""
    sent: int = 0
    """Events that were sent to be counted."""
    accepted: int = 0
    """Events that were sent by this run and are counted. After a run that was killed along with the service, some may
    have been counted by that one."""
    held: int = 0
    """Events that an earlier run had brought in."""
    refused_before: int = 0
    """Rows that could not be made an event, and were not sent."""
    refused_by_service: int = 0
    """Events that the service refuses, also those that an earlier run had sent."""
    errors: list[str] = dataclasses.field(default_factory=list)
    """Why a file was not read to its end."""
    groups: dict[tuple[str, str], Group] = dataclasses.field(default_factory=dict)

    @property
    def rejected(self) -> int:
        """Rows refused, here or by the service."""
        return self.refused_before + self.refused_by_service

    @property
    def unanswered(self) -> int:
        """Rows that were read, and of which nothing is known: not sent yet, or sent and not acknowledged."""
        return self.read - self.accepted - self.held - self.rejected

    def refuse(self, file: str, row: int, field_name: str, reason: str) -> None:
        """Notes one refused row."""
        key = (field_name, _requirement(reason))
        if key not in self.groups and len(self.groups) >= MOST_GROUPS:
            key = _REST
        group = self.groups.setdefault(key, Group(key[0], reason if key != _REST else _REST[1]))
        group.count += 1
        group.varies |= reason != group.reason and key != _REST
        if len(group.rows) < MOST_ROWS:
            group.rows.append((file, row))

    def ordered(self) -> list[Group]:
        """The groups, the largest first."""
        return sorted(self.groups.values(), key=lambda group: -group.count)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "read": self.read,
            "sent": self.sent,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "skipped": self.held,
            "unanswered": self.unanswered,
            "reasons": [
                {
                    "field": group.field,
                    "reason": group.reason,
                    "count": group.count,
                    "rows": [{"file": file, "row": row} for file, row in group.rows],
                }
                for group in self.ordered()
            ],
            "errors": self.errors,
        }


def _requirement(reason: str) -> str:
    cuts = [place for mark in _VALUE_MARKS if (place := reason.find(mark)) > 0]
    return reason[: min(cuts)] if cuts else reason
