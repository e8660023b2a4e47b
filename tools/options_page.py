"""`docs/operator-options.md`: the operator's options, written from their class."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.alias_generators import to_camel

from jobs.api.options import Options

HEAD = """\
# Options of the operator

Written by `make docs`. One YAML file, every key optional: in the cluster the key `options.yaml` of
the ConfigMap `tuning-operator`, for `python -m jobs render` the file after `--options`.

| key | value | default | meaning |
|---|---|---|---|
"""


def markdown() -> str:
    """The documentation page of all options."""
    return HEAD + "".join(_rows(Options, ""))


def _rows(part: type[BaseModel], path: str) -> Iterator[str]:
    for name, field in part.model_fields.items():
        key, kind = f"{path}{to_camel(name)}", field.annotation
        if name.startswith("policy"):  # set from its own file
            continue
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _rows(kind, f"{key}.")
            continue
        default = json.dumps(field.default) if field.default not in (None, ()) else "-"
        meaning = " ".join((field.description or "").split())
        yield f"| `{key}` | {_values(kind)} | {default} | {meaning} |\n"


def _values(kind: Any) -> str:
    """A type in YAML's words."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{each}`" for each in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {_values(get_args(kind)[0])}s"
    if args := [each for each in get_args(kind) if each is not type(None)]:
        return "map" if get_origin(kind) is dict else _values(args[0])
    return {str: "text", int: "number", bool: "`true`, `false`"}[kind]
