"""Problems and notes of a document, collected so that all are reported in one pass."""

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
    """Problems and notes of one document. `lines` maps paths to lines of the file."""

    def __init__(self, lines: dict[Path, int], *, prefix: str = "") -> None:
        self.lines, self.prefix = lines, prefix
        self.named: dict[Path, str] = {}  # paths that the command line wrote -> what it said
        self.notes: list[str] = []
        self._found: list[tuple[Path, Problem]] = []

    def add(self, code: str, path: Path, what: str, change: str) -> None:
        """Add a problem at `path`."""
        self._found.append((path, Problem(code, "", what, change)))

    def take(self, path: Path, error: TuningError) -> None:
        """Add all problems of `error`, which have places of their own, at `path`."""
        self._found += [(path, problem) for problem in error.problems]

    def note(self, path: Path, text: str) -> None:
        """Add a note about `path`; it is not a problem."""
        self.notes.append(f"{self.named.get(path) or self.prefix + spelled(path)}: {text}")

    def blames(self, path: Path) -> bool:
        """Whether there is a problem at `path` or below."""
        return any(each[: len(path)] == path for each, _ in self._found)

    def blamed_above(self, path: Path) -> bool:
        """Whether there is a problem at `path` or above."""
        return any(path[: len(each)] == each for each, _ in self._found)

    def rename(self, old: Path, new: Path) -> None:
        """Give `new` and what is below it the lines of `old`."""
        moved = {p: n for p, n in self.lines.items() if p[: len(old)] == old}
        self.lines.update({(*new, *p[len(old) :]): n for p, n in moved.items()})

    def in_order(self) -> list[Problem]:
        """The problems in the order of their lines, each with its place."""
        ordered = sorted(self._found, key=lambda pair: self._line(pair[0]))
        return [p if p.where else replace(p, where=self._where(path)) for path, p in ordered]

    def _where(self, path: Path) -> str:
        if path in self.named:
            return self.named[path]
        line = self._line(path)
        return f"{self.prefix}{spelled(path)}" + (f" (line {line})" if line else "")

    def _line(self, path: Path) -> int:
        """The line of `path`, or of its nearest parent with one; else 0."""
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
    """A user's value, to follow "is" in a message."""
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
            return "not a finite number" if not math.isfinite(value) else f"{value:g}"
        case int() if abs(value) > 1 << 64:
            return "a huge number"
        case _:
            return str(value)


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The one of `options` that `name` was probably meant to be."""
    by_lower = {option.lower(): option for option in options}
    typed = name.lower()[: 4 * _SHOWN]
    close = difflib.get_close_matches(typed, by_lower, n=1, cutoff=0.6)
    if not close and len(typed) > 3:
        close = [low for low in by_lower if typed in low or (len(low) > 3 and low in typed)][:1]
    return by_lower[close[0]] if close else None


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The change for an unknown `name`: the nearest of `options`, or all of them."""
    options = list(options)
    if meant := nearest(name, options):
        return f'did you mean "{meant}"? Otherwise remove it'
    return f"remove it; known here: {', '.join(options)}"
