"""YAML as values that know their lines: scalars keep the text they were written as, repeated keys are faults."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from profile_service.errors import SchemaFault


@dataclass(frozen=True)
class Scalar:
    """A single value: as written, and as YAML understands it."""

    text: str
    value: object


@dataclass(frozen=True)
class Node:
    """A value and its 1-based line; `key` is the key that it stands behind."""

    value: Scalar | list[Node] | dict[str, Node]
    line: int
    key: Node | None = None


def parse_yaml(text: str, faults: list[SchemaFault]) -> Node | None:
    """The document's root; None when it is no YAML, with the fault noted."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            faults.append(SchemaFault(1, "schema", "is empty"))
            return None
        return _convert(loader, root, "", faults, frozenset())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        faults.append(SchemaFault(mark.line + 1 if mark else 1, "schema", f"is not YAML: {error.problem}"))
    except yaml.YAMLError as error:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        faults.append(SchemaFault(line, "schema", f"is not YAML: {error}"))
    except ValueError as error:
        faults.append(SchemaFault(1, "schema", f"has a value that YAML cannot read: {error}"))
    finally:
        loader.dispose()
    return None


def _convert(
    loader: yaml.SafeLoader, node: yaml.Node, path: str, faults: list[SchemaFault], above: frozenset[int]
) -> Node:
    line = node.start_mark.line + 1
    if id(node) in above:
        faults.append(SchemaFault(line, path or "schema", "contains itself"))
        return Node(Scalar("", None), line)
    above |= {id(node)}
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            inner = f"{path}.{key}" if path else key
            if not isinstance(key_node, yaml.ScalarNode):
                faults.append(SchemaFault(key_line, path or "schema", "a key must be a single word"))
            elif key in values:
                faults.append(SchemaFault(key_line, inner, "stands there twice"))
            else:
                value = _convert(loader, value_node, inner, faults, above)
                values[key] = Node(value.value, value.line, Node(Scalar(key, key), key_line))
        return Node(values, line)
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(loader, item, path, faults, above) for item in node.value], line)
    return Node(Scalar(str(node.value), loader.construct_object(node)), line)
