"""The shape of a Workspace: known keys and types. Turns pydantic's errors into problems."""

from __future__ import annotations

import copy
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from tuning.spec.documents import Document
from tuning.spec.findings import Findings, Path, did_you_mean, nearest, shown, spelled
from tuning.spec.workspace import Workspace

_HINTS = {  # mistakes that no spelling distance finds
    "spec": 'a Workspace has no "spec": move what is under it to the top level',
    "volume": 'write "volumeSource"',
    "url": 'write "urls", a list',
    "data": "a Workspace has no data; a ConfigMap is a document of its own, after a line ---",
    "model": 'write "preset", with the name of the model below it',
}
_MISSING: dict[Path, str] = {  # KAITO's names of what is missing
    ("tuning", "preset"): "missing field(s): tuning.Preset",
    ("tuning", "method"): "missing field(s): tuning.Method",
}
_EXPECTED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


# Placeholders for missing values, so that the rules can find further problems.
_FILL: dict[str, Any] = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "x"},
    "preset": {"name": "x"},
    "name": "x",
    "method": "lora",
    "key": "x",
    "operator": "In",
}
_ROUNDS = 8


def read(document: Document) -> Workspace | None:
    """The Workspace in `document`; problems go to its findings.

    Where there are problems it is a repaired copy, good only for finding more of them, or None.
    """
    document.value = without_nulls(document.value)
    value, findings = document.value, document.findings
    for round_ in range(_ROUNDS):
        try:
            return Workspace.model_validate(value)
        except ValidationError as error:
            value = copy.deepcopy(value)
            errors = error.errors(include_url=False)
        for each in errors:
            path = tuple(each["loc"])
            if round_ == 0 or not (findings.blames(path) or findings.blamed_above(path)):
                _explain(each["type"], path, each.get("input"), each.get("ctx") or {}, findings)
        # From the end, so that removing an item of a list keeps the index of the others.
        for each in reversed(errors):
            _repair(value, tuple(each["loc"]), each["type"], findings)
    return None


def _repair(value: Any, path: Path, kind: str, findings: Findings) -> None:
    """Remove the wrong value at `path`, fill in a missing one, or correct a misspelt key."""
    *above, last = path
    for part in above:
        value = value[part]
    if kind == "missing":
        value[last] = copy.deepcopy(_FILL.get(str(last)))
        return
    content = value.pop(last)
    if kind == "extra_forbidden":
        meant = nearest(str(last), _known_keys(path[:-1]))
        if meant and meant not in value:
            value[meant] = content
            findings.rename(path, (*above, meant))


def without_nulls(value: Any) -> Any:
    """`value` without keys that hold null, which mean absent in Kubernetes."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _explain(
    kind: str, path: Path, value: Any, context: dict[str, Any], findings: Findings
) -> None:
    """Add one of pydantic's errors, of this kind and context, to `findings`."""
    name = str(path[-1]) if path else ""
    if kind == "extra_forbidden":
        change = _HINTS.get(name) or did_you_mean(name, _known_keys(path[:-1]))
        findings.add("SPEC-111", path, "unknown key", change)
    elif kind == "missing":
        what = _MISSING.get(path, f"missing field(s): {spelled(path)}")
        findings.add("SPEC-112", path, what, f'add "{name}"')
    elif kind == "literal_error":
        options = _literals(path)
        hint = nearest(value, options) if isinstance(value, str) else None
        change = f"use {' or '.join(options)}" + (f"; did you mean {hint}?" if hint else "")
        findings.add("SPEC-104", path, f"is {shown(value)}", change)
    elif kind in ("greater_than_equal", "less_than_equal"):
        bound = f"least {context['ge']}" if "ge" in context else f"most {context['le']}"
        findings.add("SPEC-104", path, f"is {shown(value)}", f"write a number of at {bound}")
    else:
        expected = _EXPECTED.get(kind, "something else")
        scalar = expected == "a string" and not isinstance(value, (list, dict))
        quotes = ", in quotes" if scalar else ""
        findings.add(
            "SPEC-113", path, f"is {shown(value)}, expected {expected}", f"write {expected}{quotes}"
        )


def _model_at(path: Path) -> type[BaseModel] | None:
    """The model of the value at `path`."""
    model: type[BaseModel] | None = Workspace
    for part in path:
        if isinstance(part, int):
            continue
        fields = {f.alias: f.annotation for f in model.model_fields.values()} if model else {}
        model = _model_in(fields.get(part))
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inside = (_model_in(each) for each in get_args(annotation))
    return next((each for each in inside if each is not None), None)


def _known_keys(path: Path) -> list[str]:
    model = _model_at(path)
    return [f.alias or name for name, f in model.model_fields.items()] if model else []


def _literals(path: Path) -> list[str]:
    model = _model_at(path[:-1])
    fields = {f.alias: f.annotation for f in model.model_fields.values()} if model else {}
    return [str(option) for option in get_args(fields.get(str(path[-1])))]
