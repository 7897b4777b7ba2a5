"""YAML read strictly, with the line of every key kept so that an error can point at it.

Rules:
  * Plain data only: mappings, lists, strings, numbers, booleans, null. No tags, anchors or aliases.
  * Booleans are `true` and `false` alone (YAML 1.2 core schema), so `off` and `no` stay words.
  * A duplicate key is an error, never a silent winner.
  * At most 64 levels deep: reading deeper ones takes time in the square of the depth, and then the whole stack.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Location = tuple[str | int, ...]

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 64
_COLLECTIONS = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}


class YamlError(ValueError):
    """A document that is not strict YAML; the message names the line."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 booleans and floats such as 1e-3."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for _REPLACED in [{"tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Source:
    """A parsed document.

    Attributes:
        data: plain Python data.
        lines: line (from 1) of each key or list item, by its location.
        name: the file's name, for messages.
    """

    data: Any
    lines: dict[Location, int] = field(default_factory=dict)
    name: str = "document"

    def line(self, location: Location) -> int:
        """The line of `location`, or of its nearest ancestor that stands in the document."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 1)


def read_yaml(path: Path) -> Source:
    """Reads a YAML file; raises :class:`YamlError` or :class:`OSError`."""
    return parse_yaml(path.read_bytes(), name=path.name)


def parse_yaml(content: bytes, name: str = "document") -> Source:
    """Parses YAML bytes (UTF-8, at most 1 MiB); raises :class:`YamlError` with the line."""
    if len(content) > _MAX_BYTES:
        raise YamlError(f"{name}: larger than 1 MiB")
    try:
        root = _compose(content.decode("utf-8"))
    except YamlError as error:
        raise YamlError(f"{name} {error}") from error
    except UnicodeDecodeError as error:
        raise YamlError(f"{name}: not UTF-8 text (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name} line {mark.line + 1}" if mark else name
        raise YamlError(f"{where}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise YamlError(f"{name}: {error}") from error
    lines: dict[Location, int] = {}
    data = None if root is None else _build(root, (), lines, name)
    return Source(data, lines, name)


def _compose(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise YamlError(f"line {_line_of(event)}: nested more than {_MAX_DEPTH} levels deep")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise YamlError(f"line {_line_of(event)}: anchors and aliases are not allowed")
        return loader.get_single_node()
    finally:
        loader.dispose()


def _line_of(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark is not None else 1


def _build(node: yaml.Node, at: Location, lines: dict[Location, int], name: str) -> Any:
    lines.setdefault(at, node.start_mark.line + 1)
    if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
        raise YamlError(f"{name} line {node.start_mark.line + 1}: the tag {node.tag} is not allowed")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, at, lines, name)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*at, index), lines, name) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.ScalarNode):
        raise YamlError(f"{name}: a node of an unknown kind")
    return _scalar(node, name)


def _mapping(node: yaml.MappingNode, at: Location, lines: dict[Location, int], name: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
        if key is None:
            raise YamlError(f"{name} line {line}: a key must be a plain word")
        if key in result:
            raise YamlError(f"{name} line {line}: the key '{key}' stands twice")
        lines[(*at, key)] = line
        result[key] = _build(value_node, (*at, key), lines, name)
    return result


def _scalar(node: yaml.ScalarNode, name: str) -> Any:
    line = node.start_mark.line + 1
    constructor = yaml.constructor.SafeConstructor()
    kinds = {
        "tag:yaml.org,2002:null": constructor.construct_yaml_null,
        "tag:yaml.org,2002:bool": constructor.construct_yaml_bool,
        "tag:yaml.org,2002:int": constructor.construct_yaml_int,
        "tag:yaml.org,2002:float": constructor.construct_yaml_float,
        "tag:yaml.org,2002:str": constructor.construct_yaml_str,
    }
    if node.tag not in kinds:
        raise YamlError(f"{name} line {line}: the tag {node.tag} is not allowed")
    try:
        return kinds[node.tag](node)
    except ValueError as error:
        raise YamlError(f"{name} line {line}: this is no {node.tag.rpartition(':')[2]}") from error
