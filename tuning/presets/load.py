"""The YAML tables in `configs/`: where they are, and a strict reader for their records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tuning.errors import Problem, SpecError

# The C parser reads the same language as yaml.safe_load, ten times as fast.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def configs_folder(package: Path) -> Path:
    """Where the tables of the code in `package` are: inside it in a wheel, else beside it."""
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


CONFIGS = configs_folder(Path(__file__).resolve().parents[1])


def table(path: Path) -> Any:
    """The YAML value in the file at `path`."""
    # Both loaders are the safe ones.
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)  # noqa: S506


@cache
def entries() -> tuple[dict[str, Any], ...]:
    """The records of `configs/presets` with their family, the name of the file they are in."""
    return tuple(
        {"family": path.stem, **entry}
        for path in sorted((CONFIGS / "presets").glob("*.yaml"))
        for entry in table(path)
    )


@cache
def examined(name: str) -> dict[str, Any]:
    """What `configs/memory` holds of the preset `name`; empty for one without a file."""
    path = CONFIGS / "memory" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def record(
    value: Any,
    *,
    where: str,
    required: Mapping[str, type],
    optional: Mapping[str, type] | None = None,
) -> dict[str, Any]:
    """`value` as a mapping with exactly these keys, each of its type; an absent one is None.

    Raises SpecError with every missing, unknown or mistyped key.
    """
    kinds = {**required, **(optional or {})}
    if not isinstance(value, dict):
        raise SpecError.at("SPEC-301", where, "is not a mapping", f"give it {', '.join(kinds)}")
    problems = [
        Problem("SPEC-301", f"{where}.{key}", "is not a known key", f"use {', '.join(kinds)}")
        for key in value
        if key not in kinds
    ]
    for key, kind in kinds.items():
        item = value.get(key)
        if item is None and key in required:
            problems.append(Problem("SPEC-301", f"{where}.{key}", "is missing", "add it"))
        elif item is not None and not _is(item, kind):
            problems.append(
                Problem("SPEC-301", f"{where}.{key}", f"is {item!r}", f"write a {kind.__name__}")
            )
    if problems:
        raise SpecError(problems)
    return {key: value.get(key) for key in kinds}


def _is(value: Any, kind: type) -> bool:
    """isinstance, but a bool is not a number, and an int is a float."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
