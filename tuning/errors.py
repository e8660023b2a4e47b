"""Every error a person can meet.

TuningError
├── UsageError         2   the command line is wrong                        USE- SERVE-
├── DataError         10   the data is unusable                                  DATA-nnn
├── SpecError         11   spec or config wrong, or nothing fits  SPEC- PLAN- MODEL- IMAGE- SERVE-
├── RefusedError      12   a registry, hub or data host refused           FETCH-, HUB-, REG-, SIGN-
├── DivergedError     13   loss, gradient or weight became non-finite            TRAIN-nnn
├── OutOfMemoryError  14   out of memory after the automatic fallbacks           TRAIN-nnn
├── TransientError    20   network, 5xx, disk full, run directory locked, hang   any room's
├── Stopped           75   SIGTERM or SIGINT, with the state saved               RUN-nnn
└── Killed           128+  a child was killed from outside, by that signal       RUN-nnn

An error carries one or more problems, because a person wants to see all of them in one pass:

    raise SpecError.at("SPEC-104", "tuning.method", 'is "lorra"', 'use "lora" or "qlora"')

prints as `SPEC-104 tuning.method: is "lorra". Change: use "lora" or "qlora".`
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Self

SHOWN_PER_CODE = 20

# Exit code -> the reason of a condition, and the codes that are worth another try. A contract.
REASONS = {
    0: "Succeeded",
    1: "InternalError",
    2: "UsageError",
    10: "DataUnusable",
    11: "SpecInvalid",
    12: "AccessRefused",
    13: "TrainingDiverged",
    14: "OutOfMemory",
    20: "TransientFailure",
    75: "Stopped",
}
RETRYABLE = frozenset({20, 75})


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a stable code, the place, what is wrong there, what to change."""

    code: str
    where: str
    what: str
    change: str

    def __str__(self) -> str:
        what, change = self.what.rstrip(" ."), self.change.rstrip(" .")
        where = f" {self.where}" if self.where else ""
        return printable(redact(f"{self.code}{where}: {what}. Change: {change}."))


class TuningError(Exception):
    """Base of the tree: catch it at an entry point, print it, leave with `exit_code`."""

    exit_code: int = 1

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(str(self))

    @classmethod
    def at(cls, code: str, where: str, what: str, change: str) -> Self:
        """The error of a single problem."""
        return cls([Problem(code, where, what, change)])

    def __str__(self) -> str:
        lines, counts = [], dict.fromkeys((p.code for p in self.problems), 0)
        for problem in self.problems:
            counts[problem.code] += 1
            if counts[problem.code] <= SHOWN_PER_CODE:
                lines.append(str(problem))
        hidden = {code: n - SHOWN_PER_CODE for code, n in counts.items() if n > SHOWN_PER_CODE}
        lines += [f"{code}: the same in {n} more places." for code, n in hidden.items()]
        return "\n".join(lines)

    def report(self) -> dict[str, Any]:
        """For a program that reads --json: exit code, reason, and each problem; safe to show."""
        problems = [
            {"code": p.code, "where": p.where, "message": p.what, "hint": p.change}
            for p in self.problems
        ]
        return {
            "exit_code": self.exit_code,
            "reason": REASONS.get(self.exit_code, "Killed"),
            "problems": [
                {name: printable(redact(text)) for name, text in each.items()} for each in problems
            ],
        }

    def to_json(self) -> dict[str, Any]:
        """For a child process's result file; `from_json` is the way back."""
        return {"exit_code": self.exit_code, "problems": [asdict(p) for p in self.problems]}


class UsageError(TuningError):
    """The command line is wrong."""

    exit_code = 2


# The extra of a library that is not of `train`, by what is imported
_EXTRAS = {
    **dict.fromkeys(("starlette", "uvicorn", "h11"), "serve"),
    **dict.fromkeys(("kubernetes", "prometheus_client"), "cluster"),
    "gguf": "gguf",
}


def not_installed(error: ModuleNotFoundError) -> UsageError:
    """What to tell of a library that a command needs; a missing module of ours is a bug."""
    name = (error.name or "tuning").partition(".")[0]
    if name in ("tuning", "jobs"):
        raise error
    what = f"this command needs {name}, which is not installed"
    change = f"pip install 'tuning-jobs[{_EXTRAS.get(name, 'train')}]', or make install"
    return UsageError.at("USE-102", "", what, change)


class DataError(TuningError):
    """The data is unusable: the same data will fail again."""

    exit_code = 10


class SpecError(TuningError):
    """The spec or config is wrong, or nothing fits the GPU."""

    exit_code = 11


class RefusedError(TuningError):
    """A registry, hub or data host said no, and would say it again."""

    exit_code = 12


class DivergedError(TuningError):
    """Training produced a non-finite loss, gradient or weight."""

    exit_code = 13


class OutOfMemoryError(TuningError):
    """Out of memory although everything that saves memory was tried."""

    exit_code = 14


class TransientError(TuningError):
    """Worth another try: network, server errors, a full disk, a locked run directory, a hang."""

    exit_code = 20


class Stopped(TuningError):
    """Stopped by a signal, state saved: the same command goes on."""

    exit_code = 75


class Killed(TuningError):
    """A child process was killed from outside; the code is the shell's, 128 + signal."""

    def __init__(self, problems: Iterable[Problem], *, signal: int = 9) -> None:
        super().__init__(problems)
        self.exit_code = 128 + signal


_BY_EXIT_CODE: dict[int, type[TuningError]] = {
    kind.exit_code: kind
    for kind in (
        UsageError,
        DataError,
        SpecError,
        RefusedError,
        DivergedError,
        OutOfMemoryError,
        TransientError,
        Stopped,
    )
}


def from_json(record: dict[str, Any]) -> TuningError:
    """The error that a child process wrote with `to_json`."""
    kind = _BY_EXIT_CODE.get(record["exit_code"], TuningError)
    return kind(Problem(**problem) for problem in record["problems"])


_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<userinfo>[^\s/@'\"<>]*@)?"
    r"(?P<rest>[^\s?#'\"<>]*)(?P<query>\?[^\s#'\"<>]*)?"
)


def printable(text: str) -> str:
    """`text` with every character that a terminal would obey, or not show, written as an escape.

    Names and answers of other people's servers and files may hold ESC, direction marks or lone
    surrogates. Line feeds and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _LAYOUT else _escape(c) for c in text)


_LAYOUT = frozenset("\n\t\u00a0\u202f\u3000")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def redact(text: str) -> str:
    """`text` with the user info and the query of every URL in it taken out."""

    def clean(match: re.Match[str]) -> str:
        query = "?<redacted>" if match["query"] else ""
        return f"{match['scheme']}{match['rest']}{query}"

    return _URL.sub(clean, text)
