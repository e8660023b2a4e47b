"""All that is wrong with the data, collected in one pass."""

from __future__ import annotations

from collections.abc import Iterable

from tuning.data.formats import Shape
from tuning.errors import DataError, Problem

LIMIT = 10_000


def mixed(where: str, shape: Shape, first: str, known: Shape) -> Problem:
    """The file or row at `where` is of another shape than what came first."""
    what = (
        f"is of shape {shape.name} ({shape.reason}), but {first} is of shape "
        f"{known.name} ({known.reason})"
    )
    change = "train on one shape at a time: give every file the same columns"
    return Problem("DATA-215", where, what, change)


class Problems:
    """Collects problems until the data is read, or until there are so many that reading stops."""

    def __init__(self) -> None:
        self._found: list[Problem] = []

    def __len__(self) -> int:
        return len(self._found)

    def extend(self, problems: Iterable[Problem]) -> None:
        """Note several problems."""
        for problem in problems:
            self.add(problem.code, problem.where, problem.what, problem.change)

    def to_json(self) -> list[list[str]]:
        """For the answer of a child; `from_json` is the way back."""
        return [[p.code, p.where, p.what, p.change] for p in self._found]

    def add(self, code: str, where: str, what: str, change: str) -> None:
        """Note one problem. Raises DataError with all of them once there are LIMIT."""
        self._found.append(Problem(code, where, what, change))
        if len(self._found) >= LIMIT:
            what = f"stopped reading after {LIMIT} problems"
            self._found.append(Problem("DATA-299", where, what, "repair these first"))
            self.raise_all()

    def raise_all(self, more: Iterable[Problem] = ()) -> None:
        """Raise DataError if there is any problem."""
        self._found += more
        if self._found:
            raise DataError(self._found)
