"""Which way each event goes, without I/O: all to a frontend, or each straight to the owner of its user.

    batch ─▶ split by partition ─┬─▶ part ─▶ way to an owner     ─▶ acknowledged ─┬─▶ batch acknowledged,
                                 ├─▶ part ─▶ way to another      ─▶ acknowledged ─┤   in the order of the numbers
                                 └─▶ the rest ─▶ way to a frontend ─▶ …          ─┘

The ways of a conversation are fixed when it begins: a user's events go one way only, so none overtakes an earlier one.
When one way ends, all do; the next conversation begins with everything that is not acknowledged, under the same
numbers, and may choose other ways. What was on its way meanwhile and arrives late counts once all the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash

from profile_client.errors import Rejected, ServiceError
from profile_client.owners import Owner
from profile_client.window import Batch

FRONTEND = 0
"""The number of the way that is always there."""

_EVENTS_TAG = 0x0A
_USER_ID_TAG = 0x0A
_LENGTH_DELIMITED = 2


@dataclass
class Part:
    """What of a batch goes one way."""

    batch: Batch
    body: bytes
    places: Sequence[int] | None
    """Of its events in the batch; None where it is the whole."""


@dataclass
class Way:
    """One stream of a conversation."""

    owner: Owner | None
    """None for a frontend."""
    call: Any = None
    is_open: bool = False
    """Whether its first message was answered."""
    has_ended: bool = False
    is_left: bool = False
    """Whether we have ended it."""
    error: ServiceError | None = None
    """What it ended with, unless we have ended it."""
    queue: deque[Part] = field(default_factory=deque)
    sent: deque[Part] = field(default_factory=deque)


@dataclass
class _Open:
    """A batch that is not acknowledged by all ways that have a part of it."""

    sequence: int
    missing: int
    rejected: list[Rejected] = field(default_factory=list)


class Ways:
    """The ways of one conversation, and the batches on them.

    Args:
        partitions: the owner of each partition; None where a frontend is to be used. Without any owner all goes through
            a frontend, in whole batches.
        shift: from a user's hash to the partition.
    """

    def __init__(self, partitions: Sequence[Owner | None] = (), shift: int = 64) -> None:
        self._partitions = partitions
        self._shift = shift
        owners = {owner.address: owner for owner in partitions if owner is not None}
        self.all = [Way(None), *(Way(owner) for owner in owners.values())]
        self.is_split = bool(owners)
        """Whether batches are split, and the streams are sparse."""
        self.is_settled = False
        """Whether it is known which ways can be used."""
        self.is_turning = False
        """Whether nothing more is sent, so that a new conversation may use other ways."""
        self.told_sequence = 0
        """Up to where the frontend was told that everything is acknowledged."""
        self.told_at = float("-inf")
        self._way_of: list[int] = []
        self._open: deque[_Open] = deque()
        self._by_sequence: dict[int, _Open] = {}

    @property
    def have_ended(self) -> bool:
        """Whether the conversation is over: when one way is, or all, where it turns."""
        used = [way for way in self.all if not way.is_left]
        return all(way.has_ended for way in used) if self.is_turning else any(way.has_ended for way in used)

    @property
    def error(self) -> ServiceError | None:
        """What the first way that ended with an error ended with."""
        return next((way.error for way in self.all if way.error is not None), None)

    def settle(self) -> None:
        """From now on the ways that are open are used."""
        number_of = {
            way.owner.address: number for number, way in enumerate(self.all) if way.owner is not None and way.is_open
        }
        self._way_of = [
            FRONTEND if owner is None else number_of.get(owner.address, FRONTEND) for owner in self._partitions
        ]
        self.is_settled = True

    def put(self, batch: Batch) -> None:
        """Splits a batch, and queues its parts."""
        parts = self._split(batch) if self.is_split else {FRONTEND: Part(batch, batch.body, None)}
        for number, part in parts.items():
            self.all[number].queue.append(part)
        opened = _Open(batch.sequence, len(parts))
        self._open.append(opened)
        self._by_sequence[batch.sequence] = opened

    def take(self, number: int) -> Part | None:
        """The next part to send that way."""
        way = self.all[number]
        if not way.queue:
            return None
        part = way.queue.popleft()
        way.sent.append(part)
        return part

    def acknowledge(self, number: int, sequence: int, rejected: Sequence[Rejected]) -> None:
        """A way has answered every part up to this one, and refused some of their events."""
        way = self.all[number]
        parts: dict[int, Part] = {}
        while way.sent and way.sent[0].batch.sequence <= sequence:
            part = way.sent.popleft()
            parts[part.batch.sequence] = part
            self._by_sequence[part.batch.sequence].missing -= 1
        for each in rejected:
            if each.sequence in parts:
                places = parts[each.sequence].places
                placed = each
                if places is not None and 0 <= each.index < len(places):
                    placed = replace(each, index=places[each.index])
                self._by_sequence[each.sequence].rejected.append(placed)

    def acknowledged(self) -> tuple[int, list[Rejected]] | None:
        """The last of the batches that are acknowledged by now, and not yet taken from here, and what was refused of
        them, in order; None where there is none."""
        sequence = 0
        rejected: list[Rejected] = []
        while self._open and not self._open[0].missing:
            done = self._open.popleft()
            del self._by_sequence[done.sequence]
            sequence = done.sequence
            rejected += sorted(done.rejected, key=lambda each: each.index)
        return (sequence, rejected) if sequence else None

    def _split(self, batch: Batch) -> dict[int, Part]:
        places = split(batch.body, self._way_of, self._shift)
        if places is None or set(places) == {FRONTEND}:
            return {FRONTEND: Part(batch, batch.body, None)}
        if len(places) == 1:
            return {number: Part(batch, batch.body, None) for number in places}
        return {number: Part(batch, b"".join(pieces), at) for number, (pieces, at) in places.items()}

    def check_invariants(self) -> None:
        """Every part that is queued or sent is missing to its batch, and no other; for tests."""
        missing = dict.fromkeys(self._by_sequence, 0)
        for way in self.all:
            numbers = [part.batch.sequence for part in (*way.sent, *way.queue)]
            assert numbers == sorted(set(numbers))
            for number in numbers:
                missing[number] += 1
        assert missing == {opened.sequence: opened.missing for opened in self._open}


def split(body: bytes, way_of: Sequence[int], shift: int) -> dict[int, tuple[list[bytes], list[int]]] | None:
    r"""The framed events of a batch by the way of their users' partitions, with their places; None where the body is
    not one of framed events, which is for a frontend to say.

    >>> way_of_half = [1, 2]
    >>> pieces = split(b"\x0a\x03\x0a\x01u" b"\x0a\x03\x0a\x01v", way_of_half, 63)
    >>> sorted(places for _, places in pieces.values())
    [[0], [1]]
    """
    found: dict[int, tuple[list[bytes], list[int]]] = {}
    at = index = 0
    try:
        while at < len(body):
            start = at
            if body[at] != _EVENTS_TAG:
                return None
            size, begin = body[at + 1], at + 2
            if size >= 0x80:
                size, begin = _varint(body, at + 1)
            at = begin + size
            # Nearly always the user's id comes first, and is short.
            if size > 1 and body[begin] == _USER_ID_TAG and body[begin + 1] < 0x80:
                user_id = body[begin + 2 : begin + 2 + body[begin + 1]]
            else:
                user_id = _user_id(body[begin:at])
            way = way_of[xxhash.xxh64_intdigest(user_id) >> shift]
            held = found.get(way)
            if held is None:
                held = found[way] = ([], [])
            held[0].append(body[start:at])
            held[1].append(index)
            index += 1
    except IndexError:
        return None
    return found if at == len(body) else None


def _user_id(event: bytes) -> bytes:
    """The user id of a serialized event; nothing where it has none, or is damaged: any owner refuses it then."""
    at, user_id = 0, b""
    try:
        while at < len(event):
            tag, at = _varint(event, at)
            kind = tag & 7
            if kind == 0:
                _, at = _varint(event, at)
            elif kind == _LENGTH_DELIMITED:
                size, at = _varint(event, at)
                if tag == _USER_ID_TAG:
                    user_id = event[at : at + size]
                at += size
            else:
                at += {1: 8, 5: 4}[kind]
    except (IndexError, KeyError):
        return b""
    return user_id


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that stands there, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
