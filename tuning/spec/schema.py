"""The JSON schema of a spec file, for completion and checks in an editor."""

from __future__ import annotations

from typing import Any

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
