"""The table of configuration keys, read from `configs/keys.yaml`, and its page in `docs/`."""

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

    @property
    def allowed(self) -> str:
        """The allowed values, for messages."""
        return " or ".join(self.values) or f"a value that matches {self.pattern}"

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
            name, tuple(row.get("values", ())), row["default"], row["doc"], row.get("pattern", "")
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
    installed = _PACKAGE / "configs" / "keys.yaml"  # in a wheel
    path = installed if installed.exists() else _PACKAGE.parent / "configs" / "keys.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    table: dict[str, Any] = yaml.load(path.read_bytes(), Loader=loader)  # noqa: S506 a safe loader
    return table


_HEAD = """\
# Configuration keys

<!-- Written by `make docs` from configs/keys.yaml; a test compares. -->

`tuning.config` names a ConfigMap with the key `training_config.yaml`. Nothing in it is needed: what
is not set, the plan derives, and `python -m tuning plan` prints each number with its reason. The
ConfigMap stands in the same file as the Workspace, after a line `---`. The names
`lora-params-template` and `qlora-params-template` mean "all defaults" and need no ConfigMap.

Null is "not set" everywhere. The values of KAITO's templates count as not set, too, so that a
copied template does not switch off sizing, packing or checkpoints. That holds for the pair `r: 8`
and `lora_alpha: 8` as well: for an adapter of rank 8, write `r: 8` with another alpha, such as 16.

| use | meaning |
|---|---|
| honoured | sets what its name says |
| translated | has its effect under another name or in another form; the run prints a note |
| ignored | has no effect; the run prints the reason, unless the value is the usual one |
| refused | stops the run before it starts, because ignoring it would change what you get |

An unknown key or section is an error that names the nearest known one.
"""


def page() -> str:
    """The text of docs/config-keys.md."""
    parts = [_HEAD]
    for section, rows in sections().items():
        parts.append(f"\n## {section}\n\n| key | use | type | not set, or silent | meaning |")
        parts.append("|---|---|---|---|---|")
        parts += [_row(key) for key in rows.values()]
    parts.append(
        "\n## Annotations\n\n`metadata.annotations` of the Workspace, for what concerns the"
    )
    parts.append("cluster and the push. Every other `tuning.kaito.sh/` annotation is refused.\n")
    parts.append("| annotation | values | default | meaning |\n|---|---|---|---|")
    for a in our_annotations().values():
        values = ", ".join(f"`{value}`" for value in a.values) or f"`{a.pattern}`"
        parts.append(f"| `tuning.kaito.sh/{a.name}` | {values} | `{a.default}` | {a.text} |")
    return "\n".join(parts) + "\n"


def _row(key: Key) -> str:
    silent = ", ".join(f"`{_yaml(value)}`" for value in key.unset if value is not None)
    text = key.text[:1].upper() + key.text[1:]
    if key.change:
        text += f". Change: {key.change}"
    extension = " (ours)" if key.extension else ""
    cells = [f"`{key.name}`{extension}", key.use, _type(key), silent, f"{text.rstrip('.')}."]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(key: Key) -> str:
    if key.values:
        return ", ".join(f"`{value}`" for value in key.values)
    names = {"count": "whole number", "numbers": "whole numbers", "switch": "true, false"}
    bounds = [
        f"{sign} {bound:g}" if bound < 1e6 else f"{sign} {bound:,.0f}"
        for sign, bound in ((">", key.above), ("≥", key.min), ("<", key.below), ("≤", key.max))
        if bound is not None
    ]
    kind = names.get(key.type, key.type)
    return f"{kind} {', '.join(bounds)}".strip()


def _yaml(value: Any) -> str:
    if value == "no":
        return '"no"'
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n")
    return text.removesuffix("...").strip()
