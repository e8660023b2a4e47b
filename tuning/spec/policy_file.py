"""The administrator's policy file: one YAML with a section for each room that it governs.

data: ...       # where data may come from: network
registry: ...   # how registries are reached, and which images are trusted: oci
cluster: ...    # what Workspaces may use of a cluster: the operator, and nobody else
prices: ...     # what an hour of each instance type costs: plan
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tuning.errors import Problem, SpecError
from tuning.spec import documents
from tuning.spec.findings import did_you_mean

SECTIONS = ("data", "registry", "cluster", "prices")
Model = TypeVar("Model", bound=BaseModel)


def section(path: Path, name: str, model: type[Model]) -> Model:
    """The section `name` of the policy file at `path`, or the defaults where it has none.

    Raises SpecError with all problems of the section, and of the file as a whole.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}"
        raise SpecError.at("FETCH-109", str(path), what, "name the policy file") from None
    parts = documents.read(text, origin=str(path))
    if problems := [p for document in parts for p in document.findings.in_order()]:
        raise SpecError(problems)
    whole = parts[0].value if parts else {}
    if whole is not None and not isinstance(whole, dict):
        change = f"write the sections {' and '.join(SECTIONS)}"
        raise SpecError.at("FETCH-109", str(path), "is not a mapping", change)
    problems = [
        _unknown_key(str(path), [key], SECTIONS) for key in whole or {} if key not in SECTIONS
    ]
    value = (whole or {}).get(name)
    try:
        parsed = model.model_validate({} if value is None else value)
    except ValidationError as error:
        problems += [_problem(dict(e), f"{path} {name}", model) for e in error.errors()]
    if problems:
        raise SpecError(problems)
    return parsed


def _problem(error: Mapping[str, object], origin: str, model: type[BaseModel]) -> Problem:
    location = error["loc"] if isinstance(error["loc"], tuple) else ()
    path = [str(part) for part in location]
    if error["type"] == "extra_forbidden":
        return _unknown_key(origin, path, _keys(model, path[:-1]))
    where = ".".join([origin, *path])
    return Problem("FETCH-109", where, str(error["msg"]), "correct the policy file")


def _keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys at the top of the section; for deeper paths none are suggested."""
    return [] if path else [field.alias or name for name, field in model.model_fields.items()]


def _unknown_key(origin: str, path: list[str], known: tuple[str, ...] | list[str]) -> Problem:
    change = did_you_mean(path[-1], known) if known else "remove it; docs/registries.md lists all"
    separator = "." if " " in origin else " "
    where = f"{origin}{separator}{'.'.join(path)}"
    return Problem("FETCH-109", where, "is not a key of the policy file", change)
