"""YAML text -> plain values that know their lines.

Files are untrusted: size, depth and number of nodes are bounded (aliases count each time they are
used), duplicate keys are refused, and no tag makes an object. Scalars are read as by `kubectl`:
`2e-4` is a number, a date and `12:30` are strings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from tuning.errors import SpecError
from tuning.spec.findings import Findings, Path, spelled

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_NODES = 200_000
_SHOWN_TAG = 60  # characters

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_SCALARS = SafeConstructor()
_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9]*)?[eE][-+]?[0-9]+")  # a number in YAML 1.2


@dataclass(eq=False)
class Document:
    """One YAML document: its value, and the lines of its paths and block scalars."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)  # 1 is the first line
    blocks: dict[Path, int] = field(default_factory=dict)  # block scalar -> its first line
    max_nodes: int = MAX_NODES  # of it, and of each document in a string of it
    findings: Findings = field(init=False)

    def __post_init__(self) -> None:
        self.findings = Findings(self.lines)

    def at(self, *path: str) -> Any:
        """The value at `path`, or None."""
        value = self.value
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read(
    text: str, *, origin: str, first_line: int = 1, max_nodes: int = MAX_NODES
) -> list[Document]:
    """The documents in `text`, empty ones left out.

    `origin` names the text in errors. Duplicate keys and the like go to each document's findings,
    since those of other kinds do not matter. Raises SpecError for invalid YAML.
    """
    _check_bounds(text, origin, first_line, max_nodes)
    try:
        nodes = [node for node in yaml.compose_all(text, Loader=_LOADER) if node is not None]
    except yaml.YAMLError as error:
        raise _not_yaml(error, origin, first_line) from None
    builders = [_Builder(origin, first_line, max_nodes) for _ in nodes]
    documents = [builder.build(node) for builder, node in zip(builders, nodes, strict=True)]
    return [document for document in documents if document.value is not None]


