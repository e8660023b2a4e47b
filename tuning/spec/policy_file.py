"""The administrator's policy file: one YAML, a section for each room that has something to allow.

data: ...       # where data may come from: network
registry: ...   # how registries are reached, and which images are trusted: trust
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tuning.errors import Problem, SpecError
from tuning.spec import documents
from tuning.spec.findings import did_you_mean

SECTIONS = ("data", "registry")
Model = TypeVar("Model", bound=BaseModel)


def section(path: Path, name: str, model: type[Model]) -> Model:
    """The section `name` of the policy file at `path`, or the defaults where it has none.

    Raises SpecError with all problems of the section, and of the file as a whole.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read: {getattr(error, 'strerror', None) or 'it is no UTF-8 text'}"
        raise SpecError.at("FETCH-109", str(path), what, "name the policy file") from None
    found = documents.read(text, origin=str(path))
    if problems := [p for document in found for p in document.findings.in_order()]:
        raise SpecError(problems)
    whole = found[0].value if found else {}
    if whole is not None and not isinstance(whole, dict):
        raise SpecError.at("FETCH-109", str(path), "is no mapping", "mend the policy file")
    problems = [_stranger(str(path), [key], SECTIONS) for key in whole or {} if key not in SECTIONS]
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
        return _stranger(origin, path, _keys(model, path[:-1]))
    where = ".".join([origin, *path])
    return Problem("FETCH-109", where, str(error["msg"]), "mend the policy file")


def _keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys that the section knows at the top; deeper the message does not guess."""
    return [] if path else [field.alias or name for name, field in model.model_fields.items()]


def _stranger(origin: str, path: list[str], known: tuple[str, ...] | list[str]) -> Problem:
    change = did_you_mean(path[-1], known) if known else "remove it; docs/registries.md lists all"
    separator = "." if " " in origin else " "
    where = f"{origin}{separator}{'.'.join(path)}"
    return Problem("FETCH-109", where, "is not a key of the policy file", change)
