"""`docs/operator-options.md`: the operator's options, written from their class."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.alias_generators import to_camel

from jobs.api.options import Options
from jobs.observed.phases import LOADING_SECONDS, NODE_LOST, PHASES, Row

HEAD = """\
# Options of the operator

Written by `make docs`. One YAML file, every key optional: in the cluster the key `options.yaml` of
the ConfigMap `tuning-operator`, for `python -m jobs render` the file after `--options`.

| key | value | default | meaning |
|---|---|---|---|
"""


NODES = f"""
## Deadlines of a provisioned node

A node is paid for by the second: the engine works on it, or it waits for a deadline, or it is given
back. The time begins when the node is ready, and again when a run on it ends; further pods do not
begin it again. The nodes of a run on several machines wait until the last one is ready and all pods
run, and are given back together. A server whose container has started has {LOADING_SECONDS} s to
load its model. Nodes of your own have no deadline but for a known problem of a scheduled pod
(image, volume, Secret). The annotation `tuning.kaito.sh/keep-node` keeps a node.

| while | the node | deadline | then |
|---|---|---|---|
"""
_THEN = {
    "": "-",
    "refused": "the API server's refusal has the deadline",
    "released": "the node is given back; the Workspace goes on with another where it can",
    "stuck": "the node is given back; the Workspace fails with the last reason",
    "unprovisioned": "the Workspace fails with the cloud's message",
}
_NODE = {"requested": "is requested", "waits": "waits", "works": "works"}


def markdown() -> str:
    """The documentation page of all options."""
    rows = [*PHASES.values(), NODE_LOST]
    return HEAD + "".join(_rows(Options, "")) + NODES + "".join(map(_deadline, rows))


def _deadline(row: Row) -> str:
    if row.node == "released":  # at once; only that of an earlier server may wait
        beside = ", unless an earlier server answers" if row.then else ""
        return f"| {row.meaning} | is given back{beside} | - | - |\n"
    keys = ", ".join(f"`{key}`" for key in row.deadline.split(", ") if key and row.then)
    return f"| {row.meaning} | {_NODE[row.node]} | {keys or '-'} | {_THEN[row.then]} |\n"


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
    return {str: "text", int: "number", float: "number", bool: "`true`, `false`"}[kind]
