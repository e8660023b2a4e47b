"""Workspace and ConfigMap documents -> typed spec.

`load` reads a file and `parse` a text; both refuse with one SpecError that lists every problem, its
place and what to change. `rules` says what a Workspace must obey, `keys` what becomes of each key
of the ConfigMap, `workspace` holds the models from which the CRD and the JSON schema are made.
"""

from tuning.spec.findings import spelled
from tuning.spec.ignored import ignored
from tuning.spec.reader import from_command_line, load, parse, parse_workspace, read_file
from tuning.spec.schema import json_schema
from tuning.spec.values import (
    Destination,
    Method,
    Overrides,
    Settings,
    Sharding,
    Source,
    Spec,
)
from tuning.spec.writer import digest, dump

__all__ = [
    "Destination",
    "Method",
    "Overrides",
    "Settings",
    "Sharding",
    "Source",
    "Spec",
    "digest",
    "dump",
    "from_command_line",
    "ignored",
    "json_schema",
    "load",
    "parse",
    "parse_workspace",
    "read_file",
    "spelled",
]
