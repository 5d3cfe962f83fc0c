"""YAML as values that know their lines.

Scalars stay what was written: which of `007`, `no` and `1e3` is a number and which is a word depends on who asks, not
on YAML 1.1, for which `no` is false, `010` is eight and `1e3` is a word. Repeated keys are faults. Anchors, aliases and
the merge key `<<` work; what they expand to is bounded, so that no file of a few bytes fills the memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

from profile_service.errors import SchemaFault

MOST_CHARACTERS = 1_000_000
MOST_VALUES = 200_000
"""In a whole file, each alias counted with all that it stands for."""

_TAG = "tag:yaml.org,2002:"
_KNOWN_TAGS = frozenset(
    _TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge", "seq", "map")
)
_NULLS = ("", "~", "null", "Null", "NULL")
_WHOLE = re.compile(r"[-+]?[0-9]{1,300}")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Scalar:
    """A single value, as written."""

    text: str
    """Without its quotes."""
    quoted: bool = False

    @property
    def is_null(self) -> bool:
        """Whether nothing is written there, or `~`, or `null`."""
        return not self.quoted and self.text in _NULLS

    @property
    def number(self) -> int | float | None:
        """The decimal number that is written there; None where it is none, or quoted.

        >>> [Scalar(text).number for text in ("010", "1e3", "-.inf", "1_000", "12:30", "0x1f")]
        [10, 1000.0, -inf, None, None, None]
        """
        if self.quoted:
            return None
        if _WHOLE.fullmatch(self.text):
            return int(self.text)
        if _NUMBER.fullmatch(self.text):
            return float(self.text)
        if _NOT_FINITE.fullmatch(self.text):
            return float(self.text.replace(".", ""))
        return None


@dataclass(frozen=True)
class Node:
    """A value and where it stands; lines count from 1."""

    value: Scalar | list[Node] | dict[str, Node]
    line: int
    """Of a single value, or an item of a list, its own; of a mapping or a list behind a key, the key's."""
    key_line: int

    @property
    def scalar(self) -> Scalar | None:
        """The value, if it is a single one."""
        return self.value if isinstance(self.value, Scalar) else None


def parse_yaml(text: str, faults: list[SchemaFault]) -> Node | None:
    """The document's root; None when it cannot be read, with the fault noted."""
    if len(text) > MOST_CHARACTERS:
        faults.append(SchemaFault(1, "schema", f"has {len(text)} characters, at most {MOST_CHARACTERS} are possible"))
        return None
    line = 1
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
        except RecursionError:
            line = loader.get_mark().line + 1
            raise
        if root is not None:
            return _Converter(faults).convert(root, "", root.start_mark.line + 1)
        description = "is empty"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        description = f"has a character that YAML does not allow: U+{ord(text[error.position]):04X}"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        description = f"is not YAML: {error.problem}"
        if error.context and error.context_mark:
            description += f" ({error.context} begun on line {error.context_mark.line + 1})"
    except RecursionError:
        description = "nests too deeply"
    except _Refused as refused:
        line, description = refused.line, refused.description
    faults.append(SchemaFault(line, "schema", description))
    return None


class _Refused(Exception):
    """The document must not be read any further."""

    def __init__(self, line: int, description: str) -> None:
        self.line = line
        self.description = description


class _Converter:
    """Turns PyYAML's nodes into ours, and notes what no schema may have."""

    def __init__(self, faults: list[SchemaFault]) -> None:
        self._faults = faults
        self._values = 0
        self._above: set[int] = set()

    def convert(self, node: yaml.Node, path: str, key_line: int | None = None) -> Node:
        line = node.start_mark.line + 1
        self._values += 1
        if self._values > MOST_VALUES:
            raise _Refused(line, f"has more than {MOST_VALUES} values, counting what aliases stand for")
        if id(node) in self._above:
            raise _Refused(line, "has an alias inside of what it stands for")
        if node.tag not in _KNOWN_TAGS:
            self._fault(line, path, f"a tag ({node.tag.replace(_TAG, '!!')}) has no meaning here: leave it out")
        if isinstance(node, yaml.ScalarNode):
            return Node(self._scalar(node, path), line, key_line or line)
        self._above.add(id(node))
        if isinstance(node, yaml.MappingNode):
            value: list[Node] | dict[str, Node] = self._mapping(node, path)
        else:
            value = [self.convert(item, f"{path}[{index}]") for index, item in enumerate(node.value)]
        self._above.remove(id(node))
        return Node(value, key_line or line, key_line or line)

    def _scalar(self, node: yaml.ScalarNode, path: str) -> Scalar:
        text = str(node.value)
        if not _is_unicode(text):
            self._fault(node.start_mark.line + 1, path, "has half of a surrogate pair, which is no character")
            text = text.encode(errors="replace").decode()
        return Scalar(text, quoted=node.style is not None)

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Node]:
        values: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._fault(line, path, "a key must be a single word")
                continue
            key = self._scalar(key_node, path).text
            inner = join(path, key)
            if key_node.tag == _TAG + "merge":
                merged = {**self._merged(self.convert(value_node, inner, line), inner), **merged}
            elif key in values:
                self._fault(line, inner, f"stands there twice, first on line {values[key].key_line}")
            else:
                values[key] = self.convert(value_node, inner, line)
        return {**values, **{key: value for key, value in merged.items() if key not in values}}

    def _merged(self, source: Node, path: str) -> dict[str, Node]:
        merged: dict[str, Node] = {}
        for mapping in source.value if isinstance(source.value, list) else [source]:
            if not isinstance(mapping.value, dict):
                self._fault(mapping.line, path, "takes the alias of a mapping, or a list of such")
                break
            merged = {**mapping.value, **merged}
        return merged

    def _fault(self, line: int, path: str, description: str) -> None:
        self._faults.append(SchemaFault(line, path or "schema", description))


def join(path: str, key: str) -> str:
    """The path of what stands behind `key`.

    >>> join("features", "color"), join("features", "two words")
    ('features.color', "features.'two words'")
    """
    shown = key if key.isprintable() and key and " " not in key and len(key) <= 64 else show(key)
    return f"{path}.{shown}" if path else shown


def show(text: str) -> str:
    """A text of the file as a message quotes it: on one line, and cut where it is long."""
    return f"{text!r:.64}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
