"""`DatasetConfig.sources`: the parts of a mixture, and to which of them a file belongs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from tuning.errors import Problem, SpecError
from tuning.spec.findings import Findings, Path, did_you_mean, shorten, shown
from tuning.spec.values import Part

KEY = "DatasetConfig.sources"
COLUMNS = ("messages_column", "context_column", "response_column")
MOST = 100  # parts
_EXAMPLE = '`- path: own.jsonl` with "weight" or "rows" below it'


def read(value: Any, path: Path, findings: Findings) -> tuple[Part, ...] | None:
    """The parts that the list `value` at `path` describes; None, with problems, if it is wrong."""
    if not isinstance(value, list) or not 0 < len(value) <= MOST:
        what = f"lists {len(value):,} parts" if isinstance(value, list) else f"is {shown(value)}"
        findings.add("SPEC-113", path, f"{what}, expected 1 to {MOST}", f"write {_EXAMPLE}")
        return None
    parts = [_part(each, (*path, number), findings) for number, each in enumerate(value)]
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        return None
    seen: dict[str, int] = {}
    for number, part in enumerate(whole):
        if (first := seen.setdefault(part.path, number)) != number:
            what = f"is the path of part {first} as well"
            change = "name other files, or make one part of the two"
            findings.add("SPEC-108", (*path, number, "path"), what, change)
    weighted = [part for part in whole if part.weight is not None]
    unsaid = [n for n, part in enumerate(whole) if part.weight is None and part.rows is None]
    if weighted and unsaid:
        what = "has no weight, and other parts have one"
        change = "give it a weight, or the number of its rows"
        findings.add("SPEC-112", (*path, unsaid[0]), what, change)
    return tuple(whole)


def _part(value: Any, path: Path, findings: Findings) -> Part | None:
    if not isinstance(value, dict):
        findings.add("SPEC-113", path, f"is {shown(value)}, expected a part", f"write {_EXAMPLE}")
        return None
    known = ("path", "weight", "rows", *COLUMNS)
    wrong = False

    def bad(code: str, name: str, what: str, change: str) -> None:
        nonlocal wrong
        wrong = True
        findings.add(code, (*path, name), what, change)

    for name in value.keys() - set(known):
        bad("SPEC-111", str(name), "unknown key", did_you_mean(str(name), known))
    given = {name: value[name] for name in known if value.get(name) is not None}
    if "path" not in given:
        what = "has no path"
        change = "name a URL of the input, a file, or a pattern such as *.jsonl"
        wrong = True
        findings.add("SPEC-112", path, what, change)
    for name in given.keys() - {"weight", "rows"}:
        text = given[name]
        if not isinstance(text, str) or not text.strip() or not text.isprintable():
            bad("SPEC-113", name, f"is {shown(text)}, expected a text", "write a text, in quotes")
    weight, rows = given.get("weight"), given.get("rows")
    if weight is not None and not (_is(weight, int, float) and 0 < weight <= 1e6):
        what = f"is {shown(weight)}, must be above 0 and at most 1,000,000"
        bad("SPEC-104", "weight", what, "write a number, such as 70 or 0.7")
    if rows is not None and not (_is(rows, int) and 0 < rows < 1 << 53):
        what = f"is {shown(rows)}, must be a whole number above 0"
        bad("SPEC-104", "rows", what, "write how many of its rows are trained on")
    if weight is not None and rows is not None:
        what = "has a weight and a number of rows"
        bad("SPEC-108", "rows", what, "keep one of the two")
    return None if wrong else Part(**given | ({"weight": float(weight)} if weight else {}))


def _is(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def assign(parts: Sequence[Part], names: Sequence[tuple[str, str]]) -> list[int]:
    """For each file the number of the first of `parts` whose path names it.

    `names` holds for each file the URL that named it, or "", and what messages call it. Raises
    SpecError for files of no part and parts without a file, all in one pass.
    """
    found = [next((n for n, part in enumerate(parts) if _names(part, *each)), -1) for each in names]
    listed = _some(shorten(name) for _, name in names)
    problems = [
        Problem(
            "SPEC-123",
            f"{KEY}[{number}].path",
            f'names "{shorten(part.path)}", and no file of the data is called so: {listed}',
            "write a URL of the input as it is there, a file's name, or a pattern such as *.jsonl",
        )
        for number, part in enumerate(parts)
        if number not in found
    ]
    if left := [name for number, (_, name) in zip(found, names, strict=True) if number < 0]:
        what = f"names no part for {_some(map(shorten, left))}"
        change = 'add a part for it, or one with `path: "*"` at the end for all others'
        problems.append(Problem("SPEC-123", KEY, what, change))
    if problems:
        raise SpecError(problems)
    return found


def _names(part: Part, url: str, shown: str) -> bool:
    """Whether the part's path is the URL or the name, whole or from a slash on, or matches one."""
    for name in filter(None, (url.partition("#")[0], shown)):
        if name == part.path or name.endswith(f"/{part.path}"):
            return True
        if fnmatchcase(name, part.path) or fnmatchcase(name, f"*/{part.path}"):
            return True
    return False


def _some(names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:6]) + (f", ... ({len(names):,})" if len(names) > 6 else "")
