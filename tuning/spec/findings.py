"""What is wrong with a document, collected so that a person sees all of it in one pass."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tuning.errors import Problem, TuningError

Path = tuple[str | int, ...]
_SHOWN = 60  # characters of a user's value in a message


class Findings:
    """Problems and notes of one document. `lines` knows where each path stands in the file."""

    def __init__(self, lines: dict[Path, int], *, prefix: str = "") -> None:
        self.lines, self.prefix = lines, prefix
        self.notes: list[str] = []
        self._found: list[tuple[Path, Problem]] = []

    def add(self, code: str, path: Path, what: str, change: str) -> None:
        """One more problem at `path`."""
        self._found.append((path, Problem(code, "", what, change)))

    def take(self, path: Path, error: TuningError) -> None:
        """All problems of `error`, which know their place themselves, at `path`."""
        self._found += [(path, problem) for problem in error.problems]

    def note(self, path: Path, text: str) -> None:
        """Something a person should know, though nothing is wrong."""
        self.notes.append(f"{self.prefix}{spelled(path)}: {text}")

    def blames(self, path: Path) -> bool:
        """True if something is wrong at `path` or below: what is missing there may follow."""
        return any(each[: len(path)] == path for each, _ in self._found)

    def blamed_above(self, path: Path) -> bool:
        """True if something is wrong with what holds `path`."""
        return any(path[: len(each)] == each for each, _ in self._found)

    def rename(self, old: Path, new: Path) -> None:
        """From now on, what stands at `old` is spoken of as `new`, in the lines where it is."""
        moved = {p: n for p, n in self.lines.items() if p[: len(old)] == old}
        self.lines.update({(*new, *p[len(old) :]): n for p, n in moved.items()})

    def in_order(self) -> list[Problem]:
        """The problems in the order of their lines, each with its place."""
        found = sorted(self._found, key=lambda pair: self._line(pair[0]))
        return [p if p.where else replace(p, where=self._where(path)) for path, p in found]

    def _where(self, path: Path) -> str:
        line = self._line(path)
        return f"{self.prefix}{spelled(path)}" + (f" (line {line})" if line else "")

    def _line(self, path: Path) -> int:
        """The line of `path`, or of the nearest thing around it; 0 if nobody knows."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return 0


def spelled(path: Path) -> str:
    """`("tuning", "input", "urls", 1)` as a person writes it: `tuning.input.urls[1]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif "." in part and part != "training_config.yaml":
            text += f"[{shorten(part)}]"
        else:
            text += f".{shorten(part)}" if text else shorten(part)
    return text


def shorten(text: str) -> str:
    """`text` on one line, at most 60 characters of it."""
    clean = "".join(c if c.isprintable() else "�" for c in text[: _SHOWN + 1])
    return clean if len(clean) <= _SHOWN else clean[: _SHOWN - 3] + "..."


def shown(value: Any) -> str:
    """A user's value in a sentence after "is"."""
    match value:
        case None:
            return "empty"
        case bool():
            return f"{str(value).lower()}, which YAML reads as yes or no"
        case str():
            return f'"{shorten(value)}"'
        case list():
            return "a list"
        case dict():
            return "a mapping"
        case float():
            return "no finite number" if not math.isfinite(value) else f"{value:g}"
        case int() if abs(value) > 1 << 64:
            return "a huge number"
        case _:
            return str(value)


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The one of `options` that `name` was probably meant to be."""
    by_lower = {option.lower(): option for option in options}
    wanted = name.lower()[: 4 * _SHOWN]
    found = difflib.get_close_matches(wanted, by_lower, n=1, cutoff=0.6)
    if not found and len(wanted) > 3:
        found = [low for low in by_lower if wanted in low or (len(low) > 3 and low in wanted)][:1]
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """What to change about an unknown `name`."""
    options = list(options)
    if found := nearest(name, options):
        return f'did you mean "{found}"? Otherwise remove it'
    return f"remove it; known here: {', '.join(options)}"