def _check_bounds(text: str, origin: str, first_line: int, max_nodes: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise SpecError.at(
            "SPEC-102", origin, "holds invalid characters", "save it as UTF-8"
        ) from None
    if size > MAX_BYTES:
        raise too_large(origin)
    depth = nodes = 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            nodes += 1
            if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                depth += 1
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                depth -= 1
            if depth > MAX_DEPTH or nodes > 2 * max_nodes:
                raise _too_complex(origin, max_nodes)
    except yaml.YAMLError as error:
        raise _not_yaml(error, origin, first_line) from None


def too_large(origin: str) -> SpecError:
    """The error for a file above the limit."""
    return SpecError.at(
        "SPEC-119",
        origin,
        f"is larger than {MAX_BYTES >> 20} MiB",
        "give a Workspace document; data belongs in tuning.input",
    )


def _too_complex(origin: str, max_nodes: int) -> SpecError:
    return SpecError.at(
        "SPEC-119",
        origin,
        f"is nested more than {MAX_DEPTH} deep or has more than {max_nodes} values",
        "give a Workspace document without YAML aliases that repeat large parts",
    )


def _not_yaml(error: yaml.YAMLError, origin: str, first_line: int) -> SpecError:
    # Never PyYAML's snippet of the text: it may hold a Secret.
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = getattr(error, "problem", None) or "it holds characters that YAML does not allow"
    where = f"{origin} line {mark.line + first_line}, column {mark.column + 1}" if mark else origin
    change = "correct the YAML there; indent with spaces, and quote strings with : or #"
    return SpecError.at("SPEC-102", where, f"invalid YAML: {what}", change)


class _Builder:
    """Builds a Document from a tree of YAML nodes."""

    def __init__(self, origin: str, first_line: int, max_nodes: int) -> None:
        self.origin, self.first_line = origin, first_line
        self.document = Document(max_nodes=max_nodes)
        self.nodes = 0

    def build(self, root: Node) -> Document:
        if kind_of(root) == "Secret":
            self.document.value = {"kind": "Secret"}  # the rest is not read
            return self.document
        self.document.lines[()] = root.start_mark.line + self.first_line
        self.document.value = self._value(root, ())
        return self.document

    def _value(self, node: Node, path: Path) -> Any:
        self.nodes += 1
        if self.nodes > self.document.max_nodes or len(path) > MAX_DEPTH:
            raise _too_complex(self.origin, self.document.max_nodes)
        match node:
            case MappingNode():
                return self._mapping(node, path)
            case SequenceNode():
                self._check_tag(node, "seq", path)
                return [self._item(child, (*path, i)) for i, child in enumerate(node.value)]
            case _:
                return self._scalar(node, path)

    def _item(self, node: Node, path: Path) -> Any:
        self.document.lines[path] = node.start_mark.line + self.first_line
        return self._value(node, path)

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        self._check_tag(node, "map", path)
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                for source in _merge_sources(value_node):
                    merged = self._mapping(source, path) | merged
                continue
            line = key_node.start_mark.line + self.first_line
            key = self._key(key_node, path, line)
            if key in own:
                first = self.document.lines[*path, key]
                what = f"duplicate key, first in line {first}"
                self.document.lines[*path, key] = line
                self.document.findings.add("SPEC-105", (*path, key), what, "keep one of the two")
            self.document.lines[*path, key] = line
            own[key] = self._value(value_node, (*path, key))
        return merged | own

    def _key(self, node: Node, path: Path, line: int) -> str:
        if not isinstance(node, ScalarNode):
            self._refuse(path, line, "a key must be a string", "write `key: value`")
            return "?"
        if node.tag != _TAG + "str":
            what = f"the key {node.value[:40]} is not a string"
            self._refuse((*path, str(node.value)), line, what, "put it in quotes")
        return str(node.value)

    def _scalar(self, node: Node, path: Path) -> Any:
        assert isinstance(node, ScalarNode)
        text, tag = str(node.value), node.tag.removeprefix(_TAG)
        if node.style in ("|", ">"):
            self.document.blocks[path] = node.start_mark.line + self.first_line + 1
        try:
            value = _typed(node, text, tag)
        except (ValueError, KeyError, ConstructorError):
            return text  # an explicit tag on another type, or an overlong number
        if value is _UNKNOWN:
            line = node.start_mark.line + self.first_line
            self._refuse(path, line, f"the YAML tag {_short_tag(node)} is not allowed", "remove it")
            return None
        if isinstance(value, float) and not math.isfinite(value):
            line = node.start_mark.line + self.first_line
            self._refuse(path, line, f"{text[:20]} is not a finite number", "write a number")
            return None
        return value

    def _check_tag(self, node: Node, kind: str, path: Path) -> None:
        if node.tag != _TAG + kind:
            line = node.start_mark.line + self.first_line
            self._refuse(path, line, f"the YAML tag {_short_tag(node)} is not allowed", "remove it")

    def _refuse(self, path: Path, line: int, what: str, change: str) -> None:
        self.document.lines.setdefault(path, line)
        self.document.findings.add("SPEC-102", path, what, change)


_UNKNOWN = object()


def _short_tag(node: Node) -> str:
    return str(node.tag).replace(_TAG, "!!")[:_SHOWN_TAG]


def _typed(node: ScalarNode, text: str, tag: str) -> Any:
    match tag:
        case "null":
            return None
        case "bool":
            return SafeConstructor.bool_values[text.lower()]
        case "int" if ":" not in text:
            return _SCALARS.construct_yaml_int(node)
        case "float" if ":" not in text:
            return _SCALARS.construct_yaml_float(node)
        case "str" if not node.style and _EXPONENT.fullmatch(text):
            return float(text.replace("_", ""))
        case "str" | "int" | "float" | "timestamp" | "merge" | "value":
            return text
        case _:
            return _UNKNOWN


def _merge_sources(node: Node) -> Iterator[MappingNode]:
    for source in node.value if isinstance(node, SequenceNode) else [node]:
        if isinstance(source, MappingNode):
            yield source


def kind_of(root: Node) -> str | None:
    """The `kind` of a document; the rest is not read."""
    if isinstance(root, MappingNode):
        for key, value in root.value:
            if isinstance(key, ScalarNode) and key.value == "kind" and isinstance(value.value, str):
                return value.value
    return None


def inner(text: str, outer: Document, path: Path, *, origin: str) -> list[Document]:
    """The documents in the string at `path` of `outer`, with the lines of the file."""
    first = outer.blocks.get(path)
    where = f"{origin} {spelled(path)}"
    documents = read(text, origin=where, first_line=first or 1, max_nodes=outer.max_nodes)
    if first is None:  # a quoted string: its lines are not the file's
        for document in documents:
            document.lines.clear()
    return documents
