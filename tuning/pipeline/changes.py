"""What differs between the recipe of the adapter that is there and the one that replaces it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuning import files
from tuning.plan import Recipe
from tuning.spec.writer import plain

SHOWN = 40  # characters of a value


def changed(adapter: Path, recipe: Recipe) -> list[str]:
    """The changes from the recipe of the finished adapter in `adapter` to `recipe`.

    Empty where there is no adapter of another recipe.
    """
    try:
        before = files.read_json(adapter / "tuning.json")["recipe"]
        return list(_changes("", dict(before), plain(recipe.to_json())))
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _changes(above: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changes(f"{above}{name}.", old, new)
        elif old != new:
            hashes = name in ("data", "base_revision")
            values = "" if hashes else f" {_short(old)} -> {_short(new)}"
            found.append(f"{above}{name}{values}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
