"""The JSON schema of `plan --json` and of `plan.json` in a run directory."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from tuning.plan.device import Device
from tuning.plan.values import Lengths, Placement, Recipe

NUMBER = {"type": ["number", "null"]}
BYTES = {"type": "integer", "minimum": 0}


def schema() -> dict[str, Any]:
    """Every key with its type; all are there, null where nothing is known yet."""
    definitions: dict[str, Any] = {}

    def of(value: type) -> dict[str, Any]:
        made = TypeAdapter(value).json_schema(ref_template="#/$defs/{model}", mode="serialization")
        definitions.update(made.pop("$defs", {}))
        definitions[value.__name__] = made | {"additionalProperties": False}
        return {"$ref": f"#/$defs/{value.__name__}"}

    properties = {
        "run_id": {"type": ["string", "null"], "description": "sha256 of the recipe, once frozen"},
        "recipe": of(Recipe) | {"description": "what decides the adapter's bytes"},
        "placement": of(Placement) | {"description": "how this machine carries it out"},
        "device": of(Device) | {"description": "what it is planned for"},
        "reasons": {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "why a value is what it is, by its name",
        },
        "lengths": {
            "anyOf": [of(Lengths), {"type": "null"}],
            "description": "of the data in tokens, once it is read",
        },
        "rows": {"type": ["integer", "null"], "description": "training rows after packing"},
        "memory": {"anyOf": [_memory(), {"type": "null"}], "description": "bytes, at the peak"},
        "speed": {
            "type": "object",
            "properties": {"tokens_per_second": NUMBER, "seconds": NUMBER},
            "additionalProperties": False,
            "description": "of all GPUs together, padding counted; seconds of training",
        },
        "cost": {
            "anyOf": [_cost(), {"type": "null"}],
            "description": "of all machines, where the policy file has a price for them",
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Plan",
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        "$defs": definitions,
    }


def _cost() -> dict[str, Any]:
    names = ("currency", "per_hour", "total", "per_million_tokens")
    amounts = {"currency": {"type": "string"}, "per_hour": {"type": "number"}}
    return {
        "type": "object",
        "properties": dict.fromkeys(names, NUMBER) | amounts,
        "required": list(names),
        "additionalProperties": False,
    }


def _memory() -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "terms": {"type": "object", "additionalProperties": BYTES},
            "total": BYTES,
            "allocated": BYTES | {"description": "as torch counts it: without context and slack"},
            "free": BYTES | {"description": "of each GPU"},
            "host": BYTES | {"description": "of a machine's own memory, for shares that lie there"},
            "moment": {"type": "string", "description": "when the peak is"},
        },
        "required": ["terms", "total", "allocated", "free", "host", "moment"],
        "additionalProperties": False,
    }
