"""JSON schemas of a spec file and of its settings, for completion and checks in an editor."""

from __future__ import annotations

from typing import Any

from tuning.spec import config, keys
from tuning.spec.workspace import Workspace


def json_schema() -> dict[str, Any]:
    """The schema of a document: a Workspace is described, other kinds pass."""
    workspace = _tidy(Workspace.model_json_schema(by_alias=True))
    definitions = workspace.pop("$defs")
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "KAITO Workspace",
        "if": {"properties": {"kind": {"const": "Workspace"}}, "required": ["kind"]},
        "then": {"$ref": "#/$defs/Workspace"},
        "else": {"type": "object", "required": ["apiVersion", "kind"]},
        "$defs": {**definitions, "Workspace": workspace},
    }


def _tidy(node: Any) -> Any:
    """Without pydantic's titles, and with `X or null` written as X: null means absent."""
    if isinstance(node, list):
        return [_tidy(each) for each in node]
    if not isinstance(node, dict):
        return node
    if "anyOf" in node:
        kinds = [each for each in node["anyOf"] if each != {"type": "null"}]
        if len(kinds) == 1:
            rest = {k: v for k, v in node.items() if k not in ("anyOf", "default")}
            node = {**kinds[0], **rest}
    return {
        key: _tidy(value)
        for key, value in node.items()
        if not (key == "title" and isinstance(value, str)) and not key.startswith("x-")
    }


def config_schema() -> dict[str, Any]:
    """The schema of `training_config.yaml` of a ConfigMap: the keys that have an effect."""
    sections = {
        section: {
            "type": "object",
            "additionalProperties": False,
            "properties": {key.name: _value(key) for key in rows.values() if key.setting},
        }
        for section, rows in keys.sections().items()
    }
    root = {"type": "object", "additionalProperties": False, "properties": sections}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "training_config.yaml",
        "type": "object",
        "required": [config.ROOT],
        "properties": {config.ROOT: root},
    }


def _value(key: keys.Key) -> dict[str, Any]:
    """The schema of a key's value; where it has several forms, only its description."""
    bounds = {
        "exclusiveMinimum": key.above,
        "minimum": key.min,
        "exclusiveMaximum": key.below,
        "maximum": key.max,
    }
    limits = {name: bound for name, bound in bounds.items() if bound is not None}
    kinds: dict[str, dict[str, Any]] = {
        "number": {"type": "number", **limits},
        "count": {"type": "integer", **limits},
        "switch": {"type": "boolean"},
        "choice": {"enum": list(key.values)},
        "text": {"type": "string"},
        "address": {"type": "string"},
        "names": {"type": ["string", "array"], "items": {"type": "string"}},
        "trackers": {"type": ["string", "array"], "items": {"type": "string"}},
    }
    unset = [each for each in key.unset if each is not None]
    kind = kinds.get(key.type, {})
    if unset and kind:
        kind = {"anyOf": [kind, {"enum": unset}]}
    return kind | {"description": key.text}
