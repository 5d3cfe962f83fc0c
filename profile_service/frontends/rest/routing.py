"""Which binding a request is for. Paths are matched as they came, percent-encoded, so that a user id may hold anything.

    raw path  /v1/profiles/a%2Fb%3Amerge:watch
    split     v1 | profiles | a%2Fb%3Amerge      verb: watch
    decoded   user_id = "a/b:merge"

A colon in the last segment starts a verb only where the path has such a verb, whatever the HTTP method; elsewhere it
is part of the segment, as Envoy's transcoder reads it. So `/v1/profiles/a:b` is user "a:b", and a user "a:merge" is
written `a%3Amerge`: `GET /v1/profiles/a:merge` is a wrong method on the path of MergeProfiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from profile_service.errors import InvalidArgument, NotFound
from profile_service.frontends.rest import percent
from profile_service.frontends.rest.bindings import Binding, Variable


@dataclass(frozen=True)
class Match:
    """A request's binding and the values that its path gives to fields."""

    binding: Binding
    values: dict[str, str]


@dataclass(frozen=True)
class WrongMethod:
    """The path is served, but not with this HTTP method."""

    allowed: tuple[str, ...]


@dataclass
class _Path:
    segments: tuple[str | Variable, ...]
    verb: str
    bindings: dict[str, Binding] = field(default_factory=dict)

    @cached_property
    def raw(self) -> tuple[tuple[bytes, str | Variable], ...]:
        """Segments as they come where nothing is percent-encoded, beside what they are; nothing for a variable."""
        return tuple((b"" if isinstance(segment, Variable) else segment.encode(), segment) for segment in self.segments)

    @cached_property
    def raw_verb(self) -> bytes:
        """The verb and its colon, as the last segment ends with them."""
        return b":" + self.verb.encode() if self.verb else b""

    @cached_property
    def served(self) -> dict[str, Binding]:
        """Bindings by HTTP method; HEAD is a GET whose body stays here, which a stream has no end of."""
        get = self.bindings.get("GET")
        return self.bindings if get is None or get.is_streaming else {**self.bindings, "HEAD": get}

    @property
    def order(self) -> tuple[bool, int]:
        """A verb before none, more literal segments before fewer."""
        return not self.verb, sum(isinstance(segment, Variable) for segment in self.segments)


class Router:
    """Finds the binding of a request.

    >>> from profile_service.frontends.rest.bindings import service_bindings
    >>> Router(service_bindings()).match("GET", b"/v1/profiles/a%2Fb").values
    {'user_id': 'a/b'}
    """

    def __init__(self, bindings: Iterable[Binding]) -> None:
        paths: dict[tuple[tuple[str | Variable, ...], str], _Path] = {}
        for binding in bindings:
            path = paths.setdefault((binding.segments, binding.verb), _Path(binding.segments, binding.verb))
            if binding.http_method in path.bindings:
                raise ValueError(f"{binding.http_method} {binding.template} is declared twice")
            path.bindings[binding.http_method] = binding
        self._paths: dict[int, list[_Path]] = {}
        for path in sorted(paths.values(), key=lambda path: path.order):
            self._paths.setdefault(len(path.segments), []).append(path)

    def match(self, http_method: str, raw_path: bytes) -> Match | WrongMethod:
        """Raises NotFound for a path that is not served, InvalidArgument for a variable that is not UTF-8."""
        segments = raw_path.split(b"/")[1:]
        for path in self._paths.get(len(segments), ()):
            values = _values(path, segments)
            if values is None:
                continue
            binding = path.served.get(http_method)
            return Match(binding, values) if binding is not None else WrongMethod(tuple(sorted(path.served)))
        raise no_such_path(raw_path)


def no_such_path(raw_path: bytes) -> NotFound:
    """The error for a path that is not served."""
    return NotFound(f"nothing is served at {raw_path.decode(errors='replace')}; /openapi.json lists the paths")


def _values(path: _Path, segments: Sequence[bytes]) -> dict[str, str] | None:
    """What the path's variables hold, or None where it is another path."""
    if path.raw_verb:
        if not segments[-1].endswith(path.raw_verb):
            return None
        segments = (*segments[:-1], segments[-1][: -len(path.raw_verb)])
    values: dict[str, bytes] = {}
    for (literal, expected), raw in zip(path.raw, segments, strict=True):
        if raw == literal and literal:
            continue
        if isinstance(expected, Variable):
            if not raw and path.verb:
                # Not the user ":watch" either, whom a typo would then read or delete.
                raise no_such_path(b"/" + b"/".join(segments) + b":" + path.verb.encode())
            if not raw:
                return None
            values[expected.field] = raw
        elif not _decodes_to(raw, expected):
            return None
    return {name: percent.decode(raw, name) for name, raw in values.items()}


def _decodes_to(raw: bytes, expected: str) -> bool:
    if b"%" not in raw:
        return False
    try:
        return percent.decode(raw, "") == expected
    except InvalidArgument:
        return False
