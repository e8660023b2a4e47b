"""The table of configuration keys, read from `configs/keys.yaml`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

Use = Literal["honoured", "translated", "ignored", "refused"]

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Key:
    """One key of one section, and its effect."""

    section: str
    name: str
    use: Use
    text: str  # its meaning, how it is translated, or why it is ignored or refused
    change: str = ""  # refused: what to do about it
    setting: str | None = None  # the field of Settings that it sets
    type: str = ""
    values: tuple[str, ...] = ()  # of a choice
    unset: tuple[Any, ...] = ()  # values that count as not set, or get no note
    above: float | None = None
    min: float | None = None
    below: float | None = None
    max: float | None = None
    map: Mapping[Any, Any] | None = None  # translated: value -> value of the setting
    extension: bool = False  # ours: neither KAITO nor the libraries have it


@dataclass(frozen=True)
class Annotation:
    """One annotation `tuning.kaito.sh/<name>`."""

    name: str
    values: tuple[str, ...]
    default: str
    text: str
    pattern: str = ""  # in place of values: what the whole value must match
    form: str = ""  # the pattern in words, for messages

    @property
    def allowed(self) -> str:
        """The allowed values, for messages."""
        return self.form or " or ".join(self.values) or f"a value that matches {self.pattern}"

    def allows(self, value: str) -> bool:
        """Whether `value` is allowed."""
        return value in self.values if self.values else bool(re.fullmatch(self.pattern, value))


def same(one: Any, other: Any) -> bool:
    """Equality as a YAML author sees it: 1 is 1.0, but true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)


@cache
def sections() -> dict[str, dict[str, Key]]:
    """Section -> name -> key, in the order of the file."""
    return {
        section: {key.name: key for key in _keys(section, uses)}
        for section, uses in _table()["sections"].items()
    }


@cache
def our_annotations() -> dict[str, Annotation]:
    """Our annotations by name, without the prefix."""
    return {
        name: Annotation(
            name,
            tuple(row.get("values", ())),
            row["default"],
            row["doc"],
            row.get("pattern", ""),
            row.get("form", ""),
        )
        for name, row in _table()["annotations"].items()
    }


def _keys(section: str, uses: dict[str, Any]) -> Iterator[Key]:
    for name, row in uses["honoured"].items():
        yield _key(section, name, "honoured", row["doc"], row)
    for name, row in uses["translated"].items():
        yield _key(section, name, "translated", row["how"], row)
    for use in ("ignored", "refused"):
        for group in uses[use]:
            for name, silent in group["keys"].items():
                is_list = isinstance(silent, dict) and "silent" in silent
                unset = tuple(silent["silent"]) if is_list else (silent,)
                change = group.get("change", "")
                yield Key(section, name, use, group["why"], change=change, unset=unset)


def _key(section: str, name: str, use: Use, text: str, row: dict[str, Any]) -> Key:
    rest = {
        k: row[k] for k in ("type", "above", "min", "below", "max", "map", "extension") if k in row
    }
    values, unset = tuple(row.get("values", ())), tuple(row.get("unset", ()))
    return Key(section, name, use, text, setting=row.get("as"), values=values, unset=unset, **rest)


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = data("keys.yaml")
    return table


def data(name: str) -> Any:
    """The content of the YAML or JSON file `name` of `configs/`."""
    installed = _PACKAGE / "configs"  # in a wheel
    path = (installed if installed.exists() else _PACKAGE.parent / "configs") / name
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_bytes(), Loader=loader)  # noqa: S506 a safe loader
