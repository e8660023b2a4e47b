"""Problems in the words of the command that was given.

The rooms name places of the documents, which are the same from a file, on a cluster and in Python:
`TrainingArguments.max_length`. A command without a file has an option for each of them, and one
with a file may have replaced some: `--set max_length`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tuning.errors import Problem, TuningError

if TYPE_CHECKING:
    from tuning.spec import Overrides


@dataclass
class _Given:
    """What the command line of this process has."""

    options: dict[str, str] = field(default_factory=dict)  # place -> the option for it
    has_file: bool = True


_given = _Given()
_GIVE = ("set", "write")
_ONE_LINE = {
    "tuning.preset.name": "MODEL",
    "tuning.method": "--method",
    "tuning.input": "DATA",
    "tuning.output": "-o",
    "tuning.output.image": "-o",
    "resource.instanceType": "--instance",
}
_PLACE = re.compile(
    r"(?:\b(?P<verb>set|write|use|give) )?(?P<place>\b[A-Z]\w+\.[a-z]\w*|\b(?:tuning|resource)"
    r"(?:\.[a-z]\w*)+)(?:(?P<to> to |: ?)(?P<value>\d[\w.+-]*|[\w-]+(?=$|[,;.)]))?)?"
)
_WITHIN = re.compile(r" in (?P<section>[A-Z]\w+)(?::| (?=\()) ?(?P<names>.*)", re.S)
_URL = re.compile(r"^(?:tuning\.)?input\.urls\[\d+\]")
_CONFIG_MAP = re.compile(r"^(?:ConfigMap \S+: )?training_config\.")


def remember(overrides: Overrides, *, has_file: bool) -> None:
    """Note which options the command has for the places of its documents."""
    from tuning.spec import keys

    assigned = {text.partition("=")[0].strip().rpartition(".")[2] for text in overrides.set}
    _given.has_file = has_file
    _given.options = {
        f"{section}.{name}": f"--set {name}"
        for section, rows in keys.sections().items()
        for name in rows
        if not has_file or name in assigned
    }
    if not has_file:
        _given.options |= _ONE_LINE
        return
    given = {
        "tuning.preset.name": overrides.base_model and "--base-model",
        "tuning.method": overrides.method and "--method",
        "tuning.input": overrides.data and "--data",
        "tuning.output.image": overrides.output and "-o",
        "resource.instanceType": overrides.instance and "--instance",
    }
    _given.options |= {place: str(option) for place, option in given.items() if option}


def options(places: Mapping[str, str]) -> None:
    """Note that of a new document this command has an option for each of these places."""
    _given.options = dict(places)


def told(error: TuningError) -> TuningError:
    """`error` with the options of this command in the place of what they stand for."""
    if _given.options:
        error.problems = tuple(map(_problem, error.problems))
    return error


def _problem(problem: Problem) -> Problem:
    where, what = problem.where, problem.what
    if not _given.has_file:  # so there is no ConfigMap that anybody wrote
        where = _CONFIG_MAP.sub("", where)
        what = re.sub(r" in ConfigMap '[^']*'", "", what)
    inner = _CONFIG_MAP.sub("", where).partition(" (line")[0]
    if "tuning.input" in _given.options:
        where = _URL.sub(_given.options["tuning.input"], where)
    return replace(
        problem,
        where=_given.options.get(inner, where),
        what=_PLACE.sub(_option, what),
        change=_WITHIN.sub(_named, _PLACE.sub(_option, problem.change)),
    )


def _option(found: re.Match[str]) -> str:
    """`set SECTION.KEY to 4` -> `give --set KEY=4`; what is no option here stays as it is."""
    verb, to, value = found["verb"], found["to"] or "", found["value"]
    if (option := _given.options.get(found["place"])) is None:
        return found[0]
    lead = "" if verb is None else "give " if verb in _GIVE else f"{verb} "
    if not option.startswith("--set"):
        return f"{lead}{option}{' ' if to == ' to ' else to}{value or ''}"
    if value is not None:
        return f"{lead}{option}={value}"
    if to == " to ":
        return f"{lead}{option}=VALUE, "
    return f"{lead}{option}{'=VALUE' if verb else ''}{to}"


def _named(found: re.Match[str]) -> str:
    """` in SECTION: KEY, or KEY and KEY` -> ` with --set KEY=VALUE, or ...`."""
    section = found["section"]
    names = re.sub(
        r"\w+",
        lambda word: (
            f"{option}=VALUE" if (option := _given.options.get(f"{section}.{word[0]}")) else word[0]
        ),
        found["names"],
    )
    plain = re.sub(r"^\((.*)\)", r"\1", names)
    return found[0] if names == found["names"] else f" with {plain}"
