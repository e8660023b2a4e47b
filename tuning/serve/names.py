"""Adapters as they are asked for on a command line: name, place, strength. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tuning.errors import Problem, UsageError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,252}")
STRENGTH = re.compile(r"(?P<source>.+)@(?P<strength>[0-9.]+)")
MOST = 10  # adapters, as in a Workspace


@dataclass(frozen=True)
class Wanted:
    """An adapter as it is asked for."""

    name: str
    source: str  # image, oci:DIR or folder
    strength: float = 1.0


def parse(text: str) -> Wanted:
    """`NAME=SOURCE[@STRENGTH]`. Raises UsageError."""
    change = "write NAME=SOURCE, or NAME=SOURCE@0.5 for half of its strength"
    name, equals, source = text.partition("=")
    if not (equals and source and NAME.fullmatch(name)):
        raise UsageError.at("SERVE-101", f"--adapter {text[:80]}", "is no NAME=SOURCE", change)
    match = STRENGTH.fullmatch(source)
    if match is None:
        return Wanted(name, source)
    try:
        strength = float(match["strength"])
    except ValueError:
        strength = math.nan
    if not 0 <= strength <= 1:
        what = f"has strength {match['strength'][:20]}, which is no number from 0 to 1"
        raise UsageError.at("SERVE-101", f"--adapter {name}", what, change)
    return Wanted(name, match["source"], strength)


def check(wanted: Sequence[Wanted], *, base: str, combined: str) -> None:
    """Raise UsageError for names that cannot be told apart, or too many adapters."""
    problems = []
    if len(wanted) > MOST:
        what = f"there are {len(wanted)}; a server takes {MOST}"
        problems.append(Problem("SERVE-107", "--adapter", what, "run another server"))
    names = [one.name for one in wanted]
    taken = {base} | ({combined} if len(wanted) > 1 else set())
    for name in dict.fromkeys(names):
        if names.count(name) > 1 or name in taken:
            what = f"the name {name} stands for more than one model"
            change = "name each adapter, the base (--base-name) and all together (--name) apart"
            problems.append(Problem("SERVE-102", "--adapter", what, change))
    if wanted and combined == base:
        what = "is the base model's name, too"
        problems.append(Problem("SERVE-102", "--name", what, "choose another name"))
    if problems:
        raise UsageError(problems)
