"""Adapters as the command line names them: NAME=SOURCE[@STRENGTH]. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tuning.errors import Problem, UsageError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,252}")
STRENGTH = re.compile(r"(?P<source>.+)@(?P<strength>[0-9.]+)")
MAX_ADAPTERS = 10  # as in a Workspace


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter to serve."""

    name: str
    source: str  # image, oci:DIR or folder
    strength: float = 1.0


def parse(text: str) -> AdapterSpec:
    """`NAME=SOURCE[@STRENGTH]`. Raises UsageError."""
    change = "write NAME=SOURCE, or NAME=SOURCE@0.5 for half of its strength"
    name, equals, source = text.partition("=")
    if not (equals and source and NAME.fullmatch(name)):
        raise UsageError.at("SERVE-101", f"--adapter {text[:80]}", "is not NAME=SOURCE", change)
    match = STRENGTH.fullmatch(source)
    if match is None:
        return AdapterSpec(name, source)
    try:
        strength = float(match["strength"])
    except ValueError:
        strength = math.nan
    if not 0 <= strength <= 1:
        what = f"has strength {match['strength'][:20]}, which is not a number from 0 to 1"
        raise UsageError.at("SERVE-101", f"--adapter {name}", what, change)
    return AdapterSpec(name, match["source"], strength)


def check(specs: Sequence[AdapterSpec], *, base: str, combined: str) -> None:
    """Raise UsageError for ambiguous names or too many adapters."""
    problems = []
    if len(specs) > MAX_ADAPTERS:
        what = f"there are {len(specs)}; a server takes {MAX_ADAPTERS}"
        problems.append(Problem("SERVE-107", "--adapter", what, "run another server"))
    names = [spec.name for spec in specs]
    taken = {base} | ({combined} if len(specs) > 1 else set())
    for name in dict.fromkeys(names):
        if names.count(name) > 1 or name in taken:
            what = f"the name {name} stands for more than one model"
            change = "give adapters, base (--base-name) and combined model (--name) unique names"
            problems.append(Problem("SERVE-102", "--adapter", what, change))
    if specs and combined == base:
        what = "is also the base model's name"
        problems.append(Problem("SERVE-102", "--name", what, "choose another name"))
    if problems:
        raise UsageError(problems)
